"""Which sources are text, and the command lines that make datasets from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from retemper.engine.config.settings import DataConfig, SourceConfig, StageConfig
from retemper.engine.data.text_sources import TextSource, cache_folder, is_text, text_sources, with_datasets
from retemper.engine.errors import UserError
from retemper.tools.preprocess import parse_arguments


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
        },
    }
    options = parse_arguments(TextSource("data.train[0]", "hf://org/name", settings).arguments())
    assert options.input == ["hf://org/name"] and options.json_key == ["body"]
    assert (options.hf_split, options.hf_subset, options.split) == ("train", "en", "train=0.95,valid=0.05")
    assert (options.dedup, options.min_chars, options.append_eod, options.shuffle) == ("exact", 7, False, True)
    assert options.metadata == ["a", "b"]


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
