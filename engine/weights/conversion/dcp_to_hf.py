"""Convert a checkpoint to a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...files.atomic import require_absent
from ...files.outputs import Use, require_separate
from ..hugging_face.weight_dtypes import cast_to, describe_casts, dtype_name, dtype_named, dtypes_of, with_dtype
from ..hugging_face.weight_options import AUTO, DEFAULT_MAX_SHARD_SIZE, parse_shard_size
from ..workers import parse_workers
from .logits import compare_logits
from .pipeline import Conversion, hf_target
from .provenance import ConversionRecord
from .stored_model import open_checkpoint
from .vocabulary import resized_vocabulary


def plan_export(
    checkpoint: Path, dtype: str = AUTO, max_shard_size: str = DEFAULT_MAX_SHARD_SIZE, vocab_size: int | None = None
) -> Conversion:
    """Return the plan of :func:`convert` with these arguments.

    Raises:
        UserError: the checkpoint is incomplete, or not a model that can be exported.
    """
    target, shard_bytes = dtype_named(dtype), parse_shard_size(max_shard_size)
    model = open_checkpoint(checkpoint)
    target = target or model.export_dtype
    assets, rows = model.assets, model.architecture.vocab_size
    source = resized_vocabulary(model.published, model.published_tables, rows, vocab_size, None, assets)
    tensors = cast_to(source.tensors, target, model.float32)
    if source.vocab_size != rows:
        assets = assets.with_config({**model.config, "vocab_size": source.vocab_size})
    assets = with_dtype(assets, dtypes_of(tensors, model.float32))
    options = {
        "dtype": dtype if target is None else dtype_name(target),
        "max_shard_size": shard_bytes,
        "vocab_size": source.vocab_size,
    }
    return Conversion(
        model=model,
        source=source,
        tensors=tensors,
        target=hf_target(tensors, shard_bytes, assets),
        record=ConversionRecord("dcp_to_hf", model.identify(), options, source.record, model.left_out),
        stored={**model.published.tensors, **model.unused},
        hashed_rows=source.hashed_rows,
        casts=describe_casts(model.published.tensors, tensors),
        notes=source.describe(),
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

    The arguments are the options of checkpoint_convert/dcp_to_hf.py, which
    documents them. ``say`` receives its output, line by line.

    Raises:
        UserError: the checkpoint is incomplete or damaged, or ``output`` exists or cannot be written. No files are
            left, except finished ones after an interruption or on a full disk: see :func:`partial_folder`.
    """
    output, workers = require_absent(output), parse_workers(workers)
    require_separate([Use("--checkpoint", checkpoint)], folders=[Use(f"--output {output}", output)])
    conversion = plan_export(Path(checkpoint), dtype, max_shard_size, vocab_size)
    model, tensors, rows = conversion.model, conversion.tensors, conversion.record.options["vocab_size"]

    def compare(content: Path) -> dict[str, Any]:
        common = min(model.architecture.vocab_size, rows)
        written = dtype_named(conversion.record.options["dtype"])
        rounded_to = {**cast_to(model.parameters.tensors, written, model.float32), **tensors}
        return compare_logits(content, model.parameters, model.architecture, rounded_to, common, model.max_length)

    conversion.write(output, workers, allow_nonfinite, say, compare if verify else None)
