"""Convert a checkpoint to a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ...files.atomic import require_absent
from ...files.outputs import Use, require_separate
from ..block_copy import WrittenFile
from ..checkpoint.assets import HfAssets
from ..hugging_face.shards import ShardPlan
from ..hugging_face.weight_dtypes import cast_to, describe_casts, dtype_name, dtype_named, with_dtype
from ..hugging_face.weight_options import AUTO, DEFAULT_MAX_SHARD_SIZE, parse_shard_size
from ..partial_folder import partial_folder
from ..tensor_source import StoredTensor
from ..workers import parse_workers
from .checkpoint_model import CheckpointModel, open_checkpoint_model
from .logits import compare_logits, describe_logits
from .provenance import ConversionRecord
from .vocabulary import ResizedVocabulary, resized_vocabulary
from .writing import nonfinite_option, size_of, write_tensors


@dataclass(frozen=True)
class Export:
    """The planned output of a checkpoint's conversion, before anything is written."""

    model: CheckpointModel
    source: ResizedVocabulary
    """The checkpoint's parameters, with the requested number of rows."""
    tensors: dict[str, StoredTensor]
    """The tensors as written."""
    assets: HfAssets
    plan: ShardPlan
    record: ConversionRecord

    def write_assets(self, folder: Path) -> None:
        """Write everything except the weights and the record."""
        self.plan.write_index(folder)
        self.assets.write(folder)

    def write_record(self, folder: Path, done: Iterable[WrittenFile]) -> None:
        """Write the record, after all weights are ``done``."""
        self.record.write(folder, self.model.stored.tensors, self.tensors, done)


def plan_export(
    checkpoint: Path, dtype: str = AUTO, max_shard_size: str = DEFAULT_MAX_SHARD_SIZE, vocab_size: int | None = None
) -> Export:
    """Return the plan of :func:`convert` with these arguments.

    Raises:
        UserError: the checkpoint is incomplete, or not a model that can be exported.
    """
    target, shard_bytes = dtype_named(dtype), parse_shard_size(max_shard_size)
    model = open_checkpoint_model(checkpoint)
    target = target or model.export_dtype()
    assets = model.assets
    rows = model.architecture.vocab_size
    source = resized_vocabulary(model.weights, rows, vocab_size, None, assets)
    tensors = cast_to(source.tensors, target)
    if source.vocab_size != rows:
        assets = assets.with_config({**model.config, "vocab_size": source.vocab_size})
    options = {
        "dtype": dtype if target is None else dtype_name(target),
        "max_shard_size": shard_bytes,
        "vocab_size": source.vocab_size,
    }
    return Export(
        model=model,
        source=source,
        tensors=tensors,
        assets=with_dtype(assets, (tensor.dtype for tensor in tensors.values())),
        plan=ShardPlan(tensors, shard_bytes),
        record=ConversionRecord("dcp_to_hf", model.identity, options, source.record, model.left_out),
    )


def convert(
    checkpoint: str | Path,
    output: str | Path,
    dtype: str = AUTO,
    max_shard_size: str = DEFAULT_MAX_SHARD_SIZE,
    vocab_size: int | None = None,
    workers: int | None = None,
    allow_nonfinite: bool = False,
    verify: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write the Hugging Face folder ``output`` from ``checkpoint``.

    Args:
        checkpoint: a folder written by the trainer or by hf_to_dcp.
        output: the Hugging Face folder; it must not exist.
        dtype: ``auto`` keeps the dtypes of a converted checkpoint, and writes a training checkpoint in the dtype of its
            config, else float32.
        max_shard_size: largest safetensors file, such as ``5GB``.
        vocab_size: number of rows of embedding and head; by default unchanged.
        workers: threads that copy tensors; by default one for each CPU, up to 8.
        allow_nonfinite: copy weights that are NaN or infinite instead of refusing them.
        verify: compare logits with transformers. Needs 4 bytes of memory per parameter.
        say: receives the lines about casts and written files.

    Raises:
        UserError: the checkpoint is incomplete or damaged, or ``output`` exists or cannot be written. No files are
            left, except finished ones after an interruption or on a full disk: see :func:`partial_folder`.
    """
    output, workers = require_absent(output), parse_workers(workers)
    require_separate([Use("--checkpoint", checkpoint)], folders=[Use(f"--output {output}", output)])
    export = plan_export(Path(checkpoint), dtype, max_shard_size, vocab_size)
    model, source, tensors, record = export.model, export.source, export.tensors, export.record
    for line in [*model.notes, *describe_casts(model.stored.tensors, tensors), *source.describe()]:
        say(line)
    record.options |= nonfinite_option(allow_nonfinite)
    model.verify(workers)
    with partial_folder(output, record.identity, say) as partial:
        done = write_tensors(partial, export.plan.files, source, source.hashed_rows, workers, allow_nonfinite)
        model.require_unchanged()
        export.write_assets(partial.content)
        if verify:
            common = min(model.architecture.vocab_size, source.vocab_size)
            length = model.config.get("max_position_embeddings")
            record.logits = compare_logits(partial.content, model.weights, model.architecture, tensors, common, length)
            say(describe_logits(record.logits))
        export.write_record(partial.content, done.values())
    say(f"wrote {output}: {len(tensors)} tensors, {size_of(done.values())}")
