"""Every setting of a run, once: typed, documented, and checked before anything is written.

A run is described by one YAML file whose keys are the fields below; every key can be overridden on the command line
(``--optimizer.learning_rate 3e-5``). ``jsonargparse`` does YAML, command line and types; this module adds a strict YAML
reader (duplicate keys refused, ``1e-5`` is a number, ``12:30`` is text), hints for misspelt keys, and the arithmetic
that does not need to know the machine. What depends on the number of ranks is checked in :mod:`retemper.engine.budget`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from .errors import UserError


@dataclass(frozen=True)
class SourceConfig:
    """One training dataset of the blend."""

    path: str
    """Prefix of the dataset: ``{path}.bin`` and ``{path}.idx``, as written by tools/preprocess.py or Megatron-LM."""
    weight: float = 1.0
    """Share of the training tokens that come from this source, relative to the sum of all weights."""
    name: str | None = None
    """Name in logs, and the identity that keeps the source's place when the blend changes. Default: the prefix's last
    component."""

    @property
    def identity(self) -> str:
        """The name that stands for this source in logs, checkpoints and the key of its sample order."""
        return self.name if self.name is not None else Path(self.path).name


@dataclass(frozen=True)
class DataConfig:
    """What is read."""

    train: list[SourceConfig]
    """Weighted datasets to train on."""
    validation: dict[str, str] = field(default_factory=dict)
    """Named validation datasets: name -> prefix."""
    validation_fraction: float = 0.0
    """Share of each training source's last documents that is held out and evaluated as the set ``held_out``."""
    attend_across_documents: bool = False
    """Let packed documents see each other, and predict a document's first token from its neighbour. Off: attention and
    positions restart at every document, and targets that would cross a boundary are masked."""
    prefetch_steps: int = 2
    """Global batches that a background thread prepares ahead of the step."""


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and which weights it starts from."""

    initialize_from: str | None = None
    """Checkpoint folder whose weights the run starts from (made by checkpoint_convert/hf_to_dcp.py, or by a former
    run). Null: random initialization from ``architecture``."""
    architecture: dict | str | None = None
    """Hugging Face ``config.json``: its keys written here, or the path of the file or its folder. Null: the one kept in
    ``initialize_from``."""
    tokenizer: str | None = None
    """Hugging Face folder with the tokenizer that the datasets must have been made with, and that exports carry. Null:
    the one kept in ``initialize_from``, if any."""


@dataclass(frozen=True)
class TrainingConfig:
    """The token budget and the shape of a step. The clock of a run is tokens; steps are derived."""

    train_tokens: int
    """Tokens to train on in total; the last step is always a whole one."""
    warmup_tokens: int = 0
    """Tokens over which the learning rate rises linearly from zero to its peak."""
    sequence_length: int = 1024
    """Tokens in one sample."""
    global_batch_size: int = 32
    """Samples in one optimizer step, over all ranks and all micro-batches."""
    micro_batch_size: int = 1
    """Samples that one rank runs forward and backward at a time. Changes memory and speed, never the result's
    meaning."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype. Master weights, optimizer states and gradient reduction are fp32 in both."""
    eval_interval: int = 0
    """Steps between evaluations of the validation sets; 0 evaluates only at the end."""
    eval_tokens: int = 1_000_000
    """At most this many tokens of each validation set are evaluated (the same ones each time)."""
    eval_at_start: bool = False
    """Evaluate once before the first step of a fresh run."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    learning_rate: float = 5e-5
    """Peak learning rate."""
    min_learning_rate: float = 5e-6
    """Learning rate at the end of the decay."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after warm-up: cosine or linear down to the minimum at ``train_tokens``; wsd stays at the peak and falls
    linearly over the last ``decay_tokens``; constant stays at the peak."""
    decay_tokens: int | None = None
    """Length of the wsd schedule's decay. Null: a tenth of ``train_tokens``."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases have none."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """AdamW's denominator term."""
    clip_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks are laid out: replicate x shard = number of ranks."""

    replicate: int = 1
    """Copies of the sharded model (hybrid sharding when > 1)."""
    shard: int | Literal["auto"] = "auto"
    """Ranks over which parameters, gradients and states are sharded (FSDP2). auto: what the copies leave."""
    reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward pass: less memory, one more all-gather in the backward."""
    recompute: Literal["none", "full"] = "none"
    """full: keep only each block's input and recompute the block in the backward pass."""
    timeout_seconds: int = 600
    """A collective that waits longer than this ends the run."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    save_interval: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep_last: int = 3
    """Newest checkpoints that are kept."""
    keep_best: bool = True
    """With validation sets: also save and keep the checkpoint with the lowest loss of the first validation set."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is reported."""

    log_interval: int = 1
    """Steps between console lines and metric records."""
    tensorboard: bool = True
    """Write TensorBoard events under ``{run_folder}/tensorboard``."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    run_folder: str
    """Folder of checkpoints, metrics, TensorBoard events and the resolved config."""
    data: DataConfig
    training: TrainingConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    seed: int = 1234
    """Seed of the sample order and of random initialization."""
    resume: str = "auto"
    """auto: continue from the newest complete checkpoint in ``run_folder``, or start fresh when there is none. none:
    start fresh, refused where checkpoints exist. Anything else: path of the checkpoint to continue from."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA where there is a GPU, else CPU."""


# --------------------------------------------------------------------------------------------------------------------
# Reading


class _StrictLoader(yaml.SafeLoader):
    """YAML without the 1.1 traps: duplicate keys are an error, ``1e-5`` is a float, ``12:30`` and ``no`` are text."""

    yaml_implicit_resolvers: dict[str, list] = {}  # noqa: RUF012 (PyYAML's own class attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise UserError(f"line {key_node.start_mark.line + 1}: {key} cannot be a key; a key is a word")
            if key in seen:
                raise UserError(f"duplicate key '{key}' in line {key_node.start_mark.line + 1}: keep one of the two")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _StrictDumper(yaml.SafeDumper):
    """Quotes text that would be no text to a YAML 1.1 reader or to ours (``1e-5``)."""


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
):
    for _class in (_StrictLoader, _StrictDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value.replace("_", "")))


def load_yaml(text: str) -> Any:
    """Parse YAML text strictly; raises :class:`UserError` for duplicate keys and ``yaml.YAMLError`` for bad syntax."""
    return yaml.load(text, Loader=_StrictLoader)


def _dump(content: Any) -> str:
    return yaml.dump(content, Dumper=_StrictDumper, sort_keys=False)


jsonargparse.set_loader("strict_yaml", load_yaml, exceptions=(yaml.YAMLError,))
jsonargparse.set_dumper("strict_yaml", _dump)
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of ``engine/pretrain.py``: ``--config FILE`` plus one option for every field of :class:`RunConfig`."""
    parser = jsonargparse.ArgumentParser(
        prog="pretrain.py",
        description="Continue the pretraining of a language model. Describe the run in a YAML file; override on the "
        "command line.",
        parser_mode="strict_yaml",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file that describes the run")
    parser.add_class_arguments(RunConfig)
    return parser


def parse_config(arguments: Sequence[str] | None = None) -> RunConfig:
    """Read a run's configuration from the command line (default ``sys.argv[1:]``) and the YAML files that it names.

    Raises:
        UserError: unknown or duplicate keys, wrong types, missing values or impossible arithmetic, in one line.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    arguments = list(_checked(arguments))
    parser = build_parser()
    try:
        config = parser.instantiate(parser.parse_args(arguments))
    except (ArgumentError, jsonargparse.ArgumentError) as error:
        raise UserError(_explain(str(error))) from None
    run = RunConfig(**{item.name: config[item.name] for item in dataclasses.fields(RunConfig)})
    validate(run)
    return run


def _checked(arguments: Sequence[str]) -> Iterator[str]:
    """``arguments`` with the files and lists in them read, checked and written out in full.

    In full, because the parser would fill what an item of a list leaves out from the item that stood there before, in
    a former file. What is no option at all is left to the parser.

    Raises:
        UserError: an unreadable file, bad YAML, duplicate or unknown keys, wrong types.
    """
    hints = dict(_known_keys())
    dictionaries: dict[str, Any] = {name: None for name, hint in hints.items() if _is_dictionary(hint)}
    waiting = list(reversed(arguments))
    while waiting:
        argument = waiting.pop()
        option, equals, value = argument.removeprefix("--").partition("=")
        key = option.removesuffix("+")  # --data.train+ {path: ...} appends one item
        owner, _, entry = key.rpartition(".")  # --model.architecture.vocab_size 1000 sets one entry
        known = key == "config" or key in hints or owner in dictionaries
        if not argument.startswith("--") or not known or not (equals or waiting):
            yield argument
            continue
        value = value if equals else waiting.pop()
        if key == "config":
            run = _checked_file(Path(value))
            for name in dictionaries:
                section, leaf = name.split(".")
                dictionaries[name] = run.get(section, {}).get(leaf, dictionaries[name])
            value = _dump(_complete(run, RunConfig))
        elif owner in dictionaries:
            kind = (*get_args(hints[owner]), Any)[1] if get_origin(hints[owner]) is dict else Any
            former = dictionaries[owner] if isinstance(dictionaries[owner], dict) else {}
            dictionaries[owner] = {**former, entry: value if kind is str else _checked_value(value, kind, key)}
            option, value = owner, _dump(dictionaries[owner])
        else:
            content: Any = value  # text is taken as it is, all else is YAML
            if not _accepts(value, hints[key]) or _is_dictionary(hints[key]):
                content = _checked_value(value, hints[key], key, append=option != key)
            if key in dictionaries:
                dictionaries[key] = content
            value = _dump(_complete(content, hints[key])) if isinstance(content, list) else value
        yield f"--{option}={value}"


def _is_dictionary(hint: Any) -> bool:
    """Whether a key of this type may hold entries of the user's choice."""
    return _accepts({}, hint) and not dataclasses.is_dataclass(hint)


def _checked_file(path: Path) -> dict:
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not a UTF-8 text file") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found {_show(content)}")
    for problem in _problems(content, RunConfig, ""):
        raise UserError(f"{path}: {problem}")
    return content


def _checked_value(text: str, hint: Any, key: str, append: bool = False) -> Any:
    try:
        content = load_yaml(text)
    except UserError as error:
        raise UserError(f"--{key}: {error}") from None
    except yaml.YAMLError:
        content = text
    if append and not isinstance(content, list):
        content = [content]
    for problem in _problems(content, hint, key):
        raise UserError(problem)
    return content


def _complete(value: Any, hint: Any) -> Any:
    """``value`` with every dataclass in a list given all its fields."""
    if isinstance(value, dict) and dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return {key: _complete(item, hints[key]) for key, item in value.items()}
    if isinstance(value, list) and dataclasses.is_dataclass(kind := (*get_args(hint), None)[0]):
        return [to_dict(kind(**item)) for item in value]  # type: ignore[operator]
    return value


def _problems(value: Any, hint: Any, name: str) -> Iterator[str]:
    """What is wrong with the plain ``value`` of the key ``name`` that is declared as ``hint``, one line for each."""
    if isinstance(value, dict) and dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        for key, item in value.items():
            full = f"{name}.{key}" if name else str(key)
            if key in hints:
                yield from _problems(item, hints[key], full)
            else:
                yield f"unknown key '{full}'{_did_you_mean(full, section=isinstance(item, dict))}"
    elif isinstance(value, list) and get_origin(hint) is list:
        [kind] = get_args(hint)
        for position, item in enumerate(value):
            full = f"{name}[{position}]"
            yield from _problems(item, kind, full)
            if isinstance(item, dict) and dataclasses.is_dataclass(kind):
                for missing in sorted(_required(kind) - item.keys()):
                    yield f"{full}.{missing} is missing; every item of {name} needs it"
    elif isinstance(value, dict) and get_origin(hint) is dict:
        key_kind, kind = get_args(hint)
        for key, item in value.items():
            yield from _problems(key, key_kind, f"a name in {name}")
            yield from _problems(item, kind, f"{name}.{key}")
    elif not _accepts(value, hint):
        whole = isinstance(value, float) and value.is_integer() and _accepts(int(value), hint)
        remedy = f"a whole number is needed: write {int(value):_}" if whole else f"expected {_expected(hint)}"
        yield f"{name} is {_show(value)}; {remedy}"


def _accepts(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the type ``hint``, as far as its outermost layer tells."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return any(_accepts(value, member) for member in get_args(hint))
    if kind is Literal:
        return value in get_args(hint)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    return kind is Any or type(value) is kind or (kind is float and type(value) is int)


def _expected(hint: Any) -> str:
    """The type ``hint`` in words."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return " or ".join(_expected(member) for member in get_args(hint))
    if kind is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    words = {bool: "true or false", str: "text", NoneType: "null", list: "a list"}
    return words.get(kind, kind.__name__ if kind in (int, float) else "'key: value' lines")


def _show(value: Any) -> str:
    """``value`` as it would be written in YAML, shortened."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _required(kind: Any) -> set[str]:
    """The fields of a dataclass that have no default."""
    return {
        item.name
        for item in dataclasses.fields(kind)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    }


def _known_keys(kind: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every key, sections included; the keys of a list's items are not options and left out."""
    for key, hint in get_type_hints(kind).items():
        yield f"{prefix}{key}", hint
        if dataclasses.is_dataclass(hint):
            yield from _known_keys(hint, f"{prefix}{key}.")  # type: ignore[arg-type]


def _did_you_mean(key: str, section: bool = False) -> str:
    """A hint for a misspelt, abbreviated or misplaced key. Sections are proposed for sections, else never."""
    if "[" in key:  # an item of data.train
        known = [f"{key.rsplit('.', 1)[0]}.{name}" for name in get_type_hints(SourceConfig)]
    else:
        known = [name for name, hint in _known_keys() if dataclasses.is_dataclass(hint) == section]
    if key in known:
        nested = f", as {key.replace('.', ': {')}: ...{'}' * key.count('.')}" if "[" not in key else ""
        return f"; set it in a file{nested}"
    # Names in the same (or the most similar) section come first, so that they win between equally good ones.
    home = key.rpartition(".")[0]
    known.sort(key=lambda name: -difflib.SequenceMatcher(None, home, name.rpartition(".")[0]).ratio())
    last = key.rpartition(".")[2].replace("-", "_")
    leaves = {name: name.rpartition(".")[2] for name in known}
    near = (
        [name for name in known if leaves[name] == last]
        or [name for name in known if len(last) > 1 and _abbreviates(last.replace("_", ""), leaves[name].split("_"))]
        or difflib.get_close_matches(last, leaves.values(), n=1, cutoff=0.7)
    )
    match = next((name for name in known if near and near[0] in (name, leaves[name])), None)
    return f"; did you mean '{match}'?" if match else "; see --help for all keys"


def _abbreviates(short: str, words: Sequence[str]) -> bool:
    """Whether ``short`` is made of beginnings of the ``words``, in order and without a gap: lr, seqlen, warmup."""
    if not short or not words:
        return not short
    return any(
        short.startswith(words[0][:length]) and _abbreviates(short[length:], words[1:])
        for length in range(1, len(words[0]) + 1)
    )


def _explain(message: str) -> str:
    """One line with a remedy out of jsonargparse's message."""
    message = " ".join(message.split())
    unknown = re.match(r"unrecognized arguments: (--)?([^\s=]+)", message, re.IGNORECASE)
    if unknown:
        if not unknown[1]:
            return f"unexpected argument '{unknown[2]}'; every value follows its option, as in --seed 1"
        return f"unknown option --{unknown[2]}{_did_you_mean(unknown[2])}"
    missing = re.search(r"arguments? (?:is|are) required: (.+)$", message)
    if missing:
        return f"missing: {missing[1]}; set it in the file given with --config or as --{missing[1].split(', ')[0]}"
    return message


# --------------------------------------------------------------------------------------------------------------------
# Checking


def validate(config: RunConfig) -> None:
    """Refuse values that no machine could run.

    Raises:
        UserError: naming the key, its value and the remedy.
    """
    training, optimizer, parallel = config.training, config.optimizer, config.parallel
    _at_least(1, training, "training", "train_tokens", "sequence_length", "global_batch_size", "micro_batch_size")
    _at_least(0, training, "training", "warmup_tokens", "eval_interval")
    _at_least(1, training, "training", "eval_tokens")
    _at_least(1, config.data, "data", "prefetch_steps")
    _at_least(1, parallel, "parallel", "replicate", "timeout_seconds")
    _at_least(1, config.checkpoint, "checkpoint", "save_interval", "keep_last")
    _at_least(1, config.logging, "logging", "log_interval")
    _at_least(0, optimizer, "optimizer", "learning_rate", "min_learning_rate", "weight_decay", "clip_grad_norm")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            raise UserError(f"optimizer.{name} is {getattr(optimizer, name)}; it must be in [0, 1)")
    if not 0 < optimizer.eps < math.inf:
        raise UserError(f"optimizer.eps is {optimizer.eps}; it must be positive and finite")
    if isinstance(parallel.shard, int) and parallel.shard < 1:
        raise UserError(f"parallel.shard is {parallel.shard}; use auto or a number of ranks from 1")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"seed is {config.seed}; it must be in [0, 2^63)")
    _validate_schedule(training, optimizer)
    _validate_data(config.data)
    if config.model.initialize_from is None and config.model.architecture is None:
        raise UserError(
            "model.initialize_from and model.architecture are both null: name a checkpoint to start from, or describe "
            "the architecture to start from random weights"
        )


def _at_least(bound: int, section: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not (value >= bound and math.isfinite(value)):
            raise UserError(f"{prefix}.{name} is {value}; it must be at least {bound}")


def _validate_schedule(training: TrainingConfig, optimizer: OptimizerConfig) -> None:
    if training.warmup_tokens > training.train_tokens:
        raise UserError(
            f"training.warmup_tokens {training.warmup_tokens:,} is more than training.train_tokens "
            f"{training.train_tokens:,}; warm up over a part of the run"
        )
    if optimizer.min_learning_rate > optimizer.learning_rate:
        raise UserError(
            f"optimizer.min_learning_rate {optimizer.min_learning_rate:g} is above optimizer.learning_rate "
            f"{optimizer.learning_rate:g}; lower the minimum"
        )
    if optimizer.decay_tokens is not None:
        room = training.train_tokens - training.warmup_tokens
        if optimizer.schedule != "wsd":
            raise UserError(
                f"optimizer.decay_tokens is {optimizer.decay_tokens:,}, but schedule '{optimizer.schedule}' does not "
                "use it; remove it or set optimizer.schedule to wsd"
            )
        if not 0 < optimizer.decay_tokens <= room:
            raise UserError(
                f"optimizer.decay_tokens is {optimizer.decay_tokens:,}; it must be between 1 and train_tokens - "
                f"warmup_tokens = {room:,}"
            )


def _validate_data(data: DataConfig) -> None:
    if not data.train:
        raise UserError("data.train is empty; name at least one dataset")
    names = [source.identity for source in data.train]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.train has two sources named '{name}'; give each its own 'name'")
    for position, source in enumerate(data.train):
        if not (source.weight > 0 and math.isfinite(source.weight)):
            raise UserError(f"data.train[{position}].weight is {source.weight}; it must be positive")
    if not 0 <= data.validation_fraction < 1:
        raise UserError(f"data.validation_fraction is {data.validation_fraction}; it must be in [0, 1)")
    if data.validation_fraction > 0 and "held_out" in data.validation:
        raise UserError("data.validation names a set 'held_out', which data.validation_fraction makes; rename it")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionary of a configuration, for YAML, JSON and manifests."""
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as a YAML text that :func:`parse_config` reads back unchanged."""
    return _dump(to_dict(config))
