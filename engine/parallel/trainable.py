"""Select the trainable parameters: all, those of the tokens, or those whose names match patterns.

Frozen parameters have no gradients, and so no optimizer states either: each costs 4 bytes, a trained one 16. Autograd
computes nothing for blocks below the first trained parameter; above it, gradients of activations flow through all.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..config.settings import AdapterConfig, RunConfig, TrainingConfig
from ..config.spelling import nearest
from ..errors import UserError
from ..model.adapters import AdapterParameters, adapter_parameters
from ..model.architecture import Architecture
from ..model.implementations import meta_model
from ..model.language_model import LanguageModel, SameInput
from ..optim.state_sizes import state_itemsizes
from . import pipeline

Selection = str | list[str]
"""``training.trainable``: all, embeddings, or shell patterns."""


class ParameterFacts(NamedTuple):
    """A parameter of the whole model."""

    shape: tuple[int, ...]
    block: int | None
    """Number of its block; None outside of the blocks."""


@dataclass(frozen=True)
class Learning:
    """The products of a backward pass that are computed; by default, those of a model that learns as a whole."""

    weights: float = 1.0
    """Share of the blocks' matrices that have a gradient: of those of experts, that a token uses."""
    backward: float = 1.0
    """Share of the blocks through which gradients flow: those from the first one with a trained parameter on."""
    inputs: float = 1.0
    """Share of the blocks' matrices that are in those blocks: the gradients of their inputs are computed."""
    head_weight: bool = True
    """Whether the head's matrix has a gradient."""
    head_input: bool = True
    """Whether the head's input needs one: something else learns."""
    added: int = 0
    """Elements of the matrices of an adapter that multiply a token, all of which learn."""


ALL = Learning()


def selected(selection: Selection, names: Iterable[str], tables: Collection[str]) -> set[str]:
    """Return the trainable ones of ``names``.

    Args:
        selection: all, embeddings, or shell patterns (``fnmatch``), in which ``*`` matches any text.
        names: of parameters.
        tables: names of the parameters that ``embeddings`` selects.
    """
    if selection == "all":
        return set(names)
    if selection == "embeddings":
        return set(names) & set(tables)
    return {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in selection)}


def parameters_of(architecture: Architecture) -> Mapping[str, ParameterFacts]:
    """Return the parameters of the whole model that can learn by gradients, by name."""
    return _parameters_of(architecture)


@functools.lru_cache(maxsize=8)
def _parameters_of(architecture: Architecture) -> Mapping[str, ParameterFacts]:
    model = meta_model(architecture)
    blocks = {id(p): number for number, block in enumerate(model.blocks) for p in block.parameters()}
    return {
        name: ParameterFacts(tuple(parameter.shape), blocks.get(id(parameter)))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in model.constants
    }


def learning(architecture: Architecture, config: TrainingConfig, adapter: AdapterConfig | None = None) -> Learning:
    """Return what the backward pass computes. Within the first block that learns, all gradients are counted."""
    if adapter is not None and adapter.kind is not None:
        parameters = adapter_parameters(architecture, adapter)
        added = sum(architecture.active_elements(shape) for shape in parameters.added.values())
        return _learning(architecture, parameters.saved, _reached(parameters), round(added))
    if config.trainable == "all":
        return ALL
    names = selected(config.trainable, parameters_of(architecture), architecture.tables)
    return _learning(architecture, names, names)


def _reached(parameters: AdapterParameters) -> set[str]:
    """Return the parameters of the base to which gradients flow: those that train, or whose layers have an adapter."""
    return {f"{module}.weight" for module in parameters.modules} | parameters.saved.keys()


def _learning(architecture: Architecture, trained: Collection[str], names: Collection[str], added: int = 0) -> Learning:
    """Return what is computed if the parameters ``trained`` have gradients, and gradients flow to ``names``."""
    every = parameters_of(architecture)
    blocks = [facts.block for name, facts in every.items() if name in names and facts.block is not None]
    embeds, tied = architecture.embedding_name in trained, architecture.tie_word_embeddings
    outside = {name for name in names if every[name].block is None} - {architecture.head_name}
    # Outside of the blocks, what is not an embedding, the head or the final norm is a table that blocks read.
    first = 0 if outside & _before_blocks(every) else min(blocks, default=architecture.num_layers)
    in_blocks = {name: facts.shape for name, facts in every.items() if facts.block is not None}
    matrices = {name: architecture.active_elements(shape) for name, shape in in_blocks.items()}
    total = sum(matrices.values())
    learned = sum(elements for name, elements in matrices.items() if name in trained)
    reached = sum(elements for name, elements in matrices.items() if _block_of(every[name]) >= first)
    return Learning(
        weights=learned / total,
        backward=1 - first / architecture.num_layers,
        inputs=reached / total,
        head_weight=embeds if tied else architecture.head_name in trained,
        head_input=bool(blocks or outside),
        added=added,
    )


def _block_of(facts: ParameterFacts) -> int:
    assert facts.block is not None
    return facts.block


def count(architecture: Architecture, config: TrainingConfig, adapter: AdapterConfig | None = None) -> int:
    """Return the number of trainable parameters."""
    if adapter is not None and adapter.kind is not None:
        return adapter_parameters(architecture, adapter).num_trained
    if config.trainable == "all":
        return architecture.num_parameters
    every = parameters_of(architecture)
    return sum(math.prod(every[name].shape) for name in selected(config.trainable, every, architecture.tables))


def _before_blocks(every: Mapping[str, ParameterFacts]) -> set[str]:
    """Return the names of the parameters before the first block: of what it reads."""
    first = next(place for place, facts in enumerate(every.values()) if facts.block is not None)
    return set(list(every)[:first])


def check(config: RunConfig, architecture: Architecture) -> None:
    """Refuse patterns that match nothing, and layouts in which some stage would have nothing to train.

    Raises:
        UserError: names the setting.
    """
    selection = config.training.trainable
    if selection == "all":
        return
    every = parameters_of(architecture)
    for pattern in selection if isinstance(selection, list) else ():
        if not fnmatch.filter(every, pattern):
            raise UserError(_no_match(pattern, every, architecture))
    names = selected(selection, every, architecture.tables)
    _check_stages(config, architecture, names)
    if config.training.fuse_projections:
        _check_fused(architecture, names)


def _no_match(pattern: str, every: Collection[str], architecture: Architecture) -> str:
    problem = f"training.trainable has {pattern!r}, which matches none of the model's {len(every)} parameters"
    if architecture.tie_word_embeddings and fnmatch.fnmatchcase(architecture.head_name, pattern):
        return f"{problem}: the head is the embedding; write {architecture.embedding_name!r}"
    near = nearest(pattern, every) or nearest(f"*{pattern.strip('*')}*", every)
    parts = {part for name in every for part in name.split(".")}
    unknown = (part.strip("*") for part in pattern.split(".") if part not in parts)
    word = next((close for part in unknown if (close := nearest(part, parts))), None)
    hint = f"did you mean {near!r}?" if near else f"names have {word!r}" if word else f"a name is {next(iter(every))!r}"
    return f"{problem}; {hint}; * matches any text, so begin with it to match the end of a name"


def _check_stages(config: RunConfig, architecture: Architecture, names: Collection[str]) -> None:
    parallel = config.parallel
    if parallel.pipeline == 1:
        return
    if parallel.pipeline_schedule.endswith("zero_bubble"):
        raise UserError(
            f"training.trainable is {config.training.trainable}, but parallel.pipeline_schedule "
            f"{parallel.pipeline_schedule} computes the gradients of all weights; use 1f1b or interleaved_1f1b"
        )
    stages = pipeline.cut_layers(architecture, parallel.pipeline * parallel.pipeline_stages_per_rank)
    for number, layers in enumerate(stages):
        if not any(name in names for name, _ in meta_model(architecture, layers).named_parameters()):
            raise UserError(
                f"training.trainable is {config.training.trainable} with parallel.pipeline {parallel.pipeline} and "
                f"parallel.pipeline_schedule {parallel.pipeline_schedule}: stage {number} (layers {layers.start} to "
                f"{layers.stop - 1}) would have no trainable parameters; use fewer stages, and other axes"
            )


def _check_fused(architecture: Architecture, names: Collection[str]) -> None:
    model = meta_model(architecture)
    of_parameter = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        layers = module.layers_with_same_input if isinstance(module, SameInput) else []
        for kind in ("weight", "bias"):
            parts = [of_parameter[id(getattr(layer, kind))] for layer in layers if getattr(layer, kind) is not None]
            if len({part in names for part in parts}) > 1:
                raise UserError(
                    f"training.fuse_projections is true, but training.trainable selects only some of {', '.join(parts)}"
                    ", which are one matrix then; set fuse_projections to false"
                )


def apply(model: LanguageModel, config: TrainingConfig, adapter: AdapterConfig | None = None) -> None:
    """Freeze the parameters that are not trained; call before FSDP, which groups parameters by this.

    With an ``adapter``, its parameters and those of ``adapter.modules_to_save`` are trained.
    """
    if adapter is not None and adapter.kind is not None:
        trained = adapter_parameters(model.architecture, adapter).trained
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        return
    if config.trainable == "all":
        return
    named = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in model.constants}
    names = selected(config.trainable, named, model.architecture.tables)
    for name, parameter in named.items():
        parameter.requires_grad_(name in names)


def describe(architecture: Architecture, config: TrainingConfig) -> str:
    """Return what learns and what is frozen, for the start summary."""
    every, trained = parameters_of(architecture), count(architecture, config)
    names = selected(config.trainable, every, architecture.tables)
    selection = config.trainable if isinstance(config.trainable, str) else ", ".join(config.trainable)
    return (
        f"{selection}: {len(names)} of {len(every)} tensors with {trained:,} parameters learn, "
        f"{architecture.num_parameters - trained:,} parameters are frozen"
    )


def is_same_in_every_block(
    architecture: Architecture, config: TrainingConfig, adapter: AdapterConfig | None = None
) -> bool:
    """Return whether all blocks train the same parameters, so that the costs of all follow from those of some."""
    model = meta_model(architecture)
    if adapter is not None and adapter.kind is not None:
        reached = _reached(adapter_parameters(architecture, adapter))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in reached)
    elif isinstance(config.trainable, str):
        return True
    else:
        apply(model, config)
    return len({tuple(p.requires_grad for p in block.parameters()) for block in model.blocks}) == 1


def learned(architecture: Architecture, config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters that learn, by name."""
    if config.adapter.kind is not None:
        return dict(adapter_parameters(architecture, config.adapter).trained)
    every = parameters_of(architecture)
    names = selected(config.training.trainable, every, architecture.tables)
    return {name: facts.shape for name, facts in every.items() if name in names}


@functools.lru_cache(maxsize=8)
def table_names_of(architecture: Architecture) -> frozenset[str]:
    """Return the names of the embeddings and of the head of the whole model."""
    return frozenset(meta_model(architecture).table_names())


def state_bytes(architecture: Architecture, config: RunConfig) -> int:
    """Return the bytes of the optimizer's states of the whole model, without counts of steps.

    Raises:
        UserError: the class that ``optimizer.name`` imports cannot be used.
    """
    tables = table_names_of(architecture)
    return sum(
        int(math.prod(shape) * sum(state_itemsizes(name, shape, config.optimizer, tables)))
        for name, shape in learned(architecture, config).items()
    )


def require_same(
    former: Mapping[str, Any], config: TrainingConfig, folder: str | Path, architecture: Architecture
) -> None:
    """Refuse to continue from a checkpoint with optimizer states of other parameters than the trainable ones.

    Args:
        former: configuration of the run that wrote the checkpoint ``folder``, as a nested dictionary.
        config: of this run.
        folder: see above.
        architecture: of the model.

    Raises:
        UserError: with both values.
    """
    there = former.get("training", {}).get("trainable", "all")
    if there == config.trainable:
        return
    every, tables = parameters_of(architecture), architecture.tables
    if selected(there, every, tables) != selected(config.trainable, every, tables):
        raise UserError(
            f"training.trainable is {config.trainable}, but {folder} was trained with {there} and holds optimizer "
            "states of those parameters only; set it back, or start a new run_folder with model.initialize_from"
        )
