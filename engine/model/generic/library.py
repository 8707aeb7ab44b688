"""Build modules of the transformers library on the meta device, and find their parts."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import UserError
from .remote_code import SETTING

_MOST_OF_BUFFER = 2**25
"""Elements of the largest buffers: causal masks of 4,096 x 4,096 tokens."""
_KERNEL_PACKAGES = {"causal_conv1d": "causal-conv1d", "fla": "flash-linear-attention", "mamba_ssm": "mamba-ssm"}
"""Names of packages by module."""
ATTENTION = "retemper"
"""Name of our attention among those of transformers, see :mod:`.attention`."""


@dataclass(frozen=True)
class Parts:
    """The parts of a causal language model of transformers."""

    model: Any
    """The whole ``...ForCausalLM``."""
    backbone_name: str
    """Name of the next one, such as ``model`` or ``transformer``."""
    backbone: Any
    """The module that maps tokens to hidden states."""
    embedding: nn.Embedding
    head: Any
    blocks: nn.ModuleList


def library_config(config: dict[str, Any], where: str) -> Any:
    """Return the configuration object that transformers makes of ``config``, the content of a ``config.json``.

    Raises:
        UserError: transformers does not know its type, or refuses a value.
    """
    transformers = _transformers()
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        remedy = "upgrade transformers, or correct it"
        if config.get("auto_map"):
            remedy = f"it brings its own code (auto_map), which runs only with {SETTING}: true; set it if you trust it"
        raise UserError(
            f"{where}: model_type is {model_type!r}, which transformers {transformers.__version__} does not know; "
            f"{remedy}"
        )
    left_out = ("model_type", "auto_map", "quantization_config")
    try:
        values = {key: _with_floats(value) for key, value in config.items() if key not in left_out}
        made = transformers.AutoConfig.for_model(model_type, **values)
    except Exception as error:  # whatever its checks raise
        raise UserError(f"{where}: transformers refuses it: {_one_line(error)}; correct it") from None
    if type(made) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{where}: model_type {model_type} is not a causal language model in transformers "
            f"{transformers.__version__}; name a model that generates text"
        )
    return made


def _with_floats(value: Any) -> Any:
    """Return a copy of ``value`` with the numbers that transformers writes as ``{"__float__": "Infinity"}``."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def meta_library_model(config: Any, attention: str = ATTENTION) -> Any:
    """Return the causal language model of ``config`` with its parameters on the meta device, in fp32.

    Buffers, such as rotary frequencies, are on the CPU with their values: nothing else could compute them later.
    """
    return _on_meta(config, attention, None)


def constructed_values(config: Any, seed: int, attention: str = ATTENTION) -> dict[str, Tensor]:
    """Return the values that the modules' constructors give to parameters and buffers, by name.

    Most parameters get theirs later, by ``_init_weights``. ``seed`` is of random ones.
    """
    values: dict[nn.Parameter, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _on_meta(config, attention, values)
    found = {name: values[parameter] for name, parameter in model.named_parameters() if parameter in values}
    return {**found, **dict(model.named_buffers())}


def _on_meta(config: Any, attention: str, values: dict[nn.Parameter, Tensor] | None) -> Any:
    """Return the model of ``config`` on the meta device; add the values of its parameters to ``values`` if given."""
    config = copy.deepcopy(config)
    config.use_cache = False
    with _parameters_on_meta(values):
        model = _transformers().AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=torch.float32
        )
    return model.eval()


def library_model(config: Any, attention: str) -> Any:
    """Return the causal language model of ``config`` on the CPU in fp32, randomly initialized."""
    config = copy.deepcopy(config)
    config.use_cache = False
    made = _transformers().AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return made.eval()


def library_attention(config: Any) -> str:
    """Return the best attention of transformers that this type supports."""
    model_class = _transformers().MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return "sdpa" if model_class._supports_sdpa else "eager"


def missing_kernel_packages(config: Any) -> list[str]:
    """Return the packages with GPU kernels that the code of this type uses if they are installed, and that are not."""
    model_class = _transformers().MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    source = inspect.getsource(sys.modules[model_class.__module__])
    used = [module for module in _KERNEL_PACKAGES if f'"{module}"' in source]
    return [_KERNEL_PACKAGES[module] for module in used if importlib.util.find_spec(module) is None]


def find_parts(model: Any) -> Parts:
    """Return the parts of ``model``.

    Raises:
        ValueError: it is not made of a backbone with blocks of their own parameters, and a head.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None:
        raise ValueError("it has no separate embedding and head")
    blocks = _blocks(model, model.config.num_hidden_layers)
    if (shared := _shared(blocks)) is not None:  # sharding could not keep it one parameter
        raise ValueError(f"its blocks share the parameter {shared}")
    holders = [name for name, module in model.named_modules() if name and _holds(module, embedding, blocks)]
    if not holders:
        raise ValueError("it has no backbone with embedding and blocks")
    name = max(holders, key=len)
    return Parts(model, name, model.get_submodule(name), embedding, head, blocks)


def _shared(blocks: nn.ModuleList) -> str | None:
    """Return the name in ``blocks`` of a parameter that several modules have."""
    own = {name for name, _ in blocks.named_parameters()}
    every = (name for name, _ in blocks.named_parameters(remove_duplicate=False))
    return next((name for name in every if name not in own), None)


def _holds(module: nn.Module, *wanted: nn.Module) -> bool:
    inside = set(module.modules())
    return all(each in inside for each in wanted) and module not in wanted


def _blocks(model: nn.Module, count: int) -> nn.ModuleList:
    """Return the list of blocks: the first list with one module for each layer, else the longest list."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = next((each for each in lists if len(each) == count), max(lists, key=len, default=None))
    if found is None:
        raise ValueError("it has no list of blocks")
    return found


class _LargeOnMeta(TorchFunctionMode):
    """Puts new tensors on the meta device that become parameters: uninitialized ones, and very large ones."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``function``."""
        options = dict(kwargs or {})
        is_new = function in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
        if is_new and options.get("device") is None and (function is torch.empty or _count(args) > _MOST_OF_BUFFER):
            options["device"] = "meta"
        return function(*args, **options)


def _compact(values: Tensor) -> Tensor:
    """Return the same values, without memory if they are all the same."""
    is_constant = values.numel() > 0 and bool((values == values.flatten()[0]).all())
    return values.flatten()[0].clone().expand(values.shape) if is_constant else values


def _count(sizes: tuple[Any, ...]) -> int:
    flat = sizes[0] if sizes and isinstance(sizes[0], (tuple, list)) else sizes
    return math.prod(size for size in flat if isinstance(size, int))


@contextmanager
def _parameters_on_meta(values: dict[nn.Parameter, Tensor] | None) -> Iterator[None]:
    """Put every parameter that is registered in a module on the meta device, and leave buffers where they are.

    The values that it had before are added to ``values`` if it is given.
    """
    from transformers import PreTrainedModel

    register, initialize = nn.Module.register_parameter, PreTrainedModel.initialize_weights

    @functools.wraps(register)
    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            constructed = parameter.detach()
            parameter = nn.Parameter(constructed.to("meta"), requires_grad=parameter.requires_grad)
            if values is not None:
                values[parameter] = _compact(constructed)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    # Random values would take most of the time, and are lost at once.
    PreTrainedModel.initialize_weights = lambda model: None  # type: ignore[method-assign]
    try:
        with _LargeOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        PreTrainedModel.initialize_weights = initialize  # type: ignore[method-assign]


def _transformers() -> Any:
    import transformers

    return transformers


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
