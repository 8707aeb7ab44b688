"""The merge command: against datasets written at once, Megatron-made datasets, and everything that it must refuse."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forked import LIMIT_SECONDS
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.megatron_index import read_megatron, write_megatron
from oracles.tiny_tokenizer import sample_text

import retemper
from retemper.engine.data import index_format
from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.data.sidecar import InputSource, Sidecar
from retemper.engine.errors import run_command
from retemper.engine.files.hashing import hash_file
from retemper.tools import merge as command
from retemper.tools.preprocessing import hashed_file
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter
from retemper.tools.preprocessing.merging.merge import MergeOptions, merge
from retemper.tools.preprocessing.options import PreprocessOptions
from retemper.tools.preprocessing.pipeline import preprocess

COMMAND = Path(retemper.__file__).parent / "tools" / "merge.py"
SUFFIXES = (".bin", ".idx", ".json", ".mask.bin", ".metadata.jsonl")
Documents = list[list[list[int]]]
SEQUENCE = st.lists(st.integers(0, 255), min_size=1, max_size=6)
DOCUMENT = st.lists(SEQUENCE, max_size=3)


def source(name: str, documents: int, tokens: int, left_out: dict[str, int] | None = None) -> InputSource:
    return InputSource(name, 3, 1000, documents, tokens, 7 * documents, 9 * documents, left_out or {})


def sidecar(*sources: InputSource, **options: object) -> Sidecar:
    return Sidecar("acme/tiny", "ab" * 32, 400, True, "<|endoftext|>", 0, sources, options)


def write(
    prefix: Path,
    documents: Documents,
    made: Sidecar | None = None,
    dtype: str = "<u2",
    mask: Sequence[int] | None = None,
    metadata: Sequence[bytes] | None = None,
) -> Path:
    """Write documents one by one; those with mask or metadata have one sequence each."""
    kinds = {"mask": mask is not None, "metadata": metadata is not None}
    with IndexedDatasetWriter(prefix, dtype, **kinds) as writer:
        writer.sidecar = made
        if mask is not None or metadata is not None:
            tokens = list(itertools.chain(*itertools.chain(*documents)))
            writer.add_documents(tokens, [len(d[0]) if d else 0 for d in documents], mask=mask, metadata=metadata)
        else:
            for document in documents:
                writer.add_document(list(itertools.chain(*document)), [len(sequence) for sequence in document])
    return prefix


def join(output: Path, *inputs: Path | str, overwrite: bool = False) -> Path:
    merge(MergeOptions([str(each) for each in inputs], str(output), overwrite))
    return output


def files(prefix: Path) -> dict[str, bytes]:
    paths = {suffix: Path(f"{prefix}{suffix}") for suffix in SUFFIXES}
    return {suffix: path.read_bytes() for suffix, path in paths.items() if path.exists()}


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture
def refused(tmp_path, capsys):
    """Run the command line in ``tmp_path``: exit status 1, one line on stderr, and no file more than before."""

    def check(*arguments: Path | str, output: str = "out", extra: Sequence[str] = ()) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        full = ["--inputs", *map(str, arguments), "--output-prefix", f"{tmp_path}/{output}", *extra]
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: command.main(full))
        captured = capsys.readouterr()
        assert (exit_.value.code, captured.out) == (1, "")
        assert len(captured.err.splitlines()) == 1, captured.err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return captured.err

    return check


@settings(max_examples=80, deadline=None)
@given(
    documents=st.lists(DOCUMENT, max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    dtype=st.sampled_from(["<u2", "<i4"]),
    chunk=st.integers(1, 5),
    block=st.sampled_from([4, 12, 1 << 20]),
    sidecars=st.booleans(),
)
def test_any_cut_joined_is_the_whole(tmp_path_factory, documents, cuts, dtype, chunk, block, sidecars):
    """Documents of several sequences and of none, datasets of none, whatever the sizes of chunks and blocks."""
    folder = tmp_path_factory.mktemp("m")
    edges = [0, *sorted(min(cut, len(documents)) for cut in cuts), len(documents)]
    write(folder / "whole", documents, sidecar() if sidecars else None, dtype)
    for number, (first, last) in enumerate(itertools.pairwise(edges)):
        write(folder / f"part{number}", documents[first:last], sidecar() if sidecars else None, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_format, "ENTRIES_AT_ONCE", chunk)
        patch.setattr(hashed_file, "_BLOCK_BYTES", block)
        join(folder / "out", *(folder / f"part{number}" for number in range(len(edges) - 1)))
    assert files(folder / "out") == files(folder / "whole")
    assert read_megatron(folder / "out").documents == documents


def test_shards_of_a_run_are_the_run(tmp_path):
    """Twelve, so that their order by name is not that by number; from a pattern, and one by one."""
    documents = [[[n, 2 * n, 3]] for n in range(30)]
    options = {"json_key": ["body"], "min_tokens": 2}
    cuts = np.linspace(0, 30, 13).astype(int).tolist()
    for index, (first, last) in enumerate(itertools.pairwise(cuts)):
        mine, left_out = documents[first:last], {"too short": index} if index % 2 else {}
        sources = (source("a", len(mine), 3 * len(mine), left_out), source("b", 0, 0, {"empty": 1}))
        made = sidecar(*sources, **options, shard=f"{index}/12")
        write(tmp_path / f"d.shard-{index}-of-12", mine, made, metadata=[b'{"n":%d}' % d[0][0] for d in mine])
    totals = (source("a", 30, 90, {"too short": 36}), source("b", 0, 0, {"empty": 12}))
    lines = [b'{"n":%d}' % n for n in range(30)]
    whole = files(write(tmp_path / "whole", documents, sidecar(*totals, **options), metadata=lines))
    assert files(join(tmp_path / "out", tmp_path / "d.shard-*-of-12")) == whole
    shards = [tmp_path / f"d.shard-{index}-of-12.idx" for index in range(12)]
    assert files(join(tmp_path / "out", *shards, overwrite=True)) == whole


def test_what_three_machines_preprocess_is_what_one_does(tmp_path, tiny_tokenizer):
    for name, seeds in (("a", range(40)), ("b", range(40, 60))):
        lines = [json.dumps({"text": sample_text(seed, seed) if seed % 7 else "", "id": seed}) for seed in seeds]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    inputs = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    options = {"metadata": ["id"], "workers": 1, "task_bytes": 999}
    preprocess(PreprocessOptions(inputs, str(tiny_tokenizer), str(tmp_path / "whole"), **options))
    for index in range(3):
        output = str(tmp_path / "d")
        preprocess(PreprocessOptions(inputs, str(tiny_tokenizer), output, shard=f"{index}/3", **options))
    assert files(join(tmp_path / "out", tmp_path / "d.shard-*-of-3")) == files(tmp_path / "whole")
    assert sorted(files(tmp_path / "out")) == [".bin", ".idx", ".json", ".metadata.jsonl"]


def test_an_input_that_was_named_twice_stays_two(tmp_path):
    for index in range(2):
        made = sidecar(source("a", 1, 1), source("a", 2, 2), shard=f"{index}/2")
        write(tmp_path / f"d.shard-{index}-of-2", [[[1]], [[2]], [[3]]], made)
    joined = Sidecar.read(join(tmp_path / "d", tmp_path / "d.shard-*"))
    assert joined is not None and joined.sources == (source("a", 2, 2), source("a", 4, 4))


def test_shards_that_saw_only_themselves_say_so(tmp_path):
    """Deduplication, limits and shuffle of a run in shards are not those of the whole."""
    for options in ({"dedup": "exact"}, {"max_documents": 9}, {"shuffle": True, "seed": 3}):
        for index in range(2):
            with IndexedDatasetWriter(tmp_path / f"d.shard-{index}-of-2", "<u2", overwrite=True) as writer:
                writer.add_document([1])
                writer.sidecar = sidecar(source("a", 1, 1), **options, shard=f"{index}/2")
        joined = Sidecar.read(join(tmp_path / "d", tmp_path / "d.shard-*", overwrite=True))
        assert joined is not None and joined.options == {**options, "shards": 2}


def test_sides_of_a_split_are_told_apart(tmp_path):
    for index, side in itertools.product(range(2), ("train", "valid")):
        number = 2 * index + (side == "valid")
        made = sidecar(source("a", 1, 1), split="train=0.5,valid=0.5", shard=f"{index}/2")
        write(tmp_path / f"d.shard-{index}-of-2.{side}", [[[number]]], made)
    join(tmp_path / "d.train", tmp_path / "d.shard-*-of-2.train")
    assert read_megatron(tmp_path / "d.train").sequences == [[0], [2]]
    assert Sidecar.read(tmp_path / "d.train").options == {"split": "train=0.5,valid=0.5"}
    join(tmp_path / "both", tmp_path / "d.shard-*")
    assert read_megatron(tmp_path / "both").sequences == [[0], [2], [1], [3]]
    assert Sidecar.read(tmp_path / "both").sources == (source("a", 2, 2), source("a", 2, 2))


def test_different_datasets_keep_their_order_sources_and_options(tmp_path):
    b = write(tmp_path / "b", [[[1, 2]], []], sidecar(source("corpus", 2, 2), dedup="exact"))
    a = write(tmp_path / "a[1]", [[[3]]], sidecar(source("corpus", 1, 1, {"empty": 2}), source("x", 0, 0)))
    for index in range(2):
        made = sidecar(source("s", 1, 1), shuffle=True, shard=f"{index}/2")
        write(tmp_path / f"b.shard-{index}-of-2", [[[5 + index]]], made)
    out = join(tmp_path / "sub" / "out", b, a, tmp_path / "b.shard-?-of-2")
    assert read_megatron(out).documents == [[[1, 2]], [], [[3]], [[5]], [[6]]]
    merged = Sidecar.read(out)
    assert merged.sources == (source("corpus", 2, 2), *Sidecar.read(a).sources, source("s", 2, 2))
    assert merged.left_out == {"empty": 2}
    run = str(tmp_path / "b.shard-*")
    assert merged.options == {"merged": {str(b): {"dedup": "exact"}, str(a): {}, run: {"shuffle": True, "shards": 2}}}
    assert (merged.documents, merged.tokens, merged.max_token_id, merged.dtype) == (5, 5, 6, "uint16")
    assert merged.bin_xxh3_128 == hash_file(f"{out}.bin")
    # What was joined can be joined again.
    again = join(tmp_path / "again", out, write(tmp_path / "c", [[[9]]], sidecar(source("c", 1, 1))))
    assert read_megatron(again).sequences == [[1, 2], [3], [5], [6], [9]]


def test_mask_and_metadata_are_filled_up(tmp_path, refused, capsys):
    plain = write(tmp_path / "a", [[[1, 2]], []], sidecar())
    masked = write(tmp_path / "b", [[[3, 4]], [[5]]], sidecar(), mask=[0, 1, 0])
    noted = write(tmp_path / "c", [[[6]], [], [[7]]], sidecar(), metadata=[b'{"u":"\xc3\xbc"}', b"{}", b'{"v":1}'])
    line = refused(plain, masked, noted)
    assert line.startswith(f"error: {plain}: has no loss mask, but {masked} has one; ") and "--fill-mask" in line
    out = tmp_path / "out"
    command.main(["--inputs", *map(str, (plain, masked, noted)), "--output-prefix", str(out), "--fill-mask"])
    assert "loss mask                 all ones for the datasets without one, 2 of 3\n" in capsys.readouterr().out
    assert files(out)[".mask.bin"] == bytes([1, 1, 0, 1, 0, 1, 1])
    assert files(out)[".metadata.jsonl"] == b'{}\n{}\n{}\n{}\n{"u":"\xc3\xbc"}\n{}\n{"v":1}\n'
    merged = Sidecar.read(out)
    assert merged.mask_xxh3_128 == hash_file(f"{out}.mask.bin")
    assert merged.metadata_xxh3_128 == hash_file(f"{out}.metadata.jsonl")
    assert IndexedDataset(out).loss_mask(0, 5).tolist() == [True, True, False, True, False]
    # Replaced by a dataset without them, they go.
    join(out, plain, overwrite=True)
    assert sorted(files(out)) == [".bin", ".idx", ".json"]


def test_datasets_of_megatron_have_no_sidecar_and_need_none(tmp_path, capsys):
    documents: Documents = [[[1, 2], [], [3]], [], [[4]]]
    write_megatron(tmp_path / "m", documents, 5)
    write_megatron(tmp_path / "n", [[[5], [6]]], 5)
    ours = write(tmp_path / "ours", [[[7]]], sidecar(), dtype="<i8")
    command.main(["--inputs", *(str(tmp_path / n) for n in "nm"), str(ours), "--output-prefix", str(tmp_path / "o")])
    assert read_megatron(tmp_path / "o").documents == [[[5], [6]], *documents, [[7]]]
    assert sorted(files(tmp_path / "o")) == [".bin", ".idx"]
    out = capsys.readouterr().out
    assert f"none, since {tmp_path / 'n'} has none" in out
    assert "datasets joined           3\ndocuments                 5\ntokens                    7 (int64)\n" in out


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ([(0, 3), (2, 3)], "shard 1 of 3 missing"),
        ([(5, 9)], "shards 0, 1, 2, 3, 4, 6, 7, 8 of 9 missing .*--shard 0/9"),
        ([(1, 40)], "0, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 29 more of 40 missing"),
        ([(0, 2), (1, 2), (0, 3)], r"some are of 2 shards, some of 3, .*d\.shard-\*-of-2"),
        ([(0, 2), (2, 2), (1, 2)], "in the order 0, 1, 2; name each of 0 to 1 once"),
    ],
)
def test_a_run_must_be_whole(tmp_path, refused, present, message):
    for index, count in present:
        write(tmp_path / f"d.shard-{index}-of-{count}", [[[index]]])
    line = refused(tmp_path / "d.shard-*")
    assert re.search(message, line), line
    assert str(tmp_path / "d.shard-*") in line


def test_shards_named_out_of_order_or_twice_are_refused(tmp_path, refused):
    for name in ("0-of-2", "1-of-2", "00-of-2"):
        write(tmp_path / f"d.shard-{name}", [[[1]]])
    zero, one, again = (tmp_path / f"d.shard-{name}" for name in ("0-of-2", "1-of-2", "00-of-2"))
    assert "in the order 1, 0; name each of 0 to 1 once" in refused(one, zero)
    assert "in the order 0, 0, 1" in refused(tmp_path / "d.shard-*")
    assert "in the order 0, 1, 0" in refused(zero, one, again)
    assert "shard 1 of 2 missing" in refused(zero)


def test_what_does_not_belong_together_is_refused(tmp_path, refused):
    a = write(tmp_path / "a", [[[1]]], sidecar(source("a", 1, 1)))
    whole = sidecar(source("a", 1, 1))
    for name, change, message in (
        ("hash", {"tokenizer_sha256": "cd" * 32}, f"tokenizer_sha256 is {'cd' * 32}, but of {a} it is {'ab' * 32}"),
        ("eod", {"eod_id": 7}, f"eod_id is 7, but of {a} it is 0"),
        ("append", {"append_eod": False}, f"append_eod is False, but of {a} it is True"),
    ):
        line = refused(a, write(tmp_path / name, [[[1]]], replace(whole, **change)))
        assert line.startswith(f"error: {tmp_path / name}: {message}")
    other = write(tmp_path / "other", [[[1]]], whole, dtype="<i4")
    assert f"{other}: dtype is int32, but of {a} it is uint16" in refused(a, other)
    # Also with one without a sidecar between them.
    write_megatron(tmp_path / "m", [[[1]]], 8)
    assert "eod_id is 7" in refused(a, tmp_path / "m", tmp_path / "eod")
    write_megatron(tmp_path / "multimodal", [[[1]]], 8, modes=True)
    assert "multimodal.idx: has the modes" in refused(tmp_path / "multimodal")


def test_shards_of_different_runs_are_refused(tmp_path, refused):
    def shards(second: Sidecar) -> str:
        for index, made in enumerate((sidecar(source("a", 1, 1), min_chars=3, shard="0/2"), second)):
            with IndexedDatasetWriter(tmp_path / f"d.shard-{index}-of-2", "<u2", overwrite=True) as writer:
                writer.add_document([1])
                writer.sidecar = made
        return refused(tmp_path / "d.shard-*-of-2")

    one = f"error: {tmp_path / 'd.shard-1-of-2.json'}: "
    same = source("a", 1, 1)
    assert shards(sidecar(same, min_chars=4, shard="1/2")).startswith(f"{one}made with min_chars 4, but")
    assert shards(sidecar(same, shard="1/2")).startswith(f"{one}made with min_chars at its default, but")
    assert "made with dedup exact, but" in shards(sidecar(same, min_chars=3, dedup="exact", shard="1/2"))
    assert "says shard: 1/3, but the dataset's files say 1/2" in shards(sidecar(same, min_chars=3, shard="1/3"))
    grown = replace(same, files=4)
    assert "a was 4 files of 1000 bytes, but" in shards(sidecar(grown, min_chars=3, shard="1/2"))
    others = sidecar(same, source("b", 0, 0), min_chars=3, shard="1/2")
    assert f"made from a b, but {tmp_path / 'd.shard-0-of-2'} from a: shards of different inputs" in shards(others)


def test_the_same_dataset_twice_or_as_output_is_refused(tmp_path, refused):
    a = write(tmp_path / "a", [[[1]]])
    for suffix in (".bin", ".idx"):
        (tmp_path / f"link{suffix}").symlink_to(f"{a}{suffix}")
    (tmp_path / "folder").symlink_to(tmp_path)
    for again in (f"{a}.idx", tmp_path / "link", tmp_path / "folder" / "a", tmp_path / "a*", f"{tmp_path}/./a"):
        assert "is already an input" in refused(a, again)
    for output in ("a", "a.bin", "folder/a", "./a"):
        assert "is an input" in refused(a, output=output, extra=["--overwrite"])
    assert "is an input" in refused(tmp_path / "a", output="a")
    assert "names a folder" in refused(a, output="sub/")
    assert "no such file" in refused(a, tmp_path / "none")
    assert "no dataset matches this pattern" in refused(tmp_path / "none-*")
    assert "--inputs" in refused()


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("at", [0, -1])
def test_a_changed_byte_is_refused(tmp_path, refused, suffix, at):
    documents: Documents = [[[1, 2]], [[3]]]
    a = write(tmp_path / "a", documents, sidecar(), mask=[1, 0, 1], metadata=[b"[1]", b"[2]"])
    b = write(tmp_path / "b", documents, sidecar(), mask=[1, 0, 1], metadata=[b"[1]", b"[2]"])
    flip(Path(f"{b}{suffix}"), at)
    assert str(b) in refused(a, b)
    if suffix not in (".json", ".idx"):
        assert f"{b}{suffix}: its hash is " in refused(a, b)


def test_an_index_that_was_replaced_is_refused(tmp_path, refused):
    """Whole in itself, of the same counts, and not that of the sidecar."""
    a = write(tmp_path / "a", [[[1, 2]], [[3]]], sidecar())
    b = write(tmp_path / "b", [[[1]], [[2, 3]]], sidecar())
    os.replace(f"{b}.idx", f"{a}.idx")
    assert f"{a}.idx: its hash is " in refused(a)


def test_a_sidecar_of_another_dataset_is_refused(tmp_path, refused):
    a = write(tmp_path / "a", [[[1, 2]], [[3]]], sidecar())
    record = json.loads(Path(f"{a}.json").read_text())
    for name, value, message in (
        ("documents", 3, "says documents: 3, but the dataset's files say 2"),
        ("tokens", 2, "says tokens: 2, but the dataset's files say 3"),
        ("dtype", "int32", "says dtype: int32, but the dataset's files say uint16"),
        ("mask_xxh3_128", "ab", "says a loss mask: True, but the dataset's files say False"),
        ("metadata_xxh3_128", "ab", "says metadata: True, but the dataset's files say False"),
    ):
        Path(f"{a}.json").write_text(json.dumps({**record, name: value}))
        assert message in refused(a)
    Path(f"{a}.json").write_text(json.dumps(record))
    Path(f"{a}.mask.bin").write_bytes(b"\1\1\1")
    assert "says a loss mask: False, but the dataset's files say True" in refused(a)


@pytest.mark.parametrize("lines", [b"{}\n", b"{}\n{}\n{}\n", b"{}\n{}\n{}", b"{}\n{}", b""])
def test_metadata_must_have_a_line_a_document(tmp_path, refused, lines):
    """Without a sidecar, so that no hash tells."""
    write_megatron(tmp_path / "a", [[[1]], [[2]]], 4)
    (tmp_path / "a.metadata.jsonl").write_bytes(lines)
    assert f"a.metadata.jsonl: {lines.count(10)} lines, but the dataset has 2 documents" in refused(tmp_path / "a")


def test_a_damaged_index_without_a_sidecar_is_refused(tmp_path, refused):
    write_megatron(tmp_path / "a", [[[1]], [[2, 3]], [[4]]], 4)
    flip(tmp_path / "a.idx", 34 + 12 + 8)  # the pointer to the second sequence
    assert "a.idx: sequence 1 of length 2 points to byte 5" in refused(tmp_path / "a")


@pytest.mark.parametrize("name", ["copy_file_range", "fsync", "replace"])
def test_a_full_disk_leaves_nothing(tmp_path, refused, monkeypatch, name):
    a = write(tmp_path / "a", [[[1, 2]]], sidecar())

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, name, full)
    assert refused(a) == f"error: {tmp_path / 'out'}: No space left on device; nothing was written\n"
    assert listing(tmp_path) == ["a.bin", "a.idx", "a.json"]


def test_an_existing_dataset_stays_until_the_new_one_is_complete(tmp_path, refused):
    old = files(write(tmp_path / "out", [[[9]]], sidecar(source("old", 1, 1))))
    a = write(tmp_path / "a", [[[1]]], sidecar())
    flip(Path(f"{a}.bin"), 0)
    refused(a, extra=["--overwrite"])
    assert files(tmp_path / "out") == old
    flip(Path(f"{a}.bin"), 0)
    join(tmp_path / "out", a, overwrite=True)
    assert read_megatron(tmp_path / "out").sequences == [[1]]


SLOW = """
import os, sys, time
from retemper.engine.errors import run_command
from retemper.tools.preprocessing import hashed_file
from retemper.tools import merge
original = hashed_file._copy_range
def slow(*arguments):
    original(*arguments)
    print("copied", flush=True)
    time.sleep(60)
hashed_file._copy_range = slow
run_command(lambda: merge.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interruption_leaves_nothing_under_a_final_name(tmp_path, how):
    a = write(tmp_path / "a", [[[1, 2]]], sidecar())
    b = write(tmp_path / "b", [[[3]]], sidecar())
    arguments = ["--inputs", str(a), str(b), "--output-prefix", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "copied\n"
    process.send_signal(how)
    status = process.wait(timeout=LIMIT_SECONDS)
    process.stdout.close()
    inputs = ["a.bin", "a.idx", "a.json", "b.bin", "b.idx", "b.json"]
    if how == signal.SIGKILL:
        assert [name for name in listing(tmp_path) if name[0] != "."] == inputs
    else:
        assert (status, listing(tmp_path)) == (130, inputs)
    # The same command takes what a kill left out of the way.
    join(tmp_path / "out", a, b)
    assert listing(tmp_path) == [*inputs, "out.bin", "out.idx", "out.json"]
    assert read_megatron(tmp_path / "out").sequences == [[1, 2], [3]]


PEAK = """
import resource, sys
from retemper.engine.errors import run_command
from retemper.tools import merge
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "KB")
"""


def test_memory_does_not_grow_with_the_datasets(tmp_path):
    """Two datasets of 5 million sequences, 100 MB of index each and 40 MB of tokens: a map of the indexes, or arrays of
    all their entries, would show."""
    count = 5_000_000
    for name in ("a", "b"):
        np.zeros(4 * count, np.uint8).tofile(tmp_path / f"{name}.bin")
        index_format.write_index(tmp_path / f"{name}.idx", "<i4", np.ones(count, np.int32))
    arguments = ["--inputs", str(tmp_path / "a"), str(tmp_path / "b"), "--output-prefix", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-2]) < 120_000, done.stdout
    assert len(IndexedDataset(tmp_path / "out")) == 2 * count


def test_the_command_runs_as_a_file(tmp_path):
    a = write(tmp_path / "a", [[[1]]], sidecar())
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(COMMAND), "--inputs", a, "--output-prefix", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line[:25].strip(): line[26:] for line in done.stdout.splitlines()}
    assert (rows["datasets joined"], rows["documents"], rows["tokens"]) == ("1", "1", "1 (uint16)")
    assert rows["files"] == "out.bin out.json out.idx"
    assert float(rows["speed"].split()[2]) <= time.monotonic() - started + 0.1
