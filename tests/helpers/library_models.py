"""The tiny models of the table, as transformers makes and saves them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from model_table import STATISTICS, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM


@functools.cache
def library_model(model_type: str, seed: int = 0) -> Any:
    """A random tiny model of the type, whose biases of routers are random too. Not to be changed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    persistent = model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    with torch.no_grad():
        for name in sorted(persistent):
            if STATISTICS.search(name):
                model.get_buffer(name).normal_()
    return model


def own_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers, without those that are tied to others."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
