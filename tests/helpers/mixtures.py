"""A tiny mixture of experts of transformers, the native decoder with its weights, and the gradients of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from retemper.engine.batch import Batch
from retemper.engine.model.families import parse_decoder_architecture
from retemper.engine.model.implementations import meta_model

VOCAB = 97
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "pad_token_id": None},
}


def library_mixture(family: str, num_layers: int, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of transformers whose routers are far from uniform."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, num_hidden_layers=num_layers, **{**_SHAPE, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model.to(dtype)


def native_mixture(theirs: Any) -> Any:
    """The native decoder with the weights of a model of transformers."""
    ours = meta_model(parse_decoder_architecture(theirs.config.to_dict())).to_empty(device="cpu")
    with torch.no_grad():
        named = by_native_name(dict(theirs.named_parameters()))
        assert named.keys() == {name for name, _ in ours.named_parameters()}
        for name, parameter in ours.named_parameters():
            parameter.copy_(named[name])
    return ours


def by_native_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the module of transformers, which stacks gate and up, by their native names."""
    named = {}
    for name, tensor in tensors.items():
        prefix, found, kind = name.partition(".experts.")
        if not found:
            named[name] = tensor
        elif kind == "gate_up_proj":
            gate, up = tensor.chunk(2, 1)
            named |= {f"{prefix}.experts.gate_proj.weight": gate, f"{prefix}.experts.up_proj.weight": up}
        else:
            named[f"{prefix}.experts.down_proj.weight"] = tensor
    return named


def documents(num_tokens: int, seed: int = 0) -> tuple[Tensor, Batch]:
    """Tokens of one document, and the batch; the last token has no target."""
    tokens = torch.randint(0, VOCAB, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    targets = torch.cat([tokens[1:], torch.tensor([-100])])
    return tokens, Batch.of_documents(tokens, [num_tokens], targets)


def gradients(model: Any) -> dict[str, Tensor]:
    """The gradients of all parameters by name."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}
