"""Ranks that hold the same are compared bit for bit; one flipped bit ends the run and is named."""

from __future__ import annotations

import json
import re
import socket

import numpy as np
import pytest
import tiny_run
import torch

from retemper.engine import pretrain
from retemper.engine.errors import UserError
from retemper.engine.guards import replica_check
from retemper.engine.guards.replica_check import hash_tensors, odd_numbers
from retemper.engine.optim.local import local_part
from retemper.engine.weights.checkpoint.tensors import optimizer_tensors

COPIES = ["--parallel.replicate", "2", "--parallel.shard", "1"]
TENSOR = ["--parallel.tensor", "2", "--parallel.shard", "1"]
TENSOR += ["--model.architecture", json.dumps({**tiny_run.ARCHITECTURE, "vocab_size": 98})]
OPTIONS = [
    "--training.train_tokens",
    str(5 * 8 * 32),
    "--training.eval_interval",
    "0",
    "--optimizer.learning_rate",
    "0",
]
OPTIONS += ["--optimizer.min_learning_rate", "0"]


def train(ranks, path, overrides, flips):
    """What the run says when ``flips``, {rank: (step, tensor, element, bit)}, come in its memory."""
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
    update = run.optimizer.step

    def step():
        update()
        at, name, element, bit = flips.get(ranks.rank, (0, "", 0, 0))
        if run.progress.step + 1 == at:
            tensors = dict(run.model.named_parameters()) | optimizer_tensors(run.model, run.optimizer)
            values = local_part(tensors[name].detach()).view(-1).view(torch.int32)
            values[element] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)

    run.optimizer.step = step
    try:
        pretrain.train(run)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("layout", [COPIES, TENSOR], ids=["copies", "tensor"])
def test_an_undisturbed_run_passes(layout, two_ranks, run_file, tmp_path):
    options = [*OPTIONS, *layout, "--training.check_replicas_interval", "1", "--run_folder", str(tmp_path)]
    options += ["--optimizer.learning_rate", "0.01"]
    assert two_ranks.run(train, run_file, options, {}) == [None, None]


@pytest.mark.parametrize(
    ("layout", "options", "name"),
    [
        (COPIES, [], "model.layers.1.mlp.up_proj.weight"),
        (COPIES, [], "optimizer.exp_avg_sq.model.layers.0.self_attn.q_proj.weight"),
        (COPIES, [], "optimizer.step.model.norm.weight"),
        (COPIES, ["--training.weight_dtype", "bf16"], "model.norm.weight"),
        (TENSOR, [], "model.layers.1.input_layernorm.weight"),
    ],
)
def test_a_flipped_bit_is_named(layout, options, name, two_ranks, run_file, tmp_path):
    options = [
        *OPTIONS,
        *layout,
        *options,
        "--training.check_replicas_interval",
        "2",
        "--checkpoint.save_interval",
        "1",
    ]
    # The learning rate is zero: nothing else differs because of it.
    flips = {1: (3, name, 0, 1)}
    said = two_ranks.run(train, run_file, [*options, "--run_folder", str(tmp_path)], flips)
    assert said[0] == said[1]
    host = re.escape(socket.gethostname())
    pattern = rf"step 4: rank 1 \({host}\) and rank 0 \({host}\) hold different values of {re.escape(name)}, which .*"
    pattern += r"since step 2, the last check, when all were equal, .*; the newest checkpoint is .*0003"
    assert re.fullmatch(pattern, said[0])
    assert not (tmp_path / "checkpoints" / "step-00000004").exists()


def test_what_nobody_else_holds_is_not_compared(two_ranks, run_file, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    options = [*OPTIONS, *TENSOR, "--training.check_replicas_interval", "1", "--run_folder", str(tmp_path)]
    assert two_ranks.run(train, run_file, options, {1: (3, name, 0, 1)}) == [None, None]


def test_stages_of_a_pipeline_hold_different_parameters(two_ranks, run_file, tmp_path):
    options = [*OPTIONS, "--parallel.pipeline", "2", "--training.check_replicas_interval", "1"]
    assert two_ranks.run(train, run_file, [*options, "--run_folder", str(tmp_path)], {}) == [None, None]


def test_stages_of_a_pipeline_hold_different_constants(two_ranks, run_file, tmp_path):
    """Biases of routers are whole on all ranks that have the layer, and on no others."""
    experts = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 0}
    model = {**tiny_run.ARCHITECTURE, "model_type": "glm4_moe", "head_dim": 8, "moe_intermediate_size": 24, **experts}
    options = [*OPTIONS, "--model.architecture", json.dumps(model), "--training.check_replicas_interval", "1"]
    options += ["--run_folder", str(tmp_path), "--parallel.pipeline", "2"]
    assert two_ranks.run(train, run_file, options, {}) == [None, None]


def test_of_four_copies_the_odd_one_is_named(four_ranks, run_file, tmp_path):
    options = [*OPTIONS, "--parallel.replicate", "4", "--parallel.shard", "1", "--run_folder", str(tmp_path)]
    options += ["--training.check_replicas_interval", "1", "--training.micro_batch_size", "2"]
    said = four_ranks.run(train, run_file, options, {2: (1, "model.norm.weight", 3, 31)})
    assert said[0] is not None and re.match(r"step 1: rank 2 \(\S+\) and rank 0 \(\S+\) and 2 more hold diff", said[0])
    assert len(set(said)) == 1 and "since the start" in said[0] and "no checkpoint has been written" in said[0]


def test_the_hash(monkeypatch):
    """Against the same sum in Python's integers; every single flipped bit and every swap shows; NaNs have bits."""
    monkeypatch.setattr(replica_check, "_CHUNK", 16)
    generator = np.random.default_rng(1)
    values = generator.integers(-(2**31), 2**31, 41, dtype=np.int32)
    values[7] = np.float32("nan").view(np.int32)
    weights = odd_numbers(16, torch.device("cpu")).tolist()
    assert len({w % 2**64 for w in weights}) == 16 and all(w % 2 for w in weights)
    expected = 0
    for start in range(0, 41, 16):
        chunk = values[start : start + 16].tolist()
        total = sum(value * weight for value, weight in zip(chunk, weights, strict=False))
        expected = (expected * 0x5851F42D4C957F2D + total) % 2**64

    def hashed(array):
        return hash_tensors({"x": torch.from_numpy(array).view(torch.float32)})["x"]

    assert hashed(values) % 2**64 == expected
    others = set()
    for place in range(41):
        for bit in range(32):
            flipped = values.copy()
            flipped.view(np.uint32)[place] ^= np.uint32(1 << bit)
            others.add(hashed(flipped))
        swapped = values.copy()
        swapped[[place, place - 1]] = swapped[[place - 1, place]]
        others.add(hashed(swapped))
    assert len(others) == 41 * 33 and hashed(values) not in others


def test_odd_numbers_are_those_of_splitmix64():
    """The finalizer in Python's integers."""

    def mixed(value):
        value = value * 0x9E3779B97F4A7C15 % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return (value ^ (value >> 31)) | 1

    assert [w % 2**64 for w in odd_numbers(100, torch.device("cpu")).tolist()] == [mixed(i) for i in range(100)]
