"""``retemper train``: what it makes of the options, and the settings that it chooses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retemper.engine.errors import UserError
from retemper.tools.training.options import name_of, named, parse_evaluation, parse_replay, parse_source, parse_tokens
from retemper.tools.training.recipe import Situation, choose_training, intervals


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
    assert min(*intervals(chosen, now.train_tokens), chosen["eval_interval"]) >= 1
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
