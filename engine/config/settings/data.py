"""Settings of the data of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...files.masking import without_signature
from .marks import DataPath, FilePath


@dataclass(frozen=True)
class SourceConfig:
    """One training dataset of the mixture, or text."""

    path: DataPath
    """A dataset or text. Dataset: its prefix, ``{path}.bin`` and ``{path}.idx``, as written by tools/preprocess.py or
    Megatron-LM. Text: a file, folder, pattern or URL (``hf://namespace/name``, ``s3://``, ``gs://``) that
    tools/preprocess.py reads. Before the training, it is tokenized into ``data.cache_folder``, where the next start
    finds it."""
    weight: float = 1.0
    """Share of the training tokens (or documents, see ``data.weights``) that come from this source, relative to the sum
    of all weights."""
    name: str | None = None
    """Name in logs. It identifies the source, so that it keeps its position when the mixture or the stage changes.
    Default: the last component of ``path``."""
    max_epochs: float | None = None
    """Maximum number of epochs over this source, counted from the start of the run across all stages, and rounded down
    to whole samples. When it is reached, the share of this source goes to the other sources in proportion. Null: no
    limit."""
    max_tokens: int | None = None
    """The same limit in tokens. If both are set, the smaller one applies."""
    loss_weight: float = 1.0
    """Factor of the loss of this source's tokens. ``weight`` decides how often they are read, this how strongly each
    counts: the loss of a step is the mean of the tokens' losses, weighted by these factors. Only their ratios matter,
    so it has no effect if all sources have the same. Evaluations are not weighted."""
    column: str | None = None
    """For text: key or column of the text, as ``--json-key`` of tools/preprocess.py. Null: ``text``."""
    split: str | None = None
    """For text from the Hub (``hf://``): split of the dataset. Null: ``train``."""
    subset: str | None = None
    """For text from the Hub (``hf://``): subset (configuration) of the dataset. Null: its default."""
    validation_fraction: float = 0.0
    """For text: fraction of its documents that is held out and evaluated as the validation set with the name of this
    source, before those of ``data.validation``. A hash of each document decides, so copies of a text are on the same
    side."""
    preprocess: dict | None = None
    """For text: more options of tools/preprocess.py, without dashes: ``{dedup: exact, min_chars: 200}``.
    Null: none."""

    @property
    def identity(self) -> str:
        """Name of this source in logs and checkpoints, and key of its sample order."""
        return self.name if self.name is not None else Path(without_signature(self.path)).name

    @property
    def for_text(self) -> dict[str, Any]:
        """Settings of this source that only text has, as far as they are set."""
        keys = ("column", "split", "subset", "validation_fraction", "preprocess")
        return {key: value for key in keys if (value := getattr(self, key))}


@dataclass(frozen=True)
class ValidationConfig:
    """Text of a validation set. The keys are those of :class:`SourceConfig`."""

    path: DataPath
    """A file, folder, pattern or URL."""
    column: str | None = None
    """Key or column of the text. Null: ``text``."""
    split: str | None = None
    """From the Hub: split of the dataset. Null: ``train``."""
    subset: str | None = None
    """From the Hub: subset of the dataset. Null: its default."""
    preprocess: dict | None = None
    """More options of tools/preprocess.py. Null: none."""

    @property
    def for_text(self) -> dict[str, Any]:
        """Settings that only text has, as far as they are set."""
        keys = ("column", "split", "subset", "preprocess")
        return {key: value for key in keys if (value := getattr(self, key))}


@dataclass(frozen=True)
class StageConfig:
    """A part of the run with its own mixture."""

    train: list[SourceConfig]
    """Weighted datasets of the stage. A source that an earlier stage also has (by name) continues from its
    position there."""
    train_tokens: int | None = None
    """Length of the stage in tokens, counted as in ``training.train_tokens``. Stages change between samples: a stage
    ends with the sample that reaches the sum of its tokens and those of all earlier stages. Null, in the last stage
    only: the rest of the run. The last stage also provides the samples that complete the run's last step."""


@dataclass(frozen=True)
class DataConfig:
    """Data of the run, and the order in which it is read."""

    train: list[SourceConfig] = field(default_factory=list)
    """Weighted datasets to train on. Required unless ``stages`` is set."""
    stages: list[StageConfig] = field(default_factory=list)
    """A curriculum: mixtures used one after another, each for a number of tokens. Replaces ``train``."""
    weights: Literal["tokens", "documents"] = "tokens"
    """Unit of the weights. tokens: shares of the tokens. documents: shares of the documents; a source's share of the
    tokens is its weight times the mean length of its documents."""
    shuffle: Literal["windows", "documents"] = "windows"
    """Unit of shuffling in every epoch of a source. windows: all chunks of sequence_length tokens, as they are in the
    file. documents: additionally, the documents within every group of 128 consecutive chunks, before they are cut into
    chunks."""
    packing: Literal["concat", "best_fit"] = "concat"
    """Arrangement of documents in chunks. concat: documents follow each other and are cut every sequence_length
    tokens. best_fit: the documents of 128 consecutive chunks are arranged so that nearly all documents that fit in a
    chunk stay whole. Both use every token and add no padding. Validation sets always use concat in file order."""
    validation: dict[str, DataPath | ValidationConfig] = field(default_factory=dict)
    """Named validation sets: name -> prefix of a dataset, or text as in ``data.train``; or for text with options its
    ``path``, ``column``, ``split``, ``subset`` and ``preprocess``, as ``chats: {path: chats.jsonl, preprocess: {chat:
    true}}``."""
    cache_folder: FilePath | None = None
    """Folder in which datasets made from text are kept, named by the content of the text. With several nodes it must
    be on shared storage. Null: the environment variable RETEMPER_CACHE, or ``~/.cache/retemper``."""
    validation_fraction: float = 0.0
    """Fraction of each training source's documents, taken from its end, that is held out and evaluated as the set
    ``held_out``."""
    attend_across_documents: bool = False
    """Let packed documents attend to each other, and predict a document's first token from the document before it.
    False: attention and positions restart at every document, and targets across a document boundary are masked."""
    prefetch_steps: int = 2
    """Number of global batches that a background thread prepares ahead of the step."""

    @property
    def validation_paths(self) -> dict[str, str]:
        """Prefix of the dataset, or text, of each set of ``validation``."""
        return {name: one if isinstance(one, str) else one.path for name, one in self.validation.items()}
