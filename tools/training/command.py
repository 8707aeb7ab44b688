"""The steps of ``retemper train``: tokenize, choose the settings, check the memory, train, report."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...engine.config.budget import TRAIN, as_written, recorded_budget
from ...engine.config.files import read_config
from ...engine.config.options import Settings
from ...engine.config.parser import add_arguments, build_config
from ...engine.config.settings import AdapterConfig, DataConfig, ModelConfig, RunConfig
from ...engine.config.types_check import Problems, build
from ...engine.config.yaml_loader import dump_yaml
from ...engine.data.text_sources import cache_folder, is_text
from ...engine.early_stopping import is_stopped
from ...engine.errors import UserError
from ...engine.files.atomic import replace_file
from ...engine.files.outputs import write_report
from ...engine.model.architecture import Architecture
from ...engine.model.config_file import read_hf_config
from ...engine.model.wrappers import text_config_of
from ...engine.parallel import adapter, trainable
from ...engine.prepare_data import tokenizer_of
from ...engine.weights.checkpoint.manifest import read_manifest
from ...engine.weights.checkpoint.names import EXPORTS, PEFT_EXPORTS, complete_checkpoints, step_of
from ...engine.weights.conversion.export_run import export_folders
from ...engine.weights.conversion.model_folders import are_written
from ...engine.weights.hugging_face.config_source import architecture_source, configured_architecture
from .fitting import CHANGEABLE, Machine, find_machine, fit
from .launch import run_training, training_command
from .options import TrainOptions, named
from .recipe import QLORA_FORMAT, Situation, adapter_settings, choose_training, intervals
from .sources import SizedSource, Sizing, with_shares

RUN_FILE = "run.yaml"
REPORT_FILE = "report.html"
_MOST_EPOCHS = 4
"""Repeated text is nearly as good as new text up to here (Muennighoff et al., 2023, https://arxiv.org/abs/2305.16264)."""
_MANY_SOURCES = 8
_KEPT = {
    "training": ("sequence_length", "global_batch_size", "eval_interval", "eval_tokens"),
    "checkpoint": ("save_interval",),
    "logging": ("log_interval",),
}
"""Chosen settings on which the result of a run depends, or its records."""
_SET_BY_OPTIONS = {
    "model.initialize_from": "model",
    "data.train": "data",
    "data.stages": "data",
    "data.validation": "evaluate",
    "data.weights": "data",
    "adapter.rank": "lora_rank",
    "adapter.quantize_base": "qlora",
    "run_folder": "output",
}
"""Settings of a run that an option of this command sets."""
_DATA_OF_FILE = ("train", "stages", "weights", "validation", "validation_fraction")


@dataclass(frozen=True)
class TrainingPlan:
    """A run that is decided completely."""

    config: RunConfig
    tree: dict[str, Any]
    """The settings of the run that are not left at their defaults."""
    machine: Machine
    lines: list[str] = field(default_factory=list)
    """The plan in words."""

    @property
    def yaml(self) -> str:
        """The configuration file of the run."""
        return dump_yaml(self.tree)


def plan_training(
    options: TrainOptions, files: Sequence[str], settings: Sequence[str], dry: bool, gpu: str | None = None
) -> TrainingPlan:
    """Tokenize the texts, and decide all settings.

    Args:
        options: the request.
        files: command line with ``--config FILE`` only.
        settings: command line with the other options of engine/pretrain.py, which win over everything else.
        dry: estimate sizes instead of tokenizing.
        gpu: name of the GPU to plan for; None: those of this machine.

    Raises:
        UserError: the texts or settings are unusable, or the model does not fit.
    """
    options.check()
    for name, entry in options.evaluate:
        path = entry["path"] if isinstance(entry, dict) else entry
        if not is_text(path) and not os.path.exists(f"{path}.idx"):
            raise UserError(f"--evaluate {name}={path}: no such file, folder or dataset")
    _require_outside(options)
    merged = _given(options, files, settings)
    given = merged.tree
    fixed = {key for key in CHANGEABLE if _value(given, key) is not None}
    model = _model_settings(given["model"])
    try:
        architecture = configured_architecture(model)
    except UserError as error:
        raise UserError(str(error).replace("model.initialize_from", "--model")) from None
    ranks = options.ranks or (1 if options.qlora else None)  # a quantized base is on one rank
    machine = find_machine(ranks, gpu, given.get("device", "auto"))
    cache = cache_folder(DataConfig(cache_folder=given.get("data", {}).get("cache_folder")))
    data, replay = _sized(options, Sizing(tokenizer_of(model, "--data"), cache, options.validation, dry))
    shares = [share for _, share in options.replay]
    train = with_shares(data, list(zip(replay, shares, strict=True)))
    _fill(given, "data", {"train": train, **({"validation": dict(options.evaluate)} if options.evaluate else {})})
    sized = [*data, *replay]
    budget = _budget(options, given, data, replay)
    situation = Situation(
        train_tokens=budget,
        smallest_source=min(source.tokens for source in sized),
        all_tokens=sum(source.tokens for source in sized),
        longest_sequence=_longest_sequence(model),
        ranks=machine.ranks,
        on_gpu=machine.gpu is not None,
        evaluates=bool(given["data"].get("validation")) or any(one.entry.get("validation_fraction") for one in sized),
    )
    _keep_recorded(given, dry)
    if options.lora:
        given.update(adapter_settings(options.lora_rank, given, options.qlora))
    given["training"] = choose_training(situation, given.get("training", {}))
    save_interval, log_interval = intervals(given["training"], budget)
    _fill(given, "checkpoint", {"save_interval": save_interval, "export_hf": True})
    _fill(given, "logging", {"log_interval": log_interval})
    config = build_config(merged)
    try:
        adapter.check(architecture, config, machine.ranks)
    except UserError as error:
        raise UserError(f"--qlora: {error}" if options.qlora else str(error)) from None
    adapted = _with_adapter(config, given, architecture, machine.ranks)
    changes, memory = fit(config, architecture, machine, options.auto, fixed, adapted, _say)
    for section, keys in changes.items():
        given[section] = {**given.get(section, {}), **keys}
    config = build_config(merged) if changes else config
    lines = _describe(options, config, budget, data, replay, machine, memory, architecture.num_parameters)
    if config.adapter.kind is not None:
        lines.insert(1, _adapter_line(config, trainable.count(architecture, config.training, config.adapter)))
    return TrainingPlan(config, given, machine, lines)


def run_plan(plan: TrainingPlan) -> int:
    """Train as planned, and report the run; return the exit status."""
    folder = Path(plan.config.run_folder)
    if _is_finished(folder, plan.config):
        _require_same_run(folder, plan)
        if are_written(plan.config, complete_checkpoints(folder / "checkpoints")):
            _say(
                f"finished    {folder} has used its tokens, or has stopped early; to continue it raise --tokens or "
                "training.early_stopping.patience, else name another --output"
            )
            _report(folder)
            return 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / RUN_FILE, [plan.yaml.encode()])
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be written: {error.strerror}; name another --output"
        ) from None
    _say(f"settings    {folder / RUN_FILE}")
    status = run_training(training_command(folder / RUN_FILE, plan.machine.ranks))
    if status:
        return status
    if not _is_finished(folder, plan.config):
        _say(f"stopped before the end; the same command continues {folder}")
        return 0
    _report(folder)
    return 0


def _is_finished(folder: Path, config: RunConfig) -> bool:
    """Return whether a run has used its tokens or stopped early, and has exported its last checkpoint if it is to."""
    newest = _newest(folder)
    if newest is None:
        return False
    manifest = read_manifest(newest)
    budget = recorded_budget(asdict(as_written(config).training), manifest.config.get("training"))
    used_up = budget is not None and manifest.consumed_tokens >= budget
    if not used_up and not is_stopped(config.training.early_stopping, manifest.early_stopping):
        return False
    return all(export.is_dir() for export in export_folders(config, folder, step_of(newest)))


def _require_same_run(folder: Path, plan: TrainingPlan) -> None:
    """Refuse to report a finished run as one on other data, or with another adapter."""
    newest = _newest(folder)
    assert newest is not None
    adapter.require_same(read_manifest(newest).config, plan.config.adapter, newest)
    path = folder / RUN_FILE
    if path.is_file() and read_config(path).get("data", {}).get("train") != plan.tree["data"]["train"]:
        raise UserError(f"{folder} is finished, and was trained on other data ({path}); name another --output")


def _newest(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run."""
    checkpoints = complete_checkpoints(folder / "checkpoints")
    return checkpoints[-1] if checkpoints else None


def _report(folder: Path) -> None:
    from ..reports.run import read_run
    from ..reports.run_page import format_run, run_page

    run = read_run(folder)
    write_report("report", folder / REPORT_FILE, run_page(run))
    print(f"\n{format_run(run)}\n\nreport      {folder / REPORT_FILE}")
    if adapters := sorted((folder / PEFT_EXPORTS).glob("step-*")):
        print(f"adapter     {adapters[-1]}, for PEFT")
    if exports := sorted((folder / EXPORTS).glob("step-*")):
        print(f"model       {exports[-1]}")
        print(f"try it      retemper generate --model {exports[-1]} --prompt '...'", flush=True)


def _given(options: TrainOptions, files: Sequence[str], settings: Sequence[str]) -> Settings:
    """Return the settings that the user has chosen."""
    merged = Settings()
    add_arguments(merged, files)
    data = merged.tree.get("data", {})
    for name in _DATA_OF_FILE:  # of the data that the file was written for
        data.pop(name, None)
    merged.tree["model"] = {**merged.tree.get("model", {}), "initialize_from": options.model}
    if options.output is not None or "run_folder" not in merged.tree:
        merged.tree = {"run_folder": options.run_folder, **merged.tree}
        merged.tree["run_folder"] = options.run_folder
    training = merged.tree.setdefault("training", {})
    if options.tokens is not None or options.epochs is not None:
        for key in TRAIN.keys:
            training.pop(key, None)
    if options.tokens is not None:
        training["train_tokens"] = options.tokens
    before = dict(training)
    chosen = {key: _value(merged.tree, key) for key in _SET_BY_OPTIONS}
    add_arguments(merged, settings)
    for key, option in _SET_BY_OPTIONS.items():
        if getattr(options, option) not in (None, (), False) and _value(merged.tree, key) != chosen[key]:
            merged.found.add(f"--{key} and --{option.replace('_', '-')} set the same; remove one of them")
    for option in [name for name in ("tokens", "epochs") if getattr(options, name) is not None]:
        for key in TRAIN.keys:
            if _value(merged.tree, f"training.{key}") not in (None, before.get(key)):
                merged.found.add(f"--training.{key} and --{option} set the same; remove one of them")
    merged.found.raise_if_any()
    return merged


def _require_outside(options: TrainOptions) -> None:
    """Refuse a run folder inside a folder of text: the next start would read the files of the run."""
    output = Path(options.run_folder).resolve()
    for entry in (*options.data, *(entry for entry, _ in options.replay)):
        folder = Path(entry["path"]).resolve()
        if folder.is_dir() and output.is_relative_to(folder):
            raise UserError(f"--output {options.run_folder}: inside the text {entry['path']}; name a folder elsewhere")


def _value(tree: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.rpartition(".")
    return (tree.get(section, {}) if section else tree).get(name)


def _model_settings(tree: dict[str, Any]) -> ModelConfig:
    found = Problems()
    settings: ModelConfig = build(tree, ModelConfig, "model", found, [])
    found.raise_if_any()
    return settings


def _sized(options: TrainOptions, sizing: Sizing) -> tuple[list[SizedSource], list[SizedSource]]:
    """Return the sources of ``--data`` and of ``--replay`` with names and sizes."""
    sources = named([*options.data, *(entry for entry, _ in options.replay)])
    count = len(options.data)
    data = [sizing.sized("--data", entry) for entry in sources[:count]]
    return data, [sizing.sized("--replay", entry) for entry in sources[count:]]


def _keep_recorded(given: dict[str, Any], dry: bool) -> None:
    """Keep what an earlier start of this run has chosen, unless it is given: a resume on another machine is exact."""
    path = Path(given["run_folder"], RUN_FILE)
    if dry or not path.is_file() or _newest(path.parent) is None:
        return
    recorded = read_config(path)
    trained = recorded.get("adapter", {})
    if trained.get("kind") is not None and _value(given, "adapter.kind") is None:
        _fill(given, "adapter", trained)
        _fill(given, "optimizer", recorded.get("optimizer", {}))
    for section, keys in _KEPT.items():
        found = recorded.get(section, {})
        _fill(given, section, {key: found[key] for key in keys if key in found})


def _fill(tree: dict[str, Any], section: str, defaults: Mapping[str, Any]) -> None:
    """Set the keys of ``section`` that are not set."""
    tree[section] = {**defaults, **tree.get(section, {})}


def _with_adapter(
    config: RunConfig, given: Mapping[str, Any], architecture: Architecture, ranks: int
) -> list[RunConfig]:
    """Return the run with an adapter instead of all parameters, and with one on a base in 4 bits if it can run.

    What the user has said stays.
    """
    settings, found = given.get("adapter", {}), []
    if config.training.trainable != "all" or settings.get("kind", "lora") is None:
        return []
    if "kind" not in settings:
        chosen = adapter_settings(None, given)
        optimizer = replace(config.optimizer, learning_rate=chosen["optimizer"]["learning_rate"])
        config = replace(config, adapter=AdapterConfig(**chosen["adapter"]), optimizer=optimizer)
        found.append(config)
    if "quantize_base" in settings or config.training.compile == "on":
        return found
    quantized = replace(config, adapter=replace(config.adapter, quantize_base=QLORA_FORMAT))
    with suppress(UserError):
        adapter.check(architecture, quantized, ranks)
        found.append(quantized)
    return found


def _budget(
    options: TrainOptions, given: Mapping[str, Any], data: Sequence[SizedSource], replay: Sequence[SizedSource]
) -> int:
    """Return the tokens to train on: as given, or ``--epochs`` over the data plus the replay between it.

    Those of ``training.train_epochs``, which is over data and replay, may differ a little from what the run counts.
    """
    training = given.get("training", {})
    tokens, steps, epochs = (training.get(key) for key in TRAIN.keys)
    if tokens is not None:
        return int(tokens)
    if epochs is not None:
        return max(1, round(epochs * sum(source.tokens for source in (*data, *replay))))
    if steps is not None:
        batch = [training.get(key) for key in ("global_batch_size", "sequence_length")]
        if None in batch:
            raise UserError(
                f"training.train_steps is {steps}, but this command chooses the size of a step from the number of "
                "tokens; use --tokens or --epochs, or add --training.global_batch_size and --training.sequence_length"
            )
        return int(steps * batch[0] * batch[1])
    return max(1, round((options.epochs or 1.0) * sum(source.tokens for source in data) / (1 - options.replay_share)))


def _longest_sequence(model: ModelConfig) -> int | None:
    config, _ = text_config_of(read_hf_config(architecture_source(model)))
    value = config.get("max_position_embeddings")
    return value if type(value) is int and value > 0 else None


def _describe(
    options: TrainOptions,
    config: RunConfig,
    budget: int,
    data: Sequence[SizedSource],
    replay: Sequence[SizedSource],
    machine: Machine,
    memory: str,
    num_parameters: int,
) -> list[str]:
    training = config.training
    per_step = training.global_batch_size * training.sequence_length
    weights = {source.identity: source.weight for source in config.data.train}
    total = sum(weights.values())
    lines = [f"model       {options.model}: {num_parameters:,} parameters"]
    for kind, sources in (("data", data), ("replay", replay)):
        for source in sources:
            share = weights.get(source.entry["name"], 0.0) / total
            epochs = share * budget / source.tokens
            held_out = f"; {source.validation_documents:,} documents held out" if source.validation_documents else ""
            lines.append(
                f"{kind:<12}{source.entry['name']}: {source.shown_size}{held_out}; {share:.0%} of the run, "
                f"{epochs:.2f} epochs"
            )
            if epochs > _MOST_EPOCHS:
                lines.append(
                    f"            note: more than {_MOST_EPOCHS} epochs help little; add text or lower --tokens"
                )
    if not any(source.entry.get("validation_fraction") for source in (*data, *replay)) and not options.evaluate:
        lines.append(f"{'':12}note: nothing is held out, so nothing is evaluated; name text with --evaluate")
    if any(source.estimated for source in (*data, *replay)):
        lines.append(f"{'':12}note: sizes and held-out parts may differ when the text is tokenized")
    if len(data) > _MANY_SOURCES:
        lines.append(f"{'':12}note: each path of --data is a source; quote a pattern to make its files one source")
    if not replay:
        measured = "not prevented" if options.evaluate else "neither prevented nor measured"
        lines.append(f"{'':12}note: without --replay, what the model forgets is {measured}")
    lines += [
        f"budget      {budget:,} tokens = {-(-budget // per_step):,} steps of "
        f"{training.global_batch_size:,} x {training.sequence_length:,} tokens; learning rate "
        f"{config.optimizer.learning_rate:g}",
        f"machine     {machine.shown}",
        f"memory      {memory}",
        f"run folder  {config.run_folder}",
    ]
    return lines


def _adapter_line(config: RunConfig, num_trained: int) -> str:
    adapter = config.adapter
    layers = "all linear layers" if adapter.targets == ["*"] else ", ".join(adapter.targets)
    base = "" if adapter.quantize_base == "none" else f", its matrices in {adapter.quantize_base}"
    return (
        f"adapter     LoRA of rank {adapter.rank}, alpha {adapter.alpha:g}, on {layers}: {num_trained:,} parameters "
        f"learn; the model itself is frozen{base}"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
