"""Random initialization of models that transformers computes: as the library's own in distribution."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from model_table import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from retemper.engine.errors import UserError
from retemper.engine.model.implementations import meta_model, parse_architecture

CPU = torch.device("cpu")
TYPES = ("qwen3_moe", "qwen3_next", "gpt2", "gemma2", "deepseek_v3", "apertus", "recurrent_gemma", "falcon_mamba")
"""Experts in one tensor; values of constructors; smaller output projections; tied heads; constants; rates."""


@functools.cache
def initialized(model_type: str, seed: int) -> dict[str, Tensor]:
    """Every parameter of our model."""
    model = meta_model(parse_architecture(tiny_config(model_type).to_dict(), "test", "transformers")).materialize(CPU)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.initialize_(seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@functools.cache
def of_transformers(model_type: str, seed: int) -> dict[str, Tensor]:
    """Every parameter and buffer of a model of transformers."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("model_type", TYPES)
def test_distribution_is_that_of_transformers(model_type):
    """Mean and standard deviation within seven standard errors; what is not random is the same."""
    theirs, others = of_transformers(model_type, 1), of_transformers(model_type, 2)
    for name, ours in initialized(model_type, 0).items():
        if torch.equal(theirs[name], others[name]):
            assert torch.equal(ours, theirs[name]), name
            continue
        error = 7 * theirs[name].std() / math.sqrt(ours.numel())
        assert abs(ours.std() - theirs[name].std()) <= error, name
        assert abs(ours.mean() - theirs[name].mean()) <= error, name


@pytest.mark.parametrize("model_type", ["qwen3_moe", "falcon_mamba"])
def test_a_seed_decides_everything(model_type):
    first, other = initialized(model_type, 0), initialized(model_type, 1)
    again = initialized.__wrapped__(model_type, 0)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_type_that_transformers_does_not_initialize_is_refused_by_name():
    changes = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    config = {"model_type": "openai-gpt", "n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, **changes}
    model = meta_model(parse_architecture(config, "test", "transformers")).materialize(CPU)
    with pytest.raises(UserError, match=r"openai-gpt: transformers does not initialize .*c_attn.weight; set"):
        model.initialize_(0)


def test_blocks_that_share_parameters_are_refused():
    with pytest.raises(UserError, match="blocks share the parameter"):
        parse_architecture(tiny_config("zamba2").to_dict(), "test", "transformers")
