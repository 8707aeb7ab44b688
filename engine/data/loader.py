"""Make one rank's micro-batches from sample numbers, ahead of the step, in a background thread."""

from __future__ import annotations

import bisect
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from ..batch import Batch
from ..schedule import BatchPlan
from .packing import pack
from .sample_order import SampleOrder
from .source import Chunk, Source


class TrainingData:
    """The training sources in sample order, divided into global batches and distributed to ranks.

    Args:
        sources: in the order of ``order.sources``.
        order: the sample order.
        plan: batch sizes.
        data_rank: this rank's place among the ``plan.data_parallel_size`` ranks that read different samples.
        vocab_size: bound on token ids.
        attend_across_documents: see :func:`retemper.engine.data.packing.pack`.
        pin_memory: whether micro-batches are in page-locked memory, from which a GPU copies without a wait.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        order: SampleOrder,
        plan: BatchPlan,
        data_rank: int,
        vocab_size: int,
        attend_across_documents: bool,
        pin_memory: bool = False,
    ):
        self.sources = sources
        self.order = order
        self.plan = plan
        self.data_rank = data_rank
        self.vocab_size = vocab_size
        self.attend_across_documents = attend_across_documents
        self.pin_memory = pin_memory
        # Only their ratios matter, since the loss is a weighted mean. So the largest is 1, and equal ones are not used.
        largest = max(source.loss_weight for source in sources)
        relative = [source.loss_weight / largest for source in sources]
        self._loss_weights = None if set(relative) == {1.0} else relative

    def micro_batches(self, first_sample: int) -> list[Batch]:
        """Return this rank's part of the global batch that begins with sample ``first_sample``."""
        batches = [
            self._packed([first_sample + offset for offset in offsets])
            for offsets in self.plan.sample_offsets(self.data_rank)
        ]
        return [batch.pin_memory() for batch in batches] if self.pin_memory else batches

    def _packed(self, samples: list[int]) -> Batch:
        length = self.plan.sequence_length
        weights = self._loss_weights
        of_samples = None if weights is None else [weights[self.order.sample(sample).source] for sample in samples]
        batch = pack([self._chunk(sample) for sample in samples], length, self.attend_across_documents, of_samples)
        numbers = torch.cat([torch.arange(sample * length, (sample + 1) * length) for sample in samples])
        return batch._replace(token_numbers=numbers)

    def _chunk(self, index: int) -> Chunk:
        sample = self.order.sample(index)
        return self.sources[sample.source].chunk(sample.chunk, self.vocab_size, sample.epoch)


class SourceBatch(NamedTuple):
    """A micro-batch of a validation set, with chunks of one source only."""

    source: int
    """Number of the source in the set."""
    batch: Batch


def validation_batches(
    sources: Sequence[Source],
    plan: BatchPlan,
    data_rank: int,
    vocab_size: int,
    attend_across_documents: bool,
    max_tokens: int,
) -> Iterator[SourceBatch]:
    """Yield this rank's micro-batches of a validation set, the same ones each time.

    They hold all targets of the set, with a shorter last chunk of each source; or ``max_tokens`` tokens in whole
    chunks, spread evenly over all sources. Every rank gets the same number of micro-batches, since they compute
    together: places beyond the last chunk of a source are filled with masked tokens.
    """
    micro_batches = list(_chunks_by_micro_batch(sources, plan, max_tokens))
    for first in range(0, len(micro_batches), plan.data_parallel_size):
        mine = first + data_rank
        source, numbers = micro_batches[mine] if mine < len(micro_batches) else (micro_batches[-1][0], [])
        chunks: list[Chunk | None] = [sources[source].chunk(number, vocab_size) for number in numbers]
        chunks += [None] * (plan.micro_batch_size - len(chunks))
        yield SourceBatch(source, pack(chunks, plan.sequence_length, attend_across_documents))


def _chunks_by_micro_batch(
    sources: Sequence[Source], plan: BatchPlan, max_tokens: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield (source, its chunks) of every micro-batch of all ranks."""
    ends, count = chunks_evaluated(sources, plan.sequence_length, max_tokens)
    numbers = [place * ends[-1] // count for place in range(count)]
    for source, group in itertools.groupby(numbers, key=lambda number: bisect.bisect_right(ends, number)):
        first = ends[source - 1] if source else 0
        chunks = [number - first for number in group]
        for start in range(0, len(chunks), plan.micro_batch_size):
            yield source, chunks[start : start + plan.micro_batch_size]


def chunks_evaluated(sources: Sequence[Source], sequence_length: int, max_tokens: int) -> tuple[list[int], int]:
    """Return (running sum of the chunks of each source, number of evaluated chunks)."""
    ends = list(itertools.accumulate(source.num_chunks_with_tail for source in sources))
    if sum(source.num_targets for source in sources) <= max_tokens:
        return ends, ends[-1]
    whole = list(itertools.accumulate(source.num_chunks for source in sources))
    ends = whole if whole[-1] else ends
    return ends, min(ends[-1], max(1, max_tokens // sequence_length))


def describe_evaluated(sources: Sequence[Source], sequence_length: int, max_tokens: int) -> str:
    """Describe which part of a validation set is evaluated."""
    _, count = chunks_evaluated(sources, sequence_length, max_tokens)
    total = sum(source.num_chunks_with_tail for source in sources)
    if count == total:
        return f"all chunks ({total:,}), none left out"
    return f"{count:,} of {total:,} chunks, spread evenly; training.eval_tokens {max_tokens:,} leaves out the others"


class Prefetcher:
    """Runs ``make(first_sample)`` for successive global batches on a thread, at most ``depth`` results ahead.

    An exception in ``make`` is raised by the :meth:`get` that would have returned its result. Use as a context manager.
    """

    def __init__(self, make: Callable[[int], list[Batch]], first_samples: Sequence[int], depth: int):
        self._results: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, first_samples), name="data-prefetch", daemon=True)

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        self._thread.join()

    def get(self) -> list[Batch]:
        """Return the next global batch's micro-batches, after waiting for them if necessary."""
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def _run(self, make: Callable[[int], list[Batch]], first_samples: Sequence[int]) -> None:
        for first_sample in first_samples:
            try:
                result: list[Batch] | BaseException = make(first_sample)
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
