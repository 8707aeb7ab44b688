"""``manifest.json``: what a checkpoint is, in plain JSON. Written last, so a folder that has one is complete."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
_ORDER_KEYS = {
    "seed": None,
    "training.sequence_length": None,
    "data.validation_fraction": None,
    "data.shuffle": "windows",
    "data.packing": "concat",
}
"""Settings that decide what the n-th sample of a source is, and what runs did before there was the setting."""


@dataclass(frozen=True)
class Manifest:
    """A checkpoint in a few lines."""

    kind: Literal["training", "converted"]
    """training: weights, optimizer states and the place in the data; converted: weights of a Hugging Face folder."""
    step: int = 0
    """Optimizer steps made."""
    consumed_samples: int = 0
    """Samples of the run's order that have been trained on: the place in the data."""
    consumed_tokens: int = 0
    """The clock."""
    sample_order: dict[str, Any] = field(default_factory=dict)
    """See :meth:`retemper.engine.data.schedule.Schedule.state`."""
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Fingerprint of every training source: see :class:`retemper.engine.data.catalog.Catalog`."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """Validation losses measured at this very step."""
    best: dict[str, Any] = field(default_factory=dict)
    """Best evaluation so far: ``{"step", "name", "loss"}``."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration of the run."""
    world_size: int = 1
    retemper_version: str = ""
    format_version: int = FORMAT_VERSION


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest`` into ``folder``."""
    text = json.dumps(dataclasses.asdict(manifest), indent=2, allow_nan=False) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of the checkpoint ``folder``.

    Raises:
        UserError: the folder is missing, incomplete or of another format.
    """
    path = Path(folder) / MANIFEST_FILE
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such checkpoint folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: not a complete checkpoint, {MANIFEST_FILE} is missing; {_what_to_name(Path(folder))}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        version = content.get("format_version") if isinstance(content, dict) else None
        raise UserError(f"{path}: format_version is {version!r}, this program reads {FORMAT_VERSION}")
    names = {item.name for item in dataclasses.fields(Manifest)}
    if content.keys() - names or "kind" not in content:
        raise UserError(f"{path}: unexpected or missing keys {sorted(content.keys() ^ names)}")
    for key, value in content.items():
        kind = type(getattr(_EMPTY, key))
        if type(value) is not kind or (kind is int and value < 0):
            raise UserError(f"{path}: damaged, {key} is {value!r}; use another checkpoint")
    return Manifest(**content)


def require_same_order(manifest: Manifest, config: Mapping[str, Any], folder: str | Path) -> None:
    """Refuse changes of the configuration after which "the samples that follow" would mean nothing.

    Args:
        manifest: of the checkpoint ``folder`` that a run is to continue from.
        config: the run's own, as a nested dictionary.

    Raises:
        UserError: naming the key and both values.
    """
    for path, former in _ORDER_KEYS.items():
        here, there = _setting(config, path, None), _setting(manifest.config, path, former)
        if here != there:
            raise UserError(
                f"{path} is {here}, but {folder} was trained with {there}, and the sample order depends on it; set it "
                "back, or start a new run_folder with model.initialize_from"
            )


def _setting(config: Any, path: str, missing: Any) -> Any:
    for key in path.split("."):
        if key not in config:
            return missing
        config = config[key]
    return config


def _what_to_name(folder: Path) -> str:
    """The remedy for a folder that is something else than a checkpoint."""
    if (folder / "config.json").is_file():
        return f"it is a Hugging Face folder: convert it with checkpoint_convert/hf_to_dcp.py --hf {folder}"
    below = sorted([*folder.glob("step-*/"), *folder.glob("checkpoints/step-*/")])
    if below:
        return f"name one of the checkpoints in it, such as {below[-1]}"
    return "name a folder that the trainer (step-...) or checkpoint_convert/hf_to_dcp.py has written"


_EMPTY = Manifest(kind="training")
