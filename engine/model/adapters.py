"""Which parameters an adapter adds to a model, and which parameters train: a description that builds nothing.

Names: an adapted linear layer ``{module}`` with ``{module}.weight`` [out, in] gets ``{module}.lora_A.weight`` [r, in]
and ``{module}.lora_B.weight`` [out, r], and with DoRA ``{module}.lora_magnitude_vector`` [out]. Names of the base do
not change. The adapters of E experts are stacked as their weight [E, out, in] is: [E, r, in] and [E, out, r].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..config.settings import AdapterConfig
from ..errors import UserError
from .architecture import Architecture
from .implementations import meta_model

LORA_A, LORA_B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
"""Names of the parameters of an adapter below that of its linear layer."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class LinearShape:
    """Size of a linear layer of the base."""

    out_features: int
    in_features: int
    num_experts: int | None = None
    """Number of stacked layers of this size, each with its own adapter; None: it is not a stack."""


@dataclass(frozen=True)
class AdapterParameters:
    """The parameters of a model with an adapter, by name and whole shape."""

    config: AdapterConfig
    modules: Mapping[str, LinearShape]
    """The linear layers with an adapter, in the order of the model."""
    saved: Mapping[str, Shape]
    """Parameters of the base that train fully (``adapter.modules_to_save``)."""
    frozen: Mapping[str, Shape]
    """Parameters of the base that do not train. Checkpoints do not contain them."""

    @property
    def scaling(self) -> float:
        """Return the factor of the product: alpha / r, or alpha / sqrt(r) (rsLoRA)."""
        return scaling(self.config)

    @property
    def added(self) -> dict[str, Shape]:
        """Return names and shapes of the parameters of the adapter."""
        return {
            f"{module}.{name}": shape
            for module, linear in self.modules.items()
            for name, shape in parameter_shapes(self.config, linear).items()
        }

    @property
    def trained(self) -> dict[str, Shape]:
        """Return names and shapes of all parameters that train, which checkpoints contain."""
        return {**self.added, **self.saved}

    def trains_head(self, architecture: Architecture) -> bool:
        """Return whether the output head trains fully."""
        tied = architecture.tie_word_embeddings
        return (architecture.embedding_name if tied else architecture.head_name) in self.saved

    @property
    def num_trained(self) -> int:
        """Return the number of trained parameters."""
        return sum(math.prod(shape) for shape in self.trained.values())

    @property
    def num_frozen(self) -> int:
        """Return the number of frozen parameters."""
        return sum(math.prod(shape) for shape in self.frozen.values())


def scaling(config: AdapterConfig) -> float:
    """Return the factor of the product: alpha / r (Hu et al., 2021, https://arxiv.org/abs/2106.09685), or
    alpha / sqrt(r) (Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732).
    """
    return config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)


def parameter_shapes(config: AdapterConfig, linear: LinearShape) -> dict[str, Shape]:
    """Return the shapes of the parameters that the adapter of one linear layer has, by their names below it."""
    shapes: dict[str, Shape] = {
        LORA_A: (config.rank, linear.in_features),
        LORA_B: (linear.out_features, config.rank),
    }
    if config.dora:
        shapes[MAGNITUDE] = (linear.out_features,)
    stacked = () if linear.num_experts is None else (linear.num_experts,)
    return {name: (*stacked, *shape) for name, shape in shapes.items()}


def adapter_parameters(architecture: Architecture, config: AdapterConfig) -> AdapterParameters:
    """Return the parameters of the model ``architecture`` with the adapter ``config``.

    Raises:
        UserError: a pattern matches nothing, or a layer would both have an adapter and train fully.
    """
    linears, shapes, trainable = _parameters(architecture)
    modules = _chosen(
        "adapter.targets", config.targets, {name: [name] for name in linears}, "linear layer of the blocks"
    )
    saved = _chosen(
        "adapter.modules_to_save",
        config.modules_to_save,
        {name: [name, name.rpartition(".")[0]] for name in trainable},
        "parameter or module",
    )
    both = next((name for name in shapes if name in saved and name.rpartition(".")[0] in modules), None)
    if both is not None:
        raise UserError(
            f"adapter.modules_to_save trains {both} fully, but adapter.targets gives its layer an adapter; exclude it "
            "from one of them"
        )
    chosen = {name: linears[name] for name in linears if name in modules}
    train = {name: shape for name, shape in shapes.items() if name in saved}
    frozen = {name: shape for name, shape in shapes.items() if name not in saved}
    stack = next((name for name, linear in chosen.items() if linear.num_experts is not None), None)
    if config.dora and stack is not None:
        raise UserError(
            f"adapter.dora is true, but adapter.targets give the experts of {stack} an adapter, for which DoRA is not "
            "implemented; set it to false, or target other layers"
        )
    return AdapterParameters(config, chosen, train, frozen)


def _parameters(architecture: Architecture) -> tuple[dict[str, LinearShape], dict[str, Shape], list[str]]:
    """Return the linear layers of the blocks, the shapes of all parameters, and the names of those that may train."""
    from torch import nn

    from .experts import GroupedLinear

    model = meta_model(architecture)
    of_blocks = {module for block in model.blocks for module in block.modules()}
    linears = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module in of_blocks:
            linears[name] = LinearShape(module.out_features, module.in_features)
        elif type(module) is GroupedLinear:
            num_experts, outputs, inputs = module.weight.shape
            linears[name] = LinearShape(outputs, inputs, num_experts)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return (
        linears,
        shapes,
        [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name not in model.constants
        ],
    )


def _chosen(key: str, patterns: list[str], names: Mapping[str, list[str]], kind: str) -> set[str]:
    """Return the entries of ``names`` one of whose names matches a pattern.

    Raises:
        UserError: a pattern matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name, spellings in names.items() if any(fnmatchcase(each, pattern) for each in spellings)}
        if not matches:
            suffix = next(_with_suffix(pattern, names), None)
            remedy = f'write "*.{pattern}"' if suffix else f"names are such as {next(iter(names), 'none: it has none')}"
            raise UserError(f'{key} has "{pattern}", which matches no {kind} of the model; {remedy}')
        found |= matches
    return found


def _with_suffix(pattern: str, names: Mapping[str, list[str]]) -> Iterator[str]:
    return (name for name, spellings in names.items() if any(fnmatchcase(each, f"*.{pattern}") for each in spellings))
