"""Shards of a tensor must make it up, each element once: the oracle counts the elements."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from collections import Counter
from pathlib import Path

import old_format
import pytest
import torch
from torch import Size
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from retemper.engine.errors import UserError
from retemper.engine.weights.checkpoint.tensors import load_tensors, open_tensors
from retemper.engine.weights.coverage import Box, coverage_problem
from retemper.engine.weights.damage import DamagedCheckpoint
from retemper.engine.weights.dcp_metadata import read_metadata
from retemper.engine.weights.saving import save_tensors


def cut_at_random(rng: random.Random, box: Box) -> list[Box]:
    """Shards that tile ``box``."""
    offsets, sizes = box
    axes = [axis for axis, size in enumerate(sizes) if size > 1]
    if not axes or rng.random() < 0.3:
        return [box]
    axis = rng.choice(axes)
    first = rng.randint(1, sizes[axis] - 1)
    beyond = (*offsets[:axis], offsets[axis] + first, *offsets[axis + 1 :])
    left = (*sizes[:axis], first, *sizes[axis + 1 :])
    right = (*sizes[:axis], sizes[axis] - first, *sizes[axis + 1 :])
    return cut_at_random(rng, (offsets, left)) + cut_at_random(rng, (beyond, right))


def holds_each_element_once(shape: tuple[int, ...], shards: list[Box]) -> bool:
    counts = Counter(
        element
        for offsets, sizes in shards
        for element in itertools.product(*(range(first, first + n) for first, n in zip(offsets, sizes, strict=True)))
    )
    return counts == Counter(itertools.product(*map(range, shape)))


def test_it_agrees_with_counting_the_elements() -> None:
    rng, verdicts = random.Random(0), Counter[bool]()
    for _ in range(4000):
        shape = tuple(rng.randint(1, 4) for _ in range(rng.randint(0, 3)))
        shards = cut_at_random(rng, ((0,) * len(shape), shape))
        if shape and rng.random() < 0.6:  # moved, or moved onto another: the number of elements stays
            number, axis = rng.randrange(len(shards)), rng.randrange(len(shape))
            offsets, sizes = shards[number]
            moved = (*offsets[:axis], offsets[axis] + rng.choice((-1, 1)), *offsets[axis + 1 :])
            shards[number] = (moved, sizes)
            other = rng.randrange(len(shards))
            shards[other] = (moved if rng.random() < 0.5 else shards[other][0], shards[other][1])
        if shape and rng.random() < 0.1:  # an empty one, as ranks without a part write it
            shards.append(((9,) * len(shape), (0, *shape[1:])))
        rng.shuffle(shards)
        whole = holds_each_element_once(shape, shards)
        assert (coverage_problem(shape, shards) is None) == whole, (shape, shards)
        verdicts[whole] += 1
    assert min(verdicts[True], verdicts[False]) > 1000


def test_many_shards() -> None:
    """Tens of thousands along two axes: comparing each with each would take minutes."""
    shards = [((2 * row, 3 * column), (2, 3)) for row in range(200) for column in range(200)]
    assert coverage_problem((400, 600), shards) is None
    shards[777] = shards[778]
    assert (
        coverage_problem((400, 600), shards) == "has 240,000 elements, but its shards hold some twice and miss others"
    )


@pytest.mark.parametrize(
    ("shards", "problem"),
    [
        ([((0, 0), (2, 6)), ((0, 0), (2, 6))], "has 24 elements, but its shards hold some twice"),
        ([((0, 0), (2, 6)), ((1, 0), (2, 6))], "has 24 elements, but its shards hold some twice"),
        (
            [((0, 0), (2, 4)), ((0, 4), (4, 2)), ((2, 0), (2, 2)), ((1, 2), (2, 2))],
            "hold some twice and miss others",
        ),
        ([((0, 0), (2, 6))], "has 24 elements, its shards 12"),
        ([], "has 24 elements, its shards 0"),
        ([((0, 3), (4, 6))], r"is \[4, 6\], a shard of \[4, 6\] at \[0, 3\] lies outside"),
        ([((-1, 0), (4, 6))], r"'bad' has a part in file 0 at \[-1, 0\] of \[4, 6\]"),
        (
            [((0, 0), (4, 6)), ((0, 0), (2, 6)), ((2, 0), (-2, 6))],
            r"'bad' has a part in file 0 at \[2, 0\] of \[-2, 6\]",
        ),
        ([((0,), (24,))], r"'bad' is \[4, 6\], a part \[24\] at \[0\]"),
    ],
    ids=["twice", "overlap", "brick", "half", "none", "beyond", "before", "negative", "other rank"],
)
def test_a_checkpoint_whose_shards_do_not_make_it_up(tmp_path: Path, shards: list[Box], problem: str) -> None:
    save_tensors(tmp_path, {"good": torch.ones(2), "bad": torch.ones(4, 6)}, distributed=False)
    table = json.loads((tmp_path / "tensors.json").read_text())
    table["tensors"]["bad"]["parts"] = [[0, *box] for box in shards]
    (tmp_path / "tensors.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=rf"^{tmp_path}/tensors\.json: .*{problem}[^\n]*; use another") as error:
        load_tensors(tmp_path, {"bad": torch.ones(4, 6)}, distributed=False)
    with pytest.raises(DamagedCheckpoint, match="use another"):
        open_tensors(tmp_path).require_full_coverage()
    if "tensors.json: bad" in str(error.value):  # and not that the table is none
        load_tensors(tmp_path, {"good": torch.zeros(2)}, distributed=False)


@pytest.mark.parametrize("shards", [[((0, 0), (2, 6)), ((0, 0), (2, 6))], [((0, 0), (2, 6))], []])
def test_a_checkpoint_of_the_old_format_whose_shards_do_not_make_it_up(tmp_path: Path, shards: list[Box]) -> None:
    old_format.write_tensors(tmp_path, {"good": torch.ones(2), "bad": torch.ones(4, 6)})
    metadata = read_metadata(tmp_path)
    [place] = [info for index, info in metadata.storage_data.items() if index.fqn == "bad"]
    metadata.state_dict_metadata["bad"].chunks = [ChunkStorageMetadata(Size(at), Size(size)) for at, size in shards]
    metadata.storage_data |= {MetadataIndex("bad", Size(at)): place for at, _ in shards}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=rf"^{tmp_path}/\.metadata: bad has 24 elements, [^\n]*; use another"):
        load_tensors(tmp_path, {"bad": torch.ones(4, 6)}, distributed=False)
    load_tensors(tmp_path, {"good": torch.ones(2)}, distributed=False)
