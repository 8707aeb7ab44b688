"""Convert a budget in epochs to tokens, without a run: from the sizes of datasets that exist."""

from __future__ import annotations

from ...engine.config.checks import with_known_budget
from ...engine.config.settings import RunConfig
from ...engine.data.indexed_dataset import IndexedDataset
from ...engine.data.source import split_source
from ...engine.data.text_sources import text_sources
from ...engine.errors import UserError


def with_planned_budget(config: RunConfig) -> RunConfig:
    """Return ``config`` with its budget in tokens.

    Raises:
        UserError: it is in epochs, and the data are text, or not here.
    """
    training = config.training
    if training.train_epochs is None or training.train_tokens is not None:
        return config
    try:
        if texts := text_sources(config.data):
            raise UserError(f"{texts[0].key} is text that has not been tokenized")
        return with_known_budget(config, sum(_chunks(config)) * training.sequence_length)
    except UserError as error:
        raise UserError(
            f"training.train_epochs is {training.train_epochs:g}, but the size of the data is not known here: {error}; "
            "add --training.train_tokens N for the plan"
        ) from None


def _chunks(config: RunConfig) -> list[int]:
    length, held_out = config.training.sequence_length, config.data.validation_fraction
    return [
        split_source(source.identity, IndexedDataset(source.path), length, held_out)[0].num_chunks
        for source in config.data.train
    ]
