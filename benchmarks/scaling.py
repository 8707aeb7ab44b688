"""Compute the communication per step of Qwen2-72B by layout: the table of docs/performance.md, "Scaling on paper".

    python benchmarks/scaling.py

Computed from datasheet bandwidths by retemper.benchmarks.step.communication; nothing is measured.
"""

from __future__ import annotations

from retemper.benchmarks.step.communication import Layout, compute_seconds, memory_bytes, step_traffic, tokens_to_hide
from retemper.engine.model.architecture import parse_architecture

QWEN2_72B = parse_architecture(
    {
        # Hugging Face config.json of Qwen/Qwen2-72B
        "model_type": "qwen2",
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    }
)
SEQUENCE_LENGTH = 4096
FLOPS_PER_SECOND = 400e12
"""Rate of one GPU while it computes: an assumption, 40 % of an H100's or H200's dense bf16 peak."""
TOKENS = 8192
"""Tokens per data-parallel rank, in one micro-batch."""
LAYOUTS = (
    Layout(tensor=1, shard=32),
    Layout(tensor=2, shard=16),
    Layout(tensor=4, shard=8),
    Layout(tensor=8, shard=4),
    Layout(tensor=1, shard=512),
    Layout(tensor=1, shard=32, replicate=16),
    Layout(tensor=8, shard=64),
    Layout(tensor=8, shard=4, replicate=16),
)


def table() -> str:
    """Return a Markdown table, one row for each layout."""
    lines = [
        "| GPUs | tensor x shard x replicate | weights, gradients, states | gathered | reduced | time of these "
        "| tensor parallel | computing | tokens per rank that hide it | tokens per step then |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for layout in LAYOUTS:
        traffic = step_traffic(QWEN2_72B, layout, TOKENS, micro_batches=1)
        computing = compute_seconds(QWEN2_72B, layout, TOKENS, SEQUENCE_LENGTH, FLOPS_PER_SECOND)
        tokens = tokens_to_hide(QWEN2_72B, layout, SEQUENCE_LENGTH, FLOPS_PER_SECOND)
        lines.append(
            f"| {layout.num_gpus} | {layout.tensor} x {layout.shard} x {layout.replicate} "
            f"| {memory_bytes(QWEN2_72B, layout) / 1e9:.1f} GB | {traffic.gather_bytes / 1e9:.1f} GB "
            f"| {traffic.reduce_bytes / 1e9:.1f} GB | {traffic.weight_seconds:.2f} s "
            f"| {traffic.tensor_bytes / 1e9:.1f} GB, {traffic.tensor_seconds:.2f} s | {computing:.2f} s "
            f"| {tokens:,.0f} | {tokens * layout.shard * layout.replicate / 1e6:.2f} M |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
