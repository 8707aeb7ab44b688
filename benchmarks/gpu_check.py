"""Run all checks that need a GPU, in two runs of at most ten minutes: ``make gpu-check PART=1``, then ``PART=2``.

    pip install --no-deps --no-build-isolation -e .
    pip install --no-deps jsonargparse docstring-parser typeshed-client zstandard xxhash orjson
    python benchmarks/gpu_check.py --part 1 --output gpu_check
    python benchmarks/gpu_check.py --part 2 --output gpu_check

Part 1: the tests marked ``gpu``, and the kernels and their peers at the sizes of Qwen2.5 0.5B and 7B. Part 2: the
training step of both models, and of the installed peers. Every stage is a process with its own time limit; if
one fails, the others still run. Outputs, and the summaries summary_part1.md and .json, are written to --output. The
exit status is nonzero if a check of correctness failed: a test, a kernel outside its bounds, an engine of ours that
does not run.
``--dry-run`` runs the same stages in tiny sizes on a CPU; ``--list`` prints their commands and time limits.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retemper.benchmarks.machine import describe_machine
from retemper.benchmarks.report import BenchmarkReport, command_line, table
from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, run_command

ROOT = Path(__file__).resolve().parents[1]
PART_SECONDS = 570.0
"""Total time of a part's stages, whatever the sum of their own limits."""
LEAST_SECONDS = 5.0
"""No stage is started with less time left."""
RECENT = 4000
"""Maximum number of characters of a stage's output in its summary."""


@dataclass(frozen=True)
class CheckStage:
    """A command with its time limit."""

    name: str
    command: list[str]
    limit_seconds: float
    checks: bool
    """True if its failure means an error of correctness."""
    benign_codes: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class StageResult:
    """The result of a stage."""

    name: str
    command: str
    seconds: float
    exit_code: int | None
    """None: stopped at its time limit, or not started."""
    state: str
    """ok, failed, timed out, no time left."""
    checks: bool
    tail: str
    """The end of its output."""


def stages(part: int, output: Path, dry_run: bool) -> list[CheckStage]:
    """Return the stages of a part, the most important first."""
    python = sys.executable
    size = "tiny" if dry_run else "qwen2.5"
    device = "cpu" if dry_run else "cuda"
    limits = [python, "benchmarks/hardware_limits.py", "--device", device, "--seconds", "0.01" if dry_run else "2"]
    machine = CheckStage("machine", [*limits, "--json", str(output / f"machine_part{part}.json")], 60, False)

    def kernels(name: str, limit: float, *options: str) -> CheckStage:
        command = [python, "tools/benchmark_kernels.py", "--sizes", size, "--device", device, "--kernels", name]
        stem = output / f"kernels_{name.replace(',', '-')}"
        files = ["--json", f"{stem}.json", "--plot", f"{stem}.png"]
        command += ["--time-limit", str(limit * 0.7), *files, *options]
        return CheckStage(
            f"kernels: {name}", command + (["--no-compile", "--seconds", "0"] if dry_run else []), limit, True
        )

    def step(name: str, limit: float, *options: str) -> CheckStage:
        command = [python, "benchmarks/peers.py", "--device", device, "--json", str(output / f"step_{name}.json")]
        tiny = ["--layers=2", "--hidden=64", "--vocab=300", "--batch=2", "--sequence=32", "--warmup=1", "--steps=2"]
        tiny += ["--threads=1", "--engines=retemper,trainer"]
        # A failing peer is not our failure: the result file shows whether our engine succeeded.
        return CheckStage(
            f"step: {name}",
            command + [f"--total-time={limit - 10:g}"] + (tiny if dry_run else list(options)),
            limit,
            False,
        )

    if part == 1:
        # Files without such a test are skipped: the packages that they import need not be installed on a GPU machine.
        files = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8")]
        names = sorted(str(path.relative_to(ROOT)) for path in files)
        tests = [python, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *names]
        # 5: no test has this mark, or none was left after deselection.
        check = CheckStage("tests", tests, 180, True, benign_codes=(0, 5) if dry_run else (0,))
        return [
            machine,
            check,
            kernels("linear_cross_entropy", 190),
            kernels("attention", 120),
            kernels("rms_norm,rope,swiglu", 80),
        ]
    # Less important stages come last; those without time are named in the table.
    small = ["--model", "qwen2.5-0.5b", "--batch", "4", "--sequence", "4096", "--precision", "bf16"]
    small += ["--warmup", "10", "--steps", "30", "--time-limit", "75"]
    large = ["--model", "qwen2.5-7b", "--batch", "2", "--sequence", "4096", "--precision", "bf16-states", "--recompute"]
    large += ["--warmup", "3", "--steps", "8", "--time-limit", "100"]
    peers = ["litgpt+compile", "trainer+compile", "trainer+liger", "trainer"]
    return [
        machine,
        step("qwen2.5-0.5b", 230, *small, "--engines", ",".join(["retemper", *peers[:3], "trainer+compile+chunked"])),
        step("qwen2.5-7b", 235, *large, "--engines", ",".join(["retemper", *peers])),
        # The first measurement again: shows the drift of the machine.
        step("qwen2.5-0.5b-again", 45, *small, "--engines", "retemper"),
    ]


def run_stage(stage: CheckStage, output: Path, seconds_left: float) -> StageResult:
    """Run a stage in its own process group and save its output in a file."""
    command = shlex.join(stage.command)
    limit = min(stage.limit_seconds, seconds_left)
    if limit < LEAST_SECONDS:
        return StageResult(stage.name, command, 0.0, None, "no time left", stage.checks, "")
    log = output / (stage.name.replace(": ", "_").replace(",", "-") + ".log")
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # The stage and all its children: nothing may keep running during the next stage.
            _end_group(process)
    text = log.read_text(encoding="utf-8", errors="replace")
    state = "timed out" if code is None else "ok" if code in stage.benign_codes else "failed"
    return StageResult(stage.name, command, time.monotonic() - started, code, state, stage.checks, text[-RECENT:])


def _end_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def our_step_problem(stage_name: str, output: Path) -> str | None:
    """Return why our engine's row of a step stage is missing; None if it exists."""
    path = output / f"step_{stage_name.removeprefix('step: ')}.json"
    if not path.exists():
        return "no result was written"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    ours = [row for row in rows if row["engine"] == "retemper"]
    return None if ours and "rate" in ours[0] else f"retemper: {ours[0].get('problem') if ours else 'not run'}"


def summary(part: int, results: Sequence[StageResult], problems: Sequence[str]) -> str:
    """Return a Markdown summary: passed and failed stages, and the end of each stage's output."""
    rows = [[result.name, result.state, f"{result.seconds:.0f}"] for result in results]
    lines = [f"# GPU check, part {part}", "", *table(["stage", "state", "seconds"], rows)]
    lines += ["", *(f"- FAILED: {problem}" for problem in problems)]
    if not problems:
        lines.append("All checks of correctness passed.")
    for result in results:
        lines += ["", f"## {result.name}", "", f"`{result.command}`", "", "```", result.tail.strip(), "```"]
    return "\n".join(lines) + "\n"


def require_own_results(folder: Path) -> None:
    """Refuse a folder that is not empty and holds no results of a part, since its files might have our names."""
    own = folder.is_dir() and (not any(folder.iterdir()) or any(folder.glob("summary_part*.md")))
    if folder.exists() and not own:
        raise UserError(f"--output {folder}: exists, and holds no results of this command; choose another folder")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a part; return 0 if every check of correctness passed."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, choices=[1, 2], required=True)
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="output folder (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--list", action="store_true", help="print the stages and their time limits; run nothing")
    parser.add_argument(
        "--seconds", type=float, default=PART_SECONDS, help="time for all stages (default: %(default)g)"
    )
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    if options.list:
        for stage in stages(options.part, output, options.dry_run):
            share = stage.limit_seconds / options.seconds
            print(f"{stage.name}: at most {stage.limit_seconds:g} s ({share:.0%})\n    {shlex.join(stage.command)}")
        return 0
    if not options.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("gpu-check needs a CUDA GPU, and PyTorch sees none on this machine; --dry-run tries the stages here")
            return 1
    require_own_results(output)
    output.mkdir(parents=True, exist_ok=True)
    started, results, problems = time.monotonic(), [], []
    name = f"summary_part{options.part}"
    report = BenchmarkReport(command_line("benchmarks/gpu_check.py", arguments), describe_machine(), vars(options))
    report.settings["output"] = None
    for stage in stages(options.part, output, options.dry_run):
        if stage.name.startswith("step: "):
            # An old result must not count for a run that wrote none.
            (output / f"step_{stage.name.removeprefix('step: ')}.json").unlink(missing_ok=True)
        result = run_stage(stage, output, options.seconds - (time.monotonic() - started))
        results.append(result)
        print(f"{result.name}: {result.state}, {result.seconds:.0f} s", flush=True)
        if stage.checks and result.state != "ok":
            problems.append(f"{stage.name}: {result.state}")
        if stage.name.startswith("step: ") and (problem := our_step_problem(stage.name, output)):
            problems.append(f"{stage.name}: {problem}")
        # Written after every stage, so that results survive the loss of the machine.
        report.rows, report.summary = [asdict(one) for one in results], {"problems": problems}
        report.write(output / f"{name}.json", "--output")
        (output / f"{name}.md").write_text(summary(options.part, results, problems), encoding="utf-8")
    print((output / f"{name}.md").read_text(encoding="utf-8")[-6000:])
    return 1 if problems else 0


if __name__ == "__main__":
    run_command(main)
