"""Packed sequences as Parquet: what pyarrow reads is what the engine trains on, and what transformers' loss expects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tiny_run
import torch
import yaml
from fake_hub import TOKEN, FakeHub
from huggingface_hub import constants
from oracles.megatron_index import read_megatron
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from retemper.engine import pretrain
from retemper.engine.errors import UserError
from retemper.tools.export_packed import main
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter

LENGTH = 32
NAME = "somebody/packed"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_run.write_config(tmp_path)
    return tmp_path


def rows_of(output: Path) -> list[dict]:
    files = sorted((output / "data").glob("*.parquet"))
    names = [f"train-{number:05d}-of-{len(files):05d}.parquet" for number in range(len(files))]
    assert [path.name for path in files] == names
    return [row for path in files for row in pyarrow.parquet.read_table(path).to_pylist()]


def change(path: Path, **data: object) -> None:
    config = yaml.safe_load(path.read_text())
    config["data"].update(data)
    path.write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    "data",
    [{}, {"packing": "best_fit", "shuffle": "documents"}, {"attend_across_documents": True}],
    ids=["concat", "best fit", "across documents"],
)
def test_the_rows_of_a_run_are_what_it_trains_on(folder, one_rank, data):
    if "packing" in data:
        data = {**data, "train": [{"path": str(folder / "first")}]}  # more than one epoch
    change(folder / "run.yaml", **data)
    main(["--config", str(folder / "run.yaml"), "--output", str(folder / "packed"), "--shift-labels"])
    rows = rows_of(folder / "packed")
    run = pretrain.build(tiny_run.configure(folder / "run.yaml"), one_rank)
    batches = [batch for step in range(20) for batch in run.data.micro_batches(8 * step)]
    for column, name in (("input_ids", "tokens"), ("shift_labels", "targets"), ("position_ids", "position_ids")):
        engine = torch.cat([getattr(batch, name) for batch in batches]).view(-1, LENGTH).tolist()
        assert [row[column] for row in rows] == engine
    lengths = [length for row in rows for length in row["seq_lengths"]]
    assert lengths == [n for batch in batches for n in np.diff(batch.cu_seqlens).tolist()]
    assert {row["source"] for row in rows} == {source.name for source in run.data.sources}


def test_labels_are_those_of_transformers(folder):
    main(["--config", str(folder / "run.yaml"), "--output", str(folder / "packed"), "--shift-labels"])
    generator = torch.Generator().manual_seed(1)
    for row in rows_of(folder / "packed")[:20]:
        logits = torch.randn(1, LENGTH, tiny_run.VOCAB_SIZE, generator=generator)
        labels, shifted = torch.tensor([row["labels"]]), torch.tensor([row["shift_labels"]])
        losses = torch.nn.functional.cross_entropy(logits[0], shifted[0], reduction="none")
        inside = losses[:-1]
        mean = inside.sum() / (shifted[0, :-1] != -100).sum()
        torch.testing.assert_close(ForCausalLMLoss(logits, labels, tiny_run.VOCAB_SIZE), mean)
        mean = losses.sum() / (shifted != -100).sum()
        torch.testing.assert_close(ForCausalLMLoss(logits, None, tiny_run.VOCAB_SIZE, shift_labels=shifted), mean)
        # The first token of a document is not predicted, and all others are.
        starts = np.cumsum([0, *row["seq_lengths"]])[:-1]
        expected = np.array(row["input_ids"])
        expected[starts] = -100
        assert row["labels"] == expected.tolist()


def test_the_rows_of_datasets_are_their_tokens_in_order(folder):
    prefixes = [folder / "second", folder / "first"]
    arguments = ["--inputs", *map(str, prefixes), "--sequence-length", "32", "--output", str(folder / "packed")]
    main([*arguments, "--tokens-per-file", "300"])
    rows = rows_of(folder / "packed")
    wanted = []
    for prefix in prefixes:
        tokens = [token for document in read_megatron(prefix).documents for part in document for token in part]
        count = (len(tokens) - 1) // LENGTH
        wanted += [tokens[place * LENGTH : place * LENGTH + LENGTH] for place in range(count)]
    assert [row["input_ids"] for row in rows] == wanted
    assert len(list((folder / "packed" / "data").iterdir())) == -(-len(rows) // 9)
    record = json.loads((folder / "packed" / "packed.json").read_text())
    assert (record["rows"], record["sequence_length"]) == (len(rows), LENGTH)


def test_a_loss_mask_is_in_the_labels(tmp_path):
    draw = np.random.default_rng(1)
    tokens, mask = draw.integers(0, 90, 400), draw.integers(0, 2, 400)
    with IndexedDatasetWriter(str(tmp_path / "chat"), np.uint16, mask=True) as writer:
        writer.add_documents(tokens, [100] * 4, mask=mask)
    main(["--inputs", str(tmp_path / "chat"), "--sequence-length", "50", "--output", str(tmp_path / "packed")])
    mask[::100] = 0
    mask[::50] = 0  # of a sequence's first token, the prediction is in the sequence before it
    wanted = np.where(mask == 1, tokens, -100)
    assert [label for row in rows_of(tmp_path / "packed") for label in row["labels"]] == wanted[:350].tolist()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_what_is_uploaded_is_the_folder(folder, hub, capsys):
    stale = "data/train-00000-of-00009.parquet"
    hub.repositories[NAME] = {stale: b"old", "notes.md": b"kept"}
    arguments = ["--inputs", str(folder / "first"), "--sequence-length", "32", "--output", str(folder / "packed")]
    main([*arguments, "--push-to-hub", NAME, "--commit-message", "Packed"])
    files = {path.relative_to(folder / "packed").as_posix(): path for path in (folder / "packed").rglob("*.*")}
    wanted = {name: path.read_bytes() for name, path in files.items()}
    assert hub.repositories[NAME] == {**wanted, "notes.md": b"kept"}
    assert hub.messages == ["Packed"]
    assert all("/api/models" not in request.path for request in hub.requests)
    created = next(json.loads(request.body) for request in hub.requests if request.path == "/api/repos/create")
    assert created["type"] == "dataset"
    assert stale in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inputs", "first"], "--sequence-length"),
        (["--inputs", "first", "--sequence-length", "1"], "--sequence-length 1"),
        (["--inputs", "missing", "--sequence-length", "32"], "missing"),
        (["--inputs", "first", "--sequence-length", "1000000"], "first"),
        (["--config", "run.yaml", "--sequence-length", "32"], "--sequence-length"),
        (["--config", "run.yaml", "--packing", "concat"], "--packing"),
        (["--inputs", "first", "--sequence-length", "32", "--private"], "--private has no effect"),
        (["--inputs", "first", "--sequence-length", "32", "--tokens-per-file", "0"], "--tokens-per-file 0"),
        (["--inputs", "first", "--sequence-length", "32", "--push-to-hub", "no"], "--push-to-hub 'no'"),
    ],
)
def test_what_is_refused(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=message):
        main([*arguments, "--output", "packed"])
    assert sorted(folder.rglob("*")) == before


def test_an_existing_folder_is_kept(folder):
    (folder / "packed").mkdir()
    with pytest.raises(UserError, match="exists already"):
        main(["--config", str(folder / "run.yaml"), "--output", str(folder / "packed")])
    assert list((folder / "packed").iterdir()) == []


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_keeps_the_documents_of_a_row_apart(folder, attention):
    """The loss of a row by its columns is that of its documents, each alone."""
    main(["--config", str(folder / "run.yaml"), "--output", str(folder / "packed"), "--shift-labels"])
    torch.manual_seed(2)
    model = Qwen2ForCausalLM(Qwen2Config(**tiny_run.ARCHITECTURE, attn_implementation=attention)).eval()
    rows = [row for row in rows_of(folder / "packed") if len(row["seq_lengths"]) > 2][:5]
    assert len(rows) == 5
    for row in rows:
        columns = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels", "position_ids", "shift_labels")}
        with torch.no_grad():
            loss = model(**columns, use_cache=False).loss
            parts = torch.split(columns["input_ids"][0], row["seq_lengths"])
            logits = torch.cat([model(part[None]).logits[0] for part in parts])
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, columns["shift_labels"][0]))
