"""The loss of a validation set is the mean over all its targets: against transformers in float64, target by target."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_run
import torch
from torch.distributed.tensor import DTensor

from retemper.engine import pretrain
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter

LENGTH = 32  # of tiny_run's windows


def write(prefix, lengths, seed=5):
    generator = np.random.default_rng(seed)
    documents = [generator.integers(0, tiny_run.VOCAB_SIZE, length) for length in lengths]
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    return documents


def evaluated(ranks, path, overrides):
    """Losses of the validation sets before the first step, what the log says of the sets, and the weights."""
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
    losses = run.validation.evaluate(run.forward_backward, 0, lambda: False, print)
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in run.model.named_parameters()
    }
    return losses, run.validation.describe(), weights


@torch.no_grad()
def float64_loss(weights, documents):
    """Every token that follows another in its document is a target, and predicted once, from what precedes it in its
    window of the concatenated tokens."""
    # Not at the top, because ranks import this file.
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in tiny_run.ARCHITECTURE.items() if k != "model_type"}))
    model.load_state_dict(weights, strict=False)
    model = model.double().eval()
    total, count, at = 0.0, 0, 0
    for document in documents:
        for place in range(1, len(document)):
            first = max(0, place - 1 - (at + place - 1) % LENGTH)  # its window's, or its document's, first token
            logits = model(torch.from_numpy(document[first:place])[None]).logits[0, -1]
            total -= torch.log_softmax(logits, 0)[int(document[place])].item()
            count += 1
        at += len(document)
    return total / count, count


@pytest.mark.parametrize(
    "lengths",
    [[127], [20], [2], [33], [40, 1, 1, 30, 7], [65, 31]],
    ids=["tail", "short", "two tokens", "one window", "documents", "whole windows but one"],
)
def test_all_targets_are_evaluated(lengths, one_rank, run_file, tmp_path):
    documents = write(tmp_path / "v", lengths)
    overrides = ["--data.validation", f"{{v: {tmp_path / 'v'}}}", "--run_folder", str(tmp_path / "run")]
    losses, [said], weights = evaluated(one_rank, run_file, overrides)
    expected, count = float64_loss(weights, documents)
    assert losses["v"] == pytest.approx(expected, rel=2e-6)
    assert said == f"validation  v: {count} targets in all chunks ({-(-(sum(lengths) - 1) // LENGTH)}), none left out"


def test_all_targets_of_a_held_out_part_on_two_ranks(two_ranks, run_file, tmp_path):
    documents = write(tmp_path / "train", [30] * 30)
    overrides = [
        *("--data.train", f"[{{path: {tmp_path / 'train'}}}]", "--data.validation", "{}"),
        *("--data.validation_fraction", "0.1", "--run_folder", str(tmp_path / "run")),
    ]
    for losses, [said], weights in two_ranks.run(evaluated, run_file, overrides):
        expected, count = float64_loss(weights, documents[27:])
        assert losses["held_out"] == pytest.approx(expected, rel=2e-6) and f"{count} targets" in said


TWO_SOURCES = {"news": [30] * 20, "web": [9] * 70}
"""Lengths of the documents of two sources, whose last tenth is held out: 2 of 30 tokens, and 7 of 9."""


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    """Options of a run that holds out a part of two sources, and the documents that are held out."""
    folder = tmp_path_factory.mktemp("sources")
    documents = {name: write(folder / name, lengths, len(name)) for name, lengths in TWO_SOURCES.items()}
    train = ", ".join(f"{{path: {folder / name}}}" for name in TWO_SOURCES)
    options = ["--data.train", f"[{train}]", "--data.validation", "{}", "--data.validation_fraction", "0.1"]
    held_out = {name: of_source[-len(of_source) // 10 :] for name, of_source in documents.items()}
    return options, held_out


def check_sources(result, held_out):
    losses, [said], weights = result
    expected = {name: float64_loss(weights, documents) for name, documents in held_out.items()}
    total = sum(count for _, count in expected.values())
    assert f": {total} targets" in said and [*losses] == ["held_out", "held_out/news", "held_out/web"]
    for name, (loss, _) in expected.items():
        assert losses[f"held_out/{name}"] == pytest.approx(loss, rel=2e-6)
    mean = sum(loss * count for loss, count in expected.values()) / total
    assert losses["held_out"] == pytest.approx(mean, rel=2e-6)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_loss_of_each_source(micro_batch, one_rank, run_file, two_sources, tmp_path):
    options, held_out = two_sources
    options = [*options, "--training.micro_batch_size", str(micro_batch), "--run_folder", str(tmp_path)]
    check_sources(evaluated(one_rank, run_file, options), held_out)


@pytest.mark.parametrize(
    "layout",
    [
        "--training.micro_batch_size 4",
        "--training.micro_batch_size 1",
        "--parallel.pipeline 2 --training.micro_batch_size 1",
        "--parallel.tensor 2",
        "--parallel.context 2",
    ],
)
def test_the_loss_of_each_source_on_two_ranks(layout, two_ranks, one_rank, run_file, two_sources, tmp_path):
    options = [*two_sources[0], "--model.architecture.vocab_size", "98", "--run_folder", str(tmp_path)]
    expected, said, _ = evaluated(one_rank, run_file, options)
    for losses, lines, _ in two_ranks.run(evaluated, run_file, [*options, *layout.split()]):
        assert losses == pytest.approx(expected, rel=2e-6) and lines == said and len(losses) == 3


def test_the_log_says_which_part_of_a_set_is_evaluated(one_rank, run_file, tmp_path):
    write(tmp_path / "v", [500])
    overrides = ["--data.validation", f"{{v: {tmp_path / 'v'}}}", "--training.eval_tokens", "100"]
    _, [said], _ = evaluated(one_rank, run_file, [*overrides, "--run_folder", str(tmp_path / "run")])
    assert said == (
        "validation  v: 96 targets in 3 of 16 chunks, spread evenly; training.eval_tokens 100 leaves out the others"
    )
