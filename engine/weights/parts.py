"""Read tensors that are stored in parts: whole rows for converters, or the shards of a rank for a run.

A part is a box of a tensor whose values are in one file. Parts come from a checkpoint's table (:mod:`.table`), from a
Hugging Face folder, whose tensors are stored whole (:mod:`.hugging_face.folder`), or from a folder of PyTorch's
distributed checkpoint (:mod:`.dcp_files`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..errors import UserError
from ..optim.local import local_part
from ..parallel.process_group import Ranks
from .coverage import Box, coverage_problem
from .damage import DamagedCheckpoint
from .raw_bytes import opened_for_reading, read_box
from .tensor_source import ReadRows, StoredTensor, rows_of

BLOCK_BYTES = 64 << 20
"""Bytes read at a time if they are converted to another dtype, device or layout."""
ComputeBox = Callable[[tuple[int, ...], Tensor], None]
"""``compute(offsets, box)`` fills ``box`` with the values of a part that begin at ``offsets`` of its array. The values
follow from others, such as the sum of a weight and an adapter, and are computed when they are read."""
CheckValues = Callable[[str, Tensor], object]
"""Takes the name of a tensor and some of its values, and raises an error if they are not acceptable."""


@dataclass(frozen=True)
class Part:
    """A box of a tensor and the place of its values."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    """Both with at least one dimension: see :func:`rows_of`."""
    path: Path
    find: Callable[[int], int | Tensor | ComputeBox]
    """Takes a descriptor of the file and returns the offset of the values, in bytes; or the values themselves, if they
    are not stored row after row; or a function that computes them."""
    array: Box | None = None
    """If the values are a box of a larger stored array: where they begin in it, and its sizes."""


class TensorParts:
    """Tensors and their parts (a ``TensorSource``).

    Args:
        where: the file that lists the parts, for errors.
        tensors: names, shapes and dtypes.
        parts: of each tensor.
    """

    def __init__(self, where: Path, tensors: dict[str, StoredTensor], parts: dict[str, list[Part]]):
        self.where = where
        self.tensors: dict[str, StoredTensor] = tensors
        self.parts = parts

    @property
    def paths(self) -> set[Path]:
        """The files that hold the tensors."""
        return {part.path for name in self.tensors for part in self.parts[name]}

    def only(self, names: Iterable[str]) -> TensorParts:
        """Return the same tensors restricted to ``names``, in that order."""
        some = copy.copy(self)
        some.tensors = {name: self.tensors[name] for name in names}
        return some

    def renamed(self, names: Mapping[str, str]) -> TensorParts:
        """Return some of these tensors under other names; ``names`` maps the new ones to the present ones."""
        tensors = {name: self.tensors[present] for name, present in names.items()}
        return TensorParts(self.where, tensors, {name: self.parts[present] for name, present in names.items()})

    def require_full_coverage(self, names: Collection[str] | None = None) -> None:
        """Refuse tensors (by default all) whose parts do not cover them exactly.

        Raises:
            DamagedCheckpoint: naming the first, and what is wrong with its parts.
        """
        for name in self.tensors if names is None else names:
            boxes = [(part.offsets, part.sizes) for part in self.parts[name]]
            problem = coverage_problem(rows_of(self.tensors[name].shape), boxes)
            if problem:
                raise DamagedCheckpoint(f"{self.where}: {name} {problem}; use another checkpoint")

    @contextmanager
    def rows(self, name: str) -> Iterator[ReadRows]:
        """Read rows, see :class:`~retemper.engine.weights.tensor_source.TensorSource`. Files are opened when needed:
        there may be thousands.
        """
        reader, rest = _Reader(self, name), (0,) * (len(self.tensors[name].shape) - 1)
        yield lambda first, rows: reader.read((first, *rest), rows)

    def read(self, name: str) -> Tensor:
        """Return the CPU tensor ``name``."""
        tensor = torch.empty(self.tensors[name].shape, dtype=self.tensors[name].dtype)
        self.load(name, tensor)
        return tensor

    def load(self, name: str, tensor: Tensor, check: CheckValues | None = None) -> None:
        """Read this rank's part of ``tensor``, a parameter that is sharded in any way, in place, cast to its dtype."""
        offsets, _ = box_of(tensor)
        self.read_box(name, offsets, local_part(tensor).detach(), check)

    def read_box(self, name: str, offsets: Sequence[int], into: Tensor, check: CheckValues | None = None) -> None:
        """Fill ``into``, of any dtype and device, with the box of the tensor ``name`` at ``offsets``."""
        _Reader(self, name, check).read(offsets or (0,), into if offsets else into.reshape(1))


class _Reader:
    """Reads boxes of one tensor. The place of the values of each part is looked up once."""

    def __init__(self, source: TensorParts, name: str, check: CheckValues | None = None):
        self._name, self._dtype, self._check = name, source.tensors[name].dtype, check
        self._parts = source.parts[name]
        self._found: dict[int, int | Tensor | ComputeBox] = {}

    def read(self, offsets: Sequence[int], into: Tensor) -> None:
        """Fill ``into`` with the box at ``offsets``."""
        for number, part in enumerate(self._parts):
            common = intersection((tuple(offsets), tuple(into.shape)), (part.offsets, part.sizes))
            if common is None:
                continue
            low, sizes = common
            place = into[tuple(slice(a - b, a - b + n) for a, b, n in zip(low, offsets, sizes, strict=True))]
            with opened_for_reading(part.path) as descriptor:
                if number not in self._found:
                    self._found[number] = part.find(descriptor)
                begin = part.array[0] if part.array else (0,) * len(low)
                inside = tuple(a - b + c for a, b, c in zip(low, part.offsets, begin, strict=True))
                self._read_part(part, descriptor, self._found[number], inside, place)

    def _read_part(
        self, part: Part, descriptor: int, found: int | Tensor | ComputeBox, offsets: tuple[int, ...], place: Tensor
    ) -> None:
        """Fill ``place`` from ``part``; a block at a time if it has another dtype or is on another device."""
        sizes = part.array[1] if part.array else part.sizes
        if isinstance(found, Tensor):
            box = tuple(slice(at, at + n) for at, n in zip(offsets, place.shape, strict=True))
            place.copy_(found.reshape(sizes)[box])
            return
        direct = place.dtype == self._dtype and place.device.type == "cpu" and place.is_contiguous()
        row_bytes = math.prod(place.shape[1:]) * self._dtype.itemsize
        step = len(place) if direct else max(1, BLOCK_BYTES // row_bytes)
        for first in range(0, len(place), step):
            rows = place[first : first + step]
            block = rows if direct else torch.empty(rows.shape, dtype=self._dtype)
            begin = (offsets[0] + first, *offsets[1:])
            if isinstance(found, int):
                read_box(descriptor, found, sizes, begin, block, part.path)
            else:
                found(begin, block)
            if self._check is not None:
                self._check(self._name, block)
            if not direct:
                rows.copy_(block)


def intersection(one: Box, other: Box) -> Box | None:
    """Return the box that both have in common; None if it has no elements."""
    low = tuple(map(max, one[0], other[0]))
    ends = zip(one[0], one[1], other[0], other[1], strict=True)
    sizes = tuple(min(a + n, b + m) - at for at, (a, n, b, m) in zip(low, ends, strict=True))
    return (low, sizes) if min(sizes) > 0 else None


def box_of(tensor: Tensor) -> Box:
    """Return offsets and sizes of this rank's part of ``tensor``."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tuple(tensor.shape)
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offsets), tuple(sizes)


def load_parts(
    source: TensorParts,
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    ranks: Ranks,
    check: CheckValues | None = None,
) -> None:
    """Read into ``tensors`` in place, casting to their dtypes; each may be sharded in any way.

    Args:
        source: of the values.
        tensors: by name. Each rank reads its parts of them, and no more.
        folder: of ``source``, for errors.
        ranks: that load together.
        check: of the values that are read.

    Raises:
        UserError: on every rank, when on any of them a tensor is missing, has another shape, or cannot be read.
    """

    def load() -> None:
        missing = [name for name in tensors if name not in source.tensors]
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} tensors are missing, such as {missing[0]}; is it the same model?"
            )
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != source.tensors[name].shape:
                raise UserError(
                    f"{folder}: {name} has shape {list(source.tensors[name].shape)}, the model needs "
                    f"{list(tensor.shape)}"
                )
        source.require_full_coverage(tensors)
        for name in sorted(tensors, key=lambda name: min((part.path for part in source.parts[name]), default=Path())):
            source.load(name, tensors[name], check)

    ranks.fail_together(load)


def all_ranks(group: dist.ProcessGroup | None, distributed: bool) -> Ranks:
    """Return the ranks of ``group`` (None: the default one), or this process alone."""
    if not distributed or not dist.is_initialized():
        return Ranks(0, 1, torch.device("cpu"))
    return Ranks(dist.get_rank(group), dist.get_world_size(group), torch.device("cpu"), group)
