"""Runs on the hosts of a hostfile, through programs in place of ssh and pdsh that run everything on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
from launch_runs import ROOT, assert_same_curve, has_step
from torch.distributed.run import parse_args

from retemper.engine.errors import UserError
from retemper.tools.ssh_launch import node, session, transport
from retemper.tools.ssh_launch.hostfile import Host, parse_line, read_hostfile, read_hosts
from retemper.tools.ssh_launch.job import Settings, forwarded
from retemper.tools.ssh_launch.session import require_hosts, run_session
from retemper.tools.ssh_launch.transport import TRANSPORTS, Pdsh, Ssh

FAKES = {
    "ssh": """#!/bin/bash
        while [[ $1 == -* ]]; do shift 2; done
        host=$1; shift""",
    "pdsh": """#!/bin/bash
        [[ $1 == -S && $2 == -N && $3 == -R && $5 == -w ]] || exit 9
        host=$6; shift 6""",
}
"""As ssh does, they join the words after the host, and give them to a shell."""
HOSTS = [Host("127.0.0.1", 1), Host("localhost", 1)]


@pytest.fixture
def fakes(tmp_path, monkeypatch) -> Path:
    """Put programs called ssh and pdsh first on PATH; the host ``down`` does not answer."""
    folder = tmp_path / "bin"
    folder.mkdir()
    refuse = '[[ $host == down ]] && { echo "ssh: connect to host down port 22: No route to host" >&2; exit 255; }'
    for name, start in FAKES.items():
        (folder / name).write_text(f'{start}\n{refuse}\nexec sh -c "$*"\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def settings_of(tmp_path: Path, program: str, *arguments: str, **more) -> Settings:
    """Settings whose jobs run a Python program instead of torchrun."""

    class Plain(Settings):
        def torchrun(self, number: int) -> list[str]:
            return [sys.executable, "-c", program, self.hosts[number].name, *arguments]

    return Plain(**{"hosts": HOSTS, "program": Path(program), "arguments": arguments, "python": sys.executable,
                    "folder": tmp_path, "environment": {}, "grace": 1, **more})  # fmt: skip


# Hostfiles


def test_hostfiles_of_deepspeed_open_mpi_and_mpich(tmp_path):
    path = tmp_path / "hosts"
    path.write_text(
        "# the cluster\nnode0 slots=8\n\nnode1.rack-2.example slots = 4 max_slots=8  # slower\n"
        "me@10.0.0.3:2\nnode4 max_slots=2\n"
    )
    assert read_hostfile(path) == [
        Host("node0", 8), Host("node1.rack-2.example", 4), Host("me@10.0.0.3", 2), Host("node4", None)
    ]  # fmt: skip
    assert read_hosts(str(path)) == ["node0", "node1.rack-2.example", "10.0.0.3", "node4"]
    assert read_hosts("a:22,b") == ["a:22", "b"]


@pytest.mark.parametrize("line", ["node0 slots=0", "node0 slots=x", "node0 8", "slots=8", "node0;reboot", "-v"])
def test_lines_that_are_no_hosts(line):
    with pytest.raises(UserError, match=r"^hosts:3: "):
        parse_line(line, "hosts:3")


def test_hostfiles_that_cannot_be_used(tmp_path):
    path = tmp_path / "hosts"
    for text, part in (("", "no host"), ("a\na slots=2\n", "a occurs twice"), ("\xff", "hosts:1")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=part):
            read_hostfile(path)
    with pytest.raises(UserError, match="No such file"):
        read_hostfile(tmp_path / "none")


# Jobs


def test_torchrun_understands_the_command_line():
    arguments = ["--config", "my run.yaml", "--data.train", "[{path: 'a b'}]", "--seed=1"]
    hosts = [Host("me@node0", 8), Host("node1")]
    settings = Settings(hosts, Path("/p/pretrain.py"), arguments, sys.executable, Path("/w"), {}, max_restarts=2)
    first, second = (parse_args(settings.torchrun(number)[2:]) for number in (0, 1))
    assert (first.nnodes, first.nproc_per_node, second.nproc_per_node) == ("2", "8", "gpu")
    assert first.rdzv_endpoint == second.rdzv_endpoint == "node0:29400" and first.rdzv_id == second.rdzv_id
    assert (first.local_addr, second.local_addr) == ("node0", "node1") and first.max_restarts == 2
    assert "is_host=true" in first.rdzv_conf and "is_host=false" in second.rdzv_conf
    assert (first.training_script, first.training_script_args) == ("/p/pretrain.py", arguments)


def test_the_variables_that_hosts_get():
    here = {"NCCL_DEBUG": "INFO", "HF_HOME": "/h", "PATH": "/bin", "OMP_NUM_THREADS": "4", "EDITOR": "vi", "X": "1"}
    assert forwarded(here, ["X"]) == {name: value for name, value in here.items() if name != "EDITOR"}
    for name in ("NONE", "A=b"):
        with pytest.raises(UserError, match=f"--export {name}"):
            forwarded(here, [name])


AWKWARD = 'it\'s "$HOME" `id` %h a\\b;\n\t*? é'


@pytest.mark.parametrize("kind", [Ssh, Pdsh])
def test_words_and_variables_arrive_unchanged(kind, fakes, tmp_path, monkeypatch):
    folder = tmp_path / "it's a folder $x"
    folder.mkdir()
    seen = "sys.argv[1:], os.getcwd(), os.environ.get('A'), os.environ.get('A_TOKEN')"
    show = f"import json, os, sys; print(json.dumps([{seen}]))"
    settings = settings_of(folder, show, AWKWARD, environment={"A": AWKWARD, "A_TOKEN": "secret"})
    # The interpreter may also lie in such a folder.
    python = tmp_path / "a 'python'"
    python.symlink_to(sys.executable)
    started = kind().start(HOSTS[0], str(python), settings.job(0))
    command = json.dumps(started.args)
    assert started.stdout is not None
    token = None if kind is Pdsh else "secret"
    assert json.loads(started.stdout.read()) == [["127.0.0.1", AWKWARD], str(folder), AWKWARD, token]
    assert started.wait() == 0 and "secret" not in command
    assert kind().withheld(settings.job(0)) == (["A_TOKEN"] if kind is Pdsh else [])


# Ends

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(1000)
"""
POLITE = """
import signal, sys, time
def end(*_):
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(1000)
"""


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("request_", ["TERM", "KILL", "the connection breaks"])
def test_a_job_that_does_not_end_is_killed_with_what_it_has_started(request_, fakes, tmp_path):
    ssh, job = Ssh(), settings_of(tmp_path, STUBBORN).job(0) | {"grace": 0.5}
    started = ssh.start(HOSTS[0], sys.executable, job)
    assert started.stdout is not None and started.stdin is not None
    below = int(started.stdout.readline())
    assert is_running(below)
    if request_ == "the connection breaks":
        started.stdin.close()
    else:
        ssh.signal(HOSTS[0], sys.executable, job, started, request_)
    assert started.wait(timeout=20) == 128 + signal.SIGKILL
    assert not is_running(below)


def test_a_job_that_pdsh_started_is_ended_by_its_number(fakes, tmp_path):
    pdsh, settings = Pdsh(), settings_of(tmp_path, POLITE)
    job = settings.job(0)
    started = pdsh.start(HOSTS[0], sys.executable, job)
    assert started.stdout is not None and started.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 20
    while not node._pid_path(job["id"]).exists():  # written just after the job has started
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pdsh.signal(HOSTS[0], sys.executable, job, started, "TERM")
    assert started.wait(timeout=20) == 0 and started.stdout.read() == b"saved\n"
    assert not node._pid_path(job["id"]).exists() and node.send_signal(job["id"], "TERM") == 1


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_host_that_fails_ends_the_others(name, fakes, tmp_path, capfdbinary):
    fail = "    time.sleep(1); print('bad disk'); sys.exit(7)"
    fail = f"import sys, time\nif sys.argv[1] == 'localhost':\n{fail}\n{POLITE}"
    assert run_session(settings_of(tmp_path, fail, grace=20), TRANSPORTS[name](), tmp_path / "logs") == 7
    said = capfdbinary.readouterr()
    assert said.out == b"ready\nsaved\n" == (tmp_path / "logs" / "127.0.0.1.log").read_bytes()
    assert (tmp_path / "logs" / "localhost.log").read_bytes() == b"bad disk\n"
    assert b"localhost: exit status 7\nbad disk\n" in said.err


def test_the_end_of_all_hosts_is_waited_for(fakes, tmp_path):
    later = "import sys, time; time.sleep(0.5 * (sys.argv[1] == 'localhost')); print('done')"
    assert run_session(settings_of(tmp_path, later), Ssh(), tmp_path / "logs") == 0
    assert {path.read_text() for path in (tmp_path / "logs").iterdir()} == {"done\n"}


def test_hosts_that_cannot_be_used_have_a_line_each(fakes, tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text("")
    hosts = [Host("down"), Host("127.0.0.1")]
    settings = Settings(hosts, program, [], sys.executable, tmp_path, {})
    with pytest.raises(UserError, match="down: ssh: connect to host down port 22: No route to host; ") as error:
        require_hosts(settings, Ssh())
    assert len(error.value.args) == 1
    require_hosts(Settings(hosts[1:], program, [], sys.executable, tmp_path, {}), Ssh())
    program.unlink()
    with pytest.raises(UserError, match=r"127\.0\.0\.1: a file or folder is missing") as error:
        require_hosts(settings, Pdsh())
    assert len(error.value.args) == 2
    monkeypatch.setattr(session, "_CHECK_SECONDS", 0.2)
    (fakes / "ssh").write_text("#!/bin/bash\nexec sleep 10\n")
    with pytest.raises(UserError, match="no answer within"):
        require_hosts(settings, Ssh())
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="the program ssh is not installed here"):
        require_hosts(settings, Ssh())


# The whole


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_run_on_two_hosts_is_stopped_and_continued(name, fakes, run_file, undisturbed, tmp_path):
    folder, hostfile = tmp_path / "run", tmp_path / "hosts"
    hostfile.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    command = [sys.executable, ROOT / "launch" / "over_ssh.py", "--hostfile", hostfile, "--launcher", name]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command += ["--port", free.getsockname()[1]]
    command += ["--grace", "60", "--config", run_file, "--run_folder", folder]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not has_step(folder, 15):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "the same command continues from here" in process.communicate(timeout=100)[0]
    assert process.returncode == 128 + signal.SIGTERM
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert_same_curve(tiny_run.curve(folder), undisturbed)
    assert {path.name for path in (folder / "hosts").iterdir()} == {"127.0.0.1.log", "localhost.log"}
    assert done.stdout in (folder / "hosts" / "127.0.0.1.log").read_text()


def test_the_fakes_take_what_the_programs_get():
    assert transport.NODE.is_file()
    assert Ssh(["-p", "2222"]).command(HOSTS[0], "x y")[-4:] == ["-p", "2222", "127.0.0.1", "x y"]
    assert Pdsh().command(HOSTS[0], "x y") == ["pdsh", "-S", "-N", "-R", "ssh", "-w", "127.0.0.1", "x y"]
