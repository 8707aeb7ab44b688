"""Describe the start of a run: every derived quantity, and notes about settings and data."""

from __future__ import annotations

import math
import os
import shlex
import socket
from dataclasses import replace

from tqdm import tqdm

from ..config import budget
from ..config.effects import Situation, without_effect
from ..config.settings import DataConfig, RunConfig, TrainingConfig
from ..data.catalog import Catalog
from ..data.document_packing import CHUNKS_PER_GROUP
from ..data.sample_order import SampleOrder
from ..data.source import Source
from ..data.truncation import count_truncated
from ..model.config_keys import describe_unread
from ..model.dtypes import DTYPES
from ..model.wrappers import text_config_of
from ..optim import groups
from ..optim.local import local_part
from ..optim.state_sizes import state_itemsizes
from ..parallel import trainable
from ..parallel.forward_backward import ModelParts
from ..parallel.launcher import launcher_notes
from ..run import Run
from ..schedule import decay_tokens
from ..start_kinds import AdapterStart
from ..system import free_memory, total_memory
from ..tokenizer.frame import frame_of_files
from ..weights.checkpoint.assets import HfAssets
from ..weights.checkpoint.resume_changes import describe_changes
from ..weights.checkpoint.retention import describe_rule
from ..weights.checkpoint.run_record import CONFIG_FILE
from ..weights.checkpoint.slabs import plan_slabs
from .console import LOG_FILE
from .curves import METRICS_FILE
from .flops import device_peak_flops, flops_per_token
from .progress import duration, human
from .terminal import heading
from .tokenizer_notes import tokenizer_notes

_MANY_EPOCHS = 4
_GROUPS_COUNTED = 8  # per source, to estimate how many documents are cut


def describe_start(run: Run) -> list[str]:
    """Return all lines that are logged before the first step of ``run``: sections of facts, then notes."""
    config, catalog, last_sample = run.config, run.catalog, run.end_sample
    validation = next(iter(catalog.validation), None)
    sections = {
        "Model": describe_model(run),
        "Data": [*describe_data(config.data, catalog, run.order, last_sample), *run.validation.describe()],
        "Optimizer": _describe_optimizer(run),
        "Budget": _describe_budget(run),
        "Ranks and memory": _describe_ranks(run),
        "Checkpoints": [
            describe_saving(config, run.model),
            describe_rule(config.checkpoint, config.training.eval_interval, validation, run.store.rewind_steps),
        ],
        "Outputs": describe_outputs(config),
        "Notes": _describe_notes(run),
    }
    lines = [line for title, lines in sections.items() if lines for line in (heading(title), *lines)]
    return [*lines, heading("Training")]


def _describe_notes(run: Run) -> list[str]:
    """Return lines about changes since the checkpoint, settings and data that may be mistakes, and the rest."""
    config, start, catalog, last_sample = run.config, run.start, run.catalog, run.end_sample
    assert start.assets.config is not None
    was, layout, given = start.resumed_from, run.mesh.layout._asdict(), config.model.architecture
    text, _ = text_config_of(start.assets.config)
    return [
        *(describe_changes(was, config, layout, catalog.fingerprints) if was else []),
        *(describe_unread(start.architecture.unread_keys(text), given) if isinstance(given, str) else []),
        *notes(config, catalog, start.assets),
        *data_notes(catalog, run.order, last_sample),
        *(f"note: {line}" for line in [*_budget_used(run), *without_effect(_situation(run))]),
        *run.remarks,
        *(run.validation.metric.describe_reset(run.progress.best) if run.validation.metric is not None else []),
    ]


def _trains_routers(run: Run) -> bool:
    """Return whether the weight of a router learns, on any rank."""
    return any(name.endswith(".mlp.gate.weight") for name in trainable.learned(run.start.architecture, run.config))


def _budget_used(run: Run) -> list[str]:
    """Return a line if the run has trained on more tokens than now configured."""
    training, tokens = run.config.training, run.progress.tokens
    if run.stopped_early:
        return [
            f"{run.early_stopping.describe(run.progress)}; to continue the run, raise "
            "training.early_stopping.patience or set it to null"
        ]
    if tokens - training.budget < run.plan.tokens_per_step:  # the last step is complete
        return []
    return [
        f"{budget.shown(training, budget.TRAIN)} is less than the {tokens:,} tokens that this run has trained on: "
        "no step is left; raise it to continue training"
    ]


def _situation(run: Run) -> Situation:
    layout, resumed, routers = run.mesh.layout, run.start.resumed_from, run.model.routers
    return Situation(
        run.config,
        same_weights=_has_replicas(run),
        reduces=layout.data_parallel * layout.context > 1,
        num_micro_batches=run.plan.num_micro_batches,
        has_router_losses=routers is not None,
        has_selection_biases=routers is not None and routers.updates_biases and _trains_routers(run),
        device=run.ranks.device.type,
        resumed=resumed.config if resumed else None,
        step=run.progress.step,
        epoch_tokens=run.catalog.epoch_tokens,
        source_tokens={source.name: source.stop - source.start for source in run.catalog.train},
    )


def _has_replicas(run: Run) -> bool:
    """Return whether several ranks hold the same values: copies, norms on ranks that share matrices, or constants.

    Constants, such as the biases by which routers choose experts, are on every rank that has their layers. With a
    pipeline, which only the native decoder has, these may be other ranks than this one.
    """
    layout = run.mesh.layout
    constants = run.model.constants or (layout.pipeline > 1 and run.start.architecture.float32_tensors)
    return layout.replicate > 1 or layout.tensor > 1 or (bool(constants) and layout.world_size > layout.pipeline)


def _describe_weights(run: Run) -> str:
    """Return where the weights come from."""
    folder, name = run.start.folder, run.config.model.initialize_from
    if run.start.resumed_from:
        return f"resumed from {folder} at step {run.progress.step:,}"
    return f"weights of {name or 'a random initialization'}" + (f": {folder}" if folder != name else "")


def describe_model(run: Run) -> list[str]:
    """Return lines about the model and how it is computed."""
    training, architecture, attention = run.config.training, run.start.architecture, run.choices.attention
    all_pairs, causal_pairs = _flops_per_token(run)
    num_trained = trainable.count(architecture, training, run.config.adapter)
    total, active = architecture.num_parameters, architecture.num_active_parameters
    used = f" ({human(active)} active for each token)" if active < total else ""
    return [
        f"model       {architecture.model_type}, {human(total)} parameters{used}, "
        f"{human(num_trained)} {'' if run.config.adapter.kind else 'of them '}trainable, {_describe_weights(run)}",
        *([] if training.trainable == "all" else [f"trainable   {trainable.describe(architecture, training)}"]),
        *_describe_adapter(run),
        f"computed by {architecture.describe_implementation()}",
        f"attention   {attention.backend}: {attention.reason}",
        f"FLOPs/token {all_pairs:.4g} (all pairs of positions), {causal_pairs:.4g} (causal pairs)",
    ]


def _describe_optimizer(run: Run) -> list[str]:
    architecture, config = run.start.architecture, run.config
    return groups.describe(
        config.optimizer, trainable.learned(architecture, config), trainable.table_names_of(architecture)
    )


def _describe_adapter(run: Run) -> list[str]:
    """Return a line about the adapter and its base, if there is one."""
    config, start = run.config.adapter, run.start
    if not isinstance(start, AdapterStart):
        return []
    parameters, base = start.parameters, start.base_record
    kind = "DoRA" if config.dora else "LoRA"
    scale = f"alpha {config.alpha:g}" + (" / sqrt(rank)" if config.rslora else "")
    dropout = f", dropout {config.dropout:g}" if config.dropout else ""
    saved = f"; {len(parameters.saved)} parameters of the base train fully" if parameters.saved else ""
    dtypes = f"{run.config.training.weight_dtype} trained, {run.config.training.precision} frozen"
    if config.quantize_base != "none":
        dtypes += f", its adapted matrices in {config.quantize_base}"
        if experts := sum(math.prod(shape) for shape in parameters.frozen.values() if len(shape) == 3):
            gib = experts * DTYPES[run.config.training.precision].itemsize / 2**30
            dtypes += f", but its experts stay in {run.config.training.precision}, {gib:.2f} GiB"
    return [
        f"adapter     {kind}, rank {config.rank}, {scale}{dropout}, at {len(parameters.modules)} linear layers{saved}: "
        f"{parameters.num_trained:,} parameters trained, {parameters.num_frozen:,} frozen ({dtypes})",
        *([f"            starts from the adapter in {start.peft.folder}"] if start.peft else []),
        f"base        {base['folder'] or 'a random initialization'} (hash {base['hash']}); checkpoints contain only "
        "what learns",
    ]


def _describe_budget(run: Run) -> list[str]:
    training, plan, ranks, remaining_steps = run.config.training, run.plan, run.ranks, run.remaining_steps
    # A lower bound by arithmetic. The line of every step has the measured remaining time.
    peak = device_peak_flops(ranks.device)
    _, causal_pairs = _flops_per_token(run)
    epoch = run.catalog.epoch_tokens
    seconds = remaining_steps * plan.tokens_per_step * causal_pairs / ((peak or 1.0) * ranks.world_size)
    shortest = f", at least {duration(seconds)} at the GPUs' bf16 peak" if peak else ""
    return [
        f"step        {plan.global_batch_size} samples x {plan.sequence_length:,} tokens = {plan.tokens_per_step:,} "
        f"tokens, in {plan.num_micro_batches} micro-batches of {plan.micro_batch_size} on each rank",
        f"budget      {_budget(run)} = {plan.steps_for(training.budget):,} steps, {_warmup_and_decay(run)}; "
        f"{remaining_steps:,} steps to go{shortest}",
        *([f"epoch       {epoch:,} tokens = {epoch / plan.tokens_per_step:,.1f} steps"] if epoch else []),
    ]


def _warmup_and_decay(run: Run) -> str:
    training, optimizer = run.config.training, run.config.optimizer
    parts = [_in_tokens("warm-up", training, budget.WARMUP)]
    if optimizer.schedule == "wsd":
        given = replace(optimizer, decay_tokens=decay_tokens(training, optimizer))
        parts.append(_in_tokens("decay", given, budget.DECAY))
    return ", ".join(parts)


def _in_tokens(name: str, section: budget.Section, kind: budget.Kind) -> str:
    """Return ``name`` with its tokens, and with the key that they were converted from."""
    key, tokens = budget.alternative(section, kind), getattr(section, kind.keys[0]) or 0
    return f"{name} {tokens:,} tokens" + (f" ({key} {getattr(section, key):,})" if key else "")


def _budget(run: Run) -> str:
    training = run.config.training
    epochs = "" if training.train_epochs is None else f"{training.train_epochs:g} x {run.catalog.epoch_tokens:,} = "
    return f"{epochs}{training.budget:,} tokens"


def _describe_ranks(run: Run) -> list[str]:
    config, training, ranks, choices = run.config, run.config.training, run.ranks, run.choices
    compiled = "compiled" if choices.compiled else "not compiled"
    return [
        f"ranks       {ranks.world_size} ({ranks.device.type}): {run.mesh}, compute in {training.precision} "
        f"({choices.precision_reason})",
        f"blocks      {compiled}, recompute {_describe_recompute(config)}, linear "
        f"layers in {_describe_products(run)}; weights kept in {training.weight_dtype}, "
        f"optimizer states: {config.optimizer.states}",
        *_describe_offload(run),
        *_describe_average(training),
    ]


def _describe_products(run: Run) -> str:
    """Return the dtypes of the products of linear layers."""
    training, architecture = run.config.training, run.start.architecture
    if not training.float8:
        return training.precision
    has_experts = getattr(architecture, "experts", None) is not None
    return f"float8, experts in {training.precision}" if has_experts else "float8"


def _describe_offload(run: Run) -> list[str]:
    reason = run.choices.offload_reason
    return [] if reason is None else [f"offload     {str(run.config.parallel.cpu_offload).lower()} ({reason})"]


def _describe_average(training: TrainingConfig) -> list[str]:
    if training.ema_decay is None:
        return []
    evaluated = "evaluations use it" if training.eval_ema else "evaluations use the weights"
    return [f"average     of the weights in {training.ema_dtype}, decay {training.ema_decay:g} per step; {evaluated}"]


def _flops_per_token(run: Run) -> tuple[float, float]:
    """Return the FLOPs per token that count all pairs of positions, and causal pairs."""
    architecture = run.start.architecture
    learning = trainable.learning(architecture, run.config.training, run.config.adapter)
    all_pairs, causal_pairs = (
        flops_per_token(architecture, run.plan.sequence_length, halved, learning) for halved in (False, True)
    )
    return all_pairs, causal_pairs


def describe_outputs(config: RunConfig) -> list[str]:
    """Return lines about what the run writes, and where its numbers can be seen."""
    folder, logging = config.run_folder, config.logging
    lines = [f"run folder  {folder}: {LOG_FILE}, {METRICS_FILE}, {CONFIG_FILE}, checkpoints"]
    if logging.tensorboard:
        lines.append(f"tensorboard tensorboard --logdir {shlex.quote(folder)}")
    if logging.trackers:
        lines.append(f"trackers    {', '.join(logging.trackers)}; project {logging.project}")
    if logging.metrics_port is not None:
        lines.append(f"prometheus  http://{socket.gethostname()}:{logging.metrics_port}/metrics")
    if config.callbacks:
        lines.append(f"callbacks   {', '.join(config.callbacks)}")
    return lines


def _describe_recompute(config: RunConfig) -> str:
    every = config.parallel.recompute_every
    return config.parallel.recompute + (f" in every {every}th block" if every > 1 else "")


def describe_saving(config: RunConfig, model: ModelParts) -> str:
    """Return when checkpoints are written, and the host memory that this takes.

    Args:
        config: of the run.
        model: this rank's part.
    """
    sizes: list[int] = []
    average, tables = config.training.average_bytes, model.table_names
    for name, parameter in model.named_parameters():
        held, of_trained = local_part(parameter), [float(average)] * bool(average)
        if parameter.requires_grad:
            of_trained += state_itemsizes(name, parameter.shape, config.optimizer, tables)
        sizes += [int(held.numel() * size) for size in (held.dtype.itemsize, *of_trained * parameter.requires_grad)]
    how = "training waits for each"
    if config.checkpoint.asynchronous:
        on_node = plan_slabs(sizes).total_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = free_memory()
        has = f"{_size(total_memory())} in all" if free is None else f"{_size(free)} free"
        how = f"copied to {_size(on_node)} of host memory on this node, which has {has}"
    interval = config.checkpoint.save_interval
    every = "every epoch" if isinstance(interval, str) else f"every {interval:,} steps"
    return f"checkpoints {every}, {_size(sum(sizes))} of this rank; {how}"


def _size(num_bytes: int) -> str:
    return tqdm.format_sizeof(num_bytes, "B")


def describe_data(data: DataConfig, catalog: Catalog, order: SampleOrder, last_sample: int) -> list[str]:
    """Return lines about sources, stages, caps and packing of a run that ends after ``last_sample`` samples."""
    length, curriculum = order.sequence_length, order.curriculum
    given = order.cursors(last_sample)
    sources = ", ".join(
        f"{source.name} ({human(source.stop - source.start)} tokens, "
        f"{given[source.name] / source.num_chunks:.3g} epochs)"
        for source in catalog.train
    )
    lines = [f"data        {sources} until the end; validation: {', '.join(catalog.validation) or 'none'}"]
    begin = 0
    for number, stage in enumerate(curriculum.stages, 1):
        mixture = ", ".join(f"{source.name} {source.weight:g}" for source in stage.sources)
        until = "the end" if stage.stop is None else f"{stage.stop * length:,} tokens"
        reached = "" if begin < last_sample else " (not reached)"
        if len(curriculum.stages) == 1 and stage.stop is None:
            lines.append(f"mixture     {mixture}")
        else:
            lines.append(f"stage {number:<5} from {begin * length:,} to {until}{reached}: {mixture}")
        begin = stage.stop or 0
    for phase in curriculum.phases:
        gone = [source.name for source in curriculum.stages[phase.stage].sources if source not in phase.sources]
        if gone and phase.start < last_sample:
            left = ", ".join(source.name for source in phase.sources)
            lines.append(
                f"caps        from {phase.start * length:,} tokens on {', '.join(gone)} reached the cap; "
                f"continuing with {left}"
            )
    return [*lines, _describe_packing(data, catalog)]


def _describe_packing(data: DataConfig, catalog: Catalog) -> str:
    # A group costs about a millisecond; all groups would need a pass over the whole index. Sources vary along their
    # length, so the sampled groups are spread evenly.
    counts = [count_truncated(source, groups=_spread_groups(source)) for source in catalog.train]
    fitting = sum(count.documents - count.longer for count in counts)
    cut = sum(count.truncated for count in counts) / max(1, fitting)
    lost = sum(count.tokens_dropped for count in counts)
    return (
        f"packing     {data.packing}, {data.shuffle} shuffled: cuts {cut:.1%} of the documents that fit in a chunk "
        f"(estimated from up to {_GROUPS_COUNTED * CHUNKS_PER_GROUP:,} chunks of each source); leaves out the "
        f"{lost:,} tokens after the last chunk of each source"
    )


def _spread_groups(source: Source) -> list[int]:
    """Return the numbers of some groups of chunks, evenly spread over ``source``."""
    groups = -(-source.num_chunks // CHUNKS_PER_GROUP)
    count = min(groups, _GROUPS_COUNTED)
    return [number * groups // count for number in range(count)]


def notes(config: RunConfig, catalog: Catalog, assets: HfAssets) -> list[str]:
    """Return notes about settings that may be mistakes."""
    training, lines = config.training, launcher_notes()
    assert assets.config is not None
    max_positions: int | None = assets.config.get("max_position_embeddings")
    if catalog.unchecked:
        lines.append(
            f"note: no sidecar next to {', '.join(dict.fromkeys(catalog.unchecked))}: its tokenizer is not "
            "checked, and only a sample of its token ids is (tools/show_dataset.py --verify checks all)"
        )
    lines += tokenizer_notes(catalog, frame_of_files(assets.files), assets.tokenizer_sha256 is not None)
    if max_positions is not None and training.sequence_length > max_positions:
        lines.append(
            f"note: training.sequence_length {training.sequence_length:,} is beyond the model's "
            f"max_position_embeddings {max_positions:,}; the exported config.json still has {max_positions:,}, which "
            "model.rope would raise"
        )
    return lines


def data_notes(catalog: Catalog, order: SampleOrder, last_sample: int) -> list[str]:
    """Return notes about the datasets of a run that ends after ``last_sample`` samples."""
    lines, given = [f"note: {remark}" for remark in catalog.remarks], order.cursors(last_sample)
    for source in catalog.train:
        epochs = given[source.name] / source.num_chunks
        if epochs > _MANY_EPOCHS:
            lines.append(
                f"note: training source '{source.name}' is read {epochs:.1f} times until the end of the run; from "
                f"about {_MANY_EPOCHS} epochs on, repeated data helps less and less (Muennighoff et al., 2023, "
                "https://arxiv.org/abs/2305.16264): add data, lower its weight, or cap it with max_epochs"
            )
    return lines
