r"""Preprocess a corpus with datatrove's executors, here, on Slurm or on Ray, one part of the input per task.

    python launch/preprocess_datatrove.py --shards 8 --logs logs/web --at-once 2 -- \
        --input 'web/*.jsonl.zst' --tokenizer models/qwen3 --output-prefix data/web

    python launch/preprocess_datatrove.py --shards 64 --logs logs/web --slurm --partition cpu --time 08:00:00 \
        --cpus 32 -- --input 'web/*.jsonl.zst' --tokenizer models/qwen3 --output-prefix data/web --dedup minhash

The options after ``--`` are those of tools/preprocess.py, except --shard. datatrove records finished tasks and
restarts the others with the same command; an unfinished part continues where it stopped. A last task joins the parts.

With --dedup, duplicates are removed across all parts, by the MinHash stages of datatrove: a first task per part writes
the signatures of its documents, then duplicates are found and clustered, and the tasks that write the parts leave them
out. The result is that of one machine (retemper.tools.preprocessing.dedup.across_parts).

Needs the extra datatrove (and ray for --ray), and storage that all nodes see.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, install_command, run_command
from retemper.engine.files.atomic import replace_file
from retemper.tools import preprocess
from retemper.tools.preprocessing.dataset.checks import require_free_shards
from retemper.tools.preprocessing.dedup.across_parts import signature_shape
from retemper.tools.preprocessing.inputs.hub import pin_revisions
from retemper.tools.preprocessing.option_rules import check_options
from retemper.tools.preprocessing.options import PreprocessOptions

try:
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster
    from datatrove.utils.hashing import HashConfig
except ImportError:
    PipelineStep = object

TOOLS = Path(preprocess.__file__).parent

RUN_FILE = "run.json"
"""File in the folder of logs with the options of the first start."""


class PreprocessPart(PipelineStep):
    """A step that passes its rank to ``tools/preprocess.py --shard``; documents do not pass through datatrove.

    Args:
        arguments: options of tools/preprocess.py.
        exclusions: folder with the duplicates of each part, which were found in all parts; None: there are none.
    """

    name = "preprocess"
    type = "retemper"

    def __init__(self, arguments: Sequence[str], prefix: str, overwrite: bool, exclusions: str | None = None) -> None:
        super().__init__()
        self.arguments, self.prefix, self.overwrite, self.exclusions = list(arguments), prefix, overwrite, exclusions
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
            if self.exclusions is not None:
                command += ["--exclude-documents", f"{self.exclusions}/{rank}.documents"]
            subprocess.run(command, check=True)


class SignPart(PipelineStep):
    """A step that writes the signatures of a part's documents, in place of datatrove's MinhashDedupSignature.

    The text is tokenized in this step; PreprocessPart finds the results.
    """

    name = "signatures"
    type = "retemper"

    def __init__(self, arguments: Sequence[str], folder: str) -> None:
        super().__init__()
        self.arguments, self.folder = list(arguments), folder
        self.program = str(TOOLS / "preprocess.py")

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Write the signatures of part ``rank`` of ``world_size``."""
        import subprocess
        import sys

        command = [sys.executable, self.program, *self.arguments, "--shard", f"{rank}/{world_size}"]
        subprocess.run([*command, "--signatures", self.folder], check=True)


class KeepFirst(PipelineStep):
    """A step that writes which documents each part leaves out: all of a cluster but the first; for a single task."""

    name = "keep first"
    type = "retemper"

    def __init__(self, clusters: str, exclusions: str, num_parts: int) -> None:
        super().__init__()
        self.clusters, self.exclusions, self.num_parts = clusters, exclusions, num_parts
        self.package = str(Path(__file__).parent)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Write the numbers of the documents."""
        import sys
        from pathlib import Path

        sys.path.insert(0, self.package)  # with retemper.py, for a checkout that is not installed
        from retemper.tools.preprocessing.dedup.across_parts import write_exclusions

        write_exclusions(Path(self.clusters), Path(self.exclusions), self.num_parts)


class JoinParts(PipelineStep):
    """A step that joins the parts; for a single task.

    Args:
        scratch: folder to remove when the dataset is complete.
    """

    name = "join"
    type = "retemper"

    def __init__(self, prefix: str, num_shards: int, overwrite: bool, scratch: str) -> None:
        super().__init__()
        self.prefix, self.num_shards, self.overwrite, self.scratch = prefix, num_shards, overwrite, scratch
        self.program = str(TOOLS / "merge.py")

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Write the dataset, or one for each side of a split."""
        import glob
        import os
        import shutil
        import subprocess
        import sys

        first = f"{self.prefix}.shard-0-of-{self.num_shards}"
        sides = [path[len(first) : -len(".idx")] for path in glob.glob(f"{glob.escape(first)}.*.idx")]
        for side in [""] if os.path.exists(f"{first}.idx") else sides:
            parts = [f"{self.prefix}.shard-{index}-of-{self.num_shards}{side}" for index in range(self.num_shards)]
            command = [sys.executable, self.program, "--inputs", *parts, "--output-prefix", f"{self.prefix}{side}"]
            subprocess.run([*command, "--overwrite"] if self.overwrite else command, check=True)
        shutil.rmtree(self.scratch, ignore_errors=True)


class Stage(NamedTuple):
    """Tasks that may run at the same time, after those of the stage before."""

    name: str
    """Of its folder of logs."""
    steps: list[Any]
    """datatrove's pipeline."""
    tasks: int


def stages(options: argparse.Namespace, arguments: Sequence[str], wanted: PreprocessOptions) -> list[Stage]:
    """Return the stages of a run.

    Args:
        options: of this command.
        arguments: of tools/preprocess.py.
        wanted: the same, parsed.
    """
    scratch = f"{options.logs}/dedup"
    join = Stage("join", [JoinParts(wanted.output_prefix, options.shards, wanted.overwrite, scratch)], 1)
    if wanted.dedup == "none":
        part = PreprocessPart(arguments, wanted.output_prefix, wanted.overwrite)
        return [Stage("parts", [part], options.shards), join]
    num_buckets, num_hashes = signature_shape(wanted)
    config = MinhashConfig(num_buckets=num_buckets, hashes_per_bucket=num_hashes, hash_config=HashConfig(precision=64))
    signatures, pairs, clusters, exclusions = (
        f"{scratch}/{name}" for name in ("signatures", "pairs", "clusters", "exclusions")
    )
    cluster = MinhashDedupCluster(pairs, clusters, config, save_cluster_id=True)
    part = PreprocessPart(arguments, wanted.output_prefix, wanted.overwrite, exclusions)
    return [
        Stage("signatures", [SignPart(arguments, signatures)], options.shards),
        Stage("pairs", [MinhashDedupBuckets(signatures, pairs, config=config)], num_buckets),
        Stage("clusters", [cluster, KeepFirst(clusters, exclusions, options.shards)], 1),
        Stage("parts", [part], options.shards),
        join,
    ]


def run_here(todo: Sequence[Stage], options: argparse.Namespace) -> None:
    """Run the stages on this machine."""
    for stage in todo:
        workers = min(options.at_once or 1, stage.tasks)
        LocalPipelineExecutor(
            stage.steps, tasks=stage.tasks, workers=workers, logging_dir=f"{options.logs}/{stage.name}"
        ).run()


def submit_to_slurm(todo: Sequence[Stage], options: argparse.Namespace) -> None:
    """Submit an array of jobs for each stage, after the stage before."""
    previous = None
    for stage in todo:
        previous = SlurmPipelineExecutor(
            stage.steps,
            tasks=stage.tasks,
            workers=options.at_once or -1,
            job_name="preprocess" if stage.name == "parts" else stage.name,
            depends=previous,
            logging_dir=f"{options.logs}/{stage.name}",
            partition=options.partition,
            qos=options.qos,
            time=options.time,
            cpus_per_task=options.cpus,
            mem_per_cpu_gb=options.memory_per_cpu,
            env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
        )
    assert previous is not None
    previous.run()


def run_on_ray(todo: Sequence[Stage], options: argparse.Namespace) -> None:
    """Run the stages on the Ray cluster that RAY_ADDRESS names, or on one that is started here.

    Raises:
        UserError: ray is missing, or a task failed.
    """
    try:
        import ray
    except ImportError:
        raise UserError("ray is not installed: pip install 'ray>=2.9'") from None
    try:
        ray.init()
    except ConnectionError as error:
        address = os.environ.get("RAY_ADDRESS", "")
        raise UserError(
            f"RAY_ADDRESS {address}: no Ray cluster answers ({' '.join(str(error).split())[:200]})"
        ) from None
    for stage in todo:
        executor = RayPipelineExecutor(
            stage.steps,
            tasks=stage.tasks,
            workers=options.at_once or -1,
            logging_dir=f"{options.logs}/{stage.name}",
            cpus_per_task=options.cpus,
            mem_per_cpu_gb=options.memory_per_cpu,
        )
        executor.run()
        # It only logs failures.
        if failed := executor.get_incomplete_ranks(skip_completed=True):
            raise UserError(f"{options.logs}/{stage.name}/logs: task {failed[0]} failed; start again to continue")


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
        help="number of tasks at the same time (default: here 1, since each uses all cores; elsewhere all)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--slurm", action="store_true", help="submit jobs to Slurm instead of running here")
    where.add_argument("--ray", action="store_true", help="run on the Ray cluster of RAY_ADDRESS instead")
    cluster = parser.add_argument_group("Slurm and Ray")
    cluster.add_argument("--cpus", type=int, default=16, metavar="N", help="cores of a task (default: %(default)s)")
    cluster.add_argument("--memory-per-cpu", type=int, default=2, metavar="GB", help="default: %(default)s")
    slurm = parser.add_argument_group("Slurm")
    slurm.add_argument("--partition", help="required with --slurm")
    slurm.add_argument("--qos", default="normal", help="default: %(default)s")
    slurm.add_argument("--time", default="24:00:00", help="time limit of a task (default: %(default)s)")
    options = parser.parse_args(mine)
    if options.shards < 1:
        raise UserError(f"--shards {options.shards}: must be at least 1")
    if options.slurm and options.partition is None:
        raise UserError("--slurm needs --partition; choose one that sinfo shows")
    return options, theirs


def same_as_before(logs: Path, num_shards: int, theirs: list[str], inputs: Sequence[str]) -> list[str]:
    """Return the options of all parts, with the commits of datasets of the Hub that the first start has found.

    datatrove records finished tasks in ``logs``, whatever their options were.

    Raises:
        UserError: an earlier start with these logs had other options.
    """
    path = logs / RUN_FILE
    if path.is_file():
        recorded = json.loads(path.read_text(encoding="utf-8"))
        if (recorded["shards"], recorded["options"]) != (num_shards, theirs):
            raise UserError(f"--logs {logs}: was used with other options or parts ({path}); name another folder")
        return [*theirs, "--input", *recorded["input"]]
    pinned = pin_revisions(inputs)
    logs.mkdir(parents=True, exist_ok=True)
    record = {"shards": num_shards, "options": theirs, "input": pinned}
    replace_file(path, [json.dumps(record, indent=1).encode()])
    return [*theirs, "--input", *pinned]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options, theirs = parse_arguments(arguments)
    if PipelineStep is object:
        raise UserError(f"datatrove is not installed: {install_command('datatrove')}")
    wanted = preprocess.parse_arguments(theirs)
    if wanted.shard is not None or "-" in wanted.input:
        raise UserError(
            "this command sets --shard itself, and standard input cannot be divided; leave them out after --"
        )
    for name in ("cache_folder", "report", "list_inputs"):
        if getattr(wanted, name):
            raise UserError(
                f"--{name.replace('_', '-')}: is for one call of tools/preprocess.py; leave it out after --"
            )
    if wanted.to_jsonl:
        raise UserError("--to-jsonl: this command joins datasets; run tools/preprocess.py --shard, and join its files")
    check_options(wanted)
    theirs = same_as_before(Path(options.logs), options.shards, theirs, wanted.input)
    require_free_shards(wanted, options.shards)
    run = submit_to_slurm if options.slurm else run_on_ray if options.ray else run_here
    run(stages(options, theirs, wanted), options)


if __name__ == "__main__":
    try:
        run_command(main)
    except subprocess.CalledProcessError as failed:
        sys.exit(failed.returncode)  # it has reported the reason
