"""Which files of a folder are documents: data sets as the Hub, datasets, Spark and other programs leave them."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from retemper.engine.errors import UserError
from retemper.tools.preprocessing.inputs.files import InputOptions, expand_inputs

RECORD = b'{"text": "one"}\n'
PARQUET = b"PAR1"  # of which nothing is read in a folder but its name


def make(root: Path, *names: str, content: bytes = RECORD) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def below(root: Path, *arguments: str, **options: object) -> list[str]:
    """The files that ``arguments``, by default ``root``, stand for, without the name of the folder ``root``."""
    files = expand_inputs(arguments or [str(root)], InputOptions(**options))  # type: ignore[arg-type]
    return [os.path.relpath(file.path, root) for file in files]


FOLDERS = {
    "a snapshot of the Hub": (
        ["data/train.jsonl"],
        ["README.md", "LICENSE.txt", ".gitattributes", "dataset_infos.json", "CITATION.md", "requirements.txt", "a.py"],
    ),
    "C4": (["en/c4-train.00000-of-00002.json.gz", "en/c4-train.00001-of-00002.json.gz"], ["en/README.md"]),
    "pages of a site with data": (["data.csv"], ["index.html", "README", "notes.md", "CHANGELOG.md"]),
    "texts with a licence": (["a.txt", "b.txt"], ["LICENSE-MIT.txt", "README.md", "NOTICE.txt"]),
    "a corpus of Markdown": (["README.md", "guide.md", "part/README.md"], ["LICENSE", "LICENSE.txt"]),
    "a corpus of pages": (["a/index.html", "b.html", "index.html"], ["README.md"]),
    "nothing but licences": (["LICENSE.txt", "a/LICENSE", "a/README.md", "COPYING.txt"], ["b/LICENSE-APACHE"]),
    "records and books": (["books/1.txt", "books/2.md", "web/a.jsonl"], ["README.md", "web/card.md"]),
    "books whose names look like others": (
        ["changes-in-law.txt", "history.txt", "license-plates.txt", "requirements-engineering.txt"],
        ["license.txt"],
    ),
    "MosaicML next to records": (["more.jsonl"], ["mds/index.json", "mds/shard.00000.mds", "x.tar", "y.npy"]),
    "Spark": (["part-00000", "part-00001.gz"], ["_SUCCESS", "._SUCCESS.crc", "part-00000.crc", "_metadata"]),
    "splits": (
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "extra.jsonl"],
        ["data/test-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl"],
    ),
    "splits by file": (["a/train.jsonl", "b/dev.jsonl"], ["a/test.jsonl.gz", "a/validation.csv"]),
    "splits by folder": (["x/train/0.jsonl", "x/more/0.jsonl", "test/0.jsonl"], ["x/test/0.jsonl", "x/dev/a/1.jsonl"]),
    "splits without train": (["en-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"], []),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_documents_of_a_folder_are_told_from_what_describes_them(tmp_path, capsys, name):
    wanted, others = FOLDERS[name]
    make(tmp_path, *wanted, *others)
    for path in tmp_path.rglob("*.gz"):
        path.write_bytes(gzip.compress(RECORD))
    if name == "nothing but licences":
        wanted = [path for path in wanted if "." in path]  # of the others nothing tells that they are text
    assert below(tmp_path) == sorted(wanted)
    assert below(tmp_path, f"{tmp_path}/**") == sorted(wanted)
    shown = capsys.readouterr().err
    assert all(line.startswith("note: ") for line in shown.splitlines())
    assert ("left out" in shown) == any(not Path(other).name.startswith(".") for other in others) or "nothing" in name
    # What is named is read.
    for other in others:
        if other.endswith((".md", ".txt", ".html", ".json")):
            assert below(tmp_path, str(tmp_path / other)) == [other]


def test_what_is_left_out_is_counted_by_reason_with_the_first_of_each(tmp_path, capsys):
    make(tmp_path, "a.jsonl", "README.md", "LICENSE.txt", "x.mds", "y.mds", "z.npy", "_SUCCESS")
    below(tmp_path)
    name = f"note: --input {tmp_path}: left out"
    lines = capsys.readouterr().err.splitlines()
    assert f"{name} 2 files that describe the data, {tmp_path}/LICENSE.txt first; name them to read them" in lines
    assert f"{name} 1 file of caches and markers of other programs, {tmp_path}/_SUCCESS first" in lines
    assert any(line.startswith(f"{name} 3 files of other formats") and "2 of them: MosaicML" in line for line in lines)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["index.json", "shard.00000.mds.zstd"], "1 of them: MosaicML Streaming, which is not read; write its samples"),
        (["index.json", "chunk-0-0.bin", "chunk-0-1.bin"], "2 of them: binary data: litdata"),
        (["part-0.npy", "part-1.npy", "a.pkl"], "2 of them: NumPy arrays, mostly token ids"),
        (["00000.ds", "00000.ds.index", "stats.json"], "tokens of datatrove"),
        (["000000.tar", "000001.tar"], "a tar archive, such as a shard of WebDataset, which is not read; unpack it"),
        (["a.tar.gz"], "a tar archive"),
        (["README.md", "LICENSE.txt", "data/0.tar"], "a tar archive"),  # the card alone is no corpus
        (["README.md", "index.json", "shard.00000.mds"], "MosaicML Streaming"),
        (["a.zip"], "an archive, which is not read; unpack it"),
        (["old.xls"], "an old Excel workbook, which is not read; save it as .xlsx"),
        (["a.ods"], "a workbook that is not read"),
        (["a.docx", "b.doc", "c.rtf"], "a word processor's document, which is not read; convert it to text"),
        (["a.epub"], "an e-book"),
        (["dataset_info.json", "state.json"], "only files that describe data in this folder, such as .*dataset_info"),
        (["_delta_log/0.json", "a.parquet"], "a Delta table, whose log .* export the table to Parquet"),
        (["metadata/v1.metadata.json", "data/a.parquet"], "an Iceberg table, whose log"),
        (["notes.unknown"], "1 file of other formats, .*; --input-format names a format"),
    ],
)
def test_folders_of_other_programs_are_refused_with_the_remedy(tmp_path, names, expected):
    make(tmp_path, *names)
    with pytest.raises(UserError, match=expected):
        below(tmp_path)
    if not names[0].endswith((".json", ".unknown", ".md")):
        with pytest.raises(UserError, match=r"not read|unknown format"):
            below(tmp_path, str(tmp_path / names[0]))


def save_to_disk(folder: Path, *files: str) -> None:
    """What ``datasets.Dataset.save_to_disk`` writes next to Arrow files."""
    make(folder, *files, content=b"\xff\xff\xff\xff")
    state = {"_data_files": [{"filename": name} for name in files], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text('{"features": {}}')


def test_a_saved_dataset_is_the_files_that_its_state_lists(tmp_path, capsys):
    save_to_disk(tmp_path, "data-00000-of-00002.arrow", "data-00001-of-00002.arrow")
    make(tmp_path, "cache-0123456789.arrow", "tmpabc.arrow")  # of a map() that ran later: the same rows again
    assert below(tmp_path) == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert "2 files of caches" in capsys.readouterr().err
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"state.json: names data-00001-of-00002.arrow, which is not there"):
        below(tmp_path)


def test_a_saved_selection_of_rows_is_not_read_as_all_rows(tmp_path):
    save_to_disk(tmp_path, "dataset.arrow", "indices.arrow")
    state = {"_data_files": [{"filename": "dataset.arrow"}], "_indices_data_files": [{"filename": "indices.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"state.json: the dataset is a selection .*flatten_indices"):
        below(tmp_path)


def test_a_saved_dataset_of_several_splits_is_its_training_split(tmp_path, capsys):
    for split in ("train", "test", "unsupervised"):
        save_to_disk(tmp_path / split, "data-00000-of-00001.arrow")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test", "unsupervised"]}')
    assert below(tmp_path) == ["train/data-00000-of-00001.arrow", "unsupervised/data-00000-of-00001.arrow"]
    assert "1 file of splits for evaluation" in capsys.readouterr().err
    assert below(tmp_path, str(tmp_path / "test")) == ["test/data-00000-of-00001.arrow"]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test", "unsupervised"]}')
    assert len(below(tmp_path)) == 3


def test_the_cache_of_datasets_is_its_training_split(tmp_path):
    folder = tmp_path / "default" / "0.0.0" / "abc"
    make(folder, "x-train.arrow", "x-test.arrow", "cache-1.arrow", "x.lock", "dataset_info.json", content=b"\xff" * 8)
    assert below(tmp_path) == ["default/0.0.0/abc/x-train.arrow"]


def test_a_folder_of_the_hugging_face_cache_is_its_main_snapshot(tmp_path, capsys):
    root = tmp_path / "datasets--o--n"
    make(root, "blobs/aaa", "blobs/bbb", "refs/other")
    for revision, blob in (("123", "aaa"), ("456", "bbb")):
        folder = root / "snapshots" / revision / "data"
        folder.mkdir(parents=True)
        (folder / "train.jsonl").symlink_to(f"../../../blobs/{blob}")
    with pytest.raises(UserError, match=r"a folder of the Hugging Face cache with 2 snapshots; name one of"):
        below(root)
    (root / "refs" / "main").write_text("456")
    assert below(root) == below(root, str(root / "snapshots" / "456")) == ["snapshots/456/data/train.jsonl"]
    assert below(tmp_path) == ["datasets--o--n/snapshots/456/data/train.jsonl"]
    assert "reading its snapshot 456" in capsys.readouterr().err


def test_the_format_of_all_files_can_be_named(tmp_path):
    make(tmp_path, "a.log", "b", "c.txt", "README.md", "_SUCCESS")
    options = InputOptions(input_format="jsonl")
    files = expand_inputs([str(tmp_path)], options)
    assert [(Path(file.path).name, file.format) for file in files] == [(n, "jsonl") for n in ("a.log", "b", "c.txt")]
    (tmp_path / "b").write_bytes(gzip.compress(RECORD))
    (file,) = expand_inputs([str(tmp_path / "b")], options)
    assert (file.format, file.compression) == ("jsonl", ".gz")


def test_mixtures_of_records_and_texts_are_named(tmp_path, capsys):
    make(tmp_path, "a.jsonl", "b.html", "c.html")
    below(tmp_path)
    assert "2 html, 1 jsonl" in capsys.readouterr().err
    below(tmp_path, str(tmp_path / "b.html"), str(tmp_path / "c.html"))
    assert capsys.readouterr().err == ""


def test_a_pipe_named_as_a_description_is_not_waited_for(tmp_path):
    make(tmp_path, "a.jsonl")
    for name in ("state.json", "dataset_dict.json"):
        os.mkfifo(tmp_path / name)
    assert below(tmp_path) == ["a.jsonl"]
