"""List the differences between two checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...engine.guards.rank_consistency import flatten
from ...engine.weights.checkpoint.manifest import Manifest, read_manifest
from ...engine.weights.checkpoint.tensors import load_tensors, stored_tensors
from ...engine.weights.tensor_source import StoredTensor

_GROUP_BYTES = 1 << 30
"""Bytes of values that are in memory at a time, of each checkpoint. Every group reads the metadata once."""


def compare(first: Path, second: Path, say: Callable[[str], None] = print) -> int:
    """Print the number of differences, then each on a line; return the number.

    Values are compared in float64. The files' hashes are not compared: they differ if anything does.

    Raises:
        UserError: one of them is not a checkpoint, or damaged.
    """
    manifests = read_manifest(first), read_manifest(second)
    here, there = stored_tensors(first), stored_tensors(second)
    settings = list(_manifest_differences(*manifests))
    tensors = list(_tensor_differences(first, second, here, there))
    if not settings and not tensors:
        say("no differences")
        return 0
    steps = " | ".join(f"step {manifest.step:,}" for manifest in manifests)
    entries = "1 entry" if len(settings) == 1 else f"{len(settings)} entries"
    differing, total = len({name for name, _ in tensors}), len({*here, *there})
    say(f"summary   {steps}: {entries} of the manifest and {differing} of {total} tensors differ")
    for line in settings:
        say(f"manifest  {line}")
    for name, what in tensors:
        say(f"tensor    {name}: {what}")
    return len(settings) + len(tensors)


def _manifest_differences(first: Manifest, second: Manifest) -> Iterator[str]:
    here, there = (flatten({**dataclasses.asdict(manifest), "files": None}) for manifest in (first, second))
    for key in [*here, *(key for key in there if key not in here)]:
        if here.get(key) != there.get(key):
            yield f"{key}: {here.get(key, 'absent')} | {there.get(key, 'absent')}"


def _tensor_differences(
    first: Path, second: Path, here: dict[str, StoredTensor], there: dict[str, StoredTensor]
) -> Iterator[tuple[str, str]]:
    """Yield names of tensors, and their differences."""
    yield from ((name, f"only in {first}") for name in here if name not in there)
    yield from ((name, f"only in {second}") for name in there if name not in here)
    same = {}
    for name in (name for name in here if name in there):
        one, other = here[name], there[name]
        if one.shape != other.shape:
            yield name, f"shape {list(one.shape)} | {list(other.shape)}"
            continue
        if one.dtype != other.dtype:
            yield name, f"dtype {one.dtype} | {other.dtype}".replace("torch.", "")
        same[name] = one.num_bytes + other.num_bytes
    with tqdm(total=sum(same.values()), unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for group in _groups(same):
            ones, others = _load(first, here, group), _load(second, there, group)
            for name in group:
                difference = _difference(ones.pop(name), others.pop(name))
                bar.update(same[name])
                if difference:
                    yield name, difference


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
    """Describe the difference of two tensors of one shape; empty if their values are equal. NaN equals NaN."""
    unequal = (one != other) & ~(one.isnan() & other.isnan())
    count = int(unequal.sum())
    if not count:
        return ""
    distance = (one[unequal].double() - other[unequal].double()).abs().max().item()
    return f"{count:,} of {one.numel():,} values differ, by at most {distance:.6g}"
