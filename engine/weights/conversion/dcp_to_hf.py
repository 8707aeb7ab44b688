"""Convert a checkpoint to a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files.atomic import require_absent
from ...files.outputs import Use, require_separate
from ...model.config_file import read_hf_config
from ...model.generic.remote_code import register_remote_code
from ...model.wrappers import with_vocab_size
from ..checkpoint.assets import ASSET_FOLDER
from ..hugging_face.carried import OPTION, WithCarried
from ..hugging_face.weight_dtypes import cast_to, describe_casts, dtype_name, dtype_named, dtypes_of, with_dtype
from ..hugging_face.weight_options import AUTO, DEFAULT_MAX_SHARD_SIZE, parse_shard_size
from ..workers import parse_workers
from .logits import compare_logits
from .peft_export import plan_peft_export
from .pipeline import Conversion, hf_target
from .provenance import ConversionRecord
from .stored_model import StoredModel, open_checkpoint
from .vocabulary import resized_vocabulary


def plan_export(
    checkpoint: Path,
    dtype: str = AUTO,
    max_shard_size: str = DEFAULT_MAX_SHARD_SIZE,
    vocab_size: int | None = None,
    carried_from: str | None = None,
    ema: bool = False,
    base: str | None = None,
    adapter: bool = False,
) -> Conversion:
    """Return the plan of :func:`convert` with these arguments.

    Raises:
        UserError: the checkpoint is incomplete, or not a model that can be exported.
    """
    target, shard_bytes = dtype_named(dtype), parse_shard_size(max_shard_size)
    model = open_checkpoint(checkpoint, ema, base)
    if adapter:
        return plan_peft_export(model, target, ema)
    target = target or model.export_dtype
    assets, rows = model.assets, model.architecture.vocab_size
    model = _with_carried(model, carried_from)
    source = resized_vocabulary(model.published, model.published_tables, rows, vocab_size, None, assets)
    tensors = cast_to(source.tensors, target, model.kept)
    if source.vocab_size != rows:
        assets = assets.with_config(with_vocab_size(model.config, source.vocab_size))
    assets = with_dtype(assets, dtypes_of(tensors, model.kept))
    options = {
        "dtype": dtype if target is None else dtype_name(target),
        "max_shard_size": shard_bytes,
        "vocab_size": source.vocab_size,
    }
    if ema:
        options["ema"] = True
    if isinstance(model.published, WithCarried):
        options["carried_from"] = model.published.identity
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


def _with_carried(model: StoredModel, carried_from: str | None) -> StoredModel:
    """Return ``model`` with the published tensors of the whole model, if it carries some that are not trained.

    Raises:
        UserError: they are missing, or there are none and ``carried_from`` is given.
    """
    carried = model.carried()
    if carried is None:
        if carried_from is not None:
            raise UserError(f"{OPTION} {carried_from}: {model.folder} needs no tensors from elsewhere; remove it")
        return model
    whole = WithCarried(model.published, carried, model.config, carried_from)
    kept = [*model.kept, *(whole.names.get(name, name) for name in model.kept), *carried.sha256]
    return replace(
        model,
        published=whole,
        published_tables=[whole.names.get(name, name) for name in model.published_tables],
        kept=kept,
        notes=[*model.notes, f"{len(carried.sha256)} tensors that are not trained come from {whole.where}"],
    )


def convert(
    checkpoint: str | Path,
    output: str | Path,
    dtype: str = AUTO,
    max_shard_size: str = DEFAULT_MAX_SHARD_SIZE,
    vocab_size: int | None = None,
    carried_from: str | None = None,
    base: str | None = None,
    adapter: bool = False,
    workers: int | None = None,
    allow_nonfinite: bool = False,
    verify: bool = False,
    trust_remote_code: bool = False,
    ema: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write the Hugging Face folder ``output`` from ``checkpoint``, or with ``adapter`` a folder of PEFT.

    The arguments are the options of checkpoint_convert/dcp_to_hf.py, which
    documents them. ``say`` receives its output, line by line.

    Raises:
        UserError: the checkpoint is incomplete or damaged, or ``output`` exists or cannot be written. No files are
            left, except finished ones after an interruption or on a full disk: see :func:`partial_folder`.
    """
    output, workers = require_absent(output), parse_workers(workers)
    require_separate([Use("--checkpoint", checkpoint)], folders=[Use(f"--output {output}", output)])
    if trust_remote_code:
        assets = Path(checkpoint) / ASSET_FOLDER
        register_remote_code(read_hf_config(assets), assets)
    conversion = plan_export(Path(checkpoint), dtype, max_shard_size, vocab_size, carried_from, ema, base, adapter)
    model, tensors = conversion.model, conversion.tensors

    def compare(content: Path) -> dict[str, Any]:
        rows = conversion.record.options["vocab_size"]
        common = min(model.architecture.vocab_size, rows)
        written = dtype_named(conversion.record.options["dtype"])
        rounded_to = {**cast_to(model.parameters.tensors, written, model.kept), **tensors}
        return compare_logits(content, model.parameters, model.architecture, rounded_to, common, model.max_length)

    conversion.write(output, workers, allow_nonfinite, say, compare if verify else None)
