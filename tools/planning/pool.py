"""Run rehearsals in separate processes: a process can have only one process group, and two cores do twice the work."""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from ...engine.errors import UserError
from .rank import Part, RankRehearsal, rehearse_rank

Report = Callable[[int, int], None]
"""Called with (finished rehearsals, total rehearsals)."""


class Pool:
    """Processes that rehearse; a context manager."""

    def __init__(self, num_processes: int | None = None):
        self._count = num_processes or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)

    def __enter__(self) -> Pool:
        # Not forked: PyTorch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(self._count, context, initializer=_start)
        return self

    def __exit__(self, *exception: object) -> None:
        self._executor.shutdown(wait=exception[0] is None, cancel_futures=True)

    def rehearse(self, parts: list[Part], report: Report = lambda done, total: None) -> list[RankRehearsal]:
        """Rehearse all ``parts``, the longest first.

        Raises:
            UserError: a layout is impossible.
        """
        # By duration: an expensive part at the end would leave the other processes idle.
        order = sorted(range(len(parts)), key=lambda index: -_cost(parts[index]))
        futures = {index: self._executor.submit(_rehearse, parts[index]) for index in order}
        results = {}
        for done, index in enumerate(order, 1):
            result = futures[index].result()
            if isinstance(result, str):
                raise UserError(result)
            results[index] = result
            report(done, len(parts))
        return [results[index] for index in range(len(parts))]


def _cost(part: Part) -> float:
    blocks = part.blocks_per_stage or part.architecture.num_layers
    width = part.config.training.micro_batch_size * part.layout.data_parallel
    return blocks * part.config.training.global_batch_size / width * (3 if part.layout.tensor > 1 else 1)


def _start() -> None:
    import torch

    torch.set_num_threads(1)
    # Only results of the real run's functions are reported.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _rehearse(part: Part) -> RankRehearsal | str:
    """Rehearse ``part``; return a message for an impossible layout, since some exceptions cannot be pickled."""
    try:
        return rehearse_rank(part)
    except UserError as error:
        return str(error)
