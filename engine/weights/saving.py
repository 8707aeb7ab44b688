"""Write the tensors of a run to a checkpoint folder: one safetensors file per rank, and the table of parts.

Each distinct part is written once. Of several ranks that hold it, the one with the fewest bytes so far writes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from ..errors import UserError
from ..files.atomic import sync_file
from ..files.hashing import BLOCK_BYTES, FileRecord
from ..optim.local import local_part
from ..parallel.process_group import Ranks
from .coverage import Box, coverage_problem
from .damage import TABLE_FILE
from .parts import all_ranks, box_of
from .raw_bytes import bytes_of
from .safetensors_format import CODE_OF_DTYPE, SUFFIX, in_file_order, make_header
from .table import TableEntry, write_table
from .tensor_source import StoredTensor

Held = tuple[tuple[int, ...], torch.dtype, Box]
"""Shape and dtype of a tensor, and the box of it that a rank holds."""


def save_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    staged: Mapping[str, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    distributed: bool = True,
) -> dict[str, FileRecord]:
    """Write ``tensors`` into ``folder``, each rank its parts; with ``distributed`` all ranks must call this.

    Args:
        folder: to write to; it exists.
        tensors: by name; each may be sharded in any way.
        staged: copies of this rank's parts, if there are any. Then ``tensors`` only give the layout.
        group: process group of the ranks; None: the default one.
        distributed: whether there are other ranks.

    Returns:
        The files that this rank has written and flushed to disk, hashed while they were written.

    Raises:
        UserError: on every rank, if any of them cannot write.
    """
    ranks = all_ranks(group, distributed)
    held: dict[str, Held] = {name: (tuple(t.shape), t.dtype, box_of(t)) for name, t in tensors.items()}
    gathered = _gather_on_main(held, ranks)
    plan = ranks.run_on_rank0(lambda: _assign(cast(Sequence[Mapping[str, Held]], gathered)))
    table, shares = plan or ({}, None)
    mine = _scatter_from_main(shares, ranks)

    def values(name: str) -> Tensor:
        return (local_part(tensors[name]).detach() if staged is None else staged[name]).cpu().contiguous()

    def write() -> dict[str, FileRecord]:
        boxes = {name: StoredTensor(held[name][2][1], held[name][1]) for name in mine}
        try:
            records = {_file_of(ranks.rank): write_file(folder / _file_of(ranks.rank), boxes, values)} if mine else {}
            if ranks.is_main:
                records[TABLE_FILE] = write_table(folder, table)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
        return records

    return ranks.fail_together(write)


def _file_of(rank: int) -> str:
    return f"rank-{rank:05d}{SUFFIX}"


def _gather_on_main(held: dict[str, Held], ranks: Ranks) -> list[dict[str, Held]] | None:
    """Return what every rank holds, on the main rank only: the sum over thousands of ranks is large."""
    if ranks.world_size == 1:
        return [held]
    gathered: list[dict[str, Held]] | None = [{}] * ranks.world_size if ranks.is_main else None
    dist.gather_object(held, gathered, dst=0, group=ranks.group)
    return gathered


def _scatter_from_main(shares: list[list[str]] | None, ranks: Ranks) -> list[str]:
    """Return the names of the tensors whose parts this rank writes."""
    if ranks.world_size == 1:
        return shares[0] if shares else []
    mine: list[list[str]] = [[]]
    dist.scatter_object_list(mine, shares, src=0, group=ranks.group)
    return mine[0]


def _assign(held: Sequence[Mapping[str, Held]]) -> tuple[dict[str, TableEntry], list[list[str]]]:
    """Assign each part to one of the ranks that hold it.

    Returns:
        The table, and for every rank the names of the tensors whose parts it writes.

    Raises:
        UserError: ranks disagree about a tensor, or their parts do not cover it exactly.
    """
    table: dict[str, TableEntry] = {}
    holders: dict[tuple[str, Box], list[int]] = {}
    for rank, of_rank in enumerate(held):
        for name, (shape, dtype, box) in of_rank.items():
            stored = StoredTensor(shape, dtype)
            if dtype not in CODE_OF_DTYPE or table.setdefault(name, TableEntry(stored, [])).tensor != stored:
                raise UserError(f"{name}: {shape} of {dtype} on rank {rank} cannot be saved")
            if 0 not in box[1]:
                holders.setdefault((name, box), []).append(rank)
    load, shares = [0] * len(held), [[] for _ in held]  # type: tuple[list[int], list[list[str]]]
    for (name, box), ranks in holders.items():
        rank = min(ranks, key=load.__getitem__)
        load[rank] += math.prod(box[1]) * table[name].tensor.dtype.itemsize
        shares[rank].append(name)
        table[name].parts.append((_file_of(rank), box))
    for name, entry in table.items():
        problem = coverage_problem(entry.tensor.shape, [box for _, box in entry.parts])
        if problem:
            raise UserError(f"{name} {problem}: the ranks do not hold each element exactly once, so it cannot be saved")
    return table, shares


def write_file(path: Path, tensors: Mapping[str, StoredTensor], values: Callable[[str], Tensor]) -> FileRecord:
    """Write a safetensors file and flush it to disk. At most one of its tensors is copied at a time.

    Args:
        path: of the file.
        tensors: shapes and dtypes of its tensors.
        values: returns each of them, contiguous and on the CPU.

    Returns:
        Size and hash of the data that was given to the disk; verification detects a disk that returns other data.

    Raises:
        OSError: it cannot be written.
    """
    ordered = in_file_order(tensors)
    header, _, size = make_header(ordered)
    digest = xxhash.xxh3_128()
    with open(path, "wb", buffering=0) as file:
        for data in chain([memoryview(header)], (bytes_of(values(name)) for name in ordered)):
            for first in range(0, len(data), BLOCK_BYTES):
                block = data[first : first + BLOCK_BYTES]
                digest.update(block)
                while block:
                    block = block[file.write(block) :]
        sync_file(file)
    return FileRecord(size, digest.hexdigest())
