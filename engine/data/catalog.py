"""The datasets of a run, opened and checked against its tokenizer, vocabulary and batch before anything starts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from ..budget import BatchPlan
from ..config import DataConfig
from ..errors import UserError
from .indexed_dataset import IndexedDataset
from .sample_order import OrderedSource
from .sidecar import Sidecar, hash_file
from .source import Source, split_source

_INDEX_BYTES_CHECKED = 64 * 1024**2
"""An index of up to this size (3 million documents) is hashed at start, in milliseconds; a larger one would delay it.
``tools/show_dataset.py --verify`` checks everything."""

HELD_OUT = "held_out"
"""Name of the validation set that ``data.validation_fraction`` makes."""


@dataclass(frozen=True)
class Catalog:
    """Training sources and named validation sets."""

    train: list[Source]
    weights: list[float]
    validation: dict[str, list[Source]]
    fingerprints: dict[str, dict[str, Any]]
    """By training source: ``{"path", "tokens", "hash"}``; the hash is None where there is no sidecar."""
    unchecked: list[str] = field(default_factory=list)
    """Datasets without a sidecar: nothing says which tokenizer made them."""

    @property
    def ordered_sources(self) -> list[OrderedSource]:
        """The training sources as the sample order sees them."""
        return [
            OrderedSource(source.name, source.num_windows, weight)
            for source, weight in zip(self.train, self.weights, strict=True)
        ]

    def require_unchanged(self, fingerprints: dict[str, dict[str, Any]], checkpoint: str) -> None:
        """Refuse to go on in sources whose tokens are not those that ``checkpoint`` was trained on.

        Raises:
            UserError: naming the source and what differs.
        """
        for name in self.fingerprints.keys() & fingerprints.keys():
            here, there = self.fingerprints[name], fingerprints[name]
            if here["tokens"] != there["tokens"] or (here["hash"] != there["hash"] and here["hash"] and there["hash"]):
                raise UserError(
                    f"data source '{name}' ({here['path']}) is not the one that {checkpoint} was trained on: "
                    f"{here['tokens']:,} tokens, hash {here['hash']}, was {there['tokens']:,} tokens, hash "
                    f"{there['hash']}; restore it, or give the new data another name"
                )


def open_catalog(config: DataConfig, plan: BatchPlan, vocab_size: int, tokenizer_sha256: str | None) -> Catalog:
    """Open every dataset that ``config`` names.

    Args:
        config: names of the datasets.
        plan: sequence length and global batch.
        vocab_size: of the model.
        tokenizer_sha256: of the run's ``tokenizer.json``; None checks no tokenizer.

    Raises:
        UserError: a dataset is missing, damaged, made with another tokenizer, or too small.
    """
    train, held_out, fingerprints, unchecked = [], [], {}, []
    for settings in config.train:
        dataset, sidecar = _open(settings.path, vocab_size, tokenizer_sha256)
        kept, left = split_source(settings.identity, dataset, plan.sequence_length, config.validation_fraction)
        unchecked += [] if sidecar else [settings.path]
        _require_windows(kept, "train on")
        train.append(kept)
        if config.validation_fraction > 0:
            _require_windows(left, "hold out with this data.validation_fraction")
            held_out.append(left)
        fingerprints[settings.identity] = {
            "path": settings.path,
            "tokens": dataset.num_tokens,
            "hash": sidecar.bin_xxh3_128 if sidecar else None,
        }
    windows = sum(source.num_windows for source in train)
    if windows < plan.global_batch_size:
        raise UserError(
            f"data.train holds {windows:,} windows of {plan.sequence_length:,} tokens, fewer than one global batch of "
            f"{plan.global_batch_size:,}; add data or lower training.global_batch_size or training.sequence_length"
        )
    validation = {HELD_OUT: held_out} if held_out else {}
    for name, path in config.validation.items():
        dataset, sidecar = _open(path, vocab_size, tokenizer_sha256)
        unchecked += [] if sidecar else [path]
        source = Source(name, dataset, plan.sequence_length, 0, dataset.num_tokens)
        _require_windows(source, "evaluate on")
        validation[name] = [source]
    return Catalog(train, [settings.weight for settings in config.train], validation, fingerprints, unchecked)


def _open(path: str, vocab_size: int, tokenizer_sha256: str | None) -> tuple[IndexedDataset, Sidecar | None]:
    dataset = IndexedDataset(path)
    sidecar = Sidecar.read(dataset.prefix)
    if sidecar is None:
        return dataset, None
    said = (sidecar.documents, sidecar.tokens, sidecar.dtype)
    found = (dataset.num_documents, dataset.num_tokens, dataset.dtype.name)
    if said != found:
        raise UserError(
            f"{path}.json speaks of {said[0]:,} documents, {said[1]:,} tokens of {said[2]}, but {path}.idx holds "
            f"{found[0]:,}, {found[1]:,} of {found[2]}: they are of different datasets; preprocess the corpus again"
        )
    small = os.path.getsize(dataset.idx_path) <= _INDEX_BYTES_CHECKED
    if small and hash_file(dataset.idx_path) != sidecar.idx_xxh3_128:
        raise UserError(f"{path}.idx is damaged: its hash is not the one in {path}.json; preprocess the corpus again")
    if tokenizer_sha256 is not None and sidecar.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(
            f"{path}: made with tokenizer {sidecar.tokenizer} (sha256 {sidecar.tokenizer_sha256[:12]}...), but the "
            f"model's tokenizer.json has sha256 {tokenizer_sha256[:12]}...; preprocess the corpus with the model's own "
            "tokenizer, or set model.tokenizer to the folder of the one that was used"
        )
    if sidecar.max_token_id >= vocab_size:
        raise UserError(
            f"{path}: holds token id {sidecar.max_token_id:,}, outside the model's vocabulary of {vocab_size:,}; "
            "preprocess the corpus with the model's own tokenizer"
        )
    return dataset, sidecar


def _require_windows(source: Source, purpose: str) -> None:
    if source.num_windows < 1:
        raise UserError(
            f"{source.dataset.prefix}: {source.stop - source.start:,} tokens are too few to {purpose}: one window "
            f"needs {source.sequence_length + 1:,}; add data or lower training.sequence_length"
        )
