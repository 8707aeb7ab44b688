"""What differs between two checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...engine.checkpoint.manifest import read_manifest
from ...engine.checkpoint.tensors import StoredTensor, load_tensors, stored_tensors
from ...engine.parallel.agreement import flatten

_GROUP_BYTES = 1 << 30
"""Values that are in memory at a time, of each checkpoint. Every group costs a reading of the metadata."""


def compare(first: Path, second: Path, say: Callable[[str], None] = print) -> int:
    """Say how much differs, then what, a line each; returns the number of differences.

    Values are compared in float64. The files' hashes are left out: they differ where anything does.

    Raises:
        UserError: one of them is no checkpoint, or damaged.
    """
    settings = list(_manifest_differences(first, second))
    tensors = list(_tensor_differences(first, second))
    lines = [*settings, *tensors]
    for line in [_summary(first, second, settings, tensors), *lines] if lines else ["no differences"]:
        say(line)
    return len(lines)


def _summary(first: Path, second: Path, settings: list[str], tensors: list[str]) -> str:
    """How much differs, before the list of it."""
    steps = " | ".join(f"step {read_manifest(folder).step:,}" for folder in (first, second))
    names = {line.split()[1].rstrip(":") for line in tensors}
    total = len({*stored_tensors(first), *stored_tensors(second)})
    entries = "1 entry" if len(settings) == 1 else f"{len(settings)} entries"
    return f"summary   {steps}: {entries} of the manifest and {len(names)} of {total} tensors differ"


def _manifest_differences(first: Path, second: Path) -> Iterator[str]:
    here, there = (flatten({**dataclasses.asdict(read_manifest(folder)), "files": None}) for folder in (first, second))
    for key in [*here, *(key for key in there if key not in here)]:
        if here.get(key) != there.get(key):
            yield f"manifest  {key}: {here.get(key, 'absent')} | {there.get(key, 'absent')}"


def _tensor_differences(first: Path, second: Path) -> Iterator[str]:
    here, there = stored_tensors(first), stored_tensors(second)
    yield from (f"tensor    {name}: only in {first}" for name in here if name not in there)
    yield from (f"tensor    {name}: only in {second}" for name in there if name not in here)
    same = {}
    for name in (name for name in here if name in there):
        one, other = here[name], there[name]
        if one.shape != other.shape:
            yield f"tensor    {name}: shape {list(one.shape)} | {list(other.shape)}"
            continue
        if one.dtype != other.dtype:
            yield f"tensor    {name}: dtype {one.dtype} | {other.dtype}".replace("torch.", "")
        same[name] = one.num_bytes + other.num_bytes
    with tqdm(total=sum(same.values()), unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for group in _groups(same):
            ones, others = _load(first, here, group), _load(second, there, group)
            for name in group:
                difference = _difference(ones.pop(name), others.pop(name))
                bar.update(same[name])
                if difference:
                    yield f"tensor    {name}: {difference}"


def _groups(sizes: dict[str, int]) -> Iterator[list[str]]:
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > _GROUP_BYTES:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


def _load(folder: Path, stored: dict[str, StoredTensor], names: list[str]) -> dict[str, Tensor]:
    tensors = {name: torch.empty(stored[name].shape, dtype=stored[name].dtype) for name in names}
    load_tensors(folder, tensors, distributed=False)
    return tensors


def _difference(one: Tensor, other: Tensor) -> str:
    """What to say of two tensors of one shape; empty where their values are the same. NaN is as NaN."""
    unequal = (one != other) & ~(one.isnan() & other.isnan())
    count = int(unequal.sum())
    if not count:
        return ""
    distance = (one[unequal].double() - other[unequal].double()).abs().max().item()
    return f"{count:,} of {one.numel():,} values differ, by at most {distance:.6g}"
