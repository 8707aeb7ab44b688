"""Handle the dtypes of weights: their names, the dtype declared by a config, and the casts of a conversion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from ...errors import UserError
from ..checkpoint.assets import HfAssets
from ..tensor_source import StoredTensor
from .weight_options import AUTO, DTYPE_CHOICES, DTYPE_NAMES

WEIGHT_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
_KEYS = ("dtype", "torch_dtype")
"""Keys for the dtype in config.json: transformers 5 writes the first, older versions know only the second."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name, such as ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype | None:
    """Return the dtype of ``--dtype name``; None for ``auto``.

    Raises:
        UserError: there is no such dtype.
    """
    if name != AUTO and name not in WEIGHT_DTYPES:
        raise UserError(f"--dtype {name}: expected one of {', '.join(DTYPE_CHOICES)}")
    return WEIGHT_DTYPES.get(name)


def declared_dtype(config: Mapping[str, Any], where: str) -> torch.dtype | None:
    """Return the dtype declared in the content of ``config.json``; ``where`` names the file in errors.

    Raises:
        UserError: it declares a dtype that weights cannot have.
    """
    declared = next((config[key] for key in _KEYS if config.get(key) is not None), None)
    if declared is None:
        return None
    dtype = WEIGHT_DTYPES.get(str(declared).removeprefix("torch."))
    if dtype is None:
        raise UserError(
            f"{where}: dtype is {declared!r}, supported: {', '.join(WEIGHT_DTYPES)}; correct it, or choose one with "
            "--dtype"
        )
    return dtype


def with_dtype(assets: HfAssets, dtypes: Iterable[torch.dtype]) -> HfAssets:
    """Return ``assets`` whose config declares the common dtype of ``dtypes``; unchanged if it already does.

    A model with several dtypes has no single dtype to declare: its config stays unchanged.
    """
    config, distinct = assets.config, set(dtypes)
    if config is None or len(distinct) != 1:
        return assets
    name = dtype_name(distinct.pop())
    declared = {key: name for key in _KEYS if key in config} or {_KEYS[-1]: name}
    changed = {**config, **declared}
    return assets if changed == config else assets.with_config(changed)


def cast_to(
    tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None, keep: Collection[str] = ()
) -> dict[str, StoredTensor]:
    """Return ``tensors`` with their dtypes changed to ``dtype``, except those named in ``keep``; unchanged for None."""
    return {
        name: tensor if dtype is None or name in keep else StoredTensor(tensor.shape, dtype)
        for name, tensor in tensors.items()
    }


def dtypes_of(tensors: Mapping[str, StoredTensor], keep: Collection[str] = ()) -> set[torch.dtype]:
    """Return the dtypes of ``tensors``, except those named in ``keep``."""
    return {tensor.dtype for name, tensor in tensors.items() if name not in keep}


def describe_casts(before: Mapping[str, StoredTensor], after: Mapping[str, StoredTensor]) -> list[str]:
    """Return a line for each pair of dtypes: ``cast 290 tensors from float32 to bfloat16``."""
    pairs = Counter((before[name].dtype, after[name].dtype) for name in after)
    return [
        f"cast {count} tensors from {dtype_name(source)} to {dtype_name(target)}"
        for (source, target), count in pairs.items()
        if source != target
    ]
