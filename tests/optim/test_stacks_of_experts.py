"""Optimizers of stacked experts [experts, outputs, inputs]: as of flat parameters or of each matrix, in any layout."""

from __future__ import annotations

import parity_run
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from retemper.engine.config.settings import MuonConfig, OptimizerConfig, TrainingConfig
from retemper.engine.optim import average_of, build_average, build_optimizer, elementwise, keep_average, step_unless

BF16, FP32 = torch.bfloat16, torch.float32
NAME = "model.layers.0.mlp.experts.down_proj.weight"
RATE, DECAY = 0.03, 0.1
SHAPES = [(5, 6, 512), (4, 8, 512)]
OPTIMIZERS = {
    "adamw": (FP32, {"name": "adamw"}),
    "adamw in bf16": (BF16, {"name": "adamw", "state_dtype": "bf16"}),
    "lion": (BF16, {"name": "lion", "state_dtype": "bf16"}),
    "adamw_8bit": (BF16, {"name": "adamw_8bit"}),
    "child-tuning": (FP32, {"name": "adamw", "child_tuning": 0.4}),
    "muon": (FP32, {"name": "muon"}),
    "muon in bf16": (BF16, {"name": "muon", "state_dtype": "bf16"}),
}
ELEMENTWISE = [name for name in OPTIMIZERS if "muon" not in name]


def _random(*shape, seed=0, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _trained(kind, shapes, place=lambda tensor: tensor, view=lambda tensor: tensor):
    """Weights, states and bf16 averages after three steps, of which one is skipped.

    Args:
        place: distributes a whole tensor to the ranks.
        view: another shape of the parameters.
    """
    dtype, settings = OPTIMIZERS[kind]
    config = OptimizerConfig(learning_rate=RATE, weight_decay=DECAY, **settings)
    weights = [place(view(_random(*shape, seed=seed, dtype=dtype))) for seed, shape in enumerate(shapes)]
    named = [(f"{NAME}{seed}", nn.Parameter(weight)) for seed, weight in enumerate(weights)]
    optimizer = build_optimizer(named, config, 7)
    average = build_average(named, TrainingConfig(train_tokens=1, ema_decay=0.9, ema_dtype="bf16"), 7)
    keep_average(optimizer, average)
    average_of(optimizer).reset()
    for step in range(3):
        for seed, (_, parameter) in enumerate(named):
            gradient = _random(*shapes[seed], seed=10 * step + seed, dtype=dtype)
            parameter.grad = place(view(gradient))
        step_unless(optimizer, torch.tensor(float(step == 1)), torch.tensor(2.0), step)
    tensors = [t for _, p in named for t in (p.detach(), *optimizer.state[p].values())]
    tensors += average_of(optimizer).tensors().values()
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_elements_are_updated_as_those_of_a_matrix_with_all_rows(kind, monkeypatch):
    """The same bits, also of random rounding and of blocks of codes, and for chunks of any size."""
    expected = _trained(kind, SHAPES, view=lambda tensor: tensor.flatten(0, 1))
    for size in (2**16, 1024):
        monkeypatch.setitem(elementwise.CHUNK_ELEMENTS, "cpu", size)
        for one, other in zip(_trained(kind, SHAPES), expected, strict=True):
            assert torch.equal(one.flatten(), other.flatten())


def test_muon_orthogonalizes_each_expert_as_pytorchs_does():
    shape = (5, 6, 16)
    stack = nn.Parameter(_random(*shape))
    single = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    config = OptimizerConfig(
        name="muon", learning_rate=RATE, weight_decay=DECAY, muon=MuonConfig(newton_schulz_dtype="bf16")
    )
    ours = build_optimizer([(NAME, stack)], config)
    settings = {"lr": RATE, "momentum": config.muon.momentum, "weight_decay": DECAY, "adjust_lr_fn": "match_rms_adamw"}
    theirs = torch.optim.Muon(single, nesterov=True, **settings)
    for step in range(4):
        stack.grad = _random(*shape, seed=step)
        for matrix, gradient in zip(single, stack.grad, strict=True):
            matrix.grad = gradient.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]), rtol=1e-6, atol=1e-6)


def test_muon_updates_all_matrices_of_a_mixture_and_only_vectors_do_not_decay():
    shapes = {NAME: (5, 6, 8), "model.layers.0.mlp.gate.weight": (5, 8), "model.layers.0.input_layernorm.weight": (8,)}
    named = [(name, nn.Parameter(_random(*shape))) for name, shape in shapes.items()]
    optimizer = build_optimizer(named, OptimizerConfig(name="muon", weight_decay=DECAY))
    muons, _ = optimizer.parts
    assert {name for name, _, _ in muons.named()} == {NAME, "model.layers.0.mlp.gate.weight"}
    decays = {name: group["weight_decay"] for name, group, _ in optimizer.named()}
    assert decays == dict(zip(shapes, (DECAY, DECAY, 0.0), strict=True))


STRIDED = _StridedShard(0, split_factor=2)
"""Of FSDP, if another axis divides the same dimension."""
LAYOUTS = {
    "experts": ((4,), [Shard(0)]),
    "rows": ((4,), [Shard(1)]),
    "columns": ((2, 2), [Replicate(), Shard(2)]),
    "experts, rows": ((2, 2), [Shard(0), Shard(1)]),
    "experts, columns": ((2, 2), [Shard(0), Shard(2)]),
    "experts twice": ((2, 2), [STRIDED, Shard(0)]),
}


def _placed(tensor, mesh, placements):
    """Distribute ``tensor`` as DTensor does, from the last axis to the first for strided shards."""
    local, here = tensor, mesh.get_coordinate()
    order = reversed(range(mesh.ndim)) if STRIDED in placements else range(mesh.ndim)
    for axis in order:
        if not placements[axis].is_replicate():
            dim, count = placements[axis].dim, mesh.size(axis)
            parts = local.chunk(count, dim)
            empty = local.narrow(dim, 0, 0)
            local = [*parts, *[empty] * (count - len(parts))][here[axis]]
    return DTensor.from_local(
        local.contiguous(), mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def trained_in_layouts(ranks, kind):
    """Results of :func:`_trained` on this rank in each layout."""
    found = {}
    for name, (sizes, placements) in LAYOUTS.items():
        mesh = init_device_mesh("cpu", sizes)
        shapes = SHAPES[1:] if name == "experts twice" else SHAPES
        found[name] = _trained(kind, shapes, lambda tensor, m=mesh, p=placements: _placed(tensor, m, p))
    return found


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_layout_has_the_numbers_of_one_process(kind, four_ranks):
    """Also where some ranks have no expert: five experts on four ranks are 2, 2, 1 and 0."""
    every, last = _trained(kind, SHAPES), _trained(kind, SHAPES[1:])
    for result in four_ranks.run(trained_in_layouts, kind):
        for layout, tensors in result.items():
            expected = last if layout == "experts twice" else every
            for one, other in zip(tensors, expected, strict=True):
                assert one.dtype == other.dtype
                if "muon" in kind:  # products of several matrices at a time may be computed in another order
                    tolerance = 1e-2 if one.dtype == BF16 else 1e-5
                    torch.testing.assert_close(one, other, rtol=tolerance, atol=1e-6, msg=lambda m, n=layout: n + m)
                else:
                    assert torch.equal(one, other), layout


@pytest.mark.parametrize("layout", ["expert 2 tensor 2 shard 2"])
def test_a_run_with_muon_has_the_numbers_of_one_process(layout, one_rank, four_ranks, tmp_path):
    """Losses and first gradients; later ones differ more, since Muon scales small singular values up."""
    path = parity_run.write_run(tmp_path, parity_run.Model("qwen2_moe", tied=False, packed=True))
    muon = ["--optimizer.name", "muon", "--optimizer.learning_rate", "0.003", "--training.micro_batch_size", "2"]
    words = layout.split()
    axes = [word for name, size in zip(words[::2], words[1::2], strict=True) for word in (f"--parallel.{name}", size)]
    expected = parity_run.five_steps(one_rank, path, muon)
    found = parity_run.joined(four_ranks.run(parity_run.five_steps, path, [*muon, *axes]))
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    for name, tensor in expected.parameters.items():
        assert (found.parameters[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
