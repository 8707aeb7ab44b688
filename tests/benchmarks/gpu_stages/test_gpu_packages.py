"""The GPU check needs no Python package but those of the machine and those that are carried to it, and says which."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gpu_machine
import pytest

from retemper.benchmarks.gpu_stages import packages, plan

ROOT = Path(__file__).parents[3]
MODULES = [
    *("retemper.benchmarks.gpu_check", "retemper.benchmarks.hardware_limits", "retemper.benchmarks.peers"),
    *("retemper.benchmarks.peer_engines.ours", "retemper.benchmarks.kernel.command"),
    *("retemper.benchmarks.step.measure", "retemper.tools.benchmark", "retemper.tools.benchmark_kernels"),
    *("retemper.engine.run_folder", "retemper.engine.guards.rollback", "retemper.engine.observe.end_summary"),
]
"""What the stages import, also late."""
IMPORT = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import retemper, "


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    full = [sys.executable, *command]
    return subprocess.run(full, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> dict[str, str]:
    return gpu_machine.environment(tmp_path_factory.mktemp("machine"))


def test_what_is_not_on_the_machine_cannot_be_imported(machine):
    assert "No module named 'fastokens'" in run(machine, "-c", "import fastokens").stderr
    assert run(machine, "-c", "import jsonargparse, numpy, xxhash").returncode == 0


def test_every_gpu_test_of_the_check_is_collected(machine):
    """One import error would leave no test at all."""
    collected = run(machine, "-m", "pytest", "--collect-only", "-qq", *plan.TESTS)
    assert collected.returncode == 0, collected.stdout + collected.stderr
    counts = dict(line.split(": ") for line in collected.stdout.splitlines() if line.startswith("tests/"))
    assert set(counts) == {name.partition("::")[0] for name in plan.TESTS}
    assert int(counts["tests/test_step.py"]) == 1 and all(int(count) > 0 for count in counts.values())


def test_everything_that_stages_import_is_there(machine):
    imported = run(machine, "-c", IMPORT + ", ".join(MODULES))
    assert imported.returncode == 0, imported.stderr


def test_the_command_itself_needs_nothing_that_is_carried(tmp_path):
    """It installs the carried packages."""
    names = [packages.normalized(wheel.name) for wheel in packages.carried()]
    listed = run(gpu_machine.environment(tmp_path, hidden=names), "benchmarks/gpu_check.py", "--list")
    assert listed.returncode == 0, listed.stderr
    refused = run(gpu_machine.environment(tmp_path, hidden=names), "benchmarks/gpu_check.py")
    assert "not installed: jsonargparse" in refused.stderr


def test_what_is_carried_is_needed(tmp_path):
    module = "retemper.engine.observe.start_summary"
    missing = run(gpu_machine.environment(tmp_path, hidden=["orjson"]), "-c", IMPORT + module)
    assert "No module named 'orjson'" in missing.stderr


def test_the_list_of_wheels():
    wheels = packages.carried()
    names = [packages.normalized(wheel.name) for wheel in wheels]
    assert len(set(names)) == len(names) and not set(names) & packages.machine_packages()
    assert all(wheel.why and wheel.version for wheel in wheels)
    assert sum(wheel.megabytes for wheel in wheels) < 60  # what travels with the repository
    assert {"numpy", "torch", "triton", "transformers", "accelerate"} <= packages.machine_packages()


def test_wheels_are_installed_without_a_network(tmp_path, monkeypatch):
    """A wheel of one module, made here."""
    import zipfile

    wheel = tmp_path / "wheels" / "carried_thing-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("carried_thing.py", "VALUE = 7\n")
        information = "carried_thing-1.0.dist-info"
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: carried-thing\nVersion: 1.0\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    target = tmp_path / "site"
    subprocess.run(packages.install_command(packages.wheel_files(wheel.parent), target), check=True)
    done = run({"PYTHONPATH": str(target)}, "-c", "import carried_thing; print(carried_thing.VALUE)")
    assert done.stdout.strip() == "7"
