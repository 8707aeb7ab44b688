"""Run all checks and measurements that need a GPU, in two parts that fit 900 s with the start of the machine.

    python benchmarks/gpu_check.py --download-wheels build/gpu_wheels    # here, with a network
    python benchmarks/gpu_check.py --part 1 --wheels build/gpu_wheels --output gpu_check    # on the GPU machine
    python benchmarks/gpu_check.py --part 2 --wheels build/gpu_wheels --output gpu_check    # at once after it

Without ``--part`` both run, one after the other. ``benchmarks/gpu_stages/plan.py`` has the stages: each is a process
with a hard time limit, and if one fails, the others still run. Every stage's record is written at once, so ending the
command at any moment loses only the stage that was running. The exit status is nonzero if a check of correctness
failed: a test, a kernel outside its bounds, an engine of ours that does not run. ``--rehearse`` runs every stage in a
tiny size on a CPU; ``--list`` prints commands and time limits.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from retemper.benchmarks.gpu_stages import packages
from retemper.benchmarks.gpu_stages.plan import PART_SECONDS, Setting, stages
from retemper.benchmarks.gpu_stages.run import PartRun
from retemper.benchmarks.gpu_stages.sensors import FIELDS, NVIDIA_SMI, Sensors
from retemper.benchmarks.machine import describe_machine
from retemper.benchmarks.report import BenchmarkReport, command_line
from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, run_command
from retemper.engine.files.outputs import require_report

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu_check"
"""Folder of the stages' outputs, the installed packages, and the caches of compiled kernels."""
FAKE_GPU = [sys.executable, "-S", "-c", f"print('{', '.join('0' for _ in FIELDS)}')"]
"""Stands for nvidia-smi in a rehearsal."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, choices=list(PART_SECONDS), help="run only this part (default: both)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default=Path("gpu_check"), help="output folder (default: %(default)s)"
    )
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install the packages of this folder first")
    parser.add_argument("--seconds", type=float, metavar="S", help="total time; all limits scale (default: 400 + 360)")
    parser.add_argument("--work", type=Path, metavar="DIR", default=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--list", action="store_true", help="print the stages and their time limits; run nothing")
    parser.add_argument("--download-wheels", type=Path, metavar="DIR", help="download the packages; run nothing")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if every check of correctness passed."""
    options = parse_arguments(arguments)
    if options.download_wheels:
        print(packages.download(options.download_wheels))
        return 0
    parts = [options.part] if options.part else list(PART_SECONDS)
    total = sum(PART_SECONDS[part] for part in parts)
    seconds = total if options.seconds is None else options.seconds
    if not 0 < seconds <= 100_000:
        raise UserError(f"--seconds {seconds:g}: must be positive")
    wheels = options.wheels.resolve() if options.wheels else None
    setting = Setting(options.work.resolve(), wheels, options.rehearse, seconds / total)
    if options.list:
        for part in parts:
            print_stages(part, setting)
        return 0
    require_packages(setting)
    if not options.rehearse and not gpu_is_there():
        print("gpu-check needs a CUDA GPU, and PyTorch sees none on this machine; --rehearse tries the stages here")
        return 1
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    for part in parts:
        require_report("--output", output / f"part{part}.json")
    command = command_line("benchmarks/gpu_check.py", arguments)
    return max(run_part(part, setting, output, command) for part in parts)


def run_part(part: int, setting: Setting, output: Path, command: str) -> int:
    """Run one part and print its table; return 0 if every check of correctness passed."""
    settings = {"part": part, "rehearse": setting.rehearse, "scale": setting.scale}
    report = BenchmarkReport(command, describe_machine(), settings)
    sensors = Sensors(FAKE_GPU if setting.rehearse else NVIDIA_SMI)
    run = PartRun(part, setting, output, PART_SECONDS[part] * setting.scale, report, sensors)
    problems = run.run()
    print(run.format())
    if run.interrupted:  # no other part is run then
        raise KeyboardInterrupt
    return 1 if problems else 0


def print_stages(part: int, setting: Setting) -> None:
    """Print the commands of a part and their time limits."""
    for stage in stages(part, setting):
        rest = "" if stage.is_fixed else ", and what earlier stages left"
        print(f"{stage.name}: at most {stage.limit_seconds:g} s{rest}\n    {shlex.join(stage.command)}")


def require_packages(setting: Setting) -> None:
    """Refuse a machine without the packages that the stages need, before any time is spent.

    Raises:
        UserError: some are neither installed nor in the folder of wheels.
    """
    if setting.wheels is None:
        if not setting.rehearse and (missing := packages.missing()):
            raise UserError(f"not installed: {', '.join(missing)}; name a folder of their wheels with --wheels")
    elif not packages.wheel_files(setting.wheels):
        raise UserError(f"--wheels {setting.wheels}: holds no wheels; --download-wheels makes such a folder")


def gpu_is_there() -> bool:
    """Return whether PyTorch sees a GPU."""
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    run_command(main)
