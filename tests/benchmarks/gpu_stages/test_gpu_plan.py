"""The stages of the GPU check: they fit the rented time, and every command is understood."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from retemper.benchmarks import gpu_check, hardware_limits, mixture, peers
from retemper.benchmarks.gpu_stages import plan
from retemper.benchmarks.gpu_stages.plan import PART_SECONDS, RESERVE_SECONDS, Setting, stages
from retemper.benchmarks.gpu_stages.run import END_SECONDS, LEAST_SECONDS
from retemper.benchmarks.kernel.command import selected_cases
from retemper.engine.config.parser import parse_config
from retemper.tools import benchmark, benchmark_kernels

ROOT = Path(__file__).parents[3]
RENTED_SECONDS, START_SECONDS = 900, 120
WHEELS = ROOT / "tests"  # a folder without wheels: the stage is there, and installs nothing


@pytest.mark.parametrize("part", PART_SECONDS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_all_stages_of_a_part_can_use_their_whole_limits(part, scale, tmp_path):
    limits = [stage.limit_seconds for stage in stages(part, Setting(tmp_path, WHEELS, scale=scale))]
    assert sum(limits) + RESERVE_SECONDS * scale < PART_SECONDS[part] * scale
    assert min(limits) > LEAST_SECONDS * scale


def test_both_parts_fit_one_rental():
    assert sum(PART_SECONDS.values()) + START_SECONDS < RENTED_SECONDS
    assert max(PART_SECONDS.values()) <= 600


@pytest.mark.parametrize("rehearse", [False, True])
@pytest.mark.parametrize("part", PART_SECONDS)
def test_every_command_is_understood(part, rehearse, tmp_path):
    found = stages(part, Setting(tmp_path, WHEELS, rehearse))
    assert len({stage.name for stage in found}) == len(found)
    for stage in found:
        python, script, *arguments = (word.replace("{seconds}", "30") for word in stage.command)
        assert python == sys.executable and not any("{" in word for word in arguments)
        if script == "-m":
            assert arguments[0] in ("pip", "pytest")
        elif script == "tools/benchmark_kernels.py":
            options = benchmark_kernels.parse_arguments(arguments)
            assert options.time_limit == 30 and selected_cases(options)
        elif script == "tools/benchmark.py":
            options, rest = benchmark.parse_arguments(arguments)
            config = parse_config(rest)
            assert config.training.global_batch_size == config.training.micro_batch_size == 4
        elif script == "benchmarks/peers.py":
            options = peers.parse_arguments(arguments)
            assert len(peers.asked_engines(options)) == 1 and stage.limit_seconds > END_SECONDS
        elif script == "benchmarks/mixture.py":
            options = mixture.parse_arguments(arguments)
            assert options.per_token < options.experts
        else:
            assert script == "benchmarks/hardware_limits.py"
            options = hardware_limits.parse_arguments(arguments)
        # The runner looks for a report where the command writes it.
        assert script == "-m" or options.json == tmp_path / f"part{part}" / f"{stage.name}.json"


@pytest.mark.parametrize("part", PART_SECONDS)
def test_what_a_stage_is_compared_with_is_measured_before_it(part, tmp_path):
    before = {plan.part_folder(tmp_path, 1) / f"{stage.name}.json" for stage in stages(1, Setting(tmp_path, None))}
    before = before if part == 2 else set()
    for stage in stages(part, Setting(tmp_path, None)):
        words = stage.command
        compared = [Path(words[words.index("--compare") + 1])] if "--compare" in words else []
        assert {*compared, *([stage.baseline] if stage.baseline else [])} <= before, stage.name
        before.add(plan.part_folder(tmp_path, part) / f"{stage.name}.json")


def test_every_file_with_gpu_tests_is_run_or_left_out_for_a_reason():
    # Put together here, so that this file has no such text.
    marked = {path for path in (ROOT / "tests").rglob("test_*.py") if re.search("mark" + r"\.gpu\b", path.read_text())}
    run = {ROOT / name.partition("::")[0] for name in plan.TESTS}
    left_out = {ROOT / name for name in plan.LEFT_OUT_TESTS}
    assert marked | run == run | left_out and not run & left_out
    assert all(path.exists() for path in run | left_out)


@pytest.mark.parametrize("part", PART_SECONDS)
def test_the_list_has_every_command_and_runs_none(tmp_path, capsys, part):
    output = tmp_path / "out"
    assert gpu_check.main(["--part", str(part), "--list", "--output", str(output)]) == 0
    listed = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith(" ")]
    assert listed == [stage.command for stage in stages(part, Setting(gpu_check.WORK, None))]
    assert not output.exists()


def test_make_starts_it():
    """``make -n`` prints the command; its options are those of the script."""
    for assignment, part in (("", None), ("PART=2", 2)):
        make = ["make", "--no-print-directory", "-n", "gpu-check", *filter(None, [assignment])]
        printed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        words = shlex.split(printed.splitlines()[-1])
        assert (ROOT / words[1]).samefile(gpu_check.__file__)
        assert gpu_check.parse_arguments(words[2:]).part == part
