"""Datasets of the Hub as inputs: the rows of the library datasets, at one commit, from a Hub on this machine."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from dataset_hub import DatasetHub
from oracles.preprocessing import jsonl, run
from oracles.reading import read_file
from oracles.tiny_tokenizer import sample_text

from retemper.engine.errors import UserError
from retemper.tools.preprocessing.inputs.files import InputOptions, describe_inputs, expand_inputs
from retemper.tools.preprocessing.inputs.hub import parse_hub_dataset, pin_revisions

datasets = pytest.importorskip("datasets", reason="needs datasets: pip install datasets")
ROOT = Path(__file__).parents[3]


def texts(kind: str, count: int) -> list[str]:
    return [f"{kind} {number}: {sample_text(number, 3)}" for number in range(count)]


def parquet(kind: str, count: int) -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts(kind, count)}), buffer, row_group_size=2)
    return buffer.getvalue()


CARD = b"""---
configs:
- config_name: en
  default: true
  data_files:
  - split: train
    path: ["en/b.jsonl", "en/a.jsonl"]
  - split: held
    path: en/h*.jsonl
- config_name: de
  data_files: de/*.jsonl
---
A card.
"""
DATASETS: dict[str, dict[str, bytes]] = {
    "org/names": {name: jsonl(texts(name, 4)) for name in ("train.jsonl", "test.jsonl", "validation.jsonl")},
    "org/shards": {f"data/train-{part:05d}-of-00003.parquet": parquet(f"p{part}", 5) for part in range(3)}
    | {"data/test-00000-of-00001.parquet": parquet("t", 3), "README.md": b"# No metadata\n"},
    "org/folders": {f"{folder}/{name}.jsonl": jsonl(texts(name, 3)) for folder in ("train", "dev") for name in "xy"},
    "org/unnamed": {f"part/{name}.jsonl": jsonl(texts(name, 3)) for name in "dac"},
    "org/card": {f"en/{name}.jsonl": jsonl(texts(name, 3)) for name in ("a", "b", "h1", "h2", "other")}
    | {"de/a.jsonl": jsonl(texts("de", 3)), "README.md": CARD},
}
SPLITS = [
    ("org/names", None, "train"),
    ("org/names", None, "test"),
    ("org/names", None, "validation"),
    ("org/shards", None, "train"),
    ("org/shards", None, "test"),
    ("org/folders", None, "train"),
    ("org/folders", None, "validation"),
    ("org/unnamed", None, "train"),
    ("org/card", None, "train"),
    ("org/card", "en", "held"),
    ("org/card", "de", "train"),
]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with DatasetHub() as serving:
        for name, files in DATASETS.items():
            serving.commit(name, files)
        serving.use(monkeypatch, str(tmp_path / "home"))
        yield serving


@pytest.mark.parametrize(("name", "subset", "split"), SPLITS)
def test_rows_are_those_of_datasets(hub, name, subset, split):
    expected = [row["text"] for row in datasets.load_dataset(name, subset, split=split, streaming=True)]
    files = expand_inputs([f"hf://{name}"], InputOptions(hf_subset=subset, hf_split=split))
    assert [value["text"] for file in files for value in read_file(file.path).values] == expected != []  # type: ignore[arg-type]
    sha = hub.commits[name][-1][0]
    assert all(file.path.startswith(f"hf://datasets/{name}@{sha}/") for file in files)


def test_without_a_split_train_or_the_only_one_is_read(hub):
    def named(name: str, subset: str | None = None) -> list[str]:
        files = describe_inputs([f"hf://datasets/{name}"], InputOptions(hf_subset=subset))
        return [facts.path.partition("@")[2][41:] for facts in files]

    assert named("org/names") == ["train.jsonl"]
    assert named("org/card", "de") == ["de/a.jsonl"]
    hub.commit("org/one", {"test.jsonl": jsonl(["a"])})
    assert named("org/one") == ["test.jsonl"]


def test_files_are_named_without_the_library(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for url in ("hf://datasets/org/names/t*.jsonl", "hf://org/names@main/t*.jsonl"):
        assert [facts.path.rpartition("/")[2] for facts in describe_inputs([url])] == ["test.jsonl", "train.jsonl"]
    with pytest.raises(UserError, match=r"needs datasets: pip install '[^']*\[hub\]'; or name the files"):
        describe_inputs(["hf://org/names"])


def test_what_identifies_a_file_is_the_hash_of_its_content(hub):
    before = describe_inputs(["hf://org/names/*.jsonl"])
    hub.commit("org/names", {**DATASETS["org/names"], "test.jsonl": jsonl(["another"]), "README.md": b"new"})
    after = describe_inputs(["hf://org/names/*.jsonl"])
    assert [old.identity == new.identity for old, new in zip(before, after, strict=True)] == [False, True, True]
    assert all(old.path != new.path for old, new in zip(before, after, strict=True))


def test_a_run_reads_and_records_one_commit(hub, tmp_path, tiny_tokenizer):
    first = hub.commits["org/names"][-1][0]
    sidecar = run(tiny_tokenizer, tmp_path, "hf://org/names", encoder="auto", hf_split="test")
    assert [source.name for source in sidecar.sources] == [f"hf://datasets/org/names@{first}"]
    assert sidecar.options == {"hf_split": "test"} and sidecar.documents == 4
    made = (tmp_path / "out.bin").read_bytes()
    hub.commit("org/names", {"test.jsonl": jsonl(["another"])})
    # The recorded name gives the same dataset again, the given one the new commit.
    recorded = sidecar.sources[0].name
    run(tiny_tokenizer, tmp_path, recorded, encoder="auto", hf_split="test", overwrite=True)
    assert (tmp_path / "out.bin").read_bytes() == made
    assert run(tiny_tokenizer, tmp_path, "hf://org/names", encoder="auto", overwrite=True).documents == 1


@pytest.mark.parametrize(
    ("url", "dataset"),
    [
        ("hf://org/name", ("org/name", None, "")),
        ("hf://datasets/org/name@v1.0/", ("org/name", "v1.0", "")),
        ("hf://org/name@refs/convert/parquet/default/train", ("org/name", "refs/convert/parquet", "default/train")),
        ("hf://datasets/org/name/a/*.jsonl", ("org/name", None, "a/*.jsonl")),
        ("hf://buckets/org/name/a.jsonl", None),
        ("hf://spaces/org/name/a.jsonl", None),
        ("s3://org/name", None),
    ],
)
def test_urls_of_datasets(url, dataset):
    assert parse_hub_dataset(url) == dataset


def test_wrong_names_are_one_line(hub, refused, tmp_path, monkeypatch):
    def error(*arguments: str) -> str:
        return refused("--output-prefix", str(tmp_path / "out"), "--input", *arguments)

    assert "no split 'held' (splits there: train, validation, test)" in error("hf://org/names", "--hf-split", "held")
    assert "hf://org/nothing: " in error("hf://org/nothing") and "Not Found" in error("hf://org/nothing")
    assert "hf://org/names@v9: " in error("hf://org/names@v9")
    assert "'fr'" in error("hf://org/card", "--hf-subset", "fr") and "--hf-subset" in error(
        "hf://org/card", "--hf-subset", "fr"
    )
    assert "--hf-split train: is for --input hf://" in error(str(tmp_path / "a.jsonl"), "--hf-split", "train")
    hub.commit("org/card", {**DATASETS["org/card"], "README.md": CARD.replace(b"  default: true\n", b"")})
    assert "['en', 'de']" in error("hf://org/card")
    hub.commit("org/images", {"train/a.png": b"x"})
    assert "hf://datasets/org/images" in error("hf://org/images")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "hf://org/names: cannot be read" in error("hf://org/names")


def test_revisions_are_pinned_once(hub):
    (pinned,) = pin_revisions(["hf://org/names"])
    hub.requests.clear()
    assert pin_revisions([pinned, "a.jsonl", "s3://b/c"]) == [pinned, "a.jsonl", "s3://b/c"]
    assert hub.requests == []


@pytest.mark.slow
def test_workers_read_a_dataset_as_from_the_disk(hub, tmp_path, tiny_tokenizer):
    shards = [f"data/train-{part:05d}-of-00003.parquet" for part in range(3)]
    for name in shards:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(DATASETS["org/shards"][name])
    for prefix, inputs in (("remote", ["hf://org/shards"]), ("local", shards)):
        command = [sys.executable, ROOT / "tools/preprocess.py", "--tokenizer", tiny_tokenizer, "--workers", "2"]
        command += ["--input", *inputs, "--output-prefix", prefix]
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "remote.bin").read_bytes() == (tmp_path / "local.bin").read_bytes()
    (source,) = json.loads((tmp_path / "remote.json").read_text())["sources"]
    assert source["name"] == f"hf://datasets/org/shards@{hub.commits['org/shards'][-1][0]}" and source["files"] == 3
