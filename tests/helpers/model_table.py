"""The tiny models of tests/models/tiny_models.json: one of each text decoder of transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

TABLE: dict[str, Any] = json.loads((Path(__file__).parents[1] / "models" / "tiny_models.json").read_text("utf-8"))
TYPES: tuple[str, ...] = tuple(TABLE["types"])
VOCAB_SIZE: int = TABLE["common"]["vocab_size"]
STATISTICS = re.compile(r"(?<!balancing_)bias(es)?$|scalar$")
"""Buffers that a checkpoint of a trained model holds with other values than a new model: biases of routers, scales.
transformers replaces an element of those of zaya whenever it loads them."""


def sampled(names: Sequence[str], quick: Collection[str]) -> list[Any]:
    """Parameters of a test of many types: ``quick`` in every run, a quarter of the others slow, the rest extended."""
    others = [name for name in names if name not in quick]
    slow, extended = [pytest.mark.slow], [pytest.mark.slow, pytest.mark.extended]
    return [*quick, *(pytest.param(name, marks=extended if n % 4 else slow) for n, name in enumerate(others))]


def tiny_config(model_type: str) -> Any:
    """The configuration of transformers for a type of the table."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = CONFIG_MAPPING[model_type]
    names = {*known().to_dict(), *known.attribute_map}
    common = {key: value for key, value in TABLE["common"].items() if key in names}
    return AutoConfig.for_model(model_type, **{**common, **TABLE["types"][model_type]})


def tiny_model(config: Any) -> torch.nn.Module:
    """A random model with eager attention. Weights are so large that every leak between documents shows."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
            else:  # around what the type begins with: one for norms, logarithms of rates in recurrences
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        stored = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in stored and STATISTICS.search(name):
                buffer.add_(torch.randn_like(buffer), alpha=0.1)
    return model
