"""The start-up summary: every derived quantity that a user would otherwise work out by hand."""

from __future__ import annotations

from ...kernels.attention import attention_backend
from ..budget import BatchPlan
from ..config import RunConfig
from ..data.catalog import Catalog
from ..model.architecture import Architecture
from ..model.decoder import COMPUTE_DTYPES
from ..parallel.mesh import mesh_shape
from ..parallel.process_group import Ranks
from .flops import device_peak_flops, flops_per_token
from .progress import duration, human


def describe_run(
    config: RunConfig,
    plan: BatchPlan,
    ranks: Ranks,
    architecture: Architecture,
    catalog: Catalog,
    remaining_steps: int,
    start: str,
) -> list[str]:
    """Lines about model, data, ranks, step and budget; ``start`` says where the weights come from."""
    training = config.training
    sources = ", ".join(
        f"{source.name} ({human(source.stop - source.start)} tokens, weight {weight:g})"
        for source, weight in zip(catalog.train, catalog.weights, strict=True)
    )
    replicate, shard = mesh_shape(config.parallel, ranks.world_size)
    all_pairs, causal_pairs = (flops_per_token(architecture, plan.sequence_length, halved) for halved in (False, True))
    # What arithmetic alone allows. The time that is really left is measured, and stands on the line of every step.
    peak = device_peak_flops(ranks.device)
    seconds = remaining_steps * plan.tokens_per_step * causal_pairs / ((peak or 1.0) * ranks.world_size)
    shortest = f", at least {duration(seconds)} at the GPUs' bf16 peak" if peak else ""
    return [
        f"model       {architecture.model_type}, {human(architecture.num_parameters)} parameters, {start}",
        f"data        {sources}; validation: {', '.join(catalog.validation) or 'none'}",
        f"ranks       {ranks.world_size} ({ranks.device.type}): replicate {replicate} x shard {shard}, compute in "
        f"{training.precision}, attention by "
        f"{attention_backend(ranks.device.type, COMPUTE_DTYPES[training.precision])}",
        f"step        {plan.global_batch_size} samples x {plan.sequence_length:,} tokens = {plan.tokens_per_step:,} "
        f"tokens, in {plan.num_micro_batches} micro-batches of {plan.micro_batch_size} on each rank",
        f"budget      {training.train_tokens:,} tokens = {plan.steps_for(training.train_tokens):,} steps, warm-up "
        f"{training.warmup_tokens:,} tokens; {remaining_steps:,} steps to go{shortest}",
        f"FLOPs/token {all_pairs:.4g} (all pairs of positions), {causal_pairs:.4g} (causal pairs)",
    ]
