"""List what has changed since the checkpoint that a run resumes from, and refuse changes that are not allowed.

Changes of the sample order are refused unless ``allow_changes`` names them: samples would silently be lost or repeated.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

from ...config.settings import DATA_FILES, ORDER_KEYS, OptimizerConfig, RunConfig, SourceConfig, TrainingConfig, to_dict
from ...errors import UserError
from ...model.config_file import read_hf_config
from ...parallel.layout import AXES
from ...schedule import learning_rate
from .manifest import Manifest

_OF_THE_COMMAND = ("run_folder", "resume", "allow_changes")
"""Settings of the command, not of the run."""
_ABSENT = "not set"


def require_allowed(
    manifest: Manifest, config: Mapping[str, Any], allowed: Collection[str], folder: str | Path
) -> None:
    """Refuse changes that would give another sample order, unless they are allowed.

    Args:
        manifest: of the checkpoint ``folder`` that a run is to continue from.
        config: that of the run, as a nested dictionary.
        allowed: settings that may have changed.

    Raises:
        UserError: names the key and both values.
    """
    here, there = dict(_flat(config)), dict(_flat(manifest.config))
    for key, former in ORDER_KEYS.items():
        now, then = here.get(key), there.get(key, former)
        if now != then and key not in allowed:
            raise UserError(
                f"{key} is {now}, but {folder} was trained with {then}, and the sample order depends on it; set it "
                f"back, or start a new run_folder with model.initialize_from, or set allow_changes to [{key}]: then "
                "some samples may repeat before others are seen"
                + (", or be held out now" if key == "data.validation_fraction" else "")
            )


def describe_changes(
    manifest: Manifest, config: RunConfig, layout: Mapping[str, int], datasets: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return a line for every difference from the time when the checkpoint was written.

    Args:
        manifest: of the checkpoint.
        config: of the run.
        layout: ranks along every axis of the mesh now.
        datasets: fingerprints of the training sources now.
    """
    both = _with_one_spelling(to_dict(config), manifest.config, same_ranks=manifest.layout == layout)
    here, there = (dict(_flat(settings)) for settings in both)
    changes = []
    for key in [*there, *(key for key in here if key not in there)]:
        now, then = (settings.get(key, _default(key)) for settings in (here, there))
        changed = now != then and not _is_same_path(key, now, then)
        if key not in _OF_THE_COMMAND and changed and not (_opened(key, now, there) or _opened(key, then, here)):
            changes.append(f"{key} {_shown(then)} -> {_shown(now)}" + (" (allowed)" if key in ORDER_KEYS else ""))
    # A dataset that has lost its sidecar, or got one, is listed as well. This is always allowed.
    allowed = " (allowed)" if DATA_FILES in config.allow_changes else ""
    for name in [name for name in datasets if name in manifest.datasets]:
        now, then = (_dataset(fingerprints[name]) for fingerprints in (datasets, manifest.datasets))
        if now != then:
            changes.append(f"{DATA_FILES} of {name} {then} -> {now}{allowed}")
    if manifest.layout and manifest.layout != layout:
        changes.append(f"ranks {_ranks(manifest.layout)} -> {_ranks(layout)}")
    if any(change.startswith(("training.", "optimizer.")) for change in changes):
        changes += _change_of_rate(manifest, config)
    now_made_by = Manifest(kind="training").versions
    changes += [
        f"{name} {version} -> {now_made_by[name]}"
        for name, version in manifest.versions.items()
        if now_made_by.get(name, version) != version
    ]
    return [f"changed     {change}" for change in changes]


def _with_one_spelling(
    now: Mapping[str, Any], then: Mapping[str, Any], same_ranks: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both configurations with the same spelling of settings that mean the same.

    Args:
        now: that of the run, as a nested dictionary.
        then: that of the checkpoint.
        same_ranks: whether both have the same ranks along every axis. Then it does not matter which numbers were given
            and which were derived.
    """
    both = copy.deepcopy(dict(now)), copy.deepcopy(dict(then))
    one_is_given = sum(_section(settings, "optimizer").get("decay_tokens") is None for settings in both) == 1
    for settings in both:
        model, optimizer = _section(settings, "model"), _section(settings, "optimizer")
        if model.get("architecture") is not None:
            # A path or the keys themselves. A different architecture is refused elsewhere.
            with suppress(UserError):
                model["architecture"] = read_hf_config(model["architecture"])
        if one_is_given and optimizer.get("schedule") == "wsd" and optimizer.get("decay_tokens") is None:
            tokens = _section(settings, "training").get("train_tokens", 0)
            optimizer["decay_tokens"] = max(1, (tokens - optimizer.get("schedule_start_tokens", 0)) // 10)
        for axis in AXES if same_ranks else ():
            _section(settings, "parallel").pop(axis, None)
    return both


def _section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = settings.get(name)
    return section if isinstance(section, dict) else {}


_PATHS = re.compile(
    r"^(model|adapter)\.initialize_from$|^model\.(tokenizer|architecture)$|^data\.validation\.|\]\.path$"
)


def _is_same_path(key: str, now: Any, then: Any) -> bool:
    """Return whether both values of a setting are paths of the same file or folder."""
    if not (_PATHS.search(key) and isinstance(now, str) and isinstance(then, str)):
        return False
    return os.path.realpath(now) == os.path.realpath(then)


def _opened(key: str, value: Any, others: Mapping[str, Any]) -> bool:
    """Return whether the empty ``value`` of ``key`` has entries in ``others``, which are listed themselves."""
    return not value and any(other.startswith((f"{key}.", f"{key}[")) for other in others)


def _dataset(fingerprint: Mapping[str, Any]) -> str:
    mask = fingerprint.get("mask")
    return f"{fingerprint['tokens']:,} tokens, hash {fingerprint['hash']}" + (f", loss mask {mask}" if mask else "")


def _change_of_rate(manifest: Manifest, config: RunConfig) -> list[str]:
    """Return a line if the changes give another learning rate at this step."""
    tokens = manifest.consumed_tokens
    now, former = learning_rate(tokens, config.training, config.optimizer), _section(manifest.config, "training")
    try:
        training = TrainingConfig(**{key: value for key, value in former.items() if key in _defaults(TrainingConfig)})
        optimizer: Any = SimpleNamespace(**{**_defaults(OptimizerConfig), **manifest.config["optimizer"]})
        then = learning_rate(tokens, training, optimizer)
    except (AssertionError, AttributeError, KeyError, TypeError):  # a version with other settings
        return []
    return [f"learning rate at {tokens:,} tokens {then:.3g} -> {now:.3g}"] if then != now else []


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf. Sources in a list are named, other lists are leaves."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            name = item.get("name") or Path(str(item.get("path", number))).name
            yield from _flat({part: entry for part, entry in item.items() if part != "name"}, f"{key}[{name}]")
    else:
        yield key, value


def _default(key: str) -> Any:
    """Return the default of a setting that did not exist when the checkpoint was written."""
    *sections, last = key.rpartition("].")[2].split(".")
    kind: Any = SourceConfig if "]." in key else RunConfig
    for section in sections:
        kind = get_type_hints(kind).get(section) if dataclasses.is_dataclass(kind) else None
    return _defaults(kind).get(last, _ABSENT) if dataclasses.is_dataclass(kind) else _ABSENT


def _defaults(kind: Any) -> dict[str, Any]:
    """Return the defaults of a configuration's section that are plain values."""
    return {item.name: item.default for item in dataclasses.fields(kind) if item.default is not dataclasses.MISSING}


def _ranks(layout: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in layout.items() if size > 1) or "1"


def _shown(value: Any) -> str:
    return f"{value:,}" if type(value) is int else "null" if value is None else str(value)
