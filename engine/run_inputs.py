"""What a run begins from: model, data, and the place where it goes on. Read and checked before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.attention import Choice
from .attention_choice import choose_attention
from .budget import BatchPlan
from .checkpoint.assets import HfAssets, asset_folder, find_assets, is_hf_folder
from .checkpoint.changes import require_allowed
from .checkpoint.manifest import Manifest, read_manifest
from .checkpoint.tensors import (
    check_model_tensors,
    describe_casts,
    load_tensors,
    model_tensors,
    stored_tensors,
    training_tensors,
)
from .config import DATA_FILES, OptimizerConfig, RunConfig, to_dict
from .data.catalog import Catalog, open_catalog
from .data.renamed import keep_names
from .data.sample_order import SampleOrder
from .errors import UserError
from .hugging_face.slices import load_hf_tensors
from .hugging_face.start import open_start
from .hugging_face.weight_dtypes import declared_dtype, declaring
from .model.architecture import CONFIG_FILE, INLINE, Architecture, parse_architecture
from .model.decoder import meta_decoder
from .optim import allocate_states
from .parallel import compile as block_compile
from .parallel import fsdp, trainable
from .parallel.build import Choices
from .parallel.build import check as check_model
from .parallel.passes import ModelParts
from .run_state import Progress


@dataclass(frozen=True)
class RunInputs:
    """Everything that was read."""

    assets: HfAssets
    architecture: Architecture
    attention: Choice
    choices: Choices
    catalog: Catalog
    order: SampleOrder
    progress: Progress
    resumed: Manifest | None
    """Of the checkpoint that the run goes on from."""


def keep_source_names(config: RunConfig, resume_from: Path | None) -> tuple[RunConfig, list[str]]:
    """The configuration with the names that the checkpoint ``resume_from`` knows the training sources by.

    Returns:
        the configuration, and lines for the log.

    Raises:
        UserError: the checkpoint or a source cannot be read.
    """
    if resume_from is None:
        return config, []
    data, lines = keep_names(config.data, read_manifest(resume_from).datasets)
    return replace(config, data=data), lines


def open_inputs(config: RunConfig, plan: BatchPlan, resume_from: Path | None, device: torch.device) -> RunInputs:
    """Config and tokenizer of the model, the datasets, and the place in their order.

    Args:
        config: of the run; ``model.initialize_from`` is a folder.
        plan: of its steps.
        resume_from: the checkpoint that the run goes on from.
        device: where it computes.

    Raises:
        UserError: they cannot be used, or do not fit each other or the checkpoint.
    """
    named = resume_from or config.model.initialize_from
    source = open_start(named) if named is not None and is_hf_folder(named) else None
    assets = find_assets(config.model, resume_from)
    if source is not None:  # as checkpoint_convert/hf_to_dcp.py keeps them
        assets = declaring(assets, (tensor.dtype for tensor in source.tensors.values()))
    assert assets.config is not None
    if named is not None:
        where = str(asset_folder(named) / CONFIG_FILE)
    else:
        where = config.model.architecture if isinstance(config.model.architecture, str) else INLINE
    architecture = parse_architecture(assets.config, where)
    if config.checkpoint.export_hf:
        declared_dtype(assets.config, where)  # in which the end of the run exports the weights
    attention = choose_attention(config, architecture, device)
    compiled = block_compile.wanted(config, device, attention.backend)
    choices = Choices(attention.backend, compiled, plan.num_micro_batches)
    check_model(config, architecture, choices, device)
    catalog = open_catalog(config.data, plan, architecture.vocab_size, assets.tokenizer, config.seed)
    order, progress, was = catalog.sample_order(config.seed), Progress(), None
    if resume_from:
        was = read_manifest(resume_from)
        require_allowed(was, to_dict(config), config.allow_changes, resume_from)
        trainable.require_same(was.config, config.training, resume_from)
        if DATA_FILES not in config.allow_changes:
            catalog.require_unchanged(was.datasets, str(resume_from))
        former_length = was.config.get("training", {}).get("sequence_length", plan.sequence_length)
        order = order.resumed(was.sample_order, was.consumed_samples, former_length)
        samples = was.consumed_samples * former_length // plan.sequence_length
        progress = Progress(was.step, samples, was.consumed_tokens, was.best)
    _require_schedule_begun(config.optimizer, progress.tokens)
    return RunInputs(assets, architecture, attention, choices, catalog, order, progress, was)


def _require_schedule_begun(optimizer: OptimizerConfig, tokens: int) -> None:
    if optimizer.schedule_start_tokens > tokens:
        raise UserError(
            f"optimizer.schedule_start_tokens is {optimizer.schedule_start_tokens:,}, but the run goes on at "
            f"{tokens:,} tokens, where its schedule has not begun; set it to {tokens} at most"
        )


def load_weights(
    config: RunConfig,
    architecture: Architecture,
    resume_from: Path | None,
    model: ModelParts,
    optimizer: torch.optim.Optimizer,
) -> list[str]:
    """Everything as it was when the checkpoint was written; or weights of ``initialize_from``, or random ones.

    Args:
        config: of the run; ``model.initialize_from`` is a folder.
        architecture: of the model.
        resume_from: the checkpoint that the run goes on from.
        model: this rank's part of it, without values.
        optimizer: of its parameters.

    Returns:
        lines about what was cast.

    Raises:
        UserError: the checkpoint is of another model, or cannot be read.
    """
    folder = resume_from or config.model.initialize_from
    if folder is None:
        for decoder in model.decoders:
            decoder.initialize_(config.seed, fsdp.copy_full_)
        return []
    if is_hf_folder(folder):
        return _load_hf_weights(folder, model_tensors(model))
    check_model_tensors(folder, meta_decoder(architecture))
    tensors = model_tensors(model)
    if resume_from:
        allocate_states(optimizer)
        tensors = training_tensors(model, optimizer)
    casts = describe_casts(folder, stored_tensors(folder), tensors, resuming=resume_from is not None)
    load_tensors(folder, tensors)
    return casts


def _load_hf_weights(folder: str | Path, tensors: dict[str, Tensor]) -> list[str]:
    source = open_start(folder)
    where = f"weights     {source.weights.folder}: "
    lines = [line if line.startswith("note: ") else where + line for line in source.notes]
    lines += describe_casts(folder, source.tensors, tensors, resuming=False)
    load_hf_tensors(source, tensors)
    return lines
