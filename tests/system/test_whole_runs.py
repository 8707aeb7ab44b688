"""Whole runs, with evaluations and checkpoints, are the same in every layout, and the same as transformers' in a plain
loop. Gradients and more layouts: tests/parallel/test_layout_parity.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny_run
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from retemper.engine import pretrain

LAYOUTS = {
    "micro batch 8": (1, ["--training.micro_batch_size", "8"]),
    "shard 2": (2, ["--training.micro_batch_size", "2"]),
    "replicate 2 x shard 2": (4, ["--parallel.replicate", "2", "--training.micro_batch_size", "2"]),
    "context 2": (2, ["--parallel.context", "2"]),
    "pipeline 2 x context 2": (4, ["--parallel.pipeline", "2", "--parallel.context", "2"]),
}


@pytest.fixture
def on_ranks(one_rank, request):
    """Runs a function of tiny_run on 1, 2 or 4 ranks; returns what rank 0 returned."""

    def run(world_size, function, *arguments):
        if world_size == 1:
            return function(one_rank, *arguments)
        cluster = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world_size])
        return cluster.run(function, *arguments)[0]

    return run


@pytest.mark.parametrize(
    "layout", [*list(LAYOUTS)[:-2], *(pytest.param(name, marks=pytest.mark.slow) for name in list(LAYOUTS)[-2:])]
)
def test_same_losses_over_20_steps(layout, on_ranks, run_file, reference, tmp_path):
    world_size, overrides = LAYOUTS[layout]
    # Without checkpoints on the way: they are other tests'.
    overrides = [*overrides, "--checkpoint.save_interval", "1000"]
    on_ranks(world_size, tiny_run.train, run_file, ["--run_folder", str(tmp_path), *overrides])
    assert len([r for r in tiny_run.curve(tmp_path) if r[1] == "train"]) == 20
    for one, other in zip(tiny_run.curve(tmp_path), tiny_run.curve(reference), strict=True):
        assert one[:2] == other[:2] and one[2:] == pytest.approx(other[2:], rel=1e-5)


def test_transformers_in_a_plain_loop_gives_the_same_curve(one_rank, run_file, reference, tmp_path):
    """An independent loop: transformers' model, whole documents one at a time, torch's AdamW and clipping."""
    run = pretrain.build(tiny_run.configure(run_file, "--run_folder", str(tmp_path)), one_rank)
    model = Qwen2ForCausalLM(Qwen2Config(**tiny_run.ARCHITECTURE, attn_implementation="eager"))
    ours = {name: tiny_run.whole(parameter) for name, parameter in run.model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(ours[name])
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    expected = [record for record in tiny_run.records(reference) if "grad_norm" in record]
    for step in range(1, 21):
        losses, count = [], 0
        for index in range((step - 1) * 8, step * 8):
            sample = run.order.sample(index)
            source = run.catalog.train[sample.source]
            window = source.chunk(sample.chunk, tiny_run.VOCAB_SIZE)
            stream = torch.from_numpy(np.append(window.tokens, window.targets[-1]))
            for document in stream.tensor_split(torch.from_numpy(window.ends + 1)):
                if len(document) < 2:
                    continue
                logits = model(document[None, :-1]).logits[0]
                losses.append(F.cross_entropy(logits, document[1:], reduction="sum"))
                count += len(document) - 1
        loss = torch.stack(losses).sum() / count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # 4 steps of warm-up, then a cosine from 1e-2 down to 1e-3 at step 20.
        rate = 1e-2 * step / 4 if step <= 4 else 1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 16))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        record = expected[step - 1]
        assert record["learning_rate"] == pytest.approx(rate, rel=1e-12)
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5), step
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4), step
