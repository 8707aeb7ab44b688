r"""Preprocess a corpus with datatrove's executors, on this machine or on Slurm, one part of the input per task.

    python launch/preprocess_datatrove.py --shards 8 --logs logs/web --at-once 2 -- \
        --input 'web/*.jsonl.zst' --tokenizer models/qwen3 --output-prefix data/web

    python launch/preprocess_datatrove.py --shards 64 --logs logs/web --slurm --partition cpu --time 08:00:00 \
        --cpus 32 -- --input 'web/*.jsonl.zst' --tokenizer models/qwen3 --output-prefix data/web

The options after ``--`` are those of tools/preprocess.py, except --shard. datatrove records finished tasks and
restarts the others with the same command; an unfinished part continues where it stopped. A last task joins the parts.
Needs ``pip install datatrove``, and on Slurm storage that all nodes see.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, run_command
from retemper.tools import preprocess
from retemper.tools.preprocessing.dataset.checks import require_free_shards

try:
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
except ImportError:
    PipelineStep = object

TOOLS = Path(preprocess.__file__).parent


class PreprocessPart(PipelineStep):
    """A step that passes its rank to ``tools/preprocess.py --shard``; documents do not pass through datatrove."""

    name = "preprocess"
    type = "retemper"

    def __init__(self, arguments: Sequence[str], prefix: str, overwrite: bool) -> None:
        super().__init__()
        self.arguments, self.prefix, self.overwrite = list(arguments), prefix, overwrite
        self.program = str(TOOLS / "preprocess.py")

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Write part ``rank`` of ``world_size``."""
        import glob  # imported here, since the step is pickled without its module
        import os
        import subprocess
        import sys

        part = f"{self.prefix}.shard-{rank}-of-{world_size}"
        # .idx is the last of a dataset's files to be renamed. A split has a dataset for each side.
        done = os.path.exists(f"{part}.idx") or glob.glob(f"{glob.escape(part)}.*.idx")
        if not done or self.overwrite:
            command = [sys.executable, self.program, *self.arguments, "--shard", f"{rank}/{world_size}"]
            subprocess.run(command, check=True)


class JoinParts(PipelineStep):
    """A step that joins the parts; for a single task."""

    name = "join"
    type = "retemper"

    def __init__(self, prefix: str, num_shards: int, overwrite: bool) -> None:
        super().__init__()
        self.prefix, self.num_shards, self.overwrite = prefix, num_shards, overwrite
        self.program = str(TOOLS / "merge.py")

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Write the dataset, or one for each side of a split."""
        import glob
        import os
        import subprocess
        import sys

        first = f"{self.prefix}.shard-0-of-{self.num_shards}"
        sides = [path[len(first) : -len(".idx")] for path in glob.glob(f"{glob.escape(first)}.*.idx")]
        for side in [""] if os.path.exists(f"{first}.idx") else sides:
            parts = [f"{self.prefix}.shard-{index}-of-{self.num_shards}{side}" for index in range(self.num_shards)]
            command = [sys.executable, self.program, "--inputs", *parts, "--output-prefix", f"{self.prefix}{side}"]
            subprocess.run([*command, "--overwrite"] if self.overwrite else command, check=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options of this command, and return the others, which belong to tools/preprocess.py."""
    every = list(sys.argv[1:] if arguments is None else arguments)
    mine, theirs = (every[: every.index("--")], every[every.index("--") + 1 :]) if "--" in every else (every, [])
    parser = CommandParser(
        description="Preprocess a corpus with datatrove's executors, one part of the input per task."
    )
    parser.add_argument(
        "--shards", type=int, required=True, metavar="N", help="number of parts of the input, one task each"
    )
    parser.add_argument(
        "--logs", required=True, metavar="DIR", help="datatrove's logs and its record of finished tasks"
    )
    parser.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        help="number of tasks at the same time (default: here 1, since each uses all cores; on Slurm all)",
    )
    slurm = parser.add_argument_group("Slurm")
    slurm.add_argument("--slurm", action="store_true", help="submit jobs instead of running here")
    slurm.add_argument("--partition", help="required with --slurm")
    slurm.add_argument("--qos", default="normal", help="default: %(default)s")
    slurm.add_argument("--time", default="24:00:00", help="time limit of a task (default: %(default)s)")
    slurm.add_argument("--cpus", type=int, default=16, metavar="N", help="cores of a task (default: %(default)s)")
    slurm.add_argument("--memory-per-cpu", type=int, default=2, metavar="GB", help="default: %(default)s")
    options = parser.parse_args(mine)
    if options.shards < 1:
        raise UserError(f"--shards {options.shards}: must be at least 1")
    if options.slurm and options.partition is None:
        raise UserError("--slurm needs --partition; choose one that sinfo shows")
    return options, theirs


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options, theirs = parse_arguments(arguments)
    if PipelineStep is object:
        raise UserError("datatrove is not installed: pip install datatrove")
    wanted = preprocess.parse_arguments(theirs)
    wanted.check()
    if wanted.shard is not None or "-" in wanted.input:
        raise UserError(
            "this command sets --shard itself, and standard input cannot be divided; leave them out after --"
        )
    require_free_shards(wanted, options.shards)
    part = PreprocessPart(theirs, wanted.output_prefix, wanted.overwrite)
    join = JoinParts(wanted.output_prefix, options.shards, wanted.overwrite)
    parts, joined = f"{options.logs}/parts", f"{options.logs}/join"
    if not options.slurm:
        LocalPipelineExecutor([part], tasks=options.shards, workers=options.at_once or 1, logging_dir=parts).run()
        LocalPipelineExecutor([join], tasks=1, workers=1, logging_dir=joined).run()
        return
    limits = {
        "partition": options.partition,
        "qos": options.qos,
        "time": options.time,
        "cpus_per_task": options.cpus,
        "mem_per_cpu_gb": options.memory_per_cpu,
        "env_command": f"export PATH={Path(sys.executable).parent}:$PATH",
    }
    first = SlurmPipelineExecutor(
        [part],
        tasks=options.shards,
        workers=options.at_once or -1,
        job_name="preprocess",
        logging_dir=parts,
        **limits,
    )
    SlurmPipelineExecutor([join], tasks=1, job_name="join", depends=first, logging_dir=joined, **limits).run()


if __name__ == "__main__":
    try:
        run_command(main)
    except subprocess.CalledProcessError as failed:
        sys.exit(failed.returncode)  # it has reported the reason
