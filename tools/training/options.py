"""The options of ``retemper train`` in addition to the settings of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...engine.config.settings import SourceConfig, ValidationConfig
from ...engine.config.types_check import Problems, check
from ...engine.config.yaml_loader import explain, load_yaml
from ...engine.errors import UserError
from ...engine.files.paths import expand_path

_COUNT = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kmbt]?)", re.IGNORECASE)
_MOST_EPOCHS = 1_000_000
_MOST_TOKENS = 10**15
_LEAST_SHARE = 1e-6
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


@dataclass(frozen=True)
class TrainOptions:
    """The request of a user who has a model and text."""

    model: str
    data: tuple[dict[str, Any], ...]
    """Entries of ``data.train``, at least with ``path``."""
    replay: tuple[tuple[dict[str, Any], float], ...] = ()
    """The same of general text, each with its share of the training tokens."""
    evaluate: tuple[tuple[str, str | dict[str, Any]], ...] = ()
    """Name, and path or entry of ``data.validation``, of more texts or datasets that are evaluated."""
    tokens: int | None = None
    epochs: float | None = None
    """Instead of ``tokens``: the number of times that ``data`` is seen. None: once, unless a file sets the budget."""
    validation: float = 0.02
    """Fraction of the documents of every text that is held out."""
    output: str | None = None
    """Run folder; None: below ``runs``, named after model and data."""
    ranks: int | None = None
    """None: one for each GPU, or one on a CPU."""
    auto: bool = False
    """Choose layout, micro-batch, recomputation, an adapter and offload so that the model fits."""
    lora: bool = False
    """Train an adapter."""
    qlora: bool = False
    """Train an adapter on a base in 4 bits; then ``lora`` is set as well."""
    lora_rank: int | None = None
    """Of the adapter. None: the usual one."""

    @property
    def replay_share(self) -> float:
        """Share of the training tokens that are replay."""
        return sum(share for _, share in self.replay)

    def check(self) -> None:
        """Refuse impossible values.

        Raises:
            UserError: names the option, its value and the remedy.
        """
        if not 0 <= self.validation < 1:
            raise UserError(f"--validation {self.validation:g}: must be at least 0 and below 1, such as 0.02")
        if self.epochs is not None and not 0 < self.epochs < _MOST_EPOCHS:
            raise UserError(f"--epochs {self.epochs:g}: must be positive and below {_MOST_EPOCHS:,}")
        names = [name for name, _ in self.evaluate]
        for name, entry in self.evaluate:
            if names.count(name) > 1:
                path = entry["path"] if isinstance(entry, dict) else entry
                raise UserError(f"--evaluate: two texts are named '{name}'; name them, as in --evaluate other={path}")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise UserError(f"--lora-rank {self.lora_rank}: must be at least 1, such as 64")
        if self.ranks is not None and self.ranks < 1:
            raise UserError(f"--ranks {self.ranks}: must be at least 1")
        if self.replay_share >= 1:
            raise UserError(
                f"--replay: the shares sum to {self.replay_share:g}, which leaves no tokens for --data; lower them"
            )

    @property
    def run_folder(self) -> str:
        """The folder of the run."""
        if self.output is not None:
            return self.output
        return str(Path("runs", f"{name_of(self.model)}-{self.data[0].get('name') or name_of(self.data[0]['path'])}"))


def parse_source(option: str, text: str) -> dict[str, Any]:
    """Return an entry of ``data.train`` from a path, a URL, or the entry itself, as ``{path: x, column: body}``.

    Raises:
        UserError: it is not such an entry.
    """
    if not text.lstrip().startswith("{"):
        return {"path": expand_path(text, option, urls=True)}
    entry = _parse_entry(option, text, SourceConfig)
    if "weight" in entry:
        raise UserError(f"{option} {text}: --replay TEXT:SHARE and the sizes of the texts decide weights; remove it")
    return entry


def _parse_entry(option: str, text: str, kind: type) -> dict[str, Any]:
    """Return the keys of a ``kind`` of source, with its ``path`` expanded."""
    try:
        entry = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{option} {text}: {explain(error)}") from None
    found = Problems()
    entry = check(entry, kind, option, found)
    found.raise_if_any()
    if not isinstance(entry.get("path"), str):
        raise UserError(f"{option} {text}: has no path; write it as in '{{path: corpus/, column: body}}'")
    return {**entry, "path": expand_path(entry["path"], option, urls=True)}


def parse_replay(text: str) -> tuple[dict[str, Any], float]:
    """Return source and share of ``PATH:SHARE``.

    Raises:
        UserError: there is no share between 0 and 1.
    """
    path, colon, share = text.rpartition(":")
    try:
        value = float(share) if colon else 0.0
    except ValueError:
        value = 0.0
    if not path or not _LEAST_SHARE <= value < 1:
        raise UserError(
            f"--replay {text}: write PATH:SHARE with the share of the training tokens, as in general.jsonl:0.1"
        )
    return parse_source("--replay", path), value


def parse_evaluation(text: str) -> tuple[str, str | dict[str, Any]]:
    """Return name, and path or entry of ``data.validation``, of ``NAME=PATH``, ``PATH`` or ``NAME={path: ...}``.

    Raises:
        UserError: it is not such an entry.
    """
    name, equals, path = text.partition("=")
    if not equals or "/" in name or "{" in name:
        name, path = "", text
    if path.lstrip().startswith("{"):
        entry = _parse_entry("--evaluate", path, ValidationConfig)
        return name or name_of(entry["path"]), entry
    return name or name_of(path), expand_path(path, "--evaluate", urls=True)


def parse_tokens(text: str) -> int:
    """Return a number of tokens from ``200k``, ``100M``, ``1.5B`` or digits.

    Raises:
        UserError: it is not a positive number.
    """
    match = _COUNT.fullmatch(text.strip())
    value = float(match[1].replace("_", "")) * _FACTORS[match[2].lower()] if match else 0.0
    if value < 1 or value != round(value) or value > _MOST_TOKENS:
        raise UserError(f"--tokens {text}: write a number of tokens, as in 200k, 100M or 1.5B")
    return round(value)


def name_of(path: str) -> str:
    """Return a short name for a model or a text, for folders and metrics."""
    parts = [
        part
        for part in re.split(r"[/\\]", path.partition("@")[0])
        if part.strip(".~") and not re.search(r"[*?\[:]", part)
    ]
    name = re.sub(r"\.(gz|zst|bz2|xz)$", "", parts[-1] if parts else "text")
    name = re.sub(r"\.(jsonl|json|txt|md|html|csv|tsv|parquet|arrow|xlsx|pdf)$", "", name)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name) or "text"


def named(sources: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``sources`` with a ``name`` each, all different."""
    found: list[dict[str, Any]] = []
    for source in sources:
        wanted = name = str(source.get("name") or name_of(source["path"]))
        number = 2
        while any(other["name"] == name for other in found):
            name, number = f"{wanted}-{number}", number + 1
        found.append({**source, "name": name})
    return found
