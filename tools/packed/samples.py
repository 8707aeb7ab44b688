"""The packed sequences of a run, or of datasets in file order, as the engine reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...engine.config.budget import TRAIN, given_key
from ...engine.config.checks import with_known_budget
from ...engine.config.parser import parse_config
from ...engine.config.remote_file import without_query
from ...engine.config.settings import DataConfig, SourceConfig
from ...engine.data.catalog import Catalog, open_catalog
from ...engine.data.packing import pack
from ...engine.data.sample_order import Sample, SampleOrder
from ...engine.prepare_data import prepare_data_here
from ...engine.schedule import BatchPlan, plan_batches
from ...kernels.linear_cross_entropy import IGNORE_INDEX
from ..reports.dataset.training_plan import ANY_VOCABULARY, model_facts


class PackedSequence(NamedTuple):
    """One row. S is the sequence length."""

    input_ids: npt.NDArray[np.int64]
    """[S] token ids."""
    labels: npt.NDArray[np.int64]
    """[S] as the models of transformers expect them, which compare position i with the output at i - 1: ``input_ids``,
    and -100 at the first token of each document and where a loss mask is 0."""
    shift_labels: npt.NDArray[np.int64]
    """[S] the engine's targets: the next token, also the one after the sequence, or -100."""
    position_ids: npt.NDArray[np.int64]
    """[S] from 0 in each document."""
    seq_lengths: npt.NDArray[np.int64]
    """[documents] their lengths, which sum to S."""
    source: str
    """Name of the source."""


@dataclass(frozen=True)
class PackedData:
    """Packed sequences in order."""

    catalog: Catalog
    order: SampleOrder | None
    """The order of a run; None: all chunks of the sources, one after another."""
    num_rows: int
    sequence_length: int
    attend_across_documents: bool
    vocab_size: int
    record: dict[str, Any]
    """How the sequences were made."""

    def rows(self) -> Iterator[PackedSequence]:
        """Yield all sequences.

        Raises:
            UserError: a token id is outside the vocabulary.
        """
        for sample in self._samples():
            source = self.catalog.train[sample.source]
            chunk = source.chunk(sample.chunk, self.vocab_size, sample.epoch)
            batch = pack([chunk], self.sequence_length, self.attend_across_documents)
            targets = batch.targets.numpy()
            yield PackedSequence(
                batch.tokens.numpy(),
                np.concatenate([[IGNORE_INDEX], targets[:-1]]),
                targets,
                batch.position_ids.numpy(),
                np.diff(batch.cu_seqlens.numpy()),
                source.name,
            )

    def _samples(self) -> Iterator[Sample]:
        if self.order is not None:
            yield from map(self.order.sample, range(self.num_rows))
            return
        for number, source in enumerate(self.catalog.train):
            for chunk in range(source.num_chunks):
                yield Sample(number, 0, chunk)


def open_run(config_file: str) -> PackedData:
    """Return the sequences that the run of ``config_file`` trains on, in its order.

    Raises:
        UserError: the trainer would refuse the run at its start.
    """
    config = prepare_data_here(parse_config(["--config", config_file]))
    plan = plan_batches(config.training, 1)  # the order does not depend on the number of ranks
    vocab_size, tokenizer, _ = model_facts(config)
    catalog = open_catalog(config.data, plan, vocab_size, tokenizer, config.seed)
    order = catalog.sample_order(config.seed)
    budget = with_known_budget(config, catalog.epoch_tokens).training.budget
    num_rows = plan.steps_for(budget) * plan.global_batch_size
    order.require(num_rows, given_key(config, TRAIN))
    record = {"config": without_query(config_file), "seed": config.seed, "global_batch_size": plan.global_batch_size}
    return _packed(catalog, order, num_rows, plan, config.data, vocab_size, record)


def open_datasets(prefixes: Sequence[str], sequence_length: int, packing: str) -> PackedData:
    """Return the sequences of datasets, one after another, each token at most once.

    Raises:
        UserError: a dataset is missing, damaged, or shorter than a sequence.
    """
    data = DataConfig(train=[SourceConfig(prefix) for prefix in prefixes], packing=packing)  # type: ignore[arg-type]
    plan = BatchPlan(sequence_length, 1, 1, 1)
    catalog = open_catalog(data, plan, ANY_VOCABULARY, None, seed=0)
    num_rows = sum(source.num_chunks for source in catalog.train)
    return _packed(catalog, None, num_rows, plan, data, ANY_VOCABULARY, {})


def _packed(
    catalog: Catalog,
    order: SampleOrder | None,
    num_rows: int,
    plan: BatchPlan,
    data: DataConfig,
    vocab_size: int,
    record: dict[str, Any],
) -> PackedData:
    facts = {
        "rows": num_rows,
        "sequence_length": plan.sequence_length,
        "packing": data.packing,
        "shuffle": data.shuffle,
        "attend_across_documents": data.attend_across_documents,
        "sources": catalog.fingerprints,
        **record,
    }
    catalog.finish_checks()
    return PackedData(catalog, order, num_rows, plan.sequence_length, data.attend_across_documents, vocab_size, facts)
