"""Methods that change how a model is computed or where it is kept, with a mixture of experts."""

from __future__ import annotations

from copy import deepcopy

import mixture_folders
import parity_run
import pytest
import torch

from retemper.engine.batch import Batch
from retemper.engine.model.decoder import Decoder
from retemper.engine.model.implementations import architecture_of
from retemper.engine.parallel import float8


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory):
    return parity_run.write_run(tmp_path_factory.mktemp("run"), parity_run.Model("qwen2", tied=True, packed=True))


def five_steps(ranks, path, *more: str):
    return parity_run.five_steps(ranks, path, [*mixture_folders.architecture_options("qwen2_moe"), *more])


@pytest.fixture(scope="module")
def plain(one_rank, run_yaml):
    return five_steps(one_rank, run_yaml)


@pytest.mark.parametrize(
    "more",
    [
        ["--parallel.offload_activations", "true"],
        ["--parallel.cpu_offload", "true"],
        ["--parallel.cpu_offload", "optimizer"],
        ["--training.fuse_projections", "true"],
    ],
    ids=" ".join,
)
def test_results_are_those_without(more, plain, one_rank, run_yaml):
    found = five_steps(one_rank, run_yaml, *more)
    assert found.losses == pytest.approx(plain.losses, rel=1e-6)
    for name, tensor in plain.parameters.items():
        torch.testing.assert_close(found.parameters[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)


def test_noise_on_embeddings_is_the_same_on_two_ranks(plain, one_rank, two_ranks, run_yaml):
    noise = ["--training.neftune_alpha", "5"]
    expected = five_steps(one_rank, run_yaml, *noise)
    assert expected.losses[0] != plain.losses[0]
    found = parity_run.joined(two_ranks.run(parity_run.five_steps, run_yaml, [
        *mixture_folders.architecture_options("qwen2_moe"), *noise
    ]))  # fmt: skip
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


def test_float8_computes_linear_layers_and_leaves_experts_and_routers_alone(tmp_path):
    """The gate of the shared expert has one output, which float8 products cannot have."""
    folder = mixture_folders.save_mixture(tmp_path, "qwen2_moe", shared_expert_intermediate_size=48)
    architecture = architecture_of(folder)
    plain = Decoder(architecture)
    plain.initialize_(3)
    narrow = deepcopy(plain)
    float8.convert(narrow, emulate=True)
    changed = {name for name, module in narrow.named_modules() if "Float8" in type(module).__name__}
    kinds = {name.partition("layers.0.")[2] for name in changed if "layers.0." in name}
    assert kinds == {
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
    }
    tokens = mixture_folders.TOKENS[0]
    batch = Batch.of_documents(tokens, [len(tokens)], tokens.roll(-1))
    losses = [model(batch) for model in (plain, narrow)]
    assert losses[0].item() != losses[1].item() and losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)
    losses[1].backward()
    assert all(parameter.grad is not None for parameter in narrow.parameters())
