"""What is refused or noted at the start of a run, from the chunks and tokens that are sampled there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from retemper.engine.config.settings import DataConfig, SourceConfig
from retemper.engine.data.catalog import Catalog, open_catalog
from retemper.engine.data.sidecar import Sidecar
from retemper.engine.errors import UserError
from retemper.engine.observe.start_summary import data_notes
from retemper.engine.schedule import BatchPlan
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter
from retemper.tools.preprocessing.merging.merge import MergeOptions, merge

PLAN = BatchPlan(sequence_length=8, global_batch_size=4, micro_batch_size=1, data_parallel_size=1)
SIDECAR = Sidecar("tok", "a" * 64, 100, True, "<eod>", 0, (), {})


def write(prefix: Path, lengths: list[int], mask=None, sidecar: bool = False, dtype=np.uint16, seed: int = 0) -> str:
    tokens = np.random.default_rng(seed).integers(0, 100, sum(lengths))
    prefix.parent.mkdir(exist_ok=True)
    with IndexedDatasetWriter(prefix, dtype, overwrite=True, mask=mask is not None) as writer:
        writer.add_documents(tokens, lengths, mask=None if mask is None else np.asarray(mask))
        writer.sidecar = SIDECAR if sidecar else None
    return str(prefix)


def opened(*train: str, vocab_size: int = 100, **changes) -> Catalog:
    sources = [SourceConfig(path, name=f"s{number}") for number, path in enumerate(train)]
    return open_catalog(DataConfig(train=sources, **changes), PLAN, vocab_size, None, 7)


def notes(catalog: Catalog, samples: int = 4) -> list[str]:
    return data_notes(catalog, catalog.sample_order(7), samples)


# --------------------------------------------------------------------------------------------------------------------
# Sources without targets


@pytest.mark.parametrize("sidecar", [False, True])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize(
    ("lengths", "masked", "reason"),
    [
        ([20] * 30, [0] * 600, "its loss mask leaves out every token or every document has one token"),
        ([1] * 5000, None, "chunks, spread evenly over its 624: every document has one token"),
        # A target is the token that follows another in its document: the first of a document is none.
        ([3] * 200, [1, 0, 0] * 200, "its loss mask leaves out every token"),
        ([40, 1] * 15, [0] * 615, "its loss mask leaves out"),
    ],
)
def test_a_source_with_nothing_to_predict_is_refused(tmp_path, lengths, masked, reason, packing, sidecar):
    path = write(tmp_path / "x", lengths, masked, sidecar)
    with pytest.raises(UserError, match=f"x: training source 's0' has no target in any of .*{reason}"):
        opened(path, packing=packing)


def test_one_chunk_with_a_target_in_the_sample_is_enough(tmp_path):
    mask = np.zeros(600)
    mask[592] = 1  # the last target of the last chunk
    opened(write(tmp_path / "x", [20] * 30, mask))
    mask = np.zeros(600)
    mask[2] = 1
    opened(write(tmp_path / "y", [20] * 30, mask, sidecar=True))
    # Across documents, documents of one token have targets.
    opened(write(tmp_path / "z", [1] * 500), attend_across_documents=True)


def test_a_held_out_part_is_not_looked_at_for_training(tmp_path):
    """The targets of the first half are what is trained on; those of the other half would not help."""
    path = write(tmp_path / "x", [20] * 30, [0] * 300 + [1] * 300)
    with pytest.raises(UserError, match="'s0' has no target in any of 37 chunks"):
        opened(path, validation_fraction=0.5)


# --------------------------------------------------------------------------------------------------------------------
# Ids outside the vocabulary


@pytest.mark.parametrize("bad", [100, 65535])
@pytest.mark.parametrize("place", [0, 3000, 5999])
def test_ids_outside_the_vocabulary_are_refused_at_the_start(tmp_path, place, bad):
    """Without a sidecar, wherever the sample reads: here everywhere, up to the very last token."""
    path = write(tmp_path / "x", [6000])
    plan = BatchPlan(32, global_batch_size=4, micro_batch_size=1, data_parallel_size=1)
    tokens = np.fromfile(f"{path}.bin", np.uint16)
    tokens[place] = bad
    tokens.tofile(f"{path}.bin")
    source = DataConfig(train=[SourceConfig(path)])
    last_read = (6000 - 1) // 32 * 32
    if place > last_read:  # after the last whole chunk
        open_catalog(source, plan, 100, None, 7)
        return
    with pytest.raises(UserError, match=f"x.bin: token id {bad} at token {place:,} is outside .* vocabulary of 100"):
        open_catalog(source, plan, 100, None, 7)


def test_negative_ids(tmp_path):
    path = write(tmp_path / "x", [600], dtype=np.int32)
    tokens = np.fromfile(f"{path}.bin", np.int32)
    tokens[77] = -1
    tokens.tofile(f"{path}.bin")
    with pytest.raises(UserError, match=r"x.bin: token id -1 at token 77 is outside"):
        opened(path)


# --------------------------------------------------------------------------------------------------------------------
# Notes


def test_equal_data_in_two_roles_is_noted(tmp_path):
    path = write(tmp_path / "train", [20] * 30)
    link = tmp_path / "link"
    for suffix in (".bin", ".idx"):
        os.symlink(path + suffix, f"{link}{suffix}")
    copy = tmp_path / "copy"
    for suffix in (".bin", ".idx"):
        shutil.copy(path + suffix, f"{copy}{suffix}")
    wider = write(tmp_path / "wider", [20] * 30, dtype=np.int32)
    other = write(tmp_path / "other", [20] * 30, seed=1)
    for same in (path, str(link), str(copy), wider):
        [line] = notes(opened(path, validation={"v": same}))
        assert line.startswith(
            f"note: validation set 'v' ({same}) has the same tokens as training source 's0' ({path})"
        )
        assert "decides on the best checkpoint" in line
    assert not notes(opened(path, validation={"v": other}))
    [line] = notes(opened(path, other, validation={"a": str(copy), "b": str(link)}))[2:]
    assert "validation set 'b'" in line and "the same tokens as validation set 'a'" in line
    [line] = notes(opened(path, str(copy)))
    assert "training source 's1'" in line and "training source 's0'" in line and "drawn with both weights" in line


def test_sidecars_tell_apart_what_a_sample_does_not(tmp_path):
    first, second = (write(tmp_path / name, [20] * 3000, sidecar=True) for name in ("a", "b"))
    assert len(notes(opened(first, second))) == 1
    tokens = np.random.default_rng(0).integers(0, 100, 60_000)
    tokens[30_100] += 1 if tokens[30_100] < 99 else -1
    with IndexedDatasetWriter(tmp_path / "b", np.uint16, overwrite=True) as writer:
        writer.add_documents(tokens, [20] * 3000)
        writer.sidecar = SIDECAR
    assert not notes(opened(first, second))


def test_two_indexes_over_one_file_are_two_datasets(tmp_path):
    """As a split by index alone makes them: the same .bin under two names, each with some of its sequences."""
    path = write(tmp_path / "x", [20] * 40)
    index = Path(f"{path}.idx").read_bytes()
    lengths, pointers, documents = index[34:194], index[194:514], index[514:]
    for name, part in (("even", slice(0, None, 2)), ("odd", slice(1, None, 2))):
        os.link(f"{path}.bin", tmp_path / f"{name}.bin")
        halves = [np.frombuffer(lengths, "<i4")[part], np.frombuffer(pointers, "<i8")[part]]
        content = b"".join(half.tobytes() for half in halves) + documents[: 8 * 21]
        header = index[:18] + np.array([20, 21], "<u8").tobytes()
        (tmp_path / f"{name}.idx").write_bytes(header + content)
    lines = notes(opened(str(tmp_path / "even"), validation={"v": str(tmp_path / "odd")}))
    assert len(lines) == 2 and all("do not begin in .bin at the end of the previous one" in line for line in lines)


def test_many_epochs_are_noted(tmp_path):
    """75 chunks are read 4 times by 300 samples, and more than that by 301."""
    catalog = opened(write(tmp_path / "x", [601]))
    assert not notes(catalog, 300)
    [line] = notes(catalog, 380)
    assert line.startswith("note: training source 's0' is read 5.1 times until the end of the run;")


# --------------------------------------------------------------------------------------------------------------------
# Indexes that are not in file order


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_chunks_of_an_index_out_of_order_are_those_of_the_dataset_in_order(tmp_path, packing):
    """Whatever is made of them: layouts, masks, a held-out part. In order it is written by merge.py."""
    generator = np.random.default_rng(2)
    lengths = generator.integers(1, 30, 60).tolist()
    path = write(tmp_path / "x", lengths, mask=generator.integers(0, 2, sum(lengths)))
    index = Path(f"{path}.idx").read_bytes()
    order = generator.permutation(60)[:50]
    pointers = np.frombuffer(index, "<i8", 60, 34 + 240)[order]
    part = np.array(lengths, "<i4")[order].tobytes() + pointers.tobytes() + np.arange(51, dtype="<i8").tobytes()
    Path(f"{path}.idx").write_bytes(index[:18] + np.array([50, 51], "<u8").tobytes() + part)
    merge(MergeOptions([path], str(tmp_path / "ordered")))
    catalogs = [
        open_catalog(
            DataConfig(train=[SourceConfig(prefix, name="s")], packing=packing, validation_fraction=0.2),
            PLAN,
            100,
            None,
            7,
        )
        for prefix in (path, str(tmp_path / "ordered"))
    ]
    for one, other in zip(*([*c.train, *c.validation["held_out"]] for c in catalogs), strict=True):
        assert one.num_chunks == other.num_chunks > 3 and (one.start, one.stop) == (other.start, other.stop)
        for number in range(one.num_chunks):
            pairs = zip(one.chunk(number, 100), other.chunk(number, 100), strict=True)
            assert all(np.array_equal(mine, theirs) for mine, theirs in pairs)  # or both None


def test_a_very_large_index_is_checked_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("retemper.engine.data.indexed_dataset.CHECKED_ON_OPENING", 10)
    monkeypatch.setattr("retemper.engine.data.index_check.CHECKED_AT_ONCE", 4)
    monkeypatch.setattr("retemper.engine.data.index_check._SPREAD_BLOCKS", 2)
    path = write(tmp_path / "x", [20] * 40)
    opened(path).finish_checks()
    index = bytearray(Path(f"{path}.idx").read_bytes())
    index[34 + 4 * 20 + 3] = 0x80  # the sign of the 21st length
    Path(f"{path}.idx").write_bytes(index)
    catalog = opened(path)
    with pytest.raises(UserError, match=r"x.idx: sequence 20 of length -"):
        catalog.finish_checks()
