"""What show_dataset says a configuration makes of a dataset, against walking through the run sample by sample."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from oracles.html_page import Page
from oracles.megatron_index import write_megatron
from oracles.preprocessing import jsonl, run
from oracles.tiny_tokenizer import sample_text, train_tiny_tokenizer

from retemper.engine.config.parser import parse_config
from retemper.engine.data.catalog import open_catalog
from retemper.engine.errors import UserError
from retemper.engine.schedule import plan_batches
from retemper.tools import show_dataset
from retemper.tools.reports.dataset import training_plan
from retemper.tools.reports.dataset.training_plan import plan_training

ARCHITECTURE = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": True,
}
LENGTHS = [3, 40, 16, 17, 1, 9, 30, 64, 5, 5, 12, 33, 2, 50]


@pytest.fixture
def datasets(tmp_path) -> Path:
    write_megatron(tmp_path / "a", [[[7] * length] for length in LENGTHS * 3], 4)
    write_megatron(tmp_path / "b", [[[9] * 11] for _ in range(60)], 4)
    return tmp_path


def configure(folder: Path, data: dict[str, Any], **changes: Any) -> str:
    """Write a configuration; the name of its file."""
    training = {"train_tokens": 5_000, "sequence_length": 16, "global_batch_size": 8, **changes.pop("training", {})}
    model = changes.pop("model", {"architecture": ARCHITECTURE})
    content = {"run_folder": str(folder / "run"), "model": model, "training": training, "data": data, **changes}
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "run.yaml")


def walk(file: str) -> tuple[list[str], dict[str, int]]:
    """The source of each sample of the run, one after the other, and the chunks of each source."""
    config = parse_config(["--config", file])
    plan = plan_batches(config.training, 1)
    catalog = open_catalog(config.data, plan, 512, None, config.seed)
    order = catalog.sample_order(config.seed)
    names = [source.name for source in order.sources]
    count = plan.steps_for(config.training.train_tokens) * config.training.global_batch_size
    return [names[order.sample(index).source] for index in range(count)], {
        source.name: source.num_chunks for source in order.sources
    }


def test_one_source_by_hand(datasets):
    plan = plan_training(configure(datasets, {"train": [{"path": str(datasets / "a")}]}), str(datasets / "a"))
    tokens = 3 * sum(LENGTHS)
    chunks = (tokens - 1) // 16
    assert (plan.role, plan.steps, plan.tokens) == ("train", 40, 40 * 8 * 16)  # 5,000 / 128, rounded up
    [source] = plan.sources
    assert (source.is_this, source.tokens, source.chunks, source.samples) == (True, tokens, chunks, 320)
    assert source.epochs == 320 / chunks and source.capped_at_tokens is None
    assert plan.curve[0] == (0, [0.0]) and plan.curve[-1] == (plan.tokens, [source.epochs])
    assert any(f"{source.epochs:.3g} epochs" in line for line in plan.summary)


def test_stages_and_caps_are_those_of_a_walk_through_the_run(datasets):
    a, b = ({"path": str(datasets / name)} for name in "ab")
    stages = [
        {"train": [{**a, "weight": 1}, {**b, "weight": 2, "max_epochs": 0.8}], "train_tokens": 2_000},
        {"train": [a, {**b, "max_epochs": 1.5}]},
    ]
    file = configure(datasets, {"stages": stages})
    plan = plan_training(file, f"{datasets / 'b'}.idx")
    walked, chunks = walk(file)
    first = walked[: plan.stage_stops[0] // 16]
    assert plan.stage_stops == [2_000, len(walked) * 16]
    for source in plan.sources:
        assert source.samples_by_stage == [first.count(source.name), walked[len(first) :].count(source.name)]
        assert (source.samples, source.chunks) == (walked.count(source.name), chunks[source.name])
    assert [source.is_this for source in plan.sources] == [False, True]
    given = Counter()
    for at, name in enumerate(walked):  # the cap of the first stage, reached before that ends
        given[name] += 1
        if given["b"] == int(0.8 * chunks["b"]):
            assert plan.sources[1].capped_at_tokens == 16 * (at + 1)
            break
    for tokens, epochs in plan.curve:
        counts = Counter(walked[: tokens // 16])
        assert epochs == [counts[source.name] / source.chunks for source in plan.sources]


def cut_by_hand(lengths: list[int], width: int) -> tuple[int, int, int]:
    """(documents, longer than a chunk, others that a chunk's edge cuts) when they lie one behind the other."""
    edges = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    stop = (edges[-1] - 1) // width * width
    begun = [(start, end) for start, end in pairwise(edges) if start < stop]
    longer = sum(end - start > width for start, end in begun)
    cut = sum(end - start <= width and start // width != (end - 1) // width for start, end in begun)
    return len(begun), longer, cut


def test_documents_cut(datasets, monkeypatch):
    file = configure(datasets, {"train": [{"path": str(datasets / "a")}]})
    cuts = plan_training(file, str(datasets / "a")).truncation
    assert cuts is not None and cuts.exact
    assert (cuts.documents, cuts.longer, cuts.truncated) == cut_by_hand(LENGTHS * 3, 16)
    assert cuts.tokens_dropped == 3 * sum(LENGTHS) - (3 * sum(LENGTHS) - 1) // 16 * 16
    write_megatron(datasets / "a", [[[7] * length] for length in LENGTHS * 40], 4)  # 5 groups of 128 chunks and more
    monkeypatch.setattr(training_plan, "_GROUPS_COUNTED", 2)
    cuts = plan_training(file, str(datasets / "a")).truncation
    documents, _, cut = cut_by_hand(LENGTHS * 40, 16)
    assert cuts is not None and not cuts.exact and cuts.documents < documents
    assert cuts.truncated / cuts.documents == pytest.approx(cut / documents, abs=0.1)


def test_the_part_that_the_dataset_plays(datasets):
    a, b = str(datasets / "a"), str(datasets / "b")
    file = configure(datasets, {"train": [{"path": a}], "validation": {"set": b}})
    assert plan_training(file, b).role == "validation" and plan_training(file, b).truncation is None
    file = configure(datasets, {"stages": [{"train": [{"path": a}], "train_tokens": 100}, {"train": [{"path": a}]}]})
    plan = plan_training(file, b)
    assert (plan.role, [source.name for source in plan.sources]) == ("assumed", ["b"])
    assert plan.sources[0].epochs == 320 / ((60 * 11 - 1) // 16)


def test_a_model_that_is_not_there_yet_is_said(datasets):
    data = {"train": [{"path": str(datasets / "a")}]}
    a = str(datasets / "a")
    assert not plan_training(
        configure(datasets, data, model={"initialize_from": str(datasets / "none")}), a
    ).checked_model
    assert plan_training(configure(datasets, data), a).checked_model
    with pytest.raises(UserError, match="none"):  # one that is named, but wrong
        plan_training(configure(datasets, data, model={"architecture": str(datasets / "none")}), a)


def test_runs_that_the_trainer_would_refuse_are_refused(datasets, tiny_tokenizer):
    a = str(datasets / "a")
    with pytest.raises(UserError, match="the data ends after"):
        plan_training(configure(datasets, {"train": [{"path": a, "max_epochs": 1}]}), a)
    with pytest.raises(UserError, match=r"none\.idx: no such file"):
        plan_training(configure(datasets, {"train": [{"path": a}, {"path": str(datasets / "none")}]}), a)
    (datasets / "t.jsonl").write_bytes(jsonl([sample_text(seed, 30) for seed in range(20)]))
    run(tiny_tokenizer, datasets, datasets / "t.jsonl")
    other = train_tiny_tokenizer(datasets / "other", special=("<|endoftext|>",))
    model = {"architecture": ARCHITECTURE, "tokenizer": str(other)}
    with pytest.raises(UserError, match="made with tokenizer"):
        out = str(datasets / "out")
        plan_training(configure(datasets, {"train": [{"path": out}]}, model=model), out)


def test_the_run_stands_in_the_text_the_json_and_the_page(datasets, capsys):
    hostile = "<b>$x_1$"
    train = [{"path": str(datasets / "a"), "name": hostile}, {"path": str(datasets / "b"), "name": "_b"}]
    file = configure(datasets, {"train": train, "packing": "best_fit"})
    arguments = [str(datasets / "a"), "--config", file, "--html", str(datasets / "page.html")]
    show_dataset.main(arguments)
    out = capsys.readouterr().out
    show_dataset.main([*arguments, "--json"])
    plan = json.loads(capsys.readouterr().out)["training"]
    assert "steps                 40 of 8 samples x 16 tokens = 5,120 tokens" in out
    assert f"{hostile} (this dataset)" in out and "configuration with --config" not in out
    for source in plan["sources"]:
        line = next(line for line in out.splitlines() if line.startswith(source["name"]))
        assert line.split()[-4:] == [
            *(f"{source[key]:,}" for key in ("tokens", "chunks", "samples")),
            f"{source['epochs']:.3g}",
        ]
    page = Page((datasets / "page.html").read_text("utf-8"))
    page.require_self_contained()
    assert (page.tags.count("svg"), page.tags.count("b")) == (4, 4)  # figures, and cards
    assert page.text.count("<b>$x_1$") >= 2 and "sequence_length 16" in page.text
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
