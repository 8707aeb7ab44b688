"""Weights of a Hugging Face folder, straight into sharded parameters: every rank reads its own part and no more."""

from __future__ import annotations

from torch import Tensor

from ..finite import OPTION, require_finite
from ..parts import Part, TensorParts, all_ranks, load_parts
from ..tensor_source import rows_of
from .model import HfModel

_NONFINITE_REMEDY = (
    "get another copy of the weights; to start from them nonetheless, convert the folder with "
    f"checkpoint_convert/hf_to_dcp.py {OPTION}"
)


def load_hf_tensors(model: HfModel, tensors: dict[str, Tensor], distributed: bool = True) -> None:
    """Read parameters of ``model`` into ``tensors`` in place, casting to their dtypes; each may be sharded in any way.

    Args:
        model: the folder.
        tensors: by name.
        distributed: whether there are other ranks, which then call this as well.

    Raises:
        UserError: on every rank, when on any of them a file cannot be read, or holds values that are not finite.
    """
    source = TensorParts(model.weights.folder, model.tensors, {name: [_whole(model, name)] for name in model.tensors})
    check = lambda name, values: require_finite(name, values, _NONFINITE_REMEDY)  # noqa: E731
    load_parts(source, tensors, model.weights.folder, all_ranks(None, distributed), check)


def _whole(model: HfModel, name: str) -> Part:
    """The only part of a tensor that is stored whole."""
    (path, start), sizes = model.weights.place(name), rows_of(model.tensors[name].shape)
    return Part((0,) * len(sizes), sizes, path, lambda descriptor: start)
