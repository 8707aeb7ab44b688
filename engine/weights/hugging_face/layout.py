"""Map the parameters of a model to the tensors of Hugging Face files, in both directions.

Most parameters are stored as they are. Others are pieces of stored tensors or are made of several ones, because files
hold fused projections or single experts
(:meth:`~retemper.engine.model.language_model.Architecture.stored_pieces`). The mapping moves no values. It renames and
divides the parts of tensors, so any rank can read its shard of any parameter, and a converter the rows of any tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...errors import UserError
from ...model.architecture import Architecture, Piece
from ...model.language_model import LanguageModel
from ..coverage import coverage_problem
from ..parts import Part, TensorParts, intersection
from ..tensor_source import StoredTensor, rows_of
from .weight_dtypes import dtype_name

Shape = tuple[int, ...]
Pieces = Mapping[str, Sequence[Piece]]


@dataclass(frozen=True)
class Layout:
    """The parameters of a model, and the pieces of stored tensors that hold them."""

    shapes: Mapping[str, Shape]
    """Of the parameters, in the model's order."""
    pieces: Pieces
    """Of every parameter."""

    @classmethod
    def of(cls, architecture: Architecture, model: LanguageModel) -> Layout:
        """Return the layout of ``model``, which has the whole ``architecture``."""
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        return cls.with_pieces(shapes, architecture.stored_pieces(shapes))

    @classmethod
    def with_pieces(cls, shapes: Mapping[str, Shape], pieces: Pieces) -> Layout:
        """Return the layout in which parameters without ``pieces`` are stored as they are."""
        layout = cls(shapes, {name: pieces.get(name) or [_whole(name, shape)] for name, shape in shapes.items()})
        assert all(_covers(shape, layout.pieces[name]) for name, shape in shapes.items())
        assert all(_covers(shape, layout.parameters_in[name]) for name, shape in layout.published_shapes.items())
        return layout

    @cached_property
    def published_shapes(self) -> dict[str, Shape]:
        """The tensors in Hugging Face files: names and shapes, in the order of the parameters."""
        shapes: dict[str, Shape] = {}
        for pieces in self.pieces.values():
            for piece in pieces:
                end = tuple(at + size for at, size in zip(piece.offsets, piece.sizes, strict=True))
                shapes[piece.tensor] = tuple(map(max, shapes.get(piece.tensor, end), end))
        return shapes

    @cached_property
    def parameters_in(self) -> dict[str, list[Piece]]:
        """For every stored tensor, the pieces of parameters that it consists of."""
        held: dict[str, list[Piece]] = defaultdict(list)
        for name, pieces in self.pieces.items():
            for piece in pieces:
                sizes = _with_dims(piece.sizes, len(self.shapes[name]))
                held[piece.tensor].append(Piece(name, piece.at, sizes, piece.offsets))
        return dict(held)

    def published_name(self, parameter: str) -> str:
        """Return the name in files of ``parameter`` if it is stored as one tensor, as embeddings are; else its own."""
        pieces = self.pieces.get(parameter, ())
        return pieces[0].tensor if len(pieces) == 1 else parameter

    def published_names(self, parameters: Iterable[str]) -> list[str]:
        """Return :meth:`published_name` of ``parameters``."""
        return [self.published_name(name) for name in parameters]

    def found_in(self, stored: Collection[str]) -> Layout:
        """Return this layout for files with the names ``stored``, which may hold parameters as they are in memory.

        transformers saves a model that it has loaded from such files in the same way.
        """
        as_they_are = {
            name: [_whole(name, shape)]
            for name, shape in self.shapes.items()
            if name in stored and any(piece.tensor not in stored for piece in self.pieces[name])
        }
        return Layout(self.shapes, {**self.pieces, **as_they_are}) if as_they_are else self

    def parameters(self, published: TensorParts) -> TensorParts:
        """Return the parameters, read from the ``published`` tensors of Hugging Face files."""
        return _assembled(published, self.shapes, self.pieces)

    def published(self, parameters: TensorParts) -> TensorParts:
        """Return the tensors of Hugging Face files, read from ``parameters``."""
        return _assembled(parameters, self.published_shapes, self.parameters_in)


def _whole(name: str, shape: Shape) -> Piece:
    """Return the piece of a parameter that is stored as it is."""
    begin = (0,) * len(shape)
    return Piece(name, begin, shape, begin)


def _covers(shape: Shape, pieces: Sequence[Piece]) -> bool:
    """Return whether ``pieces`` cover a tensor of ``shape`` exactly."""
    boxes = [(piece.at or (0,), rows_of(_with_dims(piece.sizes, len(shape)))) for piece in pieces]
    return coverage_problem(rows_of(shape), boxes) is None


def _assembled(source: TensorParts, shapes: Mapping[str, Shape], pieces: Pieces) -> TensorParts:
    """Return tensors of ``shapes`` that consist of ``pieces`` of the tensors of ``source``."""
    tensors, parts = {}, {}
    for name, shape in shapes.items():
        dtypes = {source.tensors[piece.tensor].dtype: piece.tensor for piece in pieces[name]}
        if len(dtypes) > 1:
            (one, first), (other, second), *_ = dtypes.items()
            raise UserError(
                f"{source.where}: {first} is {dtype_name(one)} and {second} is {dtype_name(other)}, but {name} is made "
                "of both; cast them to one dtype"
            )
        tensors[name] = StoredTensor(shape, next(iter(dtypes)))
        parts[name] = [part for piece in pieces[name] for part in _parts_of(piece, source, len(rows_of(shape)))]
    return TensorParts(source.where, tensors, parts)


def _parts_of(piece: Piece, source: TensorParts, num_dims: int) -> Iterator[Part]:
    """Yield the parts of ``source`` that hold ``piece``, as parts of a tensor with ``num_dims`` dimensions."""
    shape = source.tensors[piece.tensor].shape
    offsets, sizes, at = piece.offsets or (0,), rows_of(piece.sizes), piece.at or (0,)
    if at == offsets and sizes == rows_of(shape):  # the whole tensor
        yield from source.parts[piece.tensor]
        return
    for part in source.parts[piece.tensor]:
        common = intersection((offsets, sizes), (part.offsets, part.sizes))
        if common is None:
            continue
        low, cut = common
        inside = _with_dims(tuple(a - b for a, b in zip(low, offsets, strict=True)), num_dims, fill=0)
        begin, array = part.array or ((0,) * len(cut), part.sizes)
        begin = tuple(a - b + c for a, b, c in zip(low, part.offsets, begin, strict=True))
        place = tuple(a + b for a, b in zip(at, inside, strict=True))
        yield Part(place, _with_dims(cut, num_dims), part.path, part.find, _array_with_dims(begin, array, num_dims))


def _with_dims(numbers: Shape, num_dims: int, fill: int = 1) -> Shape:
    """Return sizes, or offsets with ``fill`` 0, with more or fewer leading dimensions of size 1."""
    extra = num_dims - len(numbers)
    return (fill,) * extra + numbers if extra >= 0 else numbers[-extra:]


def _array_with_dims(begin: Shape, array: Shape, num_dims: int) -> tuple[Shape, Shape]:
    """Return the place of a box in an array of ``num_dims`` dimensions with the same values row after row.

    The box has size 1 in dimensions that are left out. They are merged with the next one.
    """
    while len(array) > num_dims:
        begin = (begin[0] * array[1] + begin[1], *begin[2:])
        array = (array[0] * array[1], *array[2:])
    return _with_dims(begin, num_dims, fill=0), _with_dims(array, num_dims)
