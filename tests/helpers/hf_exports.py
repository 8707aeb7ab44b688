"""What the ranks of runs with ``checkpoint.export_hf`` are asked to do."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import tiny_run

from retemper.engine import pretrain
from retemper.engine.errors import UserError
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.weights.conversion import export_run
from retemper.engine.weights.conversion.dcp_to_hf import plan_export

SHARD_SIZE = "12KB"
"""So that there are several files."""
SHORT = ["--training.train_tokens", str(4 * 8 * 32), "--checkpoint.export_hf", "true"]
"""A run of four steps, and its export."""


@contextlib.contextmanager
def changed(**attributes) -> Iterator[None]:
    """Other functions in the export; and small files."""
    attributes = {"plan_export": functools.partial(plan_export, max_shard_size=SHARD_SIZE), **attributes}
    before = {name: getattr(export_run, name) for name in attributes}
    for name, value in attributes.items():
        setattr(export_run, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(export_run, name, value)


def train(ranks: Ranks, path: Path, overrides: list[str]) -> list[str]:
    """The run; names of the weights' files that this rank has written."""
    copy, mine = export_run.copy_files, []

    def noting(folder, files, *arguments, **keywords):
        mine.extend(file.name for file in files)
        return copy(folder, files, *arguments, **keywords)

    with changed(copy_files=noting):
        tiny_run.train(ranks, path, [*SHORT, *overrides])
    return mine


def train_on_a_full_disk(ranks: Ranks, path: Path, overrides: list[str], failing_rank: int) -> str:
    """The run whose export fails on one rank; what it says."""

    def full(folder, files, *arguments, **keywords):
        raise OSError(28, "No space left on device", str(folder / files[0].name))

    with changed(**({"copy_files": full} if ranks.rank == failing_rank else {})):
        try:
            tiny_run.train(ranks, path, [*SHORT, *overrides])
        except UserError as error:
            return str(error)
    return "finished"


def train_and_ask_to_stop(ranks: Ranks, path: Path, overrides: list[str]) -> None:
    """The run that is asked to stop while its last rank begins to write the export."""
    run = pretrain.build(tiny_run.configure(path, *SHORT, *overrides), ranks)
    copy = export_run.copy_files

    def asking(folder, files, source, workers, hashed_rows, on_bytes, **keywords):
        if ranks.rank == ranks.world_size - 1:
            run.stop._first = 0.0  # as a signal does
            while True:
                on_bytes(0)
        return copy(folder, files, source, workers, hashed_rows, on_bytes, **keywords)

    with changed(copy_files=asking):
        pretrain.train(run)
