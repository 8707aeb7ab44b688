"""Find settings without effect, because of other settings or of the machine; they are refused, or reported at the
start.

One table defines when the value of each setting matters. A value that is not the default and does not matter is
reported. Every new setting needs an entry, which a test checks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .budget import as_written
from .settings import CheckpointConfig, RunConfig, SourceConfig


@dataclass(frozen=True)
class Situation:
    """The facts that decide whether a setting matters."""

    config: RunConfig
    same_weights: bool = False
    """True if several ranks hold the same parameters or constants."""
    reduces: bool = False
    """True if gradients are summed over ranks."""
    num_micro_batches: int = 1
    """Micro-batches in a step of one rank."""
    has_router_losses: bool = True
    """False if the model has no experts, or is computed by transformers."""
    has_selection_biases: bool = True
    """False if no router chooses experts with a bias that may change."""
    device: str = "cpu"
    resumed: Mapping[str, Any] | None = None
    """Configuration of the checkpoint that the run continues from."""
    step: int = 0
    """From which the run continues."""
    epoch_tokens: int | None = None
    """Tokens in one epoch of the mixture; None if they are not known."""
    source_tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Tokens in one epoch of each source."""

    @property
    def steps(self) -> int:
        """Return the number of steps of the whole run."""
        training = self.config.training
        return math.ceil(training.budget / training.tokens_per_step)

    @property
    def evaluates(self) -> bool:
        """Return whether there is a validation set."""
        data = self.config.data
        held_out = any(source.validation_fraction > 0 for mixture in _mixtures(self.config) for source in mixture)
        return bool(data.validation) or data.validation_fraction > 0 or held_out


@dataclass(frozen=True)
class Rule:
    """The condition under which some settings have an effect."""

    keys: tuple[str, ...]
    matters: Callable[[Situation], bool]
    because: str
    """Reason why they have no effect otherwise; for refused settings, with the remedy."""
    refused: bool = False


def _fits(key: str) -> Callable[[Situation], bool]:
    """Return a condition: the run has enough steps to reach the interval ``training.key``."""
    return lambda now: _reached(getattr(now.config.training, key), now)


_MUON = ("momentum", "nesterov", "scale", "newton_schulz_steps", "newton_schulz_dtype", "exclude")

RULES = (
    Rule(
        ("training.initial_loss_scale", "training.loss_scale_window", "training.min_loss_scale"),
        lambda now: now.config.training.precision in ("fp16", "auto"),
        "only training.precision fp16 scales the loss; remove it, or set training.precision to fp16",
        refused=True,
    ),
    Rule(
        ("model.rope.factor",),
        lambda now: now.config.model.rope.kind is not None,
        "model.rope.kind is null, so positions are not scaled; set it to yarn, or remove factor",
        refused=True,
    ),
    Rule(
        ("model.rope.theta",),
        lambda now: now.config.model.rope.kind == "default",
        "model.rope.kind is not default, and scalings keep the base of the model; set it to default, or remove theta",
        refused=True,
    ),
    Rule(
        (
            *("adapter.rank", "adapter.alpha", "adapter.dropout", "adapter.targets", "adapter.rslora", "adapter.dora"),
            *("adapter.modules_to_save", "adapter.export", "adapter.quantize_base", "adapter.initialize_from"),
        ),
        lambda now: now.config.adapter.kind is not None,
        "adapter.kind is null, so there is no adapter; set it to lora, or remove the setting",
        refused=True,
    ),
    Rule(
        ("adapter.export",),
        lambda now: now.config.checkpoint.export_hf,
        "checkpoint.export_hf is false, so nothing is exported; set it to true, or remove adapter.export",
        refused=True,
    ),
    Rule(
        ("optimizer.decay_tokens", "optimizer.decay_steps", "optimizer.decay_ratio", "optimizer.decay_shape"),
        lambda now: now.config.optimizer.schedule == "wsd",
        "only optimizer.schedule wsd uses it; remove it or set optimizer.schedule to wsd",
        refused=True,
    ),
    Rule(
        tuple(f"optimizer.muon.{key}" for key in _MUON),
        lambda now: now.config.optimizer.name == "muon",
        "only optimizer.name muon uses it; remove it or set optimizer.name to muon",
        refused=True,
    ),
    Rule(
        ("optimizer.lion.beta1", "optimizer.lion.beta2"),
        lambda now: now.config.optimizer.name == "lion",
        "only optimizer.name lion uses it; remove it or set optimizer.name to lion",
        refused=True,
    ),
    Rule(
        ("optimizer.options",),
        lambda now: "." in now.config.optimizer.name,
        "only an optimizer with an import path gets options; remove them, or name the class in optimizer.name",
        refused=True,
    ),
    Rule(
        ("optimizer.beta1", "optimizer.beta2", "optimizer.eps"),
        lambda now: now.config.optimizer.name in ("adamw", "adamw_8bit", "muon"),
        "only adamw, adamw_8bit and muon use it; lion has optimizer.lion, and a class with an import path "
        "optimizer.options",
        refused=True,
    ),
    Rule(
        ("optimizer.state_dtype",),
        lambda now: now.config.optimizer.has_state_dtype,
        "adamw_8bit has 8-bit states of matrices and fp32 ones of the rest, and a class with an import path chooses "
        "the dtype of its states; remove it",
        refused=True,
    ),
    Rule(
        ("training.loss_spike_action",),
        lambda now: now.config.training.loss_spike_zscore is not None,
        "training.loss_spike_zscore is null, so no step counts as a spike; set it to a number such as 10, or remove "
        "loss_spike_action",
        refused=True,
    ),
    Rule(
        ("training.early_stopping.min_delta", "training.early_stopping.metric"),
        lambda now: now.config.training.early_stopping.patience is not None,
        "training.early_stopping.patience is null, so the run does not stop early; set it, or remove the other",
        refused=True,
    ),
    Rule(
        ("training.early_stopping.patience",),
        lambda now: now.evaluates,
        "there is no validation set, so nothing is evaluated; set data.validation or data.validation_fraction",
        refused=True,
    ),
    Rule(
        ("training.early_stopping.patience",),
        lambda now: now.config.training.eval_interval != 0,
        "training.eval_interval is 0, so the run evaluates only at its end; set it to a number of steps",
        refused=True,
    ),
    Rule(
        ("checkpoint.push_to_hub",),
        lambda now: now.config.checkpoint.export_hf,
        "checkpoint.export_hf is false, so there is no export to upload; set it to true, or remove "
        "checkpoint.push_to_hub",
        refused=True,
    ),
    Rule(
        ("training.ema_dtype", "training.eval_ema", "checkpoint.export_ema"),
        lambda now: now.config.training.ema_decay is not None,
        "training.ema_decay is null, so there is no average; set it to a number such as 0.999, or remove this",
        refused=True,
    ),
    Rule(
        ("checkpoint.export_ema",),
        lambda now: (
            now.config.checkpoint.export_hf
            or now.config.checkpoint.export_best
            or now.config.checkpoint.model_folders != "off"
        ),
        "nothing is exported; set checkpoint.model_folders or checkpoint.export_hf",
    ),
    Rule(
        ("checkpoint.export_best",),
        lambda now: bool(now.config.checkpoint.keep_best),
        "checkpoint.keep_best is false, so the best checkpoint is not kept; set it to true, or remove "
        "checkpoint.export_best",
        refused=True,
    ),
    Rule(
        ("checkpoint.hub_private", "checkpoint.hub_message"),
        lambda now: now.config.checkpoint.push_to_hub is not None,
        "checkpoint.push_to_hub is null, so nothing is uploaded",
    ),
    Rule(
        ("logging.project", "logging.run_name", "logging.group", "logging.tags", "logging.offline"),
        lambda now: bool(now.config.logging.trackers),
        "logging.trackers is empty",
    ),
    Rule(
        ("logging.sample_tokens",),
        lambda now: bool(now.config.logging.sample_prompts),
        "logging.sample_prompts is empty",
    ),
    Rule(
        ("parallel.pipeline_schedule", "parallel.pipeline_stages_per_rank"),
        lambda now: now.config.parallel.pipeline > 1,
        "parallel.pipeline is 1; set it to 2 or more, or remove it",
        refused=True,
    ),
    Rule(
        ("training.rewind_steps", "training.max_rewinds"),
        lambda now: now.config.training.loss_spike_action == "rewind",
        "training.loss_spike_action is skip",
    ),
    Rule(
        (
            *("training.eval_interval", "training.eval_tokens", "training.eval_at_start", "checkpoint.keep_best"),
            *("logging.sample_prompts", "training.eval_ema", "checkpoint.export_best"),
        ),
        lambda now: now.evaluates,
        "there is no validation set; set data.validation or data.validation_fraction",
    ),
    Rule(("training.eval_interval",), _fits("eval_interval"), "the run has fewer steps; it evaluates only at the end"),
    Rule(("training.check_replicas_interval",), _fits("check_replicas_interval"), "the run has fewer steps"),
    Rule(
        ("logging.profile_steps",),
        lambda now: (now.config.logging.profile_steps or [0])[0] <= now.steps,
        "the run has fewer steps",
    ),
    Rule(
        ("logging.profile_steps",),
        lambda now: (now.config.logging.profile_steps or [0])[-1] > now.step,
        "the run continues after these steps",
    ),
    Rule(
        ("checkpoint.save_interval",),
        lambda now: _reached(now.config.checkpoint.save_interval, now),
        "the run has fewer steps; it saves only at the end",
    ),
    Rule(
        ("checkpoint.keep_every",),
        lambda now: _saves_a_multiple(now.config.checkpoint, now.steps),
        "no step of the run is a multiple of both it and checkpoint.save_interval",
    ),
    Rule(
        ("training.warmup_tokens", "training.warmup_steps", "training.warmup_ratio"),
        lambda now: now.config.training.warmup > now.config.training.tokens_per_step,
        "the first step is at least as long and ends the warm-up",
    ),
    Rule(
        ("optimizer.min_learning_rate", "optimizer.min_learning_rate_ratio"),
        lambda now: now.config.optimizer.schedule != "constant" or now.config.optimizer.schedule_start_tokens > 0,
        "optimizer.schedule constant stays at the peak",
    ),
    Rule(
        ("optimizer.schedule", "optimizer.min_learning_rate", "optimizer.min_learning_rate_ratio"),
        lambda now: _decays(now) or now.config.optimizer.schedule == "constant",
        "the warm-up fills the whole schedule; there is no decay",
    ),
    Rule(
        ("optimizer.schedule_start_tokens",),
        lambda now: now.config.optimizer.schedule != "constant" or now.config.training.warmup > 0,
        "optimizer.schedule constant without a warm-up has the same rate everywhere",
    ),
    Rule(("parallel.context_kind",), lambda now: now.config.parallel.context > 1, "parallel.context is 1"),
    Rule(
        ("parallel.recompute_every",),
        lambda now: now.config.parallel.recompute != "none",
        "parallel.recompute is none",
    ),
    Rule(
        ("data.weights", "data.train[].weight"),
        lambda now: any(len(mixture) > 1 for mixture in _mixtures(now.config)),
        "no mixture has more than one source",
    ),
    Rule(
        ("data.train[].loss_weight",),
        lambda now: len({source.loss_weight for mixture in _mixtures(now.config) for source in mixture}) > 1,
        "all sources have the same, and only their ratios matter",
    ),
    # The conditions below are known only when the run starts.
    Rule(
        ("training.initial_loss_scale", "training.loss_scale_window", "training.min_loss_scale"),
        lambda now: now.config.training.precision == "fp16",
        "training.precision auto did not choose fp16, which alone scales the loss",
    ),
    Rule(
        ("training.router_aux_loss_coef", "training.router_z_loss_coef"),
        lambda now: now.has_router_losses,
        "the model has no experts, or its modules are those of transformers, whose routers have no losses here",
    ),
    Rule(
        ("training.router_bias_update_rate",),
        lambda now: now.has_selection_biases,
        "no router of the model chooses experts with a bias that training may change",
    ),
    Rule(
        ("parallel.reduce_gradients",),
        lambda now: now.reduces and now.num_micro_batches > 1 and now.config.parallel.pipeline == 1,
        "it matters only with several ranks, several micro-batches in a step and no pipeline",
    ),
    Rule(
        ("parallel.reshard_after_forward", "parallel.prefetch_blocks"),
        lambda now: (
            now.reduces
            or now.config.parallel.cpu_offload is True
            or now.config.parallel.pipeline_schedule.endswith("zero_bubble")
        ),
        "no other rank has a part of this rank's parameters, so nothing is gathered",
    ),
    Rule(
        ("training.check_replicas_interval",),
        lambda now: now.same_weights,
        "no two ranks hold the same values",
    ),
    Rule(
        ("parallel.cpu_offload", "parallel.offload_activations"),
        lambda now: now.device != "cpu",
        "the run computes on the CPU, where everything is in host memory",
    ),
    Rule(
        ("logging.memory_snapshot",),
        lambda now: now.device != "cpu",
        "the run computes on the CPU, and snapshots are of a GPU's memory",
    ),
    Rule(
        ("allow_changes",),
        lambda now: now.resumed is not None,
        "the run starts fresh, not from a checkpoint",
    ),
    Rule(
        ("model.initialize_from",),
        lambda now: (
            now.resumed is None
            or now.config.adapter.kind is not None  # the base is read from there
            or now.resumed.get("model", {}).get("initialize_from", "") in _same_start(now)
        ),
        "the run continues from its checkpoint; to start from other weights use another run_folder",
    ),
    Rule(
        ("adapter.initialize_from",),
        lambda now: now.resumed is None or now.config.adapter.initialize_from == _former_adapter(now.resumed),
        "the run continues from its checkpoint; to start from another adapter use another run_folder",
    ),
)

ALWAYS = {
    *("run_folder", "seed", "resume", "device", "model.architecture", "model.rope.kind", "model.implementation"),
    "adapter.kind",
    *("model.dropout", "model.trust_remote_code", "model.tokenizer"),
    *("data.train", "data.stages", "data.shuffle", "data.packing", "data.validation", "data.validation_fraction"),
    *("data.attend_across_documents", "data.prefetch_steps", "data.train[].path", "data.train[].name"),
    *("data.stages[].train", "data.stages[].train_tokens"),
    *("training.train_tokens", "training.train_steps", "training.train_epochs"),
    *("training.sequence_length", "training.global_batch_size", "training.micro_batch_size"),
    *("training.trainable", "training.neftune_alpha", "training.z_loss", "training.ema_decay"),
    *("training.precision", "training.weight_dtype", "training.gc_interval"),
    *("training.max_skipped_steps", "training.loss_spike_zscore", "training.stop_after_minutes"),
    *("optimizer.name", "optimizer.learning_rate", "optimizer.weight_decay", "optimizer.clip_grad_norm"),
    *("optimizer.child_tuning", "optimizer.groups", "optimizer.groups[].match"),
    *("optimizer.groups[].learning_rate", "optimizer.groups[].weight_decay"),
    *("parallel.pipeline", "parallel.replicate", "parallel.shard", "parallel.context", "parallel.tensor"),
    *("parallel.recompute", "parallel.timeout_seconds"),
    *("checkpoint.asynchronous", "checkpoint.max_failed_saves", "checkpoint.keep_last", "checkpoint.export_hf"),
    "checkpoint.model_folders",
    *("logging.log_interval", "logging.stragglers", "logging.tensorboard", "logging.trackers", "logging.progress_bar"),
    *("logging.metrics_port", "callbacks"),
}
"""Settings that matter in every run; ``[]`` stands for an item of a list."""
ELSEWHERE = {
    "data.train[].max_epochs": "engine/config/effects.py: _caps of a source",
    "data.train[].max_tokens": "engine/config/effects.py: _caps of a source",
    "data.cache_folder": "engine/prepare_data.py: prepare_data notes that no source is text",
    **{
        f"data.train[].{key}": "engine/data/text_sources.py: text_sources refuses it for datasets"
        for key in ("column", "split", "subset", "validation_fraction", "preprocess")
    },
    "training.attention_backend": "engine/model/attention_choice.py: choose_attention refuses what cannot run",
    "training.compile": "engine/parallel/compile.py: enabled refuses what cannot be compiled",
    "training.float8": "engine/parallel/float8.py: enabled refuses a device without it",
    "training.fuse_projections": "engine/parallel/fused_projections.py: check refuses what it does not work with",
    "parallel.expert": "engine/parallel/expert.py: check refuses it for a model without experts",
    "parallel.async_tensor": "engine/parallel/build.py: check refuses it without tensor parallelism",
}
"""Settings that are refused or reported elsewhere, where the necessary facts are known."""


def refused(config: RunConfig) -> Iterator[str]:
    """Return one line for each value that has no effect and must be a mistake."""
    for rule, key, value in _without_effect(Situation(config), lambda rule: rule.refused):
        yield f"{key} is {_shown(value)}, but {rule.because}"


def without_effect(now: Situation) -> list[str]:
    """Return one line for each reason why values that are not at their defaults have no effect in this run."""
    by_reason: dict[str, list[str]] = {}
    for rule, key, value in _without_effect(now, lambda rule: not rule.refused):
        by_reason.setdefault(rule.because, []).append(f"{key} {_shown(value)}")
    lines = [
        f"{', '.join(settings)} {'has' if len(settings) == 1 else 'have'} no effect: {reason}"
        for reason, settings in by_reason.items()
    ]
    return [*lines, *_caps(now)]


def _without_effect(now: Situation, chosen: Callable[[Rule], bool]) -> Iterator[tuple[Rule, str, Any]]:
    reported = set()
    for rule in filter(chosen, RULES):
        if rule.matters(now):
            continue
        for key in rule.keys:
            for name, value, default in _values(as_written(now.config), key):
                if name not in reported and value != default:
                    reported.add(name)
                    yield rule, name, value


def _values(config: RunConfig, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, value, default) of ``key``; for a key of the items of ``data.train``, of each item."""
    if key.startswith("data.train[]."):
        leaf = key.rpartition(".")[2]
        for where, sources in _named_mixtures(config):
            for place, source in enumerate(sources):
                yield f"{where}[{place}].{leaf}", getattr(source, leaf), _default(SourceConfig, leaf)
        return
    section: Any = config
    *sections, leaf = key.split(".")
    for name in sections:
        section = getattr(section, name)
    yield key, getattr(section, leaf), _default(type(section), leaf)


def _default(kind: type, name: str) -> Any:
    [item] = [item for item in dataclasses.fields(kind) if item.name == name]
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default


def _shown(value: Any) -> str:
    return f"{value:,}" if type(value) is int else str(value).lower() if isinstance(value, bool) else str(value)


def _named_mixtures(config: RunConfig) -> list[tuple[str, list[SourceConfig]]]:
    stages = [(f"data.stages[{number}].train", stage.train) for number, stage in enumerate(config.data.stages)]
    return stages or [("data.train", config.data.train)]


def _mixtures(config: RunConfig) -> list[list[SourceConfig]]:
    return [sources for _, sources in _named_mixtures(config)]


def _decays(now: Situation) -> bool:
    training = now.config.training
    return training.warmup < training.budget - now.config.optimizer.schedule_start_tokens


def _reached(interval: int | str, now: Situation) -> bool:
    """Return whether the run is as long as ``interval``: a number of steps, or epoch."""
    if isinstance(interval, str):
        return now.epoch_tokens is None or now.config.training.budget >= now.epoch_tokens
    return interval <= now.steps


def _saves_a_multiple(checkpoint: CheckpointConfig, steps: int) -> bool:
    interval = checkpoint.save_interval
    return interval == "epoch" or math.lcm(max(1, checkpoint.keep_every), interval) <= steps


def _same_start(now: Situation) -> tuple[Any, ...]:
    """Return the values of ``model.initialize_from`` in a checkpoint that mean the same start: absent (old
    checkpoints), or equal.
    """
    return ("", now.config.model.initialize_from)


def _former_adapter(resumed: Mapping[str, Any]) -> str | None:
    return resumed.get("adapter", {}).get("initialize_from")


def _caps(now: Situation) -> Iterator[str]:
    """Yield a line for each source with ``max_epochs`` and ``max_tokens``, where only the smaller one applies."""
    for where, sources in _named_mixtures(now.config):
        for place, source in enumerate(sources):
            tokens = now.source_tokens.get(source.identity)
            if tokens is None or source.max_epochs is None or source.max_tokens is None:
                continue
            of_epochs = int(source.max_epochs * tokens)
            idle, other = (
                (f"max_tokens {source.max_tokens:,}", f"max_epochs {source.max_epochs:g}")
                if of_epochs <= source.max_tokens
                else (f"max_epochs {source.max_epochs:g}", f"max_tokens {source.max_tokens:,}")
            )
            yield f"{where}[{place}].{idle} has no effect: {other} is the smaller limit ({tokens:,} tokens an epoch)"
