"""What a run begins from: model, data, and the place where it goes on. Read and checked before anything is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.attention import Choice
from .attention_choice import choose_attention
from .budget import BatchPlan
from .checkpoint.assets import HfAssets, find_assets
from .checkpoint.manifest import Manifest, read_manifest, require_same_order
from .checkpoint.tensors import check_model_tensors, describe_casts, load_tensors, model_tensors, optimizer_tensors
from .config import RunConfig, to_dict
from .data.catalog import Catalog, open_catalog
from .data.sample_order import SampleOrder
from .model.architecture import Architecture, parse_architecture
from .model.decoder import meta_decoder
from .optim import allocate_states
from .parallel import compile as block_compile
from .parallel import fsdp
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


def open_inputs(config: RunConfig, plan: BatchPlan, resume_from: Path | None, device: torch.device) -> RunInputs:
    """Config and tokenizer of the model, the datasets, and the place in their order.

    Raises:
        UserError: they cannot be used, or do not fit each other or the checkpoint.
    """
    assets = find_assets(config.model, resume_from)
    assert assets.config is not None
    named = resume_from or config.model.initialize_from
    architecture = parse_architecture(
        assets.config, "model.architecture" if named is None else f"{named}/hf/config.json"
    )
    attention = choose_attention(config, architecture, device)
    compiled = block_compile.wanted(config, device, attention.backend)
    choices = Choices(attention.backend, compiled, plan.num_micro_batches)
    check_model(config, architecture, choices, device)
    catalog = open_catalog(config.data, plan, architecture.vocab_size, assets.tokenizer_sha256, config.seed)
    order, progress, was = catalog.sample_order(config.seed), Progress(), None
    if resume_from:
        was = read_manifest(resume_from)
        require_same_order(was, to_dict(config), resume_from)
        catalog.require_unchanged(was.datasets, str(resume_from))
        order = order.resumed(was.sample_order, was.consumed_samples)
        progress = Progress(was.step, was.consumed_samples, was.consumed_tokens, was.best)
    return RunInputs(assets, architecture, attention, choices, catalog, order, progress, was)


def load_weights(
    config: RunConfig,
    architecture: Architecture,
    resume_from: Path | None,
    model: ModelParts,
    optimizer: torch.optim.Optimizer,
) -> list[str]:
    """Everything as it was when the checkpoint was written; or weights of ``initialize_from``, or random ones.

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
    check_model_tensors(folder, meta_decoder(architecture))
    tensors: dict[str, Tensor] = model_tensors(model)
    if resume_from:
        allocate_states(optimizer)
        tensors |= optimizer_tensors(model, optimizer)
    casts = describe_casts(folder, tensors, resuming=resume_from is not None)
    load_tensors(folder, tensors)
    return casts
