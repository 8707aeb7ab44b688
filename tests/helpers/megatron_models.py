"""Megatron-Core's own GPT model on the CPU: what it saves, what it loads and what it computes.

Its code asks for a GPU in four places that a small model on the CPU does not need; they are replaced for a while.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer import dot_product_attention as attention
from torch.distributed import distributed_c10d

EXTRA_STATE = "_extra_state"


_ones = torch.ones


def _ones_on_cpu(*shape: Any, **options: Any) -> torch.Tensor:
    return _ones(*shape, **{**options, "device": "cpu"})


class _NoRandomStates:
    def fork(self, *_: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@contextlib.contextmanager
def megatron_on_cpu(tensor_parallel: int = 1) -> Iterator[None]:
    """Megatron's groups of ranks, within a process group that exists."""
    with (
        mock.patch("torch.cuda.current_device", return_value=torch.device("cpu")),
        mock.patch("torch.cuda.synchronize"),
        mock.patch("torch.ones", _ones_on_cpu),
        mock.patch.object(attention.tensor_parallel, "get_cuda_rng_tracker", return_value=_NoRandomStates()),
    ):
        before = set(distributed_c10d._world.pg_map)
        parallel_state.initialize_model_parallel(tensor_parallel, 1)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            # Megatron leaves its many groups open, and every one has a thread that wakes a hundred times a second.
            for group in set(distributed_c10d._world.pg_map) - before:
                dist.destroy_process_group(group)


def args_of(settings: dict[str, Any], **others: Any) -> Namespace:
    """A Hugging Face config's ``settings`` in the words of Megatron-LM's command line, written down by hand."""
    family = settings["model_type"]
    heads = settings["num_attention_heads"]
    return Namespace(
        num_layers=settings["num_hidden_layers"],
        hidden_size=settings["hidden_size"],
        ffn_hidden_size=settings["intermediate_size"],
        num_attention_heads=heads,
        group_query_attention=settings["num_key_value_heads"] != heads,
        num_query_groups=settings["num_key_value_heads"] if settings["num_key_value_heads"] != heads else 1,
        kv_channels=settings["head_dim"],
        norm_epsilon=settings["rms_norm_eps"],
        rotary_base=settings["rope_theta"],
        rotary_percent=1.0,
        max_position_embeddings=64,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=settings.get("mlp_bias", False),
        add_qkv_bias=family == "qwen2",
        qk_layernorm=family == "qwen3",
        untie_embeddings_and_output_weights=not settings["tie_word_embeddings"],
        num_experts=None,
        use_rope_scaling="rope_parameters" in settings,
        rope_scaling_factor=settings.get("rope_parameters", {}).get("factor", 8.0),
        **others,
    )


def gpt_model(args: Namespace, padded_vocab_size: int, **settings: Any) -> GPTModel:
    """The model of Megatron's training script for ``args``, with random values in every parameter.

    ``settings`` are more of a TransformerConfig's.
    """
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        kv_channels=args.kv_channels,
        layernorm_epsilon=args.norm_epsilon,
        normalization=args.normalization,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        gated_linear_unit=args.swiglu,
        activation_func=F.silu,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        window_size=getattr(args, "window_size", None),
        window_attn_skip_freq=getattr(args, "window_attn_skip_freq", None),
        **settings,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args.normalization, qk_layernorm=args.qk_layernorm),
        vocab_size=padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
    ).eval()
    generator = torch.Generator().manual_seed(parallel_state.get_tensor_model_parallel_rank())
    shared = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms, and biases after a sum over ranks, are the same on every rank.
            split = getattr(parameter, "tensor_model_parallel", False)
            parameter.copy_(torch.randn(parameter.shape, generator=generator if split else shared) * 0.2)
    return model


def logits(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """[batch, length, padded vocabulary]."""
    length = tokens.shape[1]
    positions = torch.arange(length).expand_as(tokens)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return model(tokens, positions, later)


def save(model: GPTModel, folder: Path, common: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
    """As Megatron-LM does, with ``common`` beside the tensors. All ranks call this; ``folder`` exists."""
    # Its writer starts processes, which the ranks of tests may not, being daemons.
    with mock.patch.dict(multiprocessing.current_process()._config, {"daemon": False}):  # type: ignore[attr-defined]
        dist_checkpointing.save({"model": model.sharded_state_dict(metadata=metadata), **common}, str(folder))


def load(model: GPTModel, folder: Path, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Load strictly, as Megatron-LM does; nothing may be missing. Returns what stands beside the tensors."""
    wanted = {"model": model.sharded_state_dict(metadata=metadata)}
    loaded, not_asked_for, not_there = dist_checkpointing.load(wanted, str(folder), strict="return_all")
    assert not not_there, not_there
    # Megatron's other layer specification has modules with such states that this one lacks.
    assert all(name.endswith(f".{EXTRA_STATE}") for name in not_asked_for), not_asked_for
    model.load_state_dict(loaded.pop("model"), strict=True)
    return loaded
