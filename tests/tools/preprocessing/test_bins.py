"""preprocess --bins: a dataset for each value of a key, and a mixture that a run reads."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from oracles.megatron_index import read_megatron
from oracles.preprocessing import plain_ids, report
from oracles.tiny_tokenizer import sample_text

from retemper.engine.config.parser import parse_config
from retemper.engine.data.sidecar import Sidecar
from retemper.engine.errors import UserError
from retemper.tools.preprocessing.dataset import bins
from retemper.tools.preprocessing.dataset.bins import name_bins, weights_of
from retemper.tools.preprocessing.options import PreprocessOptions
from retemper.tools.preprocessing.pipeline import preprocess
from retemper.tools.preprocessing.report import format_report

VALUES = ["news", "Computer Science", 3, None, "news", "a.b/c", True, "", "天气"]
NAMES = {"Computer Science": "Computer_Science", "a.b/c": "a_b_c", "": "other", None: "other", True: "true"}
RECORDS = [{"text": sample_text(seed, 9), "kind": VALUES[seed % len(VALUES)], "id": seed} for seed in range(90)]
del RECORDS[3]["kind"]


def name_of(record: dict) -> str:
    value = record.get("kind")
    return NAMES.get(value, str(value))


def in_bins(records: list[dict]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for record in records:
        found[name_of(record)].append(record["text"])
    return dict(sorted(found.items()))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS))
    return path


@pytest.mark.parametrize("settings", [{}, {"task_bytes": 500, "workers": 2}], ids=["one task", "tasks"])
def test_each_value_has_a_dataset(corpus, tiny_tokenizer, settings):
    found = report(tiny_tokenizer, corpus.parent, corpus, bins="kind", metadata=["id"], **settings)
    wanted = in_bins(RECORDS)
    assert [Path(prefix).name for prefix in found.sidecars] == [f"out.{name}" for name in wanted]
    for name, texts in wanted.items():
        prefix = corpus.parent / f"out.{name}"
        assert read_megatron(prefix).documents == plain_ids(tiny_tokenizer, texts)
        ids = [json.loads(line)["id"] for line in Path(f"{prefix}.metadata.jsonl").read_text().splitlines()]
        assert ids == [record["id"] for record in RECORDS if name_of(record) == name]
    assert not list(corpus.parent.glob("out.idx"))


@pytest.mark.parametrize("shuffle", [False, True])
def test_bins_are_split_like_the_corpus(corpus, tiny_tokenizer, shuffle):
    options = {"split": "train=0.7,valid=0.3", "dedup": "exact", "shuffle": shuffle}
    whole = report(tiny_tokenizer, corpus.parent, corpus, output_prefix=str(corpus.parent / "whole"), **options)
    found = report(tiny_tokenizer, corpus.parent, corpus, bins="kind", **options)
    for side in ("train", "valid"):
        of_bins = [read_megatron(Path(prefix)).documents for prefix in found.sidecars if prefix.endswith(f".{side}")]
        documents = read_megatron(corpus.parent / f"whole.{side}").documents
        assert sorted(document for part in of_bins for document in part) == sorted(documents)
        assert sum(map(len, of_bins)) == whole.sidecars[str(corpus.parent / f"whole.{side}")].documents
    for prefix in found.sidecars:
        assert {tuple(document[0]) for document in read_megatron(Path(prefix)).documents} <= {
            tuple(document[0])
            for name, texts in in_bins(RECORDS).items()
            if f".{name}." in prefix
            for document in plain_ids(tiny_tokenizer, texts)
        }


def test_the_printed_section_is_read_by_a_run(corpus, tiny_tokenizer, tmp_path):
    found = report(
        tiny_tokenizer, tmp_path, corpus, bins="kind", split="valid=0.2,train=0.8", bin_weights="proportional"
    )
    text = format_report(found)
    section = yaml.safe_load(text[text.index("data:\n") :])
    sizes = {prefix: sidecar.tokens for prefix, sidecar in found.sidecars.items() if prefix.endswith(".train")}
    assert {entry["path"] for entry in section["data"]["train"]} == set(sizes)
    for entry in section["data"]["train"]:
        assert entry["weight"] == pytest.approx(sizes[entry["path"]] / sum(sizes.values()), abs=2e-4)
    rest = {"run_folder": "runs/x", "training": {"train_tokens": 1_000_000}, "model": {"architecture": "a"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**rest, **section}))
    data = parse_config(["--config", str(tmp_path / "run.yaml")]).data
    assert data.validation["news"].endswith("out.news.valid")


def test_a_bin_without_documents_on_a_side_is_not_written(tmp_path, tiny_tokenizer, capsys):
    records = [{"text": sample_text(seed, 5), "kind": "large" if seed else "small"} for seed in range(60)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records))
    found = report(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", bins="kind", split="train=0.9,valid=0.1")
    assert len(found.sidecars) == 3
    assert len(list(tmp_path.glob("out.small.*.idx"))) == 1
    assert "out.small" in capsys.readouterr().err
    assert not list(tmp_path.glob(".out*"))


def test_text_in_bins(corpus):
    options = {"bins": "kind", "to_jsonl": "plain", "output_prefix": str(corpus.parent / "out")}
    found = preprocess(PreprocessOptions([str(corpus)], **options))  # type: ignore[arg-type]
    for name, texts in in_bins(RECORDS).items():
        lines = (corpus.parent / f"out.{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"text": text} for text in texts]
    assert f"{corpus.parent}/out.news.jsonl" in found.mixture


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0])
def test_weights_are_shares_of_a_power_of_the_size(exponent):
    sizes = [1, 10, 1000, 1_000_000, 7, 31_415]
    weights = weights_of(sizes, exponent)
    powers = [size**exponent for size in sizes]
    assert sum(round(weight * 10_000) for weight in weights) == 10_000
    for weight, power in zip(weights, powers, strict=True):
        assert weight == pytest.approx(power / sum(powers), abs=5e-4)
        assert weight >= 1e-4
    assert weights_of([5] * 3, exponent) == [0.3334, 0.3333, 0.3333]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": "id"}, "--bins id: more than 64 different values"),
        ({"bins": "kind", "shard": "0/2"}, "--bins kind and --shard"),
        ({"bins": "kind", "bin_weights": "alpha=2"}, "--bin-weights alpha=2"),
        ({"bins": "kind", "bin_weights": "even"}, "--bin-weights even"),
    ],
)
def test_wrong_options(corpus, tiny_tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        report(tiny_tokenizer, corpus.parent, corpus, **options)
    assert not list(corpus.parent.glob("out*"))


def test_values_that_are_no_category_are_malformed(tmp_path, tiny_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one", "kind": ["x"]}\n{"text": "two", "kind": "x"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:1: the value of 'kind' for --bins is an array"):
        report(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", bins="kind")
    found = report(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", bins="kind", skip_bad_lines=True)
    assert [sidecar.left_out for sidecar in found.sidecars.values()] == [{"malformed": 1}]


def test_values_with_one_file_name_are_refused():
    with pytest.raises(UserError, match="'a b' and 'a/b' would share the file name"):
        name_bins(["a/b", "a b"], "kind")
    with pytest.raises(UserError, match="share the file name"):
        name_bins(["News", "news"], "kind")
    with pytest.raises(UserError, match="more than 64"):
        name_bins(map(str, range(bins.MAX_BINS + 1)), "kind")


def test_an_existing_dataset_of_a_bin_is_kept(corpus, tiny_tokenizer):
    (corpus.parent / "out.news.idx").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"out.news.idx: exists and is not recognised"):
        report(tiny_tokenizer, corpus.parent, corpus, bins="kind", overwrite=True)
    assert (corpus.parent / "out.news.idx").read_bytes() == b"mine"
    assert Sidecar.read(corpus.parent / "out.other") is None
