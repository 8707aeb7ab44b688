"""What a run starts from: random weights, a Hugging Face folder or a checkpoint, opened once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .config.settings import DATA_FILES, RunConfig, to_dict
from .data.catalog import Catalog, open_catalog
from .data.renamed_sources import keep_names
from .data.sample_order import SampleOrder
from .errors import UserError
from .model.architecture import CONFIG_FILE, INLINE, Architecture, hf_config_of, parse_architecture
from .model.attention_choice import choose_attention
from .model.decoder import meta_decoder
from .optim import allocate_states
from .parallel import compile as block_compile
from .parallel import fsdp, trainable
from .parallel.build import Choices
from .parallel.build import check as check_model
from .parallel.forward_backward import ModelParts
from .parallel.memory_check import require_memory
from .parallel.precision import with_precision
from .parallel.process_group import Ranks
from .schedule import BatchPlan, Progress
from .weights.checkpoint.assets import ASSET_FOLDER, HfAssets, complete_assets
from .weights.checkpoint.manifest import Manifest
from .weights.checkpoint.resume_changes import require_allowed
from .weights.checkpoint.store import CheckpointStore
from .weights.checkpoint.tensors import (
    describe_casts,
    load_tensors,
    model_tensors,
    open_tensors,
    require_model_tensors,
    training_tensors,
)
from .weights.hugging_face.initial import KEY, load_hf_tensors, local_weights, open_weights
from .weights.hugging_face.model import HfModel
from .weights.hugging_face.weight_dtypes import declared_dtype, with_dtype
from .weights.parts import TensorParts


@dataclass(frozen=True)
class StartFolder:
    """Where a run starts, found and not yet opened."""

    folder: str | None = None
    """A checkpoint or a Hugging Face folder; None: random weights."""
    manifest: Manifest | None = None
    """Of the checkpoint."""
    resumed: bool = False
    """Whether it is a checkpoint that the run continues from, optimizer states, progress and all."""
    remarks: tuple[str, ...] = ()
    """Lines for the log."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Random weights; what other starts have in common."""

    assets: HfAssets
    architecture: Architecture
    seed: int
    """Of random weights."""
    folder: str | None = None
    """That the weights are from."""
    resumed: Manifest | None = None
    """Of the checkpoint that the run continues from; None for a new run."""

    def load_into(self, model: ModelParts, optimizer: torch.optim.Optimizer) -> list[str]:
        """Give ``model``, this rank's part without values, its weights. All ranks must call this.

        Args:
            model: is changed.
            optimizer: of its parameters; gets the states of a checkpoint that the run continues from.

        Returns:
            lines about what was cast.

        Raises:
            UserError: the weights cannot be read.
        """
        for decoder in model.decoders:
            decoder.initialize_(self.seed, fsdp.copy_full_)
        return []

    def moved_to(self, folder: Path, manifest: Manifest) -> CheckpointStart:
        """Return the start of the same run from its checkpoint in ``folder``."""
        return CheckpointStart(
            assets=self.assets,
            architecture=self.architecture,
            seed=self.seed,
            folder=str(folder),
            resumed=manifest,
            parts=open_tensors(folder),
        )


@dataclass(frozen=True, kw_only=True)
class HuggingFaceStart(Start):
    """The weights of a Hugging Face folder."""

    weights: HfModel

    def load_into(self, model: ModelParts, optimizer: torch.optim.Optimizer) -> list[str]:
        """See :class:`Start`."""
        assert self.folder is not None
        tensors = model_tensors(model)
        where = f"weights     {self.folder}: "
        lines = [line if line.startswith("note: ") else where + line for line in self.weights.notes]
        lines += describe_casts(self.folder, self.weights.parameters.tensors, tensors, resuming=False)
        load_hf_tensors(self.weights, tensors)
        return lines


@dataclass(frozen=True, kw_only=True)
class CheckpointStart(Start):
    """A checkpoint: its weights, and where the run continues also its optimizer states."""

    parts: TensorParts
    """The tensors that it holds, readable in any parts."""

    def load_into(self, model: ModelParts, optimizer: torch.optim.Optimizer) -> list[str]:
        """See :class:`Start`."""
        assert self.folder is not None
        require_model_tensors(self.folder, self.parts.tensors, meta_decoder(self.architecture))
        wanted: dict[str, Tensor] = model_tensors(model)
        if self.resumed:
            allocate_states(optimizer)
            wanted = training_tensors(model, optimizer)
        casts = describe_casts(self.folder, self.parts.tensors, wanted, resuming=self.resumed is not None)
        load_tensors(self.folder, wanted, opened=self.parts)
        return casts


def find_start(config: RunConfig, ranks: Ranks, store: CheckpointStore) -> tuple[RunConfig, StartFolder]:
    """Find, download and verify what a run starts from. All ranks must call this.

    Args:
        config: of the run.
        ranks: that train together.
        store: of the run's checkpoints.

    Returns:
        the configuration, in which training sources have the names by which the checkpoint that the run continues from
        knows them; and where the run starts.

    Raises:
        UserError: on every rank, where it is missing or damaged.
    """
    resume_from, manifest = store.resolve(config.resume), store.resolved
    if resume_from is not None and manifest is not None:
        data, lines = ranks.run_on_all(lambda: keep_names(config.data, manifest.datasets))
        return replace(config, data=data), StartFolder(str(resume_from), manifest, True, tuple(lines))
    if config.model.initialize_from is None:
        return config, StartFolder()
    kind, folder = local_weights(config.model.initialize_from, ranks)
    return config, StartFolder(folder, store.require_valid(folder, KEY) if kind == "checkpoint" else None)


def open_start(config: RunConfig, found: StartFolder) -> Start:
    """Open what was found: the files that travel with the model, its architecture, and the table of its tensors.

    Raises:
        UserError: they cannot be used, or do not fit each other or ``config``.
    """
    model, folder, weights = config.model, found.folder, None
    if folder is None:
        read, where = HfAssets({}), model.architecture if isinstance(model.architecture, str) else INLINE
    elif found.manifest is None:
        read, where = HfAssets.read(folder), str(Path(folder) / CONFIG_FILE)
        content = read.files.get(CONFIG_FILE)
        weights = open_weights(folder, hf_config_of(content, Path(where)) if content is not None else None)
    else:
        read, where = HfAssets.of_checkpoint(folder), str(Path(folder) / ASSET_FOLDER / CONFIG_FILE)
    assets = complete_assets(model, read, folder, found.resumed)
    if weights is not None:  # as checkpoint_convert/hf_to_dcp.py keeps them
        assets = with_dtype(assets, (tensor.dtype for tensor in weights.parameters.tensors.values()))
    assert assets.config is not None
    if config.checkpoint.export_hf:
        declared_dtype(assets.config, where)  # in which the end of the run exports the weights
    start = Start(
        assets=assets,
        architecture=parse_architecture(assets.config, where) if weights is None else weights.architecture,
        seed=config.seed,
        folder=folder,
        resumed=found.manifest if found.resumed else None,
    )
    if weights is not None:
        return HuggingFaceStart(**vars(start), weights=weights)
    if folder is not None:
        return CheckpointStart(**vars(start), parts=open_tensors(folder))
    return start


def choose(config: RunConfig, architecture: Architecture, plan: BatchPlan, ranks: Ranks) -> tuple[RunConfig, Choices]:
    """Decide what the configuration leaves open; refuse what the model makes impossible. All ranks must call this.

    Returns:
        the configuration with its precision decided, and the other decisions.

    Raises:
        UserError: on all ranks, with both sides of the arithmetic.
    """
    config, precision = with_precision(config, ranks)

    def decide() -> Choices:
        attention = choose_attention(config, architecture, ranks.device)
        compiled = block_compile.enabled(config, ranks.device, attention.backend)
        choices = Choices(attention, compiled, plan.num_micro_batches, precision.reason)
        check_model(config, architecture, choices, ranks.device)
        require_memory(config, architecture, ranks.device, ranks.world_size)
        return choices

    return config, ranks.run_on_all(decide)


def open_data(config: RunConfig, plan: BatchPlan, start: Start) -> tuple[Catalog, SampleOrder, Progress]:
    """Open the datasets of a run, and find the place in their order where it begins.

    Raises:
        UserError: they cannot be used, or do not fit the model or the checkpoint.
    """
    catalog = open_catalog(config.data, plan, start.architecture.vocab_size, start.assets.tokenizer, config.seed)
    order, progress, was = catalog.sample_order(config.seed), Progress(), start.resumed
    if was is not None:
        folder = Path(str(start.folder))
        require_allowed(was, to_dict(config), config.allow_changes, folder)
        trainable.require_same(was.config, config.training, folder)
        if DATA_FILES not in config.allow_changes:
            catalog.require_unchanged(was.datasets, str(folder))
        former_length = was.config.get("training", {}).get("sequence_length", plan.sequence_length)
        order = order.resumed(was.sample_order, was.consumed_samples, former_length)
        samples = was.consumed_samples * former_length // plan.sequence_length
        progress = Progress(was.step, samples, was.consumed_tokens, was.best)
    begin = config.optimizer.schedule_start_tokens
    if begin > progress.tokens:
        raise UserError(
            f"optimizer.schedule_start_tokens is {begin:,}, but the run continues at {progress.tokens:,} tokens, where "
            f"its schedule has not begun; set it to {progress.tokens} at most"
        )
    steps = plan.steps_left(config.training.train_tokens, progress.tokens)
    order.require(progress.samples + steps * plan.global_batch_size)
    return catalog, order, progress
