"""Megatron-Core's own GPT model on the CPU: what it saves, what it loads and what it computes.

Its code asks for a GPU in four places that a small model on the CPU does not need; they are replaced for a while. Its
router asks for a name that is only there with TransformerEngine.
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
from megatron.core import utils as megatron_utils
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer import dot_product_attention as attention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from packaging.version import Version
from torch.distributed import distributed_c10d
from transformers import AutoConfig, AutoModelForCausalLM

EXTRA_STATE = "_extra_state"
VOCAB_SIZE = 97
TOKENS = torch.arange(40).view(2, 20) * 7 % VOCAB_SIZE

_ones = torch.ones


def _ones_on_cpu(*shape: Any, **options: Any) -> torch.Tensor:
    return _ones(*shape, **{**options, "device": "cpu"})


class _NoRandomStates:
    def fork(self, *_: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@contextlib.contextmanager
def megatron_on_cpu(tensor_parallel: int = 1, expert_parallel: int = 1) -> Iterator[None]:
    """Megatron's groups of ranks, within a process group that exists."""
    with (
        mock.patch("torch.cuda.current_device", return_value=torch.device("cpu")),
        mock.patch("torch.cuda.synchronize"),
        mock.patch("torch.ones", _ones_on_cpu),
        mock.patch.object(moe_utils, "te_general_gemm", None, create=True),
        mock.patch.object(attention.tensor_parallel, "get_cuda_rng_tracker", return_value=_NoRandomStates()),
    ):
        before = set(distributed_c10d._world.pg_map)
        parallel_state.initialize_model_parallel(tensor_parallel, 1, expert_model_parallel_size=expert_parallel)
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
        rotary_percent=settings.get("partial_rotary_factor", 1.0),
        max_position_embeddings=64,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=settings.get("mlp_bias", False),
        add_qkv_bias=family in ("qwen2", "qwen2_moe") or settings.get("attention_bias", False),
        qk_layernorm=settings.get("use_qk_norm", family in ("qwen3", "qwen3_moe", "dots1")),
        untie_embeddings_and_output_weights=not settings["tie_word_embeddings"],
        **_mixture_args(settings),
        use_rope_scaling="rope_parameters" in settings,
        rope_scaling_factor=settings.get("rope_parameters", {}).get("factor", 8.0),
        **others,
    )


def _mixture_args(settings: dict[str, Any]) -> dict[str, Any]:
    """The part of :func:`args_of` about experts."""
    experts = settings.get("num_experts", settings.get("num_local_experts"))
    if "n_routed_experts" in settings:
        return _sigmoid_args(settings)
    if experts is None:
        return {"num_experts": None}
    dense = settings.get("mlp_only_layers", [])
    shared = settings.get("shared_expert_intermediate_size")
    return {
        "num_experts": experts,
        "moe_layer_freq": [int(i not in dense) for i in range(settings["num_hidden_layers"])] if dense else 1,
        "moe_ffn_hidden_size": settings.get("moe_intermediate_size", settings["intermediate_size"]),
        "moe_router_topk": settings["num_experts_per_tok"],
        "moe_router_pre_softmax": not settings.get("norm_topk_prob", settings["model_type"] == "mixtral"),
        "moe_shared_expert_intermediate_size": shared,
        "moe_shared_expert_gate": shared is not None,
    }


def _sigmoid_args(settings: dict[str, Any]) -> dict[str, Any]:
    dense, layers = settings["first_k_dense_replace"], settings["num_hidden_layers"]
    grouped = settings.get("n_group", 1) > 1
    return {
        "num_experts": settings["n_routed_experts"],
        "moe_layer_freq": [0] * dense + [1] * (layers - dense) if dense else 1,
        "moe_ffn_hidden_size": settings["moe_intermediate_size"],
        "moe_router_topk": settings["num_experts_per_tok"],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": settings["routed_scaling_factor"],
        "moe_router_num_groups": settings["n_group"] if grouped else None,
        "moe_router_group_topk": settings["topk_group"] if grouped else None,
        "moe_shared_expert_intermediate_size": settings["n_shared_experts"] * settings["moe_intermediate_size"],
    }


def keys_with_transformer_engine(num_experts: int | None) -> tuple[bool, dict[str, str]]:
    """Whether Megatron's specification with TransformerEngine has a norm of its own before the feed-forward layer, and
    the keys that it renames. It is only a description, for which TransformerEngine need not be there."""
    with (
        mock.patch.object(gpt_layer_specs, "TESpecProvider", TESpecProvider, create=True),
        mock.patch.object(megatron_utils, "get_te_version", return_value=Version("2.8")),
    ):
        layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(num_experts=num_experts).submodules
    return layer.pre_mlp_layernorm is not IdentityOp, layer.sharded_state_dict_keys_map


def _layers(config: TransformerConfig, args: Namespace, norm_as_with_te: bool) -> Any:
    options = {"normalization": args.normalization}
    if args.num_experts is None:
        return gpt_layer_specs.get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, **options)
    block = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False, **options)
    for layer in block.layer_specs if norm_as_with_te else ():
        if layer.submodules.mlp.module is MoELayer:
            layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return block


def gpt_model(args: Namespace, padded_vocab_size: int, norm_as_with_te: bool = True, **settings: Any) -> GPTModel:
    """The model of Megatron's training script for ``args``, with random values in every parameter.

    The norms before experts have the key that they have with TransformerEngine, or that of the local specification.
    ``settings`` are more of a TransformerConfig's.
    """
    if args.num_experts is not None:
        mixture = {name: value for name, value in vars(args).items() if name.startswith("moe_")}
        mixture |= {"num_moe_experts": args.num_experts, "moe_router_load_balancing_type": "none"}
        settings = {**mixture, **settings}
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
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
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
        _layers(config, args, norm_as_with_te),
        vocab_size=padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
    ).eval()
    of_experts = torch.Generator().manual_seed(1000 + dist.get_rank())
    split = torch.Generator().manual_seed(parallel_state.get_tensor_model_parallel_rank())
    shared = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms, routers, and biases after a sum over ranks, are the same on every rank.
            is_split = getattr(parameter, "tensor_model_parallel", False)
            generator = of_experts if ".local_experts." in name else split if is_split else shared
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith(".expert_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=shared) * 0.2)
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


def saved(model: Any, folder: Path, args: Any, metadata: dict[str, Any] | None = None) -> None:
    """Save ``model`` as iteration 7 of a training run in ``folder``."""
    checkpoint = folder / "iter_0000007"
    checkpoint.mkdir(parents=True, exist_ok=True)
    common = {"args": args, "iteration": 7, "checkpoint_version": 3.0, "content_metadata": metadata or {}}
    save(model, checkpoint, common, metadata)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")


def transformers_logits(folder: Path) -> torch.Tensor:
    """What transformers computes."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits


def random_hf_folder(folder: Path, settings: dict[str, Any]) -> Path:
    """A Hugging Face model with random values in every parameter, norms and biases included."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder
