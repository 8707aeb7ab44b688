"""A Hugging Face folder out of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.assets import ASSET_FOLDER, CONFIG_FILE, HfAssets
from ..checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from ..checkpoint.tensors import OPTIMIZER_PREFIX, StoredTensor, check_model_tensors
from ..hugging_face.shards import DEFAULT_MAX_SHARD_SIZE, ShardPlan, parse_shard_size
from ..hugging_face.weight_dtypes import (
    AUTO,
    cast_to,
    declared_dtype,
    declaring,
    describe_casts,
    dtype_name,
    dtype_named,
)
from ..model.architecture import Architecture, parse_architecture, read_hf_config
from ..model.decoder import meta_decoder
from ..streaming.block_copy import WrittenFile
from ..streaming.new_folder import require_absent
from ..streaming.partial_folder import partial_folder
from ..streaming.tensor_files import CheckpointRows
from ..streaming.tensor_source import TensorSource
from .hf_to_dcp import describe_logits
from .logits import compare_logits
from .record import ConversionRecord, file_hash
from .run import parse_workers, require_outside, size_of, verify_source, write_tensors
from .vocabulary import ResizedVocabulary, resized_vocabulary


@dataclass(frozen=True)
class Export:
    """What is to be made of a checkpoint, before anything is written."""

    checkpoint: Path
    manifest: Manifest
    architecture: Architecture
    stored: CheckpointRows
    """All tensors of the checkpoint."""
    weights: TensorSource
    """Those of the model, as they are stored."""
    source: ResizedVocabulary
    """Those of the model, as many rows as are asked for."""
    tensors: dict[str, StoredTensor]
    """As they are to be written."""
    assets: HfAssets
    plan: ShardPlan
    record: ConversionRecord

    def write_assets(self, folder: Path) -> None:
        """Everything but the weights and the proof."""
        self.plan.write_index(folder)
        self.assets.write(folder)

    def write_record(self, folder: Path, done: Iterable[WrittenFile]) -> None:
        """The proof, when ``done`` holds all weights."""
        self.record.write(folder, self.stored.tensors, self.tensors, done)


def plan_export(
    checkpoint: Path, dtype: str = AUTO, max_shard_size: str = DEFAULT_MAX_SHARD_SIZE, vocab_size: int | None = None
) -> Export:
    """What :func:`convert` writes with these arguments.

    Raises:
        UserError: the checkpoint is incomplete, or not a model that can be exported.
    """
    target, shard_bytes = dtype_named(dtype), parse_shard_size(max_shard_size)
    manifest = read_manifest(checkpoint)
    where = checkpoint / ASSET_FOLDER / CONFIG_FILE
    config = read_hf_config(where)
    if target is None and manifest.kind == "training":
        target = declared_dtype(config, str(where)) or torch.float32

    architecture = parse_architecture(config, str(where))
    decoder = meta_decoder(architecture)
    check_model_tensors(checkpoint, decoder)
    stored = CheckpointRows(checkpoint)
    weights = stored.only(name for name, _ in decoder.named_parameters())
    assets = HfAssets.of_checkpoint(checkpoint)
    rows = architecture.vocab_size
    source = resized_vocabulary(weights, rows, vocab_size, None, assets.files)
    tensors = cast_to(source.tensors, target)
    if source.vocab_size != rows:
        assets = assets.with_config({**config, "vocab_size": source.vocab_size})
    record = ConversionRecord(
        "dcp_to_hf",
        _identify(checkpoint, manifest),
        {
            "dtype": dtype if target is None else dtype_name(target),
            "max_shard_size": shard_bytes,
            "vocab_size": source.vocab_size,
        },
        source.record,
        _left_out(stored.tensors, tensors),
    )
    return Export(
        checkpoint=checkpoint,
        manifest=manifest,
        architecture=architecture,
        stored=stored,
        weights=weights,
        source=source,
        tensors=tensors,
        assets=declaring(assets, (tensor.dtype for tensor in tensors.values())),
        plan=ShardPlan(tensors, shard_bytes),
        record=record,
    )


def convert(
    checkpoint: str | Path,
    output: str | Path,
    dtype: str = AUTO,
    max_shard_size: str = DEFAULT_MAX_SHARD_SIZE,
    vocab_size: int | None = None,
    workers: int | None = None,
    verify: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write the Hugging Face folder ``output`` from ``checkpoint``.

    Args:
        checkpoint: a folder written by the trainer or by hf_to_dcp.
        output: the Hugging Face folder; it must not exist.
        dtype: ``auto`` keeps the tensors of a converted checkpoint, and writes a training checkpoint in the dtype that
            its config declares, else float32.
        max_shard_size: largest safetensors file, such as ``5GB``.
        vocab_size: rows that embedding and head are to have; by default as many as they have.
        workers: threads that copy tensors; by default one for each CPU, up to 8.
        verify: compare logits with transformers. Needs 4 bytes of memory per parameter.
        say: takes the lines that tell what was cast and written.

    Raises:
        UserError: the checkpoint is incomplete or damaged, or ``output`` exists or cannot be written. Nothing is left
            behind, but for finished files after an interruption or on a full disk: see :func:`partial_folder`.
    """
    output, workers = require_absent(output), parse_workers(workers)
    require_outside(output, checkpoint, "--checkpoint")
    export = plan_export(Path(checkpoint), dtype, max_shard_size, vocab_size)
    source, tensors, record = export.source, export.tensors, export.record
    for line in [*describe_casts(export.stored.tensors, tensors), *source.describe()]:
        say(line)
    verify_source(export.checkpoint, sum(file.bytes for file in export.manifest.records.values()), workers)
    with partial_folder(output, record.identity, say) as partial:
        done = write_tensors(partial, export.plan.files, source, source.hashed_rows, workers)
        export.write_assets(partial.content)
        if verify:
            common = min(export.architecture.vocab_size, source.vocab_size)
            length = (export.assets.config or {}).get("max_position_embeddings")
            record.logits = compare_logits(
                partial.content, export.weights, export.architecture, tensors, common, length
            )
            say(describe_logits(record.logits))
        export.write_record(partial.content, done.values())
    say(f"wrote {output}: {len(tensors)} tensors, {size_of(done.values())}")


def _left_out(stored: Mapping[str, StoredTensor], tensors: Mapping[str, StoredTensor]) -> dict[str, list[str]]:
    states = [name for name in stored if name not in tensors]
    assert all(name.startswith(OPTIMIZER_PREFIX) for name in states)
    return {"state of the optimizer": states} if states else {}


def _identify(checkpoint: Path, manifest: Manifest) -> dict[str, Any]:
    """What tells this input from any other: the manifest has the hash of every file."""
    return {
        "folder": str(checkpoint.resolve()),
        "manifest_xxh3_128": file_hash(checkpoint / MANIFEST_FILE),
        "kind": manifest.kind,
        "step": manifest.step,
        "consumed_tokens": manifest.consumed_tokens,
    }
