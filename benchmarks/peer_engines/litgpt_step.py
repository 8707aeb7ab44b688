"""Run LitGPT's model and the step of its ``pretrain.fit`` (0.5), through Lightning Fabric."""

from __future__ import annotations

import re
from typing import Any

import lightning
import torch
from litgpt.config import Config
from litgpt.model import GPT, Block
from litgpt.utils import chunked_cross_entropy
from torch import Tensor

from .job import Clock, Job, draw, optimizer_groups

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "bf16-states": "bf16-true"}
NAMES = {
    # LitGPT's names, as in its own table for Qwen2.5 (litgpt/scripts/convert_hf_checkpoint.py).
    r"transformer\.wte\.weight": ["model.embed_tokens.weight"],
    r"transformer\.h\.(\d+)\.norm_1\.weight": ["model.layers.{}.input_layernorm.weight"],
    r"transformer\.h\.(\d+)\.norm_2\.weight": ["model.layers.{}.post_attention_layernorm.weight"],
    r"transformer\.h\.(\d+)\.attn\.qkv\.(weight|bias)": [f"model.layers.{{}}.self_attn.{x}_proj.{{}}" for x in "qkv"],
    r"transformer\.h\.(\d+)\.attn\.proj\.weight": ["model.layers.{}.self_attn.o_proj.weight"],
    r"transformer\.h\.(\d+)\.mlp\.fc_1\.weight": ["model.layers.{}.mlp.gate_proj.weight"],
    r"transformer\.h\.(\d+)\.mlp\.fc_2\.weight": ["model.layers.{}.mlp.up_proj.weight"],
    r"transformer\.h\.(\d+)\.mlp\.proj\.weight": ["model.layers.{}.mlp.down_proj.weight"],
    r"transformer\.ln_f\.weight": ["model.norm.weight"],
    r"lm_head\.weight": ["lm_head.weight"],
}


def run(job: Job, engine: str) -> dict[str, Any]:
    """Train and measure. ``engine``: litgpt+compile (as its pretraining) or litgpt."""
    fabric = lightning.Fabric(accelerator=job.device, devices=1, precision=PRECISIONS[job.precision])
    fabric.launch()
    model = _model(job, fabric)
    if job.recompute:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    compiled = torch.compile(model) if engine == "litgpt+compile" else model
    module = fabric.setup(compiled)
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(
            optimizer_groups(model, job),
            lr=job.learning_rate,
            betas=(job.beta1, job.beta2),
            eps=job.eps,
            fused=True,  # LitGPT: on CUDA only; given here on the CPU too
        )
    )
    batches = torch.from_numpy(job.batches())
    targets = torch.full_like(batches, -100)
    # Each sample is a document: its last token has no target.
    targets[:, :, :-1] = batches[:, :, 1:]
    clock = Clock(job)
    clock.ready()
    for tokens, target in zip(batches, targets, strict=True):
        logits = module(tokens.to(fabric.device, non_blocking=True))
        loss = chunked_cross_entropy(logits, target.to(fabric.device, non_blocking=True))
        fabric.backward(loss)
        fabric.clip_gradients(module, optimizer, max_norm=job.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        clock.step_done(loss.detach())
    return clock.record()


def _model(job: Job, fabric: lightning.Fabric) -> GPT:
    shape = job.architecture
    heads = shape["num_attention_heads"]
    config = Config(
        name="benchmark",
        block_size=job.sequence_length,
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=heads,
        n_query_groups=shape.get("num_key_value_heads", heads),
        n_embd=shape["hidden_size"],
        head_size=shape.get("head_dim") or shape["hidden_size"] // heads,
        intermediate_size=shape["intermediate_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        attn_bias=shape["model_type"] == "qwen2",
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        norm_eps=shape["rms_norm_eps"],
        rope_base=int(shape["rope_theta"]),
    )
    with fabric.init_module():
        model = GPT(config)
    if shape.get("tie_word_embeddings"):
        model.transformer.wte.weight = model.lm_head.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tied = name == "lm_head.weight" and shape.get("tie_word_embeddings")
            parameter.copy_(_values("transformer.wte.weight" if tied else name, parameter, model, job))
    return model


def _values(name: str, parameter: Tensor, model: GPT, job: Job) -> Tensor:
    """Return initial values of a parameter with LitGPT's name, drawn under Hugging Face's names."""
    found = [(names, match) for pattern, names in NAMES.items() if (match := re.fullmatch(pattern, name))]
    if not found:
        raise KeyError(f"LitGPT's parameter {name} has no counterpart")
    names, match = found[0]
    sizes = [parameter.shape[0]]
    if len(names) == 3:
        config = model.config
        sizes = [config.n_head * config.head_size] + 2 * [config.n_query_groups * config.head_size]
    shapes = [torch.Size((size, *parameter.shape[1:])) for size in sizes]
    return torch.cat([draw(x.format(*match.groups()), shape, job) for x, shape in zip(names, shapes, strict=True)])
