"""Compute what a run does with a dataset: steps, epochs of each source, and documents that are cut.

The numbers come from the trainer's own code: the same catalog of datasets and the same sample order.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from ....engine.config.budget import TRAIN, given_key
from ....engine.config.checks import with_known_budget
from ....engine.config.parser import parse_config
from ....engine.config.settings import RunConfig, SourceConfig
from ....engine.data.catalog import Catalog, open_catalog
from ....engine.data.document_packing import CHUNKS_PER_GROUP
from ....engine.data.index_format import dataset_prefix
from ....engine.data.sample_order import SampleOrder
from ....engine.data.source import Source
from ....engine.data.tokenizer_identity import TokenizerIdentity
from ....engine.data.truncation import TruncationCount, count_truncated
from ....engine.model.implementations import parse_architecture
from ....engine.observe.start_summary import describe_data
from ....engine.prepare_data import prepare_data_here
from ....engine.schedule import BatchPlan, plan_batches
from ....engine.weights.checkpoint.assets import find_assets

ANY_VOCABULARY = 1 << 31
_GROUPS_COUNTED = 256
"""Groups of chunks in which cut documents are counted; covers 134 million tokens in chunks of 4,096."""
_CURVE_POINTS = 120


@dataclass(frozen=True)
class SourcePlan:
    """The samples that a run draws from one source."""

    name: str
    path: str
    is_this: bool
    """Whether it is the inspected dataset."""
    tokens: int
    """Tokens of the part used for training."""
    chunks: int
    """Samples in one epoch."""
    samples: int
    """Samples drawn until the end of the run."""
    samples_by_stage: list[int]
    epochs: float
    """samples / chunks."""
    capped_at_tokens: int | None
    """Tokens of the run at which the source reaches its cap; None if it does not in this run."""


@dataclass(frozen=True)
class TrainingPlan:
    """The run that ``--config`` describes."""

    config: str
    role: str
    """``train``: the configuration trains on the dataset. ``validation``: it evaluates on it. ``assumed``: it does
    neither, and the dataset replaces its data."""
    checked_model: bool
    """Whether the model's vocabulary and tokenizer were compared with the datasets'."""
    steps: int
    global_batch_size: int
    sequence_length: int
    tokens: int
    """Tokens of all steps: at least training.train_tokens, in whole steps."""
    stage_stops: list[int]
    """Tokens after which each stage ends."""
    sources: list[SourcePlan]
    truncation: TruncationCount | None
    """None if the run does not train on the dataset."""
    summary: list[str]
    """Lines that the trainer logs about the data at the start."""
    curve: list[tuple[int, list[float]]]
    """(tokens of the run, epochs of each source up to there)."""


def plan_training(config_file: str, prefix: str) -> TrainingPlan:
    """Return what the run of ``config_file`` does with the dataset ``prefix``.

    Raises:
        UserError: the trainer would refuse the run at its start.
    """
    config, role = _with_dataset(prepare_data_here(parse_config(["--config", config_file])), prefix)
    plan = plan_batches(config.training, 1)  # steps and epochs do not depend on the number of ranks
    vocab_size, tokenizer, checked = model_facts(config)
    catalog = open_catalog(config.data, plan, vocab_size, tokenizer, config.seed)
    order = catalog.sample_order(config.seed)
    steps = plan.steps_for(with_known_budget(config, catalog.epoch_tokens).training.budget)
    last_sample = steps * plan.global_batch_size
    order.require(last_sample, given_key(config, TRAIN))
    # The last stage may have no end, and later stages may never be reached.
    stops = [last_sample if stage.stop is None else min(stage.stop, last_sample) for stage in catalog.stages]
    return TrainingPlan(
        config=config_file,
        role=role,
        checked_model=checked,
        steps=steps,
        global_batch_size=plan.global_batch_size,
        sequence_length=plan.sequence_length,
        tokens=steps * plan.tokens_per_step,
        stage_stops=[stop * plan.sequence_length for stop in stops],
        sources=[_plan_source(source, catalog, order, stops, prefix) for source in catalog.train],
        truncation=next(
            (_count_truncated(source) for source in catalog.train if _same(source.dataset.prefix, prefix)), None
        ),
        summary=describe_data(config.data, catalog, order, last_sample),
        curve=_curve(catalog, order, last_sample, plan),
    )


def _with_dataset(config: RunConfig, prefix: str) -> tuple[RunConfig, str]:
    """Return a configuration that uses the dataset, and the dataset's role in it."""
    mixtures = [stage.train for stage in config.data.stages] or [config.data.train]
    if any(_same(source.path, prefix) for mixture in mixtures for source in mixture):
        return config, "train"
    if any(_same(path, prefix) for path in config.data.validation_paths.values()):
        return config, "validation"
    data = replace(config.data, train=[SourceConfig(prefix)], stages=[], validation={})
    return replace(config, data=data), "assumed"


def _same(one: str, other: str) -> bool:
    return os.path.realpath(dataset_prefix(one)) == os.path.realpath(dataset_prefix(other))


def model_facts(config: RunConfig) -> tuple[int, TokenizerIdentity | None, bool]:
    """Return vocabulary size, tokenizer, and whether they are known: the model may not be on this machine."""
    if config.model.initialize_from is not None and not os.path.exists(config.model.initialize_from):
        return ANY_VOCABULARY, None, False
    assets = find_assets(config.model)
    assert assets.config is not None
    return parse_architecture(assets.config).vocab_size, assets.tokenizer, True


def _plan_source(source: Source, catalog: Catalog, order: SampleOrder, stops: list[int], prefix: str) -> SourcePlan:
    given = [order.cursors(stop)[source.name] for stop in stops]
    return SourcePlan(
        name=source.name,
        path=str(catalog.fingerprints[source.name]["path"]),
        is_this=_same(source.dataset.prefix, prefix),
        tokens=source.stop - source.start,
        chunks=source.num_chunks,
        samples=given[-1],
        samples_by_stage=[now - before for now, before in zip(given, [0, *given[:-1]], strict=True)],
        epochs=given[-1] / source.num_chunks,
        capped_at_tokens=_capped_at(source.name, order, stops[-1]),
    )


def _capped_at(name: str, order: SampleOrder, last_sample: int) -> int | None:
    """Return the tokens of the run after which the source no longer takes part in its stage."""
    for phase in order.curriculum.phases:
        wanted = [source.name for source in order.curriculum.stages[phase.stage].sources]
        if phase.start < last_sample and name in wanted and name not in [source.name for source in phase.sources]:
            return phase.start * order.sequence_length
    return None


def _count_truncated(source: Source | None) -> TruncationCount | None:
    if source is None:
        return None
    groups = -(-source.num_chunks // (CHUNKS_PER_GROUP if source.packer is None else source.packer.chunks_per_group))
    counted = sorted({groups * i // _GROUPS_COUNTED for i in range(_GROUPS_COUNTED)})
    return count_truncated(source, groups=counted)


def _curve(catalog: Catalog, order: SampleOrder, last_sample: int, plan: BatchPlan) -> list[tuple[int, list[float]]]:
    samples = sorted({last_sample * i // _CURVE_POINTS for i in range(_CURVE_POINTS + 1)})
    given = [order.cursors(sample) for sample in samples]
    return [
        (sample * plan.sequence_length, [count[source.name] / source.num_chunks for source in catalog.train])
        for sample, count in zip(samples, given, strict=True)
    ]
