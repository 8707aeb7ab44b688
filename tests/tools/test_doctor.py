"""Simulated failures of a machine: each is found, named with its remedy, and decides the exit status."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import namedtuple
from email.message import Message
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fake_hub import TOKEN, FakeHub
from huggingface_hub import constants
from packaging.requirements import Requirement
from tiny_run import write_config

from retemper.engine.errors import UserError
from retemper.engine.guards import rendezvous
from retemper.engine.parallel.launcher import Launcher
from retemper.tools import doctor
from retemper.tools.diagnosis import gpus, hub, machine, ranks, software
from retemper.tools.diagnosis.configuration import check_configuration
from retemper.tools.diagnosis.finding import Finding, checked, format_findings, note, ok, problem
from retemper.tools.diagnosis.tokenizer_exactness import check_tokenizer
from retemper.tools.tokenizer.handle import TokenizerHandle

ALONE, TWO = Launcher(), Launcher(rank=0, world_size=2, launched=True)
ROOT = Path(doctor.__file__).parents[1]


def one(findings: list[Finding], name: str) -> Finding:
    """The only finding of that name."""
    [found] = [finding for finding in findings if finding.name == name]
    return found


def statuses(findings: list[Finding]) -> list[str]:
    return [finding.status for finding in findings]


# The command


@pytest.mark.parametrize(("found", "status"), [([ok("A", "b", "c"), note("A", "b", "c")], 0), ([problem(*"Abcd")], 1)])
def test_a_problem_decides_the_exit_status(found, status, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_of_this_machine", lambda *_: found)
    assert doctor.main([]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "A" and len(lines) == len(found) + 3
    assert doctor.main(["--json"]) == status
    assert [Finding(**each) for each in json.loads(capsys.readouterr().out)] == found


def test_a_finding_is_a_line_with_its_remedy():
    text = format_findings([problem("Machine", "disk", "full", "free some space"), ok("Machine", "cores", "2")])
    assert [line.split() for line in text.splitlines()[1:3]] == [
        ["problem", "disk", "full;", "free", "some", "space"],
        ["ok", "cores", "2"],
    ]


def test_tasks_without_torchrun_are_a_problem(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_of_this_machine", lambda *_: [])
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert doctor.main([]) == 1 and "torchrun" in capsys.readouterr().out


def test_settings_need_a_configuration():
    with pytest.raises(UserError, match="--seed"):
        doctor.main(["--seed", "3"])


def test_this_machine_can_run_the_tests(capsys):
    assert doctor.main(["--json"]) == 0
    found = [Finding(**each) for each in json.loads(capsys.readouterr().out)]
    assert torch.__version__ in one(found, "torch" if not torch.cuda.is_available() else "gpu 0").text


# Software


class Metadata:
    """A distribution."""

    def __init__(self, *requires: str) -> None:
        self.requires = [*requires]
        self.metadata = Message()
        self.metadata["Requires-Python"] = ">=3.10"
        for extra in ("formats", "new", "dev"):
            self.metadata["Provides-Extra"] = extra


def test_missing_and_old_packages_come_with_the_command_that_installs_them(monkeypatch):
    needed = ["torch>=2.11", "numpy>=999", "no-such-package[x]>=2; python_version >= '3'"]
    needed += ["not-here-either>=3; extra == 'formats'", "numpy; extra == 'formats'", "none-yet; extra == 'dev'"]
    needed += ["numpy; extra == 'new'"]
    monkeypatch.setattr(software, "distribution", lambda name: Metadata(*needed))
    findings = software.check_software()
    assert one(findings, "torch").status == "ok"
    old, missing, extra = (one(findings, name) for name in ("numpy", "no-such-package", "extra formats"))
    assert (old.status, missing.status, extra.status) == ("problem", "problem", "note")
    assert old.remedy == f"{sys.executable} -m pip install 'numpy>=999'"
    assert missing.remedy.endswith("'no-such-package[x]>=2'") and extra.remedy.endswith("'not-here-either>=3'")
    assert one(findings, "extra new").status == "ok"
    assert "extra dev" not in {finding.name for finding in findings}


def test_a_clone_that_is_not_installed_is_noted(monkeypatch):
    def missing(name: str) -> None:
        raise software.PackageNotFoundError(name)

    monkeypatch.setattr(software, "distribution", missing)
    assert statuses(software.check_software()) == ["ok", "note"]


def test_another_python_is_refused():
    assert software._python(">=3.10", "3.9.1").status == "problem"
    assert software.lack_of(Requirement("torch>=2.11"), {"torch": "2.11.0+cu128"}) is None
    assert software.lack_of(Requirement("torch>=2.11"), {"torch": "2.10.1"}) is not None


# GPUs


@pytest.mark.parametrize(
    ("build", "driver", "status"),
    [(None, "570.1", "problem"), ("12.8", "570.1", "problem"), ("12.8", None, "note"), (None, None, "ok")],
)
def test_a_build_that_does_not_suit_the_machine(build, driver, status, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpus, "driver_version", lambda: driver)
    monkeypatch.setattr(gpus.shutil, "which", lambda name: None)
    [found] = gpus.check_gpus()
    assert found.status == status and bool(found.remedy) == (status == "problem")


class Gpu:
    """What PyTorch tells about a GPU."""

    def __init__(self, major: int, free: float) -> None:
        self.name, self.major, self.minor, self.free = "NVIDIA X", major, 0, free


def test_gpus_that_are_old_busy_or_broken(monkeypatch):
    cards = [Gpu(9, 1.0), Gpu(7, 1.0), Gpu(8, 0.5), Gpu(8, -1)]

    def memory(number: int) -> tuple[float, int]:
        if cards[number].free < 0:
            raise RuntimeError("CUDA error: uncorrectable ECC error\nencountered")
        return cards[number].free * 80 * 2**30, 80 * 2**30

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(gpus, "driver_version", lambda: "570.86.15")
    monkeypatch.setattr(gpus, "_kernels", list)
    findings = gpus.check_gpus()
    assert [finding.status for finding in findings if finding.name.startswith("gpu")] == [
        "ok",
        "note",
        "note",
        "problem",
    ]
    assert "12.8" in one(findings, "torch").text and one(findings, "nccl").text == "2.27.3"
    assert "80.0 of 80.0 GiB" in one(findings, "gpu 0").text and "ECC error encountered" in one(findings, "gpu 3").text
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert one(gpus.check_gpus(), "nccl").status == "problem"


def test_a_broken_torch_is_found(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert statuses(gpus.check_gpus()) == ["problem"]


def test_the_driver_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(gpus, "_DRIVER_FILE", tmp_path / "version")
    assert gpus.driver_version() is None
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build"
    (tmp_path / "version").write_text(line)
    assert gpus.driver_version() == "570.86.15"


# The machine


def test_folders_that_cannot_be_written_and_full_disks(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    assert machine.disk("run folder", tmp_path / "file" / "runs").status == "problem"
    assert machine.disk("run folder", tmp_path / "runs").status == "ok" and not (tmp_path / "runs").exists()
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 5e9)
    assert machine.disk("run folder", tmp_path).status == "note"
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 5e8)
    assert machine.disk("run folder", tmp_path).status == "problem"


def test_limits_of_open_files():
    found = [machine.open_files(64, hard, -1).status for hard in (64, 1024, 4096, -1)]
    assert found == ["problem", "note", "ok", "ok"]


def test_a_quota_of_cores_is_noted(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "_CPU_QUOTA", tmp_path / "cpu.max")
    assert machine._cores().status == "ok"
    (tmp_path / "cpu.max").write_text("max 100000")
    assert machine._cores().status == "ok"
    (tmp_path / "cpu.max").write_text("250000 100000")
    found = machine._cores()
    assert found.status == "note" and "OMP_NUM_THREADS to 2" in found.remedy


def test_little_memory_and_shared_memory(monkeypatch):
    small = namedtuple("Small", "f_blocks f_frsize f_flag")(64, 2**20, getattr(os, "ST_NOEXEC", 8))
    monkeypatch.setattr("retemper.engine.parallel.memory_check.device_memory", lambda device: 2**30)
    monkeypatch.setattr(machine.os, "statvfs", lambda path: small)
    assert machine._memory().status == "note"
    monkeypatch.setattr(machine, "_SHARED_MEMORY", ROOT)
    [found] = machine._shared_memory()
    assert found.status == "note" and "--shm-size" in found.remedy
    assert statuses(machine._executable(ROOT)) == ["note"]


def test_an_encoding_other_than_utf8_is_noted(monkeypatch):
    monkeypatch.setattr(machine.locale, "getpreferredencoding", lambda setting: "ANSI_X3.4-1968")
    found = machine._encoding()
    assert found.status == "note" and "PYTHONUTF8" in found.remedy


# The Hub


@pytest.fixture
def logged_in(monkeypatch, tmp_path):
    """A Hub on this machine, and the token that it knows."""
    with FakeHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server


def test_the_hub_and_the_token_are_checked_only_with_network(logged_in, monkeypatch):
    assert statuses(hub.check_hub(network=False)) == ["ok"] and logged_in.requests == []
    assert statuses(hub.check_hub(network=True)) == ["ok", "ok"]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    findings = hub.check_hub(network=True)
    assert one(findings, "token").status == "problem"
    assert "hf_wrong" not in format_findings(findings)


def test_no_token_and_no_network(logged_in, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    findings = hub.check_hub(network=True)
    assert one(findings, "token").status == "note" and one(findings, "connection").status == "problem"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert one(hub.check_hub(network=True), "offline").status == "note"


# Ranks


def test_hosts_that_answer_refuse_and_do_not_resolve():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        findings = ranks.check_hosts([f"127.0.0.1:{port}", "127.0.0.1:1", "no.such.host.invalid"])
    assert statuses(findings) == ["ok", "problem", "problem"]
    assert all(finding.remedy for finding in findings[1:])
    with pytest.raises(UserError, match="node0:x"):
        ranks.check_hosts(["node0:x"])


def test_the_hosts_of_missing_ranks_are_named(monkeypatch):
    def join_alone(sent: dict, timeout: float) -> None:
        rendezvous._join(dist.HashStore(), 0, 2, sent, 0.2)

    monkeypatch.setattr(rendezvous, "join", join_alone)
    here = socket.gethostname()
    [found] = ranks.check_ranks([], [f"{here}.cluster", "node7"], 1)
    assert found.status == "problem" and "node7" in found.remedy and here not in found.remedy


def test_what_is_wrong_on_other_machines_is_reported_with_their_name():
    entries = [
        {"host": "node0", "findings": [problem("Machine", "disk", "full", "").to_dict()]},
        {
            "host": "node1",
            "findings": [each.to_dict() for each in (ok(*"abc"), problem("Machine", "disk", "full", ""))],
        },
        {"host": "node1", "findings": []},
    ]
    [found] = ranks._of_other_hosts(entries)
    assert found.group == "On node1" and found.status == "problem"
    total, first, second = ranks._of_ranks(entries, [(1, 2), (3, 4), (5, 6)])
    assert "3 ranks on 2 hosts" in total.text
    assert (first.name, second.name) == ("node0", "node1") and "5.00 ms" in second.text and "6.00 ms" in second.text


@pytest.mark.slow
def test_ranks_of_torchrun_meet():
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*line, str(ROOT / "tools" / "doctor.py"), "--json"], capture_output=True, text=True, check=True, timeout=200
    )
    found = [Finding(**each) for each in json.loads(done.stdout)]
    assert "2 ranks on 1 hosts" in one(found, "all-reduce").text


# Tokenizer and configuration


def test_a_tokenizer_is_compared_with_its_reference_and_with_transformers(tiny_tokenizer, monkeypatch):
    assert "problem" not in statuses(check_tokenizer(str(tiny_tokenizer)))
    monkeypatch.setattr(TokenizerHandle, "serving_note", lambda self: "becomes [1] here and [2] with transformers")
    assert one(check_tokenizer(str(tiny_tokenizer)), "serving").status == "note"
    monkeypatch.setattr(TokenizerHandle, "fallback_reason", None)
    monkeypatch.setattr(TokenizerHandle, "check_fast_path", lambda self, texts: "differs at token 3")
    assert one(check_tokenizer(str(tiny_tokenizer)), "fast encoder").status == "note"


def test_what_a_run_lacks(tmp_path, monkeypatch):
    path = write_config(tmp_path)
    findings = check_configuration(["--config", str(path)], ALONE, network=False)
    assert "problem" not in statuses(findings) and len([each for each in findings if each.name == "data"]) == 3
    adapter = ["--adapter.kind", "lora", "--training.precision", "auto"]  # the base has the dtype of the computation
    findings = check_configuration(["--config", str(path), *adapter], ALONE, network=False)
    assert "problem" not in statuses(findings) and one(findings, "memory").status == "note"
    text = check_configuration(["--config", str(path), "--data.train.0.path", str(path)], ALONE, network=False)
    assert [each.status for each in text if each.name == "data"] == ["note", "ok", "ok"]
    (tmp_path / "second.bin").unlink()
    findings = check_configuration(["--config", str(path), "--parallel.tensor", "3"], TWO, network=False)
    assert {each.name for each in findings if each.status == "problem"} == {"ranks", "data"}
    findings = check_configuration(["--config", str(path), "--parallel.tensor", "3"], ALONE, network=False)
    assert one(findings, "ranks").status == "note"
    monkeypatch.setattr("retemper.tools.diagnosis.configuration.free_bytes", lambda folder: 100)
    monkeypatch.setattr("retemper.engine.parallel.memory_check.device_memory", lambda device: 1000)
    findings = check_configuration(["--config", str(path)], ALONE, network=False)
    assert {each.name for each in findings if each.status == "problem"} == {"disk", "memory", "data"}
    gone = ["--config", str(path), "--model.architecture", "null", "--model.initialize_from", str(tmp_path / "gone")]
    assert one(check_configuration(gone, ALONE, network=False)[:-3], "model").status == "problem"


def test_all_errors_of_a_configuration_are_problems(tmp_path):
    arguments = ["--config", str(write_config(tmp_path)), "--training.train_tokens", "0", "--seed", "x"]
    findings = checked("Configuration", "settings", lambda: check_configuration(arguments, ALONE, network=False))
    assert statuses(findings) == ["problem", "problem"]
