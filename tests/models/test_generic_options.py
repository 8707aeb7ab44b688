"""Options of a run with models that transformers computes: each has the gradients of a plain loop, or is refused."""

from __future__ import annotations

import functools

import pytest
import torch
from generic_models import (
    architecture_of_type,
    build_one,
    documents,
    documents_in_bf16,
    gradients,
    reference,
)
from torch import Tensor

from retemper.engine.parallel import compile as block_compile
from retemper.engine.parallel.process_group import Ranks

TOLERANCE = 1e-5
TYPES = ("qwen3_moe", "gemma2", "qwen3_next", "glm4_moe")
"""Routed experts, a softcap, blocks that compute one document at a time, and routers with constants."""
BITWISE: dict[str, dict[str, object]] = {
    "full": {"recompute": "full"},
    "selective": {"recompute": "selective"},
    "every second": {"recompute": "full", "recompute_every": 2},
    "offload": {"cpu_offload": True},
    "reduce once": {"reduce_gradients": "step"},
    "gathered": {"reshard_after_forward": False, "prefetch_blocks": 2},
}
"""Settings of ``parallel`` that change no bit."""


def passes(ranks: Ranks, model_type: str, compiled: bool = False, **settings: dict[str, object]) -> dict[str, Tensor]:
    """The gradients of a forward and backward pass by name, and the loss; an evaluation has the same loss."""
    training, parallel = settings.get("training", {}), settings.get("parallel", {})
    model, forward_backward = build_one(ranks, model_type, training, parallel, compiled)
    loss = forward_backward.accumulate_gradients([documents()], 1.0, lambda phase: None)
    assert forward_backward.evaluate([documents()]).item() == pytest.approx(loss.item(), rel=1e-6)
    return {"loss": loss, **gradients(model)}


def relative_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of each gradient. Of those that are rounding noise, as of key biases: of a hundredth of the norm of all."""
    total = torch.stack([expected[name].norm() for name in actual]).norm()
    return {
        name: ((gradient - expected[name]).norm() / max(expected[name].norm(), 1e-2 * total)).item()
        for name, gradient in actual.items()
    }


def require_close(actual: dict[str, Tensor], model_type: str) -> None:
    expected = reference(model_type)
    loss = actual["loss"].item()
    assert loss == pytest.approx(expected.loss, rel=TOLERANCE)
    errors = relative_errors({name: tensor for name, tensor in actual.items() if name != "loss"}, expected.gradients)
    assert max(errors.values()) <= TOLERANCE, max(errors.items(), key=lambda item: item[1])


@pytest.fixture(scope="module")
def plain(one_rank):
    """Gradients without any option, by type."""
    return functools.cache(lambda model_type: passes(one_rank, model_type))


@pytest.mark.parametrize("model_type", TYPES)
def test_gradients_are_those_of_transformers(model_type, plain):
    require_close(plain(model_type), model_type)
    assert len(plain(model_type)) - 1 == len(reference(model_type).gradients)


@pytest.mark.parametrize("option", BITWISE)
@pytest.mark.parametrize("model_type", TYPES)
def test_option_changes_no_bit(model_type, option, one_rank, plain):
    actual, expected = passes(one_rank, model_type, parallel=BITWISE[option]), plain(model_type)
    assert actual.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)]
    assert not different


@pytest.mark.parametrize("model_type", TYPES)
def test_only_tables_are_trained(model_type, one_rank, plain):
    actual = passes(one_rank, model_type, training={"trainable": "embeddings"})
    assert actual.keys() == {"loss", *architecture_of_type(model_type).tables}
    assert all(torch.equal(actual[name], plain(model_type)[name]) for name in actual)


@pytest.mark.parametrize("model_type", TYPES)
def test_only_matching_parameters_are_trained(model_type, one_rank, plain):
    last = architecture_of_type(model_type).num_layers - 1
    actual = passes(one_rank, model_type, training={"trainable": [f"*.{last}.*weight"]})
    assert actual.keys() == {"loss", *(n for n in plain(model_type) if f".{last}." in n and n.endswith("weight"))}
    assert len(actual) > 4 and all(torch.equal(actual[name], plain(model_type)[name]) for name in actual)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.slow
def test_compiled_blocks(model_type, recompute, one_rank, monkeypatch):
    """Compilation follows every line of a block; the backend that only calls the graph changes no number."""
    monkeypatch.setattr(block_compile, "apply", functools.partial(block_compile.apply, backend="eager"))
    torch._dynamo.reset()
    require_close(passes(one_rank, model_type, compiled=True, parallel={"recompute": recompute}), model_type)
    torch._dynamo.reset()


@pytest.mark.parametrize("weight_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model_type", TYPES)
def test_bf16_is_as_exact_as_in_transformers(model_type, weight_dtype, one_rank):
    """The errors of all gradients together, of both against fp32."""
    expected, training = reference(model_type), {"precision": "bf16", "weight_dtype": weight_dtype}
    actual = passes(one_rank, model_type, training=training)
    ours = overall_error(actual, expected.gradients)
    theirs = overall_error(documents_in_bf16(model_type), expected.gradients)
    assert ours <= 1.5 * theirs, (ours, theirs)


def overall_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    difference = sum((actual[name].double() - tensor).square().sum() for name, tensor in expected.items())
    return (difference / sum(tensor.double().square().sum() for tensor in expected.values())).sqrt().item()
