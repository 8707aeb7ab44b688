"""From sample numbers to the micro-batches of one rank, prepared ahead of the step by a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from ..budget import BatchPlan
from .packing import MicroBatch, pack
from .sample_order import SampleOrder
from .source import Source


class TrainingData:
    """The blend of training sources in its order, cut into global batches and dealt to ranks.

    Args:
        sources: in the order of ``order.sources``.
        order: the sample order.
        plan: batch sizes.
        data_rank: this rank's place among the ``plan.data_parallel_size`` ranks that read different samples.
        vocab_size: bound on token ids.
        attend_across_documents: see :func:`retemper.engine.data.packing.pack`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        order: SampleOrder,
        plan: BatchPlan,
        data_rank: int,
        vocab_size: int,
        attend_across_documents: bool,
    ):
        self.sources = sources
        self.order = order
        self.plan = plan
        self.data_rank = data_rank
        self.vocab_size = vocab_size
        self.attend_across_documents = attend_across_documents

    def micro_batches(self, first_sample: int) -> list[MicroBatch]:
        """This rank's part of the global batch that begins with sample ``first_sample``."""
        return [
            pack(
                [self._window(first_sample + offset) for offset in offsets],
                self.plan.sequence_length,
                self.attend_across_documents,
            )
            for offsets in self.plan.sample_offsets(self.data_rank)
        ]

    def _window(self, index: int):
        sample = self.order.sample(index)
        return self.sources[sample.source].window(sample.window, self.vocab_size)


def validation_batches(
    sources: Sequence[Source],
    plan: BatchPlan,
    data_rank: int,
    vocab_size: int,
    attend_across_documents: bool,
    max_tokens: int,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of the first ``max_tokens`` tokens of a validation set, windows in their own order.

    Every rank gets the same number of micro-batches, since they compute together: places beyond the last window are
    filled with masked tokens.
    """
    places = [(source, window) for source in sources for window in range(source.num_windows)]
    places = places[: max(1, max_tokens // plan.sequence_length)]
    width = plan.micro_batch_size * plan.data_parallel_size
    for first in range(0, len(places), width):
        mine = first + data_rank * plan.micro_batch_size
        windows = [
            places[index][0].window(places[index][1], vocab_size) if index < len(places) else None
            for index in range(mine, mine + plan.micro_batch_size)
        ]
        yield pack(windows, plan.sequence_length, attend_across_documents)


class Prefetcher:
    """Runs ``make(step)`` for successive steps on a thread, at most ``depth`` results ahead.

    An exception in ``make`` is raised by the :meth:`get` that would have returned its result. Use as a context manager.
    """

    def __init__(self, make: Callable[[int], list[MicroBatch]], steps: Sequence[int], depth: int):
        self._results: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(maxsize=depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, steps), name="data-prefetch", daemon=True)

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        self._thread.join()

    def get(self) -> list[MicroBatch]:
        """The next step's micro-batches; waits for them."""
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def _run(self, make: Callable[[int], list[MicroBatch]], steps: Sequence[int]) -> None:
        for step in steps:
            try:
                result: list[MicroBatch] | BaseException = make(step)
            except BaseException as error:
                result = error
            while not self._stopping.is_set():
                try:
                    self._results.put(result, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stopping.is_set() or isinstance(result, BaseException):
                return
