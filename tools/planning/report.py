"""Format plans as text and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...engine.model.attention_choice import context_kind
from ...engine.observe.flops import flops_per_token
from ...engine.observe.progress import duration
from ...engine.parallel.trainable import learning
from ...kernels.grouped_linear import GROUPED_CAPABILITY
from .experts import describe_missing
from .layout_plan import LayoutPlan, digits, gib
from .memory import KINDS
from .orthogonalization import on_the_host
from .prediction import StepPrediction
from .savings import Saving
from .search import SearchResult


def format_plan(plan: LayoutPlan) -> str:
    """Format a layout in full."""
    cluster = plan.cluster
    gpu, assumptions, batches = cluster.gpu, cluster.assumptions, plan.batches
    lines = [
        f"mesh        {cluster.nodes} nodes x {assumptions.gpus_per_node} GPUs ({gpu.name}) = "
        f"{plan.layout.world_size} ranks: {plan.shown_layout}",
        f"step        {batches.global_batch_size} samples x {batches.sequence_length:,} tokens = "
        f"{batches.tokens_per_step:,} tokens, in {batches.num_micro_batches} micro-batches of "
        f"{batches.micro_batch_size} on each rank",
        f"dry run     {_how(plan)}",
        "",
        *_memory_table(plan),
        "",
        *_traffic_table(plan),
        "",
        *_time_lines(plan),
        "",
        *assumption_lines(plan),
    ]
    return "\n".join(lines)


def _how(plan: LayoutPlan) -> str:
    count = len(plan.ranks)
    many = "" if count == 1 else f" of {count} of the pipeline's {plan.layout.pipeline} places"
    how = "a few blocks, and all by extrapolation" if plan.extrapolated else "all blocks"
    return f"one rank{many}, {how}; attention and loss as on a GPU, blocks not compiled"


def _memory_table(plan: LayoutPlan) -> list[str]:
    rank = plan.fullest
    peak = plan.peak_of(rank)
    offloaded = " (in host memory)" if plan.config.parallel.cpu_offload else ""
    where = f" (rank at place {rank.place} of the pipeline)" if len(plan.ranks) > 1 else ""
    lines = [
        f"| GiB on the fullest GPU{where} | between steps | most in a step | at the peak |",
        "| --- | ---: | ---: | ---: |",
    ]
    for kind in KINDS:
        note = offloaded if kind in ("parameters", "gradients", "optimizer states") else ""
        lines.append(f"| {kind}{note} | {gib(rank.kept[kind])} | {gib(rank.most[kind])} | {gib(peak[kind])} |")
    total = sum(peak.values())
    lines.append(f"| **all** | {gib(sum(rank.kept.values()))} | | **{gib(total)}** |")
    if plan.host_bytes:
        lines += ["", f"host        {_host(plan)}"]
    lines += ["", f"memory      {_sizes(plan)}"]
    missing = describe_missing(plan)
    return lines if missing is None else [*lines, missing]


def _sizes(plan: LayoutPlan) -> str:
    fits = plan.headroom >= 0
    verdict = f"fits, {gib(plan.headroom)} GiB of headroom" if fits else f"{gib(-plan.headroom)} GiB too much"
    reserve, memory = plan.cluster.reserve, plan.cluster.gpu.memory
    return f"{gib(plan.peak_bytes)} GiB at the peak + {gib(reserve)} GiB reserve of {gib(memory)} GiB: {verdict}"


def _host(plan: LayoutPlan) -> str:
    """Describe the host memory of a node, compared with what it has if that is known."""
    needed, memory = plan.host_bytes, plan.cluster.host_memory
    activations = max(rank.host_activations for rank in plan.ranks)
    waiting = f", of which activations take up to {gib(activations)} GiB for each rank" if activations else ""
    others = "more for pinned buffers, copies for checkpoints and the processes"
    text = f"{gib(needed)} GiB of host memory in each node{waiting}; {others}"
    if memory is None:
        return f"{text}; --host-memory GIB compares it"
    left = memory - needed
    verdict = f"fits, {gib(left)} GiB are left" if left >= 0 else f"{gib(-left)} GiB too much"
    return f"{text}; of {gib(memory)} GiB (--host-memory): {verdict}"


def _traffic_table(plan: LayoutPlan) -> list[str]:
    rank = plan.slowest
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


def _time_lines(plan: LayoutPlan) -> list[str]:
    architecture, batches = plan.cluster.architecture, plan.batches
    learned = learning(architecture, plan.config.training, plan.config.adapter)
    every, causal = (
        flops_per_token(architecture, batches.sequence_length, halved, learned) for halved in (False, True)
    )
    ranks, rank = plan.layout.world_size, plan.slowest
    tokens = plan.config.training.budget
    seconds = plan.hours * 3600
    executed = rank.flops * ranks / batches.tokens_per_step
    return [
        f"FLOPs/token {digits(every / 1e9)} G (all pairs of positions), {digits(causal / 1e9)} G (causal pairs); "
        f"with all that is computed again: {digits(executed / 1e9)} G",
        f"step time   {_seconds(plan.prediction)}",
        f"speed       {digits(plan.tokens_per_second)} tokens/s on each GPU, "
        f"{digits(plan.tokens_per_second * ranks)} in all; MFU {plan.mfu(causal_halved=True):.1%} (causal pairs; "
        f"--efficiency is its bound), {plan.mfu(causal_halved=False):.1%} (all pairs, as in a run's log)",
        f"run         {tokens:,} tokens = {batches.steps_for(tokens):,} steps: {duration(seconds)} = "
        f"{digits(plan.hours)} hours, {digits(plan.hours * ranks)} GPU-hours",
        f"checkpoint  {digits(plan.checkpoint_bytes / 1e9)} GB ({_stored(plan)})",
    ]


def _stored(plan: LayoutPlan) -> str:
    what = "the adapter" if plan.config.adapter.kind is not None else "weights"
    states = "both moments" if plan.config.optimizer.name == "adamw" else "optimizer states"
    return f"{what}, {states}, average" if plan.config.training.average_bytes else f"{what} and {states}"


def _seconds(prediction: StepPrediction) -> str:
    parts = {
        "computing": prediction.computing,
        "waiting for activations": prediction.waiting,
        "pipeline idle": prediction.idle,
        "weights and gradients beyond that": prediction.exposed,
        "optimizer": prediction.optimizer,
        "Muon's products": prediction.products,
    }
    shown = " + ".join(f"{name} {digits(value)}" for name, value in parts.items() if value)
    return f"{digits(prediction.step)} s = {shown}; {digits(prediction.weights)} s of gathering and reducing in all"


def assumption_lines(plan: LayoutPlan) -> list[str]:
    """Return the assumptions of the prediction."""
    cluster = plan.cluster
    gpu, assumptions = cluster.gpu, cluster.assumptions
    lines = [
        f"assumed     {gpu.flops / 1e12:g} TFLOP/s x {assumptions.efficiency:g} (--efficiency); links "
        f"{gpu.intra_node / 1e9:g} GB/s in a node, {gpu.inter_node / 1e9:g} GB/s and GPU between nodes, memory "
        f"{gpu.memory_bandwidth / 1e12:g} TB/s, each x {assumptions.link_efficiency:g}; gathering and reducing "
        "overlap with computing",
        f"not counted fragmentation, NCCL's buffers, CUDA's context: the reserve of {gib(cluster.reserve)} GiB is for "
        "them (--reserve). Compiled blocks keep less than is counted. Nothing was measured on a GPU",
    ]
    if plan.slowest.experts.flops:
        lines.append(
            "experts     all have equally many rows; grouped products take as long as their operations, or as their "
            "matrices need to pass the memory once; rows that are sorted pass it too"
        )
        if gpu.capability < GROUPED_CAPABILITY:
            lines.append(
                f"not counted on {gpu.name} each expert is a product of its own, and the host waits for the number of "
                "rows of each: there is no kernel for grouped products"
            )
    if plan.config.parallel.cpu_offload or plan.config.parallel.offload_activations:
        lines.append(
            f"offload     {gpu.host_link / 1e9:g} GB/s to the host in each direction, host memory "
            f"{assumptions.host_bandwidth / 1e9:g} GB/s (--host-bandwidth), each x {assumptions.link_efficiency:g}; "
            "transfers overlap with computing, the update does not"
        )
    if plan.config.optimizer.name == "muon":
        lines += _muon_lines(plan)
    if "." in plan.config.optimizer.name:
        lines.append(f"not counted the memory that a step of {plan.config.optimizer.name} needs beyond its states")
    return lines


def _muon_lines(plan: LayoutPlan) -> list[str]:
    config = plan.config
    options, matrices = config.optimizer.muon, plan.slowest.matrices
    speed = " as if they were bf16" if options.newton_schulz_dtype == "fp32" else ""
    lines = [
        f"muon        {options.newton_schulz_steps} iterations of three products for each matrix, computed{speed} at "
        "--efficiency; ranks that share matrices compute one each, and wait for the largest",
        "not counted the exchange of Muon's matrices between ranks, and the memory of one of them",
    ]
    if config.parallel.cpu_offload and on_the_host(matrices):
        lines.append(
            "not counted products of Muon that the host computes, because the weights are there: they take long"
        )
    return lines


def format_needless_recomputation(plan: LayoutPlan, faster: LayoutPlan) -> str:
    """Report a layout that recomputes, if the same layout with less recomputation fits too."""
    gain = faster.tokens_per_second / plan.tokens_per_second - 1
    return (
        f"note: parallel.recompute {plan.config.parallel.recompute} is not needed: with "
        f"{faster.config.parallel.recompute} the same layout fits with {gib(faster.headroom)} GiB of headroom, and is "
        f"predicted to be {gain:.0%} faster"
    )


def format_found(found: SearchResult) -> str:
    """Format the ranking of a search."""
    has_host = any(plan.host_bytes for plan in found.plans)
    host, line = (" host GiB/node |", " ---: |") if has_host else ("", "")
    lines = [
        f"| layout | tokens/s/GPU | MFU (causal) | peak GiB | headroom GiB |{host} fits |",
        f"| --- | ---: | ---: | ---: | ---: |{line} --- |",
    ]
    lines += [
        f"| {plan.shown_layout}{' (configured)' if plan is found.configured else ''} "
        f"| {digits(plan.tokens_per_second)} "
        f"| {plan.mfu(causal_halved=True):.1%} | {gib(plan.peak_bytes)} | {gib(plan.headroom)} "
        f"{f'| {gib(plan.host_bytes)} ' if has_host else ''}| {_verdict(plan)} |"
        for plan in found.plans
    ]
    lines.append("")
    if has_host and found.plans[0].cluster.host_memory is None:
        lines.append("Host memory was not compared: --host-memory GIB states what a node has")
    lines.append(
        f"{found.num_possible} layouts are possible: {found.num_too_large} are too large by formulas, {found.num_left} "
        "slower by formulas than those above, which were dry run with a few blocks"
    )
    if found.timed_out:
        lines.append(
            "Time was up before more of them were dry run: some of these may fit and be faster; search again "
            "on an idle machine"
        )
    return "\n".join(lines)


def _verdict(plan: LayoutPlan) -> str:
    if plan.fits:
        return "yes"
    return "no" if plan.fits_host else "no: host memory"


def format_savings(plan: LayoutPlan, savings: list[Saving]) -> str:
    """Format changes of settings that need less memory than ``plan``."""
    lines = [
        f"memory      {_sizes(plan)}",
        "",
        "| instead of the configured value | GiB saved | peak GiB | speed | |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for saving in savings:
        speed = _relative_speed(saving, plan)
        lines.append(
            f"| {saving.change} | {gib(saving.saved_bytes)} | {gib(saving.plan.peak_bytes)} "
            f"| {speed:.0%} | {saving.remark} |"
        )
    if not savings:
        lines.append("| no change of one setting saves memory: use more or larger GPUs | | | | |")
    return "\n".join([*lines, "", "Speeds are predicted tokens/s, compared with the configured run.", ""])


def savings_record(plan: LayoutPlan, savings: list[Saving]) -> list[dict[str, Any]]:
    """Return what :func:`format_savings` shows, for JSON."""
    return [
        {
            "settings": dict(saving.change.settings),
            "shown": str(saving.change),
            "drawback": saving.remark,
            "saved_bytes": saving.saved_bytes,
            "peak_bytes": saving.plan.peak_bytes,
            "speed": _relative_speed(saving, plan),
        }
        for saving in savings
    ]


def _relative_speed(saving: Saving, plan: LayoutPlan) -> float:
    """Return the predicted speed compared with ``plan``."""
    return saving.plan.tokens_per_second / plan.tokens_per_second


def to_record(plan: LayoutPlan) -> dict[str, Any]:
    """Return all of a plan, for JSON."""
    cluster = plan.cluster
    return {
        "layout": plan.layout._asdict(),
        "parallel": dataclasses.asdict(plan.config.parallel),
        "weight_dtype": plan.config.training.weight_dtype,
        "state_dtype": plan.config.optimizer.states,
        "micro_batch_size": plan.config.training.micro_batch_size,
        "micro_batches": plan.batches.num_micro_batches,
        "gpu": dataclasses.asdict(cluster.gpu),
        "nodes": cluster.nodes,
        "assumptions": dataclasses.asdict(cluster.assumptions),
        "reserve_bytes": cluster.reserve,
        "extrapolated": plan.extrapolated,
        "fits": plan.fits,
        "peak_bytes": plan.peak_bytes,
        "headroom_bytes": plan.headroom,
        "context_kind": context_kind(plan.config.parallel, cluster.architecture) if plan.layout.context > 1 else None,
        "host_bytes": plan.host_bytes,
        "host_memory_bytes": cluster.host_memory,
        "ranks": [
            {
                "place": rank.place,
                "blocks": rank.blocks,
                "parameters": rank.parameters,
                "trained_parameters": rank.trained,
                "kept_bytes": rank.kept,
                "most_bytes": rank.most,
                "peak_bytes": plan.peak_of(rank),
                "peaks_bytes": rank.peaks,
                "flops": rank.flops,
                "muon_flops": sum(one.flops for group in rank.matrices for one in group),
                "experts": rank.experts._asdict(),
                "collectives": [
                    {**key._asdict(), **dataclasses.asdict(sent)} for key, sent in rank.collectives.items()
                ],
            }
            for rank in plan.ranks
        ],
        "step_seconds": {**dataclasses.asdict(plan.prediction), "step": plan.prediction.step},
        "flops_per_token": flops_per_token(
            cluster.architecture,
            plan.batches.sequence_length,
            False,
            learning(cluster.architecture, plan.config.training, plan.config.adapter),
        ),
        "tokens_per_second_per_gpu": plan.tokens_per_second,
        "mfu": plan.mfu(causal_halved=False),
        "mfu_causal": plan.mfu(causal_halved=True),
        "hours": plan.hours,
        "gpu_hours": plan.hours * plan.layout.world_size,
        "checkpoint_bytes": plan.checkpoint_bytes,
    }
