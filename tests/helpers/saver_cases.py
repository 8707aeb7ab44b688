"""What ranks are asked to do with a :class:`Saver`: tensors of every layout, writers that wait or fail."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from pathlib import Path

import saved_runs
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from retemper.engine.config.settings import CheckpointConfig
from retemper.engine.errors import UserError
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.weights.checkpoint import saver as savers
from retemper.engine.weights.checkpoint import store as stores
from retemper.engine.weights.checkpoint.saver import Saver
from retemper.engine.weights.checkpoint.store import CheckpointStore


def values_at(step: int) -> dict[str, torch.Tensor]:
    """Whole tensors; the shards of 7 rows are unequal on two ranks."""
    return {
        "sharded": torch.arange(35.0).reshape(7, 5) + step,
        "copied": torch.full((3,), step, dtype=torch.bfloat16),
        "plain": torch.tensor(float(step)),
    }


def laid_out(ranks: Ranks) -> dict[str, torch.Tensor]:
    """Tensors over all ranks, with the values of step 0."""
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    whole = values_at(0)
    return {
        "sharded": distribute_tensor(whole["sharded"], mesh, [Shard(0)]),
        "copied": distribute_tensor(whole["copied"], mesh, [Replicate()]),
        "plain": whole["plain"],
    }


def advance(tensors: dict[str, torch.Tensor]) -> None:
    """The next step's values."""
    for tensor in tensors.values():
        getattr(tensor, "_local_tensor", tensor).add_(1)


@contextmanager
def saver(ranks: Ranks, run_folder: Path, lines: list[str], **settings):
    """A saver whose log is ``lines``; and its store."""
    store = CheckpointStore(run_folder, ranks, keep_last=100, keep_best=False)
    with Saver(store, ranks, CheckpointConfig(**settings), lines.append) as entered:
        yield entered


def save(entered: Saver, tensors: dict[str, torch.Tensor], step: int) -> None:
    entered.save(tensors, saved_runs.ASSETS, saved_runs.manifest_at(step), None)


@contextmanager
def writing_with(change):
    """``save_tensors`` is called through ``change``."""
    write = stores.save_tensors
    stores.save_tensors = lambda *arguments: change(write, *arguments)
    try:
        yield
    finally:
        stores.save_tensors = write


def values_change_behind_the_save(ranks: Ranks, run_folder: Path, asynchronous: bool) -> list[str]:
    """Three saves, after each of which the tensors change at once; asynchronous ones are held up meanwhile."""
    tensors, lines, changed = laid_out(ranks), [], threading.Event()

    def late(write, *arguments):
        if asynchronous:
            assert changed.wait(30)
        return write(*arguments)

    with writing_with(late), saver(ranks, run_folder, lines, asynchronous=asynchronous) as entered:
        for step in (0, 1, 2):
            changed.clear()
            save(entered, tensors, step + 1)
            entered.hold_update()
            advance(tensors)
            if asynchronous:
                entered.poll()
                assert len(lines) == step  # it is on its way
            changed.set()
            entered.wait()
    return lines


def training_goes_on_meanwhile(ranks: Ranks, run_folder: Path) -> tuple[int, list[str]]:
    """Steps that were made, with their messages between ranks, until rank 1's slow save was noticed by all at once."""
    tensors, lines, steps = laid_out(ranks), [], 0

    def slow_on_rank_1(write, *arguments):
        time.sleep(0.3 * ranks.rank)
        return write(*arguments)

    with writing_with(slow_on_rank_1), saver(ranks, run_folder, lines) as entered:
        save(entered, tensors, 1)
        while not lines:
            assert ranks.all_reduce(1) == ranks.world_size
            steps += 1
            entered.poll()
    return steps, lines


def failures(ranks: Ranks, run_folder: Path, sequence: str, **settings) -> tuple[list[str], str | None]:
    """Saves of which those with an ``x`` in ``sequence`` fail on the last rank; the log, and what ends the run."""
    tensors, lines, number = laid_out(ranks), [], iter(sequence)

    def failing(write, *arguments):
        if next(number) == "x" and ranks.rank == ranks.world_size - 1:
            arguments = (Path("/proc/nowhere"), *arguments[1:])
        return write(*arguments)

    with writing_with(failing):
        try:
            with saver(ranks, run_folder, lines, **settings) as entered:
                for step in range(len(sequence)):
                    save(entered, tensors, step + 1)
                entered.wait(raise_on_failure=True)
        except UserError as error:
            return lines, str(error)
    return lines, None


def failures_with_bound(ranks: Ranks, run_folder: Path, sequence: str, bound: int) -> tuple[list[str], str | None]:
    """See :func:`failures`."""
    return failures(ranks, run_folder, sequence, max_failed_saves=bound)


def an_error_while_saving(ranks: Ranks, run_folder: Path, kind: type[BaseException]) -> list[str]:
    """The log, when the training ends by an error while a checkpoint is on its way."""
    tensors, lines, left = laid_out(ranks), [], threading.Event()

    def slow(write, *arguments):
        left.wait(0.5)
        return write(*arguments)

    with writing_with(slow):
        try:
            with saver(ranks, run_folder, lines) as entered:
                save(entered, tensors, 1)
                task = entered._task
                raise kind("something")
        except kind:
            said = list(lines)
            left.set()
            task.result()  # so that nothing is left for the next test
    return said


def buffers_are_kept(ranks: Ranks) -> bool:
    """Whether a second copy needs no new memory."""
    staging, tensors, places = savers.Staging(), laid_out(ranks), []
    for _ in range(2):
        staging.begin(tensors)
        places.append({name: copy.data_ptr() for name, copy in staging.copy().items()})
    return places[0] == places[1]


def an_update_waits_for_the_copies(ranks: Ranks, run_folder: Path) -> bool:
    """Whether a slow copy holds up the update, and no longer."""
    tensors, lines, order, copy = laid_out(ranks), [], [], savers.Staging.copy

    def slow(staging):
        time.sleep(0.3)
        order.append("copied")
        return copy(staging)

    savers.Staging.copy = slow
    try:
        with saver(ranks, run_folder, lines) as entered:
            save(entered, tensors, 1)
            order.append("passes")
            entered.hold_update()
            order.append("update")
    finally:
        savers.Staging.copy = copy
    return order == ["passes", "copied", "update"]


def threads_after_a_save(ranks: Ranks, run_folder: Path) -> list[str]:
    """Names of the threads that save, after a save whose thread lives on after its result is known."""
    run, lines = savers._run, []

    def ends_late(*arguments):
        run(*arguments)
        time.sleep(0.3)

    savers._run = ends_late
    try:
        with saver(ranks, run_folder, lines) as entered:
            save(entered, laid_out(ranks), 1)
            entered.wait()
            return [thread.name for thread in threading.enumerate() if thread.name == "checkpoint"]
    finally:
        savers._run = run
