"""Find out how transformers stores the parameters of its modules.

transformers 5 fuses experts in memory and stores them one by one, and renames tensors of some types. Its
``save_pretrained`` passes the tensors of a model through ``revert_weight_conversion``. The same function runs here on
:class:`_Boxes`, which hold no values and record which box of which parameter moves where.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...errors import UserError
from ..architecture import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, ...]


def stored_pieces(model: PreTrainedModel, shapes: Mapping[str, Shape], where: str) -> dict[str, list[Piece]]:
    """Return the parameters that ``save_pretrained`` stores under other names or divided differently.

    Args:
        model: any device, also meta.
        shapes: of its parameters and persistent buffers, by name.
        where: the config, for errors.

    Returns:
        By parameter, the pieces that cover it: see :meth:`Architecture.stored_pieces`.

    Raises:
        UserError: transformers does not only move boxes of the parameters of this type.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tensors = {name: _Boxes.whole(name, shape) for name, shape in shapes.items()}
    try:
        stored = revert_weight_conversion(model, tensors)  # type: ignore[arg-type]
    except _NotBoxes as error:
        raise UserError(
            f"{where}: transformers stores {error.parameter} of model_type {model.config.model_type} after "
            f"{error.operation}, which Retemper cannot undo; use a model type without it"
        ) from None
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for tensor, boxes in stored.items():
        for box in boxes.boxes:
            pieces[box.parameter].append(Piece(tensor, box.offsets, box.sizes, box.at))
    return {name: pieces[name] for name in shapes if not _is_itself(name, shapes[name], pieces[name])}


def unused_tensors(model: PreTrainedModel) -> tuple[str, ...]:
    """Return regular expressions, searched in names, of the tensors in files that ``from_pretrained`` ignores."""
    return tuple(sorted(model._keys_to_ignore_on_load_unexpected or ()))


def float32_tensors(model: PreTrainedModel, names: Sequence[str]) -> frozenset[str]:
    """Return those of the parameters ``names`` that ``from_pretrained`` keeps in float32 with any dtype."""
    patterns = [pattern.replace("*", ".*") for pattern in model._keep_in_fp32_modules_strict or ()]
    return frozenset(name for name in names if any(re.search(pattern, name) for pattern in patterns))


def _is_itself(name: str, shape: Shape, pieces: Sequence[Piece]) -> bool:
    return [(piece.tensor, piece.sizes) for piece in pieces] == [(name, shape)]


class _NotBoxes(Exception):
    """An operation moves values in another way than in boxes."""

    def __init__(self, parameter: str, operation: str):
        super().__init__(f"{operation} of {parameter}")
        self.parameter, self.operation = parameter, operation


class _Box(NamedTuple):
    """A box of a parameter in a tensor."""

    parameter: str
    at: Shape
    """Where it begins in the parameter, which may have other leading dimensions of size 1 than the tensor."""
    offsets: Shape
    """Where it begins in the tensor."""
    sizes: Shape
    """Its sizes in the tensor."""

    def moved(self, dim: int, distance: int) -> _Box:
        """Return the box at another place of the tensor."""
        return self._replace(offsets=_changed(self.offsets, dim, self.offsets[dim] + distance))

    def cut(self, dim: int, start: int, stop: int) -> _Box | None:
        """Return the part of the box between ``start`` and ``stop`` of the tensor, in the same place; None if none."""
        low, high = max(start, self.offsets[dim]), min(stop, self.offsets[dim] + self.sizes[dim])
        if low >= high:
            return None
        place, skipped = dim + len(self.at) - len(self.sizes), low - self.offsets[dim]
        at = _changed(self.at, place, self.at[place] + skipped) if skipped else self.at
        return _Box(self.parameter, at, _changed(self.offsets, dim, low), _changed(self.sizes, dim, high - low))


class _Boxes:
    """A tensor without values that consists of boxes of parameters.

    It supports the functions of :data:`_FUNCTIONS`, with which transformers moves boxes, and raises :class:`_NotBoxes`
    for all others.
    """

    def __init__(self, shape: Shape, boxes: Sequence[_Box]):
        self.shape, self.boxes = shape, boxes

    @classmethod
    def whole(cls, name: str, shape: Shape) -> _Boxes:
        """Return the tensor that is the parameter ``name``."""
        begin = (0,) * len(shape)
        return cls(shape, [_Box(name, begin, begin, shape)])

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function not in _FUNCTIONS:
            first = args[0] if isinstance(args[0], _Boxes) else args[0][0]
            raise _NotBoxes(first.boxes[0].parameter, function.__name__)
        return _FUNCTIONS[function](*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _NotBoxes(self.boxes[0].parameter, name)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def size(self, dim: int) -> int:
        """Return the length of a dimension."""
        return self.shape[dim]

    def contiguous(self) -> _Boxes:
        """Return the same tensor."""
        return self

    def squeeze(self, dim: int = 0) -> _Boxes:
        """Remove the first dimension, which has size 1. Old versions of transformers do not name it."""
        if dim != 0 or self.shape[0] != 1:
            raise _NotBoxes(self.boxes[0].parameter, "squeeze")
        boxes = [box._replace(offsets=box.offsets[1:], sizes=box.sizes[1:]) for box in self.boxes]
        return _Boxes(self.shape[1:], boxes)

    def part(self, dim: int, start: int, stop: int) -> _Boxes:
        """Return the part of the tensor between ``start`` and ``stop`` of a dimension."""
        parts = [box.cut(dim, start, stop) for box in self.boxes]
        shape = _changed(self.shape, dim, stop - start)
        return _Boxes(shape, [part.moved(dim, -start) for part in parts if part is not None])


def _changed(numbers: Shape, dim: int, number: int) -> Shape:
    return (*numbers[:dim], number, *numbers[dim + 1 :])


def _chunk(tensor: _Boxes, chunks: int, dim: int = 0) -> list[_Boxes]:
    """As :func:`torch.chunk`."""
    return _split(tensor, -(-tensor.shape[dim] // chunks), dim)


def _split(tensor: _Boxes, split_size_or_sections: int | Sequence[int], dim: int = 0) -> list[_Boxes]:
    """As :func:`torch.split`."""
    length, sizes = tensor.shape[dim], split_size_or_sections
    starts = range(0, length, sizes) if isinstance(sizes, int) else [0, *accumulate(sizes)][:-1]
    return [tensor.part(dim, start, stop) for start, stop in zip(starts, [*starts[1:], length], strict=True)]


def _cat(tensors: Sequence[_Boxes], dim: int = 0) -> _Boxes:
    """As :func:`torch.cat`."""
    starts = [0, *accumulate(tensor.shape[dim] for tensor in tensors)]
    boxes = [box.moved(dim, start) for tensor, start in zip(tensors, starts, strict=False) for box in tensor.boxes]
    return _Boxes(_changed(tensors[0].shape, dim, starts[-1]), boxes)


def _stack(tensors: Sequence[_Boxes], dim: int = 0) -> _Boxes:
    """As :func:`torch.stack`, with the new dimension in front."""
    if dim != 0:
        raise _NotBoxes(tensors[0].boxes[0].parameter, "stack")
    boxes = [
        box._replace(offsets=(number, *box.offsets), sizes=(1, *box.sizes))
        for number, tensor in enumerate(tensors)
        for box in tensor.boxes
    ]
    return _Boxes((len(tensors), *tensors[0].shape), boxes)


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.chunk: _chunk,
    torch.split: _split,
    torch.cat: _cat,
    torch.stack: _stack,
}
