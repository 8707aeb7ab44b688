"""The configuration of the data's order: stages, caps, weights, and what of them is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import RunConfig, SourceConfig, StageConfig, to_yaml
from retemper.engine.errors import UserError

CONFIG = """
run_folder: runs/x
data:
  weights: documents
  shuffle: documents
  packing: best_fit
  stages:
    - train:
        - {path: corpora/web, weight: 3, max_epochs: 1.5}
        - {path: corpora/code, weight: 0.5, max_tokens: 50_000}
      train_tokens: 600_000
    - train:
        - {path: corpora/chat, name: talk}
        - {path: corpora/web}
      train_tokens: 400_000
training: {train_tokens: 1_000_000, sequence_length: 1000}
model: {architecture: {model_type: llama}}
"""


@pytest.fixture
def parse(tmp_path):
    def of(text: str, *arguments: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return parse_config(["--config", str(path), *arguments])

    return of


def test_stages_are_read_and_written_back(parse, tmp_path: Path):
    run = parse(CONFIG)
    assert (run.data.weights, run.data.shuffle, run.data.packing) == ("documents", "documents", "best_fit")
    assert run.data.train == []
    assert run.data.stages == [
        StageConfig(
            [
                SourceConfig("corpora/web", 3.0, max_epochs=1.5),
                SourceConfig("corpora/code", 0.5, max_tokens=50_000),
            ],
            600_000,
        ),
        StageConfig([SourceConfig("corpora/chat", name="talk"), SourceConfig("corpora/web")], 400_000),
    ]
    assert parse(to_yaml(run)) == run


def test_stages_on_the_command_line(parse):
    stages = "[{train: [{path: a}], train_tokens: 5_000}, {train: [{path: b, max_epochs: 2}]}]"
    run = parse(CONFIG, "--data.stages", stages, "--data.packing", "concat")
    first, second = StageConfig([SourceConfig("a")], 5_000), StageConfig([SourceConfig("b", max_epochs=2.0)])
    assert run.data.stages == [first, second]
    assert run.data.packing == "concat"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("      train_tokens: 600_000\n", "", "data.stages[0].train_tokens is null; only the last stage may"),
        ("600_000", "999", "data.stages[0].train_tokens is 999; it must be at least one sample of"),
        ("400_000", "399_999", "1,000,000 is more than the train_tokens of data.stages, which sum to 999,999; leave"),
        ("max_epochs: 1.5", "max_epochs: 0", "data.stages[0].train[0].max_epochs is 0.0; it must be positive"),
        ("max_epochs: 1.5", "max_epochs: .inf", "data.stages[0].train[0].max_epochs is inf; it must be positive"),
        ("max_tokens: 50_000", "max_tokens: 999", "train[1].max_tokens is 999; it must be at least one sample"),
        ("weight: 0.5", "weight: -1", "data.stages[0].train[1].weight is -1.0; it must be positive"),
        ("weight: 0.5", "wieght: 1", "unknown key 'data.stages[0].train[1].wieght'; did you mean"),
        ("train_tokens: 400_000", "train_token: 4", "train_token'; did you mean 'data.stages[1].train_tokens'?"),
        ("- {path: corpora/web}\n", "- {}\n", "data.stages[1].train[1].path is missing"),
        ("path: corpora/chat, name: talk", "path: other/web", "data.stages[1].train has two sources named 'web'"),
        (
            "- {path: corpora/web}\n",
            "- {path: other/web}\n",
            "names other/web 'web', but an earlier stage uses this name for",
        ),
        ("data:\n", "data:\n  train: [{path: a}]\n", "data.train and data.stages are both set"),
        ("weights: documents", "weights: words", "data.weights is 'words'; expected 'tokens' or 'documents'"),
        ("packing: best_fit", "packing: best", "data.packing is 'best'; expected 'concat' or 'best_fit'"),
    ],
)
def test_refusals(parse, old, new, expected):
    assert CONFIG.count(old) == 1
    with pytest.raises(UserError) as caught:
        parse(CONFIG.replace(old, new))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_stage_is_refused(parse):
    for stages in ("[{train: []}]", "[{train: [], train_tokens: 5000}, {train: [{path: a}]}]"):
        with pytest.raises(UserError, match=r"data\.stages\[0\]\.train is empty; name at least one dataset"):
            parse(CONFIG, "--data.stages", stages)
