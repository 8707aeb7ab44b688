"""Megatron's layout written down once more by hand, and conversions that keep what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tiny_models import SHAPE, TOKENIZER
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from retemper.checkpoint_convert import megatron_export, megatron_import

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "dtype": "bfloat16"},
    "llama, all biases": {"model_type": "llama", "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 1},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 6, "dtype": "float16"},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_key_value_heads": 2,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "mixtral": {
        "model_type": "mixtral",
        "num_key_value_heads": 2,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "dtype": "bfloat16",
    },
}
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
OLD_KEYS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Norms under other keys: that of the feed-forward layer is part of a linear layer, except before experts."""


def save_models(root: Path) -> dict[str, Path]:
    """A Hugging Face folder of each of MODELS, random in every parameter."""
    for name, settings in MODELS.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(**{**SHAPE, **settings})
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2)
        model.to(getattr(torch, settings.get("dtype", "float32"))).save_pretrained(root / name)
        for file, content in TOKENIZER.items():
            (root / name / file).write_bytes(content)
    return {name: root / name for name in MODELS}


def by_hand(folder: Path, padded: int) -> dict[str, Tensor]:
    """The Megatron tensors of a Hugging Face folder, stacked: block j of group g of query, key and value begins at row
    (g (r + 2) + j) d, where r query blocks come first, then the key, then the value."""
    hf, config = load_file(folder / "model.safetensors"), AutoConfig.from_pretrained(folder)
    groups, count = config.num_key_value_heads, config.num_hidden_layers
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    r = config.num_attention_heads // groups
    state = {"decoder.final_layernorm.weight": hf["model.norm.weight"]}
    experts = {"mixtral": "block_sparse_moe.", "qwen2_moe": "mlp."}.get(config.model_type, "")
    for key, name in (("embedding.word_embeddings", "model.embed_tokens"), ("output_layer", "lm_head")):
        if f"{name}.weight" in hf:
            table = torch.zeros(padded, config.hidden_size, dtype=hf[f"{name}.weight"].dtype)
            table[: config.vocab_size] = hf[f"{name}.weight"]
            state[f"{key}.weight"] = table

    def stack(key: str, make: Callable[[str], Tensor], needs: str) -> None:
        if f"model.layers.0.{needs}" in hf:
            state[f"decoder.layers.{key}"] = torch.stack([make(f"model.layers.{i}.") for i in range(count)])

    for kind in ("weight", "bias"):

        def qkv(layer: str, kind: str = kind) -> Tensor:
            q, k, v = (hf[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv")
            fused = torch.full(((r + 2) * groups * d, *q.shape[1:]), torch.nan, dtype=q.dtype)
            for group in range(groups):
                for j in range(r):
                    at, head = (group * (r + 2) + j) * d, (group * r + j) * d
                    fused[at : at + d] = q[head : head + d]
                for j, part in ((r, k), (r + 1, v)):
                    at = (group * (r + 2) + j) * d
                    fused[at : at + d] = part[group * d : group * d + d]
            return fused

        def fc1(layer: str, kind: str = kind) -> Tensor:
            gate, up = hf[f"{layer}mlp.gate_proj.{kind}"], hf[f"{layer}mlp.up_proj.{kind}"]
            fused = torch.cat([up, up])
            fused[: config.intermediate_size] = gate
            return fused

        stack(f"self_attention.linear_qkv.{kind}", qkv, f"self_attn.q_proj.{kind}")
        stack(f"mlp.linear_fc1.{kind}", fc1, f"mlp.gate_proj.{kind}")
        for key, name in (("self_attention.linear_proj", "self_attn.o_proj"), ("mlp.linear_fc2", "mlp.down_proj")):
            stack(f"{key}.{kind}", lambda layer, name=name, kind=kind: hf[f"{layer}{name}.{kind}"], f"{name}.{kind}")
    for key, name in (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        (
            f"{'pre_mlp_layernorm.' if experts else 'mlp.linear_fc1.layer_norm_'}weight",
            "post_attention_layernorm.weight",
        ),
        ("mlp.router.weight", f"{experts}gate.weight"),
        ("mlp.shared_experts.linear_fc2.weight", "mlp.shared_expert.down_proj.weight"),
        ("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight"),
        ("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
        ("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
    ):
        stack(key, lambda layer, name=name: hf[f"{layer}{name}"], name)
    if experts:
        gate, up, down = ("w1", "w3", "w2") if config.model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        count_experts = getattr(config, "num_local_experts", None) or config.num_experts

        def of_all(layer: str, *parts: str) -> Tensor:
            """[experts, rows of all parts, columns]."""
            names = [[f"{layer}{experts}experts.{i}.{part}.weight" for part in parts] for i in range(count_experts)]
            return torch.stack([torch.cat([hf[name] for name in of_one]) for of_one in names])

        stack("mlp.experts.experts.linear_fc1.weight", lambda layer: of_all(layer, gate, up), f"{experts}gate.weight")
        stack("mlp.experts.experts.linear_fc2.weight", lambda layer: of_all(layer, down), f"{experts}gate.weight")

        def shared(layer: str) -> Tensor:
            return torch.cat([hf[f"{layer}mlp.shared_expert.{part}_proj.weight"] for part in ("gate", "up")])

        stack("mlp.shared_experts.linear_fc1.weight", shared, "mlp.shared_expert_gate.weight")
    return state


def layer_by_layer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with keys for each layer."""
    apart = {}
    for key, tensor in state.items():
        head, layers, rest = key.partition("decoder.layers.")
        apart |= (
            {f"{head}{layers}{i}.{rest}": part.clone() for i, part in enumerate(tensor)} if layers else {key: tensor}
        )
    return apart


def save_megatron(folder: Path, state: dict[str, Any], args: Any = None) -> Path:
    """A checkpoint as an iteration of a training run."""
    folder.mkdir()
    # As Megatron does: an object is one item, whatever it consists of.
    dcp.save(state, checkpoint_id=folder, planner=dcp.DefaultSavePlanner(flatten_state_dict=False), no_dist=True)
    if args is not None:
        torch.save({"args": args, "iteration": 3}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(FORMAT))
    return folder


def quiet_from(megatron: Path, output: Path, **options: Any) -> list[str]:
    """Convert; returns what was said."""
    said: list[str] = []
    megatron_import.convert(megatron, output, say=said.append, **options)
    return said


def quiet_to(output: Path, **options: Any) -> list[str]:
    """Convert; returns what was said."""
    said: list[str] = []
    megatron_export.convert(output, say=said.append, **options)
    return said
