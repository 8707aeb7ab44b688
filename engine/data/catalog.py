"""Open the datasets of a run, and check them against its tokenizer, vocabulary and batch before anything starts."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from ..config.settings import DataConfig, SourceConfig, StageConfig
from ..errors import UserError
from ..files.hashing import hash_file
from ..schedule import BatchPlan
from .curriculum import Curriculum, CurriculumStage, SourceWeight
from .indexed_dataset import IndexedDataset
from .sample_order import SampleOrder, SourceSize
from .sidecar import Sidecar, require_same_dataset
from .source import Source, split_source
from .spot_checks import NamedDataset, check_chunks, equal_datasets
from .tokenizer_identity import TokenizerIdentity

_INDEX_BYTES_CHECKED = 64 * 1024**2
"""Maximum size of an index (3 million documents) that is hashed at the start, in milliseconds; a larger one would delay
it. ``tools/show_dataset.py --verify`` checks everything."""

HELD_OUT = "held_out"
"""Name of the validation set created by ``data.validation_fraction``."""


@dataclass(frozen=True)
class Catalog:
    """The training sources and named validation sets of a run."""

    train: list[Source]
    """All sources of all stages, each once."""
    stages: list[CurriculumStage]
    """The stages of the run; without ``data.stages`` there is a single one."""
    validation: dict[str, list[Source]]
    fingerprints: dict[str, dict[str, Any]]
    """``{"path", "tokens", "hash", "mask", "bos"}`` of each training source. ``hash`` is None without a sidecar.
    ``mask`` is the hash of the loss mask: empty without a sidecar, None without a mask. ``bos`` holds the ids at the
    beginning of every document, None if not recorded."""
    unchecked: list[str] = field(default_factory=list)
    """Datasets without a sidecar, whose tokenizer is therefore unknown."""
    remarks: list[str] = field(default_factory=list)
    """Remarks for the user about unusual but usable datasets."""

    @property
    def epoch_tokens(self) -> int | None:
        """Tokens in an epoch of the mixture: those of all chunks of all sources, whatever their weights. None: several
        stages have no common epoch.
        """
        if len(self.stages) > 1:
            return None
        return sum(source.num_chunks * source.sequence_length for source in self.train)

    def finish_checks(self) -> None:
        """Wait for the checks of very large indexes that run in threads.

        Raises:
            UserError: an index is damaged.
        """
        for source in itertools.chain(self.train, *self.validation.values()):
            source.dataset.finish_check()

    def sample_order(self, seed: int) -> SampleOrder:
        """Return the sample order of a fresh run."""
        sources = [SourceSize(source.name, source.num_chunks) for source in self.train]
        return SampleOrder(sources, Curriculum(self.stages), seed, self.train[0].sequence_length)

    def require_unchanged(self, fingerprints: dict[str, dict[str, Any]], checkpoint: str) -> None:
        """Refuse to continue with sources whose tokens differ from those that ``checkpoint`` was trained on.

        Raises:
            UserError: names the source and the difference.
        """
        for name in [name for name in self.fingerprints if name in fingerprints]:
            here, there = self.fingerprints[name], fingerprints[name]
            if here["tokens"] != there["tokens"] or (here["hash"] != there["hash"] and here["hash"] and there["hash"]):
                raise UserError(
                    f"data source '{name}' ({here['path']}) differs from the one that {checkpoint} was trained on: it "
                    f"has {here['tokens']:,} tokens, hash {here['hash']}, instead of {there['tokens']:,} tokens, hash "
                    f"{there['hash']}; restore it, or give the new data another name, or set allow_changes to "
                    "[data_files]"
                )
            masks = [here["mask"], there.get("mask")]  # absent in checkpoints from before masks existed
            if masks[0] != masks[1] and (None in masks or all(masks)):
                now, then = ("no loss mask" if mask is None else f"a loss mask of hash {mask or '?'}" for mask in masks)
                raise UserError(
                    f"data source '{name}' ({here['path']}) has {now}, but {checkpoint} was trained with {then}; "
                    f"restore {here['path']}.mask.bin, or give the new data another name, or set allow_changes to "
                    "[data_files]"
                )


def open_catalog(
    config: DataConfig, plan: BatchPlan, vocab_size: int, tokenizer: TokenizerIdentity | None, seed: int
) -> Catalog:
    """Open every dataset that ``config`` names.

    Args:
        config: names of the datasets, and how chunks are made from them.
        plan: sequence length and global batch.
        vocab_size: of the model.
        tokenizer: of the run; None skips the comparison of tokenizers.
        seed: of the document layouts.

    Raises:
        UserError: a dataset is missing, damaged, made with another tokenizer, too small, or has no targets.
    """
    train: dict[str, Source] = {}
    held_out, fingerprints, unchecked = [], {}, []
    opened: list[NamedDataset] = []
    mixtures = [stage.train for stage in config.stages] or [config.train]
    for settings in {settings.identity: settings for mixture in mixtures for settings in mixture}.values():
        dataset, sidecar = _open(settings.path, vocab_size, tokenizer)
        kept, left = split_source(settings.identity, dataset, plan.sequence_length, config.validation_fraction)
        kept, left = (replace(part, bos_id=_bos_id(sidecar)) for part in (kept, left))
        kept = replace(kept, loss_weight=settings.loss_weight)
        unchecked += [] if sidecar else [settings.path]
        opened.append(NamedDataset(f"training source '{settings.identity}'", settings.path, dataset, sidecar))
        _require_chunks(kept, "train on")
        check_chunks(kept, vocab_size, config.attend_across_documents, all_ids=sidecar is None)
        train[kept.name] = kept.with_packing(config.packing, config.shuffle, seed)
        if config.validation_fraction > 0:
            _require_targets(left, f"data.validation_fraction {config.validation_fraction:g} holds out")
            held_out.append(left)
        fingerprints[settings.identity] = {
            "path": settings.path,
            "tokens": dataset.num_tokens,
            "hash": sidecar.bin_xxh3_128 if sidecar else None,
            "mask": (sidecar.mask_xxh3_128 if sidecar else "") if dataset.has_loss_mask else None,
            "bos": None if sidecar is None or sidecar.bos_ids is None else list(sidecar.bos_ids),
        }
    chunks = sum(source.num_chunks for source in train.values())
    if chunks < plan.global_batch_size:
        where = "data.stages" if config.stages else "data.train"
        raise UserError(
            f"{where} holds {chunks:,} chunks of {plan.sequence_length:,} tokens, fewer than one global batch of "
            f"{plan.global_batch_size:,}; add data or lower training.global_batch_size or training.sequence_length"
        )
    validation = {HELD_OUT: held_out} if held_out else {}
    for name, path in config.validation_paths.items():
        source, sidecar = open_validation_set(name, path, plan.sequence_length, vocab_size, tokenizer)
        unchecked += [] if sidecar else [path]
        opened.append(NamedDataset(f"validation set '{name}'", path, source.dataset, sidecar))
        validation[name] = [source]
    remarks = [*dict.fromkeys(line for one in opened for line in one.dataset.remarks), *equal_datasets(opened)]
    return Catalog(list(train.values()), _stages(config, train), validation, fingerprints, unchecked, remarks)


def open_validation_set(
    name: str, path: str, sequence_length: int, vocab_size: int, tokenizer: TokenizerIdentity | None
) -> tuple[Source, Sidecar | None]:
    """Open a whole dataset as a validation set; return it with its sidecar, if it has one.

    Args:
        name: of the set.
        path: prefix of the dataset.
        sequence_length: of the chunks.
        vocab_size: of the model.
        tokenizer: of the model; None skips the comparison of tokenizers.

    Raises:
        UserError: the dataset is missing, damaged, made with another tokenizer, or has no targets.
    """
    dataset, sidecar = _open(path, vocab_size, tokenizer)
    source = Source(name, dataset, sequence_length, 0, dataset.num_tokens, bos_id=_bos_id(sidecar))
    _require_targets(source, "the set has")
    return source, sidecar


def _stages(config: DataConfig, sources: Mapping[str, Source]) -> list[CurriculumStage]:
    """Return the stages with token budgets, weights and caps converted to numbers of samples."""
    sequence_length = next(iter(sources.values())).sequence_length
    stages, tokens = [], 0
    mixtures = config.stages or [StageConfig(config.train)]
    for number, stage in enumerate(mixtures, 1):
        shares = tuple(_share(settings, sources[settings.identity], config.weights) for settings in stage.train)
        stop = None
        # The last stage has no end here. The last step of a run is a whole one, so it may need more samples than the
        # budget. The run may also be extended later. The configuration checks that the budgets suffice.
        if number < len(mixtures):
            assert stage.train_tokens is not None
            # Rounded once, from the start of the run, so that rounding errors of many stages do not add up.
            tokens += stage.train_tokens
            stop = -(-tokens // sequence_length)
        stages.append(CurriculumStage(shares, stop))
    return stages


def _share(settings: SourceConfig, source: Source, weights: str) -> SourceWeight:
    weight = settings.weight
    if weights == "documents":
        weight *= source.dataset.num_tokens / source.dataset.num_documents
    caps = []
    if settings.max_epochs is not None:
        # Computed as the decimal number in the file: 0.29 x 100 chunks are 29, but not in binary fractions.
        caps.append(math.floor(Fraction(str(settings.max_epochs)) * source.num_chunks))
    if settings.max_tokens is not None:
        caps.append(settings.max_tokens // source.sequence_length)
    if caps and min(caps) < 1:
        raise UserError(
            f"max_epochs {settings.max_epochs:g} of data source '{source.name}' is less than one sample, since it has "
            f"{source.num_chunks:,} chunks of {source.sequence_length:,} tokens; raise it to at least "
            f"{1 / source.num_chunks:.3g}, or remove the source"
        )
    return SourceWeight(source.name, weight, min(caps, default=None))


def _open(path: str, vocab_size: int, tokenizer: TokenizerIdentity | None) -> tuple[IndexedDataset, Sidecar | None]:
    dataset = IndexedDataset(path)
    sidecar = Sidecar.read(dataset.prefix)
    if sidecar is None:
        return dataset, None
    require_same_dataset(sidecar, dataset)
    small = os.path.getsize(dataset.idx_path) <= _INDEX_BYTES_CHECKED
    if small and hash_file(dataset.idx_path) != sidecar.idx_xxh3_128:
        raise UserError(f"{path}.idx is damaged: its hash is not the one in {path}.json; preprocess the corpus again")
    if tokenizer is not None and not tokenizer.made(sidecar):
        raise UserError(
            f"{path}: made with tokenizer {sidecar.tokenizer} (sha256 {sidecar.tokenizer_sha256[:12]}...), but the "
            f"model's tokenizer (sha256 {tokenizer.sha256[:12]}...) has another vocabulary or other rules; preprocess "
            "the corpus with the model's own tokenizer, or set model.tokenizer to the folder of the one that was used"
        )
    if sidecar.max_token_id >= vocab_size:
        raise UserError(
            f"{path}: holds token id {sidecar.max_token_id:,}, outside the model's vocabulary of {vocab_size:,}; "
            "preprocess the corpus with the model's own tokenizer"
        )
    return dataset, sidecar


def _bos_id(sidecar: Sidecar | None) -> int | None:
    return sidecar.bos_ids[0] if sidecar is not None and sidecar.bos_ids else None


def _require_chunks(source: Source, purpose: str) -> None:
    if source.num_chunks < 1:
        raise UserError(
            f"{source.dataset.prefix}: {source.stop - source.start:,} tokens are too few to {purpose}: one chunk "
            f"needs {source.sequence_length + 1:,}; add data or lower training.sequence_length"
        )


def _require_targets(source: Source, holder: str) -> None:
    """Refuse a validation part without any target, whatever its documents and mask."""
    if source.num_targets < 1:
        raise UserError(
            f"{source.dataset.prefix}: {holder} {source.stop - source.start} tokens, but an evaluation needs at least "
            "2, the second as target of the first; add data"
        )
