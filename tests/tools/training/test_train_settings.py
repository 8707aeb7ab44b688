"""``retemper train``: what it makes of the options, and the settings that it chooses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retemper.engine.errors import UserError
from retemper.tools.training import command
from retemper.tools.training.options import (
    TrainOptions,
    name_of,
    named,
    parse_evaluation,
    parse_replay,
    parse_source,
    parse_tokens,
)
from retemper.tools.training.recipe import Situation, choose_training, intervals
from retemper.tools.training.sources import SizedSource


@pytest.mark.parametrize(
    ("text", "expected"), [("200k", 200_000), ("100M", 10**8), ("1.5B", 1_500_000_000), ("1_000", 1000), ("7", 7)]
)
def test_token_counts_have_suffixes(text, expected):
    assert parse_tokens(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-5", "1e6", "12x", "M"])
def test_other_token_counts_are_refused(text):
    with pytest.raises(UserError, match="--tokens"):
        parse_tokens(text)


def test_sources_are_paths_urls_or_entries(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_source("--data", "~/a.txt") == {"path": "/home/me/a.txt"}
    assert parse_source("--data", "hf://a/b") == {"path": "hf://a/b"}
    assert parse_source("--data", "{path: ~/x, column: body}") == {"path": "/home/me/x", "column": "body"}
    assert parse_replay("s3://b/x.jsonl:0.25") == ({"path": "s3://b/x.jsonl"}, 0.25)
    assert parse_replay("{path: x, split: test}:0.1") == ({"path": "x", "split": "test"}, 0.1)
    assert parse_evaluation("general=a/b.jsonl") == ("general", "a/b.jsonl")
    assert parse_evaluation("a/b=c.jsonl.gz") == ("b_c", "a/b=c.jsonl.gz")


@pytest.mark.parametrize(
    ("parse", "text", "named"),
    [
        (parse_replay, "general.jsonl", "PATH:SHARE"),
        (parse_replay, "general.jsonl:1.5", "PATH:SHARE"),
        (parse_replay, ":0.1", "PATH:SHARE"),
        (lambda text: parse_source("--data", text), "{column: body}", "--data.*path"),
        (lambda text: parse_source("--data", text), "{path: x, weigth: 2}", "weigth"),
        (lambda text: parse_source("--data", text), "{path: x, weight: 2}", "weights"),
        (lambda text: parse_source("--data", text), "{path: x", "--data"),
    ],
)
def test_wrong_sources_are_refused(parse, text, named):
    with pytest.raises(UserError, match=named):
        parse(text)


def test_names_are_short_and_different():
    paths = ("Qwen/Qwen2.5-0.5B", "./tiny/", "a/b.jsonl.zst", "web/*.jsonl", "hf://o/n@1")
    assert [name_of(path) for path in paths] == ["Qwen2.5-0.5B", "tiny", "b", "web", "n"]
    sources = [{"path": "a/x.txt"}, {"path": "b/x.txt"}, {"path": "c", "name": "x-2"}]
    assert [source["name"] for source in named(sources)] == ["x", "x-2", "x-2-2"]


SITUATIONS = st.builds(
    Situation,
    train_tokens=st.integers(1, 10**12),
    smallest_source=st.integers(1, 10**12),
    all_tokens=st.integers(1, 10**12),
    longest_sequence=st.none() | st.integers(64, 10**6),
    ranks=st.integers(1, 64),
    on_gpu=st.booleans(),
)


@given(SITUATIONS, st.none() | st.integers(1, 512))
def test_chosen_settings_are_possible(now, micro):
    chosen = choose_training(now, {} if micro is None else {"micro_batch_size": micro})
    length, batch, micro_batch = (
        chosen[f"{name}"] for name in ("sequence_length", "global_batch_size", "micro_batch_size")
    )
    assert batch % (micro_batch * now.ranks) == 0
    assert now.longest_sequence is None or length <= now.longest_sequence
    assert chosen["warmup_tokens"] <= now.train_tokens
    save, log = intervals(chosen, now.train_tokens)
    assert min(save, log, chosen["eval_interval"]) >= 1
    assert save % chosen["eval_interval"] == 0  # each checkpoint has a loss, with which it may be the best
    if now.smallest_source >= 4 * 64:
        assert 4 * length <= now.smallest_source


def test_settings_grow_with_the_budget_up_to_limits():
    def steps(tokens: int) -> tuple[int, int]:
        chosen = choose_training(Situation(tokens, tokens, tokens, 32768, 8, True), {})
        return chosen["sequence_length"], chosen["sequence_length"] * chosen["global_batch_size"]

    assert steps(10**6) == (2048, 2048 * 8)
    assert steps(10**8) == (2048, 262_144)
    assert steps(10**11) == (2048, 524_288)
    given_by_user = {"sequence_length": 4096, "global_batch_size": 24, "eval_at_start": False}
    assert (
        given_by_user.items() <= choose_training(Situation(10**9, 10**9, 10**9, None, 8, True), given_by_user).items()
    )


DATA = [SizedSource({"path": "a", "name": "a"}, 600), SizedSource({"path": "b", "name": "b"}, 400)]
REPLAY = [SizedSource({"path": "c", "name": "c"}, 3000)]
REQUEST = TrainOptions(model="x", data=({"path": "a"}, {"path": "b"}), replay=(({"path": "c"}, 0.5),))


@pytest.mark.parametrize(
    ("request_of", "training", "tokens"),
    [
        ({}, {}, 2000),  # one pass over the data, which is half of the run
        ({"epochs": 3.0}, {}, 6000),
        ({"tokens": 77}, {"train_tokens": 77}, 77),
        ({}, {"train_epochs": 2.5}, 10_000),  # over data and replay
        ({}, {"train_steps": 5, "global_batch_size": 4, "sequence_length": 8}, 160),
    ],
)
def test_the_length_of_a_run_in_every_unit(request_of, training, tokens):
    found = command._budget(replace(REQUEST, **request_of), {"training": training}, DATA, REPLAY)
    assert found == tokens
    now = Situation(tokens, 64, 4000, None, 1, False)
    chosen = choose_training(now, training)
    assert sum(key in chosen for key in ("train_tokens", "train_steps", "train_epochs")) == 1
    with_ratio = choose_training(now, {**training, "warmup_ratio": 0.5})
    assert "warmup_tokens" in chosen and "warmup_tokens" not in with_ratio


def test_steps_need_the_size_of_a_step():
    with pytest.raises(UserError, match=r"training.train_steps is 5, but this command chooses the size of a step"):
        command._budget(REQUEST, {"training": {"train_steps": 5}}, DATA, REPLAY)


@pytest.mark.parametrize("unit", ["tokens", "epochs"])
@pytest.mark.parametrize("key", ["train_tokens", "train_steps", "train_epochs"])
def test_options_and_settings_do_not_both_give_the_length(unit, key):
    with pytest.raises(UserError, match=rf"^--training.{key} and --{unit} set the same; remove one of them$"):
        command._given(replace(REQUEST, **{unit: 5}), [], [f"--training.{key}", "7"])


def test_an_option_replaces_the_length_in_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("training: {train_steps: 9, warmup_steps: 2}\n")
    training = command._given(replace(REQUEST, tokens=500), ["--config", str(file)], []).tree["training"]
    assert training == {"train_tokens": 500, "warmup_steps": 2}
    training = command._given(REQUEST, ["--config", str(file)], ["--training.train_epochs", "2"]).tree["training"]
    assert training == {"train_epochs": 2, "warmup_steps": 2}
