"""Dry run ranks in separate processes: a process can have only one process group, and two cores do twice the work."""

from __future__ import annotations

import logging
import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from ...engine.errors import UserError
from ...engine.system import usable_cores
from .dry_run import RankSpec, RankUsage, dry_run

Report = Callable[[int, int], None]
"""Called with (finished dry runs, total dry runs)."""


class DryRunPool:
    """Processes that dry run ranks; a context manager."""

    def __init__(self, num_processes: int | None = None):
        self._count = num_processes or min(8, usable_cores())

    def __enter__(self) -> DryRunPool:
        # Not forked: PyTorch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(self._count, context, initializer=_start)
        return self

    def __exit__(self, *exception: object) -> None:
        self._executor.shutdown(wait=exception[0] is None, cancel_futures=True)

    def run(self, specs: list[RankSpec], report: Report = lambda done, total: None) -> list[RankUsage]:
        """Dry run all ``specs``, the longest first.

        Raises:
            UserError: a layout is impossible.
        """
        # By duration: an expensive spec at the end would leave the other processes idle.
        order = sorted(range(len(specs)), key=lambda index: -_cost(specs[index]))
        futures = {index: self._executor.submit(_dry_run, specs[index]) for index in order}
        results = {}
        for done, index in enumerate(order, 1):
            result = futures[index].result()
            if isinstance(result, str):
                raise UserError(result)
            results[index] = result
            report(done, len(specs))
        return [results[index] for index in range(len(specs))]


def _cost(spec: RankSpec) -> float:
    blocks = len(spec.stage_blocks or spec.architecture.block_sizes)
    width = spec.config.training.micro_batch_size * spec.layout.data_parallel
    return blocks * spec.config.training.global_batch_size / width * (3 if spec.layout.tensor > 1 else 1)


def _start() -> None:
    import torch

    torch.set_num_threads(1)
    # Only results of the real run's functions are reported.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _dry_run(spec: RankSpec) -> RankUsage | str:
    """Dry run ``spec``; return a message for an impossible layout, since some exceptions cannot be pickled."""
    try:
        return dry_run(spec)
    except UserError as error:
        return str(error)
