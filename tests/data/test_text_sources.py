"""Which sources are text, and the command lines that make datasets from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import DataConfig, SourceConfig, StageConfig, ValidationConfig
from retemper.engine.data.text_sources import TextSource, cache_folder, is_text, text_sources, with_datasets
from retemper.engine.errors import UserError
from retemper.tools.preprocess import parse_arguments
from retemper.tools.training.options import parse_evaluation


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a dataset, a text with the name of a dataset, and texts."""
    for name in ("data.bin", "data.idx", "data", "both.txt", "both.txt.idx", "a.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "corpus").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("data", False),
        ("data.bin", False),
        ("both.txt", False),
        ("missing", False),
        ("a.jsonl", True),
        ("corpus", True),
        ("corpus/", True),
        ("*.jsonl", True),
        ("*.csv", False),
        ("hf://org/name", True),
        ("s3://bucket/key", True),
    ],
)
def test_datasets_win_over_texts_of_the_same_name(folder, path, expected):
    assert is_text(path) is expected


def test_settings_become_options_of_preprocess(folder):
    settings = {
        "column": "body",
        "split": "train",
        "subset": "en",
        "validation_fraction": 0.05,
        "preprocess": {
            "dedup": "exact",
            "min-chars": 7,
            "append_eod": False,
            "shuffle": True,
            "metadata": ["a", "b"],
            "max_tokens": None,
            "fix_text": False,
            "fim_rate": 0.5,
            "fim_spm_rate": 0,
        },
    }
    options = parse_arguments(TextSource("data.train[0]", "hf://org/name", settings).arguments())
    assert options.input == ["hf://org/name"] and options.json_key == ["body"]
    assert (options.hf_split, options.hf_subset, options.split) == ("train", "en", "train=0.95,valid=0.05")
    assert (options.dedup, options.min_chars, options.append_eod, options.shuffle) == ("exact", 7, False, True)
    assert options.metadata == ["a", "b"]
    assert (options.fim_rate, options.fim_spm_rate) == (0.5, 0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"split": "train"}, "split is train"), ({"preprocess": {"output_prefix": "x"}}, "preprocess sets output_prefix")],
)
def test_impossible_settings_are_refused(settings, named):
    with pytest.raises(UserError, match=f"data.train\\[0\\].*{named}"):
        TextSource("data.train[0]", "corpus", settings).arguments()


def test_a_dataset_has_no_settings_of_text(folder):
    with pytest.raises(UserError, match=r"data.train\[1\].column is for text, but missing"):
        text_sources(DataConfig([SourceConfig("corpus"), SourceConfig("missing", column="body")]))


def test_validation_texts_have_settings(folder, tmp_path):
    """In the configuration, on the command line, and as options of tools/preprocess.py."""
    chats = {"path": "corpus", "column": "body", "preprocess": {"chat": True}}
    config = {"data": {"train": [{"path": "data"}], "validation": {"chats": chats, "plain": "a.jsonl"}}}
    config |= {"run_folder": "run", "training": {"train_tokens": 1000}, "model": {"architecture": "x.json"}}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    read = parse_config(["--config", str(tmp_path / "run.yaml")]).data
    assert read.validation == {"chats": ValidationConfig(**chats), "plain": "a.jsonl"}
    assert read.validation_paths == {"chats": "corpus", "plain": "a.jsonl"}
    [first, second] = text_sources(read)
    assert (first.key, first.path, second.key) == ("data.validation.chats", "corpus", "data.validation.plain")
    assert first.arguments() == ["--input", "corpus", "--json-key", "body", "--chat"]
    assert second.arguments() == ["--input", "a.jsonl"]
    resolved = with_datasets(read, {"data.validation.chats": {"": "cache/x"}, "data.validation.plain": {"": "cache/y"}})
    assert resolved.validation == {"chats": "cache/x", "plain": "cache/y"}
    option = ["--config", str(tmp_path / "run.yaml"), "--data.validation.chats", "{path: corpus, split: test}"]
    assert parse_config(option).data.validation["chats"] == ValidationConfig("corpus", split="test")
    assert parse_evaluation("x={path: corpus, column: body}") == ("x", {"path": "corpus", "column": "body"})
    assert parse_evaluation("{path: corpus/a.jsonl}") == ("a", {"path": "corpus/a.jsonl"})
    assert parse_evaluation("x=corpus") == ("x", "corpus") and parse_evaluation("b/a.txt") == ("a", "b/a.txt")


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"column": "body"}, "missing: data.validation.x.path"),
        ({"path": "corpus", "weight": 2}, "unknown key 'data.validation.x.weight'"),
        ({"path": "corpus", "column": 3}, "data.validation.x.column is 3; expected text or null"),
        (["corpus"], "data.validation.x is ['corpus']; expected text or 'key: value' lines"),
    ],
)
def test_wrong_validation_entries_are_refused(tmp_path, entry, line):
    config = {"data": {"train": [{"path": "data"}], "validation": {"x": entry}}}
    config |= {"run_folder": "run", "training": {"train_tokens": 1000}, "model": {"architecture": "x.json"}}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    with pytest.raises(UserError) as refusal:
        parse_config(["--config", str(tmp_path / "run.yaml")])
    assert any(line in message for message in refusal.value.problems)


def test_a_validation_dataset_has_no_settings_of_text(folder):
    data = DataConfig([SourceConfig("data")], validation={"x": ValidationConfig("missing", preprocess={"chat": True})})
    with pytest.raises(UserError, match=r"data.validation.x.preprocess is for text, but missing"):
        text_sources(data)


def test_datasets_take_the_place_of_text(folder):
    corpus = SourceConfig("corpus/", weight=3.0, column="body", validation_fraction=0.1)
    plain = SourceConfig("data", weight=1.0)
    data = DataConfig(
        stages=[StageConfig([plain], 100), StageConfig([corpus, plain])],
        validation={"more": "a.jsonl", "old": "data"},
        cache_folder="cache",
    )
    assert [(text.key, text.path) for text in text_sources(data)] == [
        ("data.stages[1].train[0]", "corpus/"),
        ("data.validation.more", "a.jsonl"),
    ]
    made = {
        "data.stages[1].train[0]": {"train": "cache/x.train", "valid": "cache/x.valid"},
        "data.validation.more": {"": "cache/y"},
    }
    resolved = with_datasets(data, made)
    assert resolved.stages == [
        StageConfig([plain], 100),
        StageConfig([SourceConfig("cache/x.train", weight=3.0, name="corpus"), plain]),
    ]
    assert resolved.validation == {"more": "cache/y", "old": "data", "corpus": "cache/x.valid"}


def test_the_cache_is_a_setting_a_variable_or_in_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("RETEMPER_CACHE", raising=False)
    assert cache_folder(DataConfig()) == Path("/home/me/.cache/retemper")
    monkeypatch.setenv("RETEMPER_CACHE", "/scratch")
    assert cache_folder(DataConfig()) == Path("/scratch")
    assert cache_folder(DataConfig(cache_folder="/other")) == Path("/other")
