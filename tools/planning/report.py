"""Format the results of a rehearsal as text and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...engine.observe.flops import flops_per_token
from ...engine.observe.progress import duration
from .memory import KINDS
from .outcome import Outcome, digits, gib, shown_layout
from .prediction import Prediction
from .search import Found


def format_outcome(outcome: Outcome) -> str:
    """Format a layout in full."""
    setting, config = outcome.setting, outcome.config
    gpu, assumptions, plan = setting.gpu, setting.assumptions, outcome.plan
    lines = [
        f"mesh        {setting.nodes} nodes x {assumptions.gpus_per_node} GPUs ({gpu.name}) = "
        f"{outcome.layout.world_size} ranks: {shown_layout(config, outcome.layout)}",
        f"step        {plan.global_batch_size} samples x {plan.sequence_length:,} tokens = {plan.tokens_per_step:,} "
        f"tokens, in {plan.num_micro_batches} micro-batches of {plan.micro_batch_size} on each rank",
        f"rehearsed   {_how(outcome)}",
        "",
        *_memory_table(outcome),
        "",
        *_traffic_table(outcome),
        "",
        *_time_lines(outcome),
        "",
        *assumption_lines(outcome),
    ]
    return "\n".join(lines)


def _how(outcome: Outcome) -> str:
    count = len(outcome.ranks)
    many = "" if count == 1 else f" of {count} of the pipeline's {outcome.layout.pipeline} places"
    how = "a few blocks, and all by extrapolation" if outcome.extrapolated else "all blocks"
    return f"one rank{many}, {how}; attention and loss as on a GPU, blocks not compiled"


def _memory_table(outcome: Outcome) -> list[str]:
    rank, setting = outcome.fullest, outcome.setting
    peak = outcome.peak_of(rank)
    offloaded = " (in host memory)" if outcome.config.parallel.cpu_offload else ""
    where = f" (rank at place {rank.place} of the pipeline)" if len(outcome.ranks) > 1 else ""
    lines = [
        f"| GiB on the fullest GPU{where} | between steps | most in a step | at the peak |",
        "| --- | ---: | ---: | ---: |",
    ]
    for kind in KINDS:
        note = offloaded if kind in ("parameters", "gradients", "optimizer states") else ""
        lines.append(f"| {kind}{note} | {gib(rank.kept[kind])} | {gib(rank.most[kind])} | {gib(peak[kind])} |")
    total = sum(peak.values())
    lines.append(f"| **all** | {gib(sum(rank.kept.values()))} | | **{gib(total)}** |")
    verdict = (
        f"fits, {gib(outcome.headroom)} GiB of headroom" if outcome.fits else f"{gib(-outcome.headroom)} GiB too much"
    )
    sizes = f"{gib(total)} GiB at the peak + {gib(setting.reserve)} GiB reserve of {gib(setting.gpu.memory)} GiB"
    lines += ["", f"memory      {sizes}: {verdict}"]
    return lines


def _traffic_table(outcome: Outcome) -> list[str]:
    rank = outcome.slowest
    lines = [
        "| collectives of a rank in a step | axis | ranks (in a node) | number | GB, whole tensors | GB sent |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for key, sent in sorted(rank.collectives.items(), key=lambda item: -item[1].sent):
        lines.append(
            f"| {key.kind} | {' x '.join(key.axes) or 'all'} | {key.ranks} ({key.per_node}) | {sent.count:,} "
            f"| {sent.size / 1e9:,.3f} | {sent.sent / 1e9:,.3f} |"
        )
    return lines if rank.collectives else ["no collectives: one rank"]


def _time_lines(outcome: Outcome) -> list[str]:
    architecture, plan = outcome.setting.architecture, outcome.plan
    trainable = outcome.config.training.trainable
    every, causal = (flops_per_token(architecture, plan.sequence_length, halved, trainable) for halved in (False, True))
    ranks, rank = outcome.layout.world_size, outcome.slowest
    tokens = outcome.config.training.train_tokens
    seconds = outcome.hours * 3600
    executed = rank.flops * ranks / plan.tokens_per_step
    return [
        f"FLOPs/token {digits(every / 1e9)} G (all pairs of positions), {digits(causal / 1e9)} G (causal pairs); "
        f"with all that is computed again: {digits(executed / 1e9)} G",
        f"step time   {_seconds(outcome.prediction)}",
        f"speed       {digits(outcome.tokens_per_second)} tokens/s on each GPU, "
        f"{digits(outcome.tokens_per_second * ranks)} in all; MFU {outcome.mfu(causal_halved=True):.1%} (causal pairs; "
        f"--efficiency is its bound), {outcome.mfu(causal_halved=False):.1%} (all pairs, as in a run's log)",
        f"run         {tokens:,} tokens = {plan.steps_for(tokens):,} steps: {duration(seconds)} = "
        f"{digits(outcome.hours)} hours, {digits(outcome.hours * ranks)} GPU-hours",
        f"checkpoint  {digits(outcome.checkpoint_bytes / 1e9)} GB (weights and both moments)",
    ]


def _seconds(prediction: Prediction) -> str:
    parts = {
        "computing": prediction.computing,
        "waiting for activations": prediction.waiting,
        "pipeline idle": prediction.idle,
        "weights and gradients beyond that": prediction.exposed,
        "optimizer": prediction.optimizer,
    }
    shown = " + ".join(f"{name} {digits(value)}" for name, value in parts.items() if value)
    return f"{digits(prediction.step)} s = {shown}; {digits(prediction.weights)} s of gathering and reducing in all"


def assumption_lines(outcome: Outcome) -> list[str]:
    """Return the assumptions of the prediction."""
    setting = outcome.setting
    gpu, assumptions = setting.gpu, setting.assumptions
    lines = [
        f"assumed     {gpu.flops / 1e12:g} TFLOP/s x {assumptions.efficiency:g} (--efficiency); links "
        f"{gpu.intra_node / 1e9:g} GB/s in a node, {gpu.inter_node / 1e9:g} GB/s and GPU between nodes, memory "
        f"{gpu.memory_bandwidth / 1e12:g} TB/s, each x {assumptions.link_efficiency:g}; gathering and reducing "
        "overlap with computing",
        f"not counted fragmentation, NCCL's buffers, CUDA's context: the reserve of {gib(setting.reserve)} GiB is for "
        "them (--reserve). Compiled blocks keep less than is counted. Nothing was measured on a GPU",
    ]
    if outcome.config.parallel.cpu_offload:
        lines.append("not counted the time of copies to host memory and of the optimizer there")
    return lines


def format_needless_recomputation(outcome: Outcome, faster: Outcome) -> str:
    """Report a layout that recomputes, if the same layout with less recomputation fits too."""
    gain = faster.tokens_per_second / outcome.tokens_per_second - 1
    return (
        f"note: parallel.recompute {outcome.config.parallel.recompute} is not needed: with "
        f"{faster.config.parallel.recompute} the same layout fits with {gib(faster.headroom)} GiB of headroom, and is "
        f"predicted to be {gain:.0%} faster"
    )


def format_found(found: Found) -> str:
    """Format the ranking of a search."""
    lines = [
        "| layout | tokens/s/GPU | MFU (causal) | peak GiB | headroom GiB | fits |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for outcome in found.outcomes:
        lines.append(
            f"| {shown_layout(outcome.config, outcome.layout)} | {digits(outcome.tokens_per_second)} "
            f"| {outcome.mfu(causal_halved=True):.1%} | {gib(outcome.peak_bytes)} | {gib(outcome.headroom)} "
            f"| {'yes' if outcome.fits else 'no'} |"
        )
    lines.append("")
    lines.append(
        f"{found.num_possible} layouts are possible: {found.num_too_large} are too large by formulas, {found.num_left} "
        "slower by formulas than those above, which were rehearsed with a few blocks"
    )
    return "\n".join(lines)


def to_record(outcome: Outcome) -> dict[str, Any]:
    """Return all of an outcome, for JSON."""
    setting = outcome.setting
    return {
        "layout": outcome.layout._asdict(),
        "parallel": dataclasses.asdict(outcome.config.parallel),
        "weight_dtype": outcome.config.training.weight_dtype,
        "state_dtype": outcome.config.optimizer.state_dtype,
        "micro_batch_size": outcome.config.training.micro_batch_size,
        "micro_batches": outcome.plan.num_micro_batches,
        "gpu": dataclasses.asdict(setting.gpu),
        "nodes": setting.nodes,
        "assumptions": dataclasses.asdict(setting.assumptions),
        "reserve_bytes": setting.reserve,
        "extrapolated": outcome.extrapolated,
        "fits": outcome.fits,
        "peak_bytes": outcome.peak_bytes,
        "headroom_bytes": outcome.headroom,
        "ranks": [
            {
                "place": rank.place,
                "blocks": rank.blocks,
                "parameters": rank.parameters,
                "kept_bytes": rank.kept,
                "most_bytes": rank.most,
                "peak_bytes": outcome.peak_of(rank),
                "peaks_bytes": rank.peaks,
                "flops": rank.flops,
                "collectives": [
                    {**key._asdict(), **dataclasses.asdict(sent)} for key, sent in rank.collectives.items()
                ],
            }
            for rank in outcome.ranks
        ],
        "step_seconds": {**dataclasses.asdict(outcome.prediction), "step": outcome.prediction.step},
        "flops_per_token": flops_per_token(
            setting.architecture, outcome.plan.sequence_length, False, outcome.config.training.trainable
        ),
        "tokens_per_second_per_gpu": outcome.tokens_per_second,
        "mfu": outcome.mfu(causal_halved=False),
        "mfu_causal": outcome.mfu(causal_halved=True),
        "hours": outcome.hours,
        "gpu_hours": outcome.hours * outcome.layout.world_size,
        "checkpoint_bytes": outcome.checkpoint_bytes,
    }
