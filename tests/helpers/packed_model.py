"""A small decoder and packed batches for the tests of what wraps its blocks, and attention that can be compiled."""

from __future__ import annotations

import itertools
import threading

import torch
from torch import Tensor

from retemper.engine.batch import Batch
from retemper.engine.model.decoder import Decoder
from retemper.engine.model.implementations import parse_architecture
from retemper.kernels.attention import per_document_attention
from retemper.kernels.linear_cross_entropy import IGNORE_INDEX

VOCAB_SIZE = 61
NUM_TOKENS = 96


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURES: dict[str, dict[str, object]] = {
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 6, **EXPERTS},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 6,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [0],
        **EXPERTS,
    },
    "glm4_moe": {
        "model_type": "glm4_moe",
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        **EXPERTS,
    },
}
"""Changes of :func:`tiny_decoder` to mixtures of experts: alone, with a gated shared expert, with groups."""


def tiny_decoder(num_layers: int = 3, device: str = "cpu", **changes) -> Decoder:
    """A Qwen3 model (norms of queries and keys, grouped queries) with random weights."""
    values = {
        "model_type": "qwen3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        **changes,
    }
    with torch.device(device):
        model = Decoder(parse_architecture(values, "test"))
    if device == "cpu":
        model.initialize_(7)
    return model


def packed(*starts: int, num_tokens: int = NUM_TOKENS, seed: int = 0) -> Batch:
    """Random tokens and targets of documents that begin at 0 and at ``starts``; the number of targets varies."""
    lengths = [stop - start for start, stop in itertools.pairwise((0, *starts, num_tokens))]
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(0, VOCAB_SIZE, (2, num_tokens), generator=generator)
    targets[: len(starts)] = IGNORE_INDEX
    return Batch.of_documents(tokens, lengths, targets)


def gradients(model: Decoder, batch: Batch) -> dict[str, Tensor]:
    """The loss (as "loss") and the gradient of every parameter."""
    model.zero_grad()
    loss = model(batch)
    loss.backward()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {"loss": loss.detach()} | {name: parameter.grad.clone() for name, parameter in named}


def compilable_attention(q, k, v, cu_seqlens, max_seqlen, *, window=None, plan=None):
    """Attention as a GPU's kernel is to the compiler: one operator that it does not look into."""
    return attention_operator(q, k, v, cu_seqlens, max_seqlen, window)


@torch.library.custom_op("retemper_tests::attention", mutates_args=())
def attention_operator(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int | None
) -> Tensor:
    return _by_document(q, k, v, cu_seqlens, window).contiguous()


@torch.library.custom_op("retemper_tests::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    grads: list[Tensor] = []

    def differentiate() -> None:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        output = _by_document(*inputs, cu_seqlens, window)
        grads.extend(g.contiguous() for g in torch.autograd.grad(output, inputs, grad))

    # Inside an operator autograd is off, for this thread only.
    thread = threading.Thread(target=differentiate)
    thread.start()
    thread.join()
    return grads[0], grads[1], grads[2]


def _by_document(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    return per_document_attention(q, k, v, cu_seqlens.diff().tolist(), window=window)


@attention_operator.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, window):
    return q.new_empty(q.shape)


@_attention_backward.register_fake
def _(grad, q, k, v, cu_seqlens, window):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.window = inputs[5]


def _backward(ctx, grad):
    return *_attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.window), None, None, None


attention_operator.register_autograd(_backward, setup_context=_setup_context)
