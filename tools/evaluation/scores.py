"""Results of an evaluation, as numbers: no PyTorch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ...engine.observe.loss_changes import LossChange


@dataclass(frozen=True)
class DocumentScore:
    """A document with an extreme loss."""

    index: int
    """Place in the dataset, from 0."""
    tokens: int
    targets: int
    loss: float
    """Mean nats per target."""
    bits_per_byte: float | None
    beginning: str
    """First characters of the text; empty without a tokenizer."""


@dataclass(frozen=True)
class SetScore:
    """The result for one set."""

    name: str
    path: str
    documents: int
    """Documents with at least one target."""
    tokens: int
    """Tokens that were read."""
    targets: int
    """Tokens that were scored."""
    nats: float
    """Sum of their losses."""
    text_targets: int | None = None
    """Scored tokens with text; None if their bytes are unknown, as all that follows."""
    text_nats: float | None = None
    text_bytes: int | None = None
    highest: list[DocumentScore] = field(default_factory=list)
    lowest: list[DocumentScore] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Mean nats per target, as validation in training."""
        return self.nats / self.targets

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte of the scored text; None if unknown."""
        return None if not self.text_bytes else (self.text_nats or 0.0) / math.log(2) / self.text_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, for JSON."""
        record = asdict(self)
        extremes = {name: record.pop(name) for name in ("highest", "lowest")}
        derived = {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return {"name": record.pop("name"), **derived, **record, **extremes}


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task of lm-evaluation-harness."""

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int | None
    higher_is_better: bool | None = None


@dataclass(frozen=True)
class ModelScore:
    """The results of one model."""

    model: str
    """As the user named it."""
    folder: str = ""
    """Where its files are."""
    facts: dict[str, str] = field(default_factory=dict)
    """How it was computed, for people."""
    tokenizer: str = ""
    """Identity of its tokenizer; empty without one."""
    sets: list[SetScore] = field(default_factory=list)
    tasks: list[TaskScore] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, for JSON."""
        return {
            "model": self.model,
            "folder": self.folder,
            **self.facts,
            "sets": [one.to_dict() for one in self.sets],
            "tasks": [asdict(one) for one in self.tasks],
            "notes": self.notes,
        }


@dataclass(frozen=True)
class SetChange:
    """The scores of one set before (baseline) and after."""

    before: SetScore
    after: SetScore
    same_tokenizer: bool
    """Whether losses per token can be compared."""

    @property
    def name(self) -> str:
        """Name of the set."""
        return self.after.name

    @property
    def loss(self) -> LossChange | None:
        """The change of the loss per token; None with different tokenizers."""
        if not self.same_tokenizer:
            return None
        return LossChange(self.before.loss, self.after.loss)

    @property
    def bits_per_byte(self) -> LossChange | None:
        """The change of bits per byte; None if either is unknown."""
        before, after = self.before.bits_per_byte, self.after.bits_per_byte
        return None if before is None or after is None else LossChange(before, after)

    @property
    def comparable(self) -> LossChange | None:
        """The change that decides: of the loss, or of bits per byte with different tokenizers."""
        return self.loss or self.bits_per_byte

    @property
    def verdict(self) -> str:
        """learned, forgotten, unchanged; empty if nothing can be compared."""
        return "" if self.comparable is None else self.comparable.outcome

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, for JSON."""
        record: dict[str, Any] = {"name": self.name, "verdict": self.verdict}
        for key, change in (("loss", self.loss), ("bits_per_byte", self.bits_per_byte)):
            record[key] = change and {**change.to_dict(), "percent": change.percent}
        return record


@dataclass(frozen=True)
class EvaluationResult:
    """Everything that an evaluation found."""

    model: ModelScore
    baseline: ModelScore | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Mode, sequence length, stride and limits."""

    @property
    def same_tokenizer(self) -> bool:
        """Whether both models have the same tokenizer."""
        return self.baseline is None or self.model.tokenizer == self.baseline.tokenizer

    @property
    def changes(self) -> list[SetChange]:
        """Each set before and after; empty without a baseline."""
        if self.baseline is None:
            return []
        before = {one.name: one for one in self.baseline.sets}
        return [SetChange(before[one.name], one, self.same_tokenizer) for one in self.model.sets]

    def to_dict(self) -> dict[str, Any]:
        """Return the record for JSON."""
        return {
            "settings": self.settings,
            "model": self.model.to_dict(),
            "baseline": self.baseline and self.baseline.to_dict(),
            "changes": [one.to_dict() for one in self.changes],
        }
