"""Tiny models that transformers computes, built as a run builds them, and what a plain loop computes."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from model_table import VOCAB_SIZE, tiny_config, tiny_model
from torch import Tensor
from torch.distributed.tensor import DTensor

from retemper.engine.batch import Batch
from retemper.engine.config.settings import DataConfig, ParallelConfig, RunConfig, TrainingConfig
from retemper.engine.model.architecture import Architecture
from retemper.engine.model.attention_choice import choose_attention
from retemper.engine.model.implementations import checked, parse_architecture
from retemper.engine.parallel import build
from retemper.engine.parallel.data_parallel import copy_full_
from retemper.engine.parallel.forward_backward import ForwardBackward, ModelParts
from retemper.engine.parallel.layout import plan_layout
from retemper.engine.parallel.mesh import build_mesh
from retemper.engine.parallel.process_group import Ranks

CPU = torch.device("cpu")
LENGTHS = (20, 1, 31, 12)
"""Shorter and longer than the windows of 8 tokens."""
_IGNORED = -100


class Reference(NamedTuple):
    """What transformers computes for documents, each alone."""

    state: dict[str, Tensor]
    """Parameters and persistent buffers by name."""
    loss: float
    """Sum over all targets."""
    gradients: dict[str, Tensor]


@functools.cache
def architecture_of_type(model_type: str) -> Architecture:
    """The architecture of a tiny model that transformers computes."""
    config = tiny_config(model_type).to_dict()
    return checked(parse_architecture(config, "test", "transformers"))


def documents() -> Batch:
    """Packed documents with targets, of which none crosses the end of a document."""
    tokens = torch.randint(3, VOCAB_SIZE, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1)
    targets[torch.tensor(list(itertools.accumulate(LENGTHS))) - 1] = _IGNORED
    return Batch.of_documents(tokens, LENGTHS, targets)


@functools.cache
def reference(model_type: str) -> Reference:
    """What transformers computes for :func:`documents`, each alone. Not to be changed."""
    model = tiny_model(tiny_config(model_type))
    loss, gradients = _passes(model)
    return Reference({name: tensor.detach() for name, tensor in model.state_dict().items()}, loss, gradients)


def documents_in_bf16(model_type: str) -> dict[str, Tensor]:
    """The gradients that transformers computes in bf16 from the weights of :func:`reference`."""
    model = tiny_model(tiny_config(model_type)).to(torch.bfloat16)
    for name, buffer in model.named_buffers():  # from_pretrained does not cast them
        buffer.data = reference(model_type).state.get(name, buffer.float())
    return _passes(model)[1]


def _passes(model: torch.nn.Module) -> tuple[float, dict[str, Tensor]]:
    """The loss of :func:`documents`, each alone, and its gradients."""
    batch = documents()
    parts = batch.tokens.split(LENGTHS)
    logits = torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts])
    loss = F.cross_entropy(logits.float(), batch.targets, ignore_index=_IGNORED, reduction="sum")
    loss.backward()
    gradients = {
        name: parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in model.named_parameters()
    }
    return loss.item(), gradients


def build_one(
    ranks: Ranks, model_type: str, training: dict[str, Any], parallel: dict[str, Any], compiled: bool = False
) -> tuple[ModelParts, ForwardBackward]:
    """The model of a run with the weights of :func:`reference`."""
    architecture = architecture_of_type(model_type)
    settings = TrainingConfig(1, **{"precision": "fp32", "micro_batch_size": 1, **training})
    config = RunConfig("folder", DataConfig(), settings, parallel=ParallelConfig(**parallel))
    choices = build.Choices(choose_attention(config, architecture, CPU), compiled, 1)
    mesh = build_mesh(plan_layout(config.parallel, ranks.world_size), "cpu")
    model, forward_backward = build.build_model(config, architecture, ranks, mesh, choices)
    load(model, reference(model_type).state)
    return model, forward_backward


@torch.no_grad()
def load(model: ModelParts, state: dict[str, Tensor]) -> None:
    """Copy whole tensors into the parameters of a model."""
    for name, parameter in model.named_parameters():
        copy_full_(parameter, state[name])


def gradients(model: ModelParts) -> dict[str, Tensor]:
    """Every whole gradient, by name."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}
