"""The options of ``retemper evaluate`` in addition to the settings of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...engine.errors import UserError
from ..training.options import name_of, named, parse_source

SETTINGS = (
    "parallel.*",
    "training.precision",
    "training.weight_dtype",
    "training.attention_backend",
    "training.compile",
    "training.float8",
    "training.fuse_projections",
    "model.implementation",
    "model.trust_remote_code",
    "model.tokenizer",
    "data.attend_across_documents",
    "data.cache_folder",
    "device",
)
"""Settings of a run that an evaluation uses."""
_NO_EFFECT = ("weight", "max_epochs", "max_tokens", "validation_fraction")
"""Keys of an entry of data.train that mean nothing here."""


@dataclass(frozen=True)
class HarnessOptions:
    """What lm-evaluation-harness is asked to run."""

    tasks: tuple[str, ...]
    include_path: str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: str = "1"


@dataclass(frozen=True)
class EvaluateOptions:
    """The request of a user."""

    model: str
    data: tuple[dict[str, Any], ...]
    """Entries of ``data.train`` with ``path`` and ``name``."""
    baseline: str | None = None
    mode: str = "packed"
    """packed or sliding."""
    sequence_length: int | None = None
    """None: that of the checkpoint's run, else that of the model up to 2048."""
    stride: int | None = None
    """For sliding; None: half of the sequence length."""
    batch_size: int = 4
    """Sequences that a rank computes at once."""
    max_tokens: int | None = None
    max_documents: int | None = None
    extremes: int = 3
    """Documents of each set to show with the highest loss, and with the lowest."""
    harness: HarnessOptions | None = None

    def check(self) -> None:
        """Refuse impossible values.

        Raises:
            UserError: names the option, its value and the remedy.
        """
        if not self.data and self.harness is None:
            raise UserError("--data is missing; name text or datasets, as in --data corpus.jsonl, or --lm-eval tasks")
        if self.harness is not None and not self.harness.tasks:
            raise UserError("--lm-eval: names no task; write names or YAML files, separated by commas")
        for name in ("batch_size", "sequence_length", "stride", "max_tokens", "max_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.extremes < 0:
            raise UserError(f"--extremes {self.extremes}: must be at least 0")
        if self.stride is not None and self.mode != "sliding":
            raise UserError(f"--stride {self.stride} has no effect without --mode sliding; add it, or remove --stride")

    def stride_of(self, sequence_length: int) -> int | None:
        """Return the number of tokens that each window scores; None if documents are packed.

        Raises:
            UserError: the windows would leave out tokens.
        """
        if self.mode == "packed":
            return None
        stride = max(1, sequence_length // 2) if self.stride is None else self.stride
        if stride > sequence_length:
            raise UserError(
                f"--stride {stride} is above --sequence-length {sequence_length}, so windows would leave out tokens; "
                f"use {sequence_length} at most"
            )
        return stride


def parse_sets(texts: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """Return entries with ``path`` and ``name`` of ``PATH``, ``NAME=PATH`` and ``{path: x, name: y, column: z}``.

    Raises:
        UserError: one cannot be read, or two have the same name.
    """
    entries = [_parse_set(text) for text in texts]
    given = [entry["name"] for entry in entries if "name" in entry]
    for name in given:
        if given.count(name) > 1:
            raise UserError(f"--data: two sets are named '{name}'; give each a name, as in --data other=PATH")
    return tuple(named(entries))


def _parse_set(text: str) -> dict[str, Any]:
    name, equals, path = text.partition("=")
    if not equals or "/" in name or text.lstrip().startswith("{"):
        name, path = "", text
    entry = parse_source("--data", path)
    for key in _NO_EFFECT:
        if key in entry:
            raise UserError(f"--data {text}: {key} has no effect on an evaluation; remove it")
    return {**entry, "name": name} if name else entry


def short_name(model: str) -> str:
    """Return a name of a model for tables."""
    return name_of(model)
