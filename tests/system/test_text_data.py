"""Runs whose training data is text: they train on what tools/preprocess.py makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_run
import yaml

from retemper.engine import pretrain
from retemper.engine.data import tokenizing
from retemper.engine.errors import UserError
from retemper.engine.guards.stop_request import StoppedBeforeTraining, StopRequest
from retemper.engine.parallel.process_group import Ranks
from retemper.tools import preprocess


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A folder with two texts."""
    folder = tmp_path_factory.mktemp("texts")
    for name, count in (("first", 150), ("second", 90)):
        lines = [json.dumps({"text": f"{name} document {i}: " + "some words " * (i % 13)}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def configs(texts, tiny_tokenizer, tmp_path) -> tuple[Path, Path]:
    """A configuration that names texts, and one that names datasets which the command has made from them."""
    made = yaml.safe_load(tiny_run.write_config(tmp_path).read_text())
    vocab_size = len(json.loads((tiny_tokenizer / "tokenizer.json").read_text())["model"]["vocab"]) + 8
    made["model"] = {
        "architecture": {**tiny_run.ARCHITECTURE, "vocab_size": vocab_size},
        "tokenizer": str(tiny_tokenizer),
    }
    made["training"]["train_tokens"] = 6 * 8 * 32
    known = ["--tokenizer", str(tiny_tokenizer), "--workers", "1"]
    split = ["--split", "train=0.8,valid=0.2"]
    preprocess.main(["--input", str(texts / "first.jsonl"), "--output-prefix", str(tmp_path / "one"), *split, *known])
    preprocess.main(["--input", str(texts / "second.jsonl"), "--output-prefix", str(tmp_path / "two"), *known])
    first = {"path": str(texts / "first.jsonl"), "name": "first", "validation_fraction": 0.2, "weight": 2.0}
    of_texts = {
        "cache_folder": str(tmp_path / "cache"),
        "train": [first, {"path": str(texts / "second.jsonl"), "name": "second"}],
        "validation": {"more": str(texts / "second.jsonl")},
    }
    first_dataset = {"path": str(tmp_path / "one.train"), "name": "first", "weight": 2.0}
    of_datasets = {
        "train": [first_dataset, {"path": str(tmp_path / "two"), "name": "second"}],
        "validation": {"first": str(tmp_path / "one.valid"), "more": str(tmp_path / "two")},
    }
    for name, data in (("texts", of_texts), ("datasets", of_datasets)):
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump({**made, "data": data, "run_folder": str(tmp_path / name)})
        )
    return tmp_path / "texts.yaml", tmp_path / "datasets.yaml"


def test_text_trains_like_the_datasets_made_from_it(one_rank, configs, tmp_path):
    for config in configs:
        tiny_run.train(one_rank, config, [])
    assert tiny_run.curve(tmp_path / "texts") == tiny_run.curve(tmp_path / "datasets")
    assert {record.get("evaluation") for record in tiny_run.records(tmp_path / "texts")} == {None, "more", "first"}


def test_a_resumed_run_takes_its_data_from_the_cache(one_rank, configs, tmp_path, monkeypatch):
    tiny_run.train_until(one_rank, configs[0], [], 5)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("dataset*")}
    tiny_run.train(one_rank, configs[0], [])
    tiny_run.train(one_rank, configs[1], [])
    assert tiny_run.curve(tmp_path / "texts") == tiny_run.curve(tmp_path / "datasets")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("dataset*")} == before


def as_two_nodes(ranks: Ranks, config: Path) -> list[str]:
    """Train as if each rank were alone on its node; return the parts that this rank has made."""
    made = []
    run_job = tokenizing.TokenizingJob.run

    def run(job: tokenizing.TokenizingJob, part: str | None = None):
        made.append(part)
        return run_job(job, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing.TokenizingJob, "run", run)
        patch.setenv("LOCAL_RANK", "0")  # of both
        tiny_run.train(ranks, config, [])
    return made


def test_nodes_share_the_work(two_ranks, configs, tmp_path):
    main, other = two_ranks.run(as_two_nodes, configs[0])
    assert other == ["1/2"] * 3 and main == ["0/2", None] * 3
    two_ranks.run(tiny_run.train, configs[1], [])
    assert tiny_run.curve(tmp_path / "texts") == tiny_run.curve(tmp_path / "datasets")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--data.train.0.column", "missing"], r"data.train\[0\].*first.jsonl"),
        (["--data.train.0.preprocess", "{min_chars: -1}"], r"data.train\[0\]: --min-chars -1"),
        (["--data.train.0.preprocess", "{unknown: 1}"], r"data.train\[0\].*--unknown"),
        (["--model.tokenizer", "null"], r"data.train\[0\] is text.*model.tokenizer"),
    ],
)
def test_text_that_cannot_be_tokenized_is_refused(one_rank, configs, tmp_path, changes, named, capfd):
    with pytest.raises(UserError, match=named):
        pretrain.build(tiny_run.configure(configs[0], *changes), one_rank)
    assert "error" not in capfd.readouterr().err  # the run prints it, and not its process as well
    assert not (tmp_path / "texts").exists()


def test_a_request_to_stop_ends_the_tokenization(one_rank, configs, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "PREPROCESS", tmp_path / "slow.py")
    (tmp_path / "slow.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr(StopRequest, "agreed", lambda self: True)
    with pytest.raises(StoppedBeforeTraining):
        pretrain.build(tiny_run.configure(configs[0]), one_rank)
