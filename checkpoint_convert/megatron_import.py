"""Convert a Megatron-Core checkpoint to a Hugging Face folder, or to a checkpoint for training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from retemper.engine.errors import UserError
from retemper.engine.files.atomic import require_absent
from retemper.engine.files.hashing import hash_file
from retemper.engine.files.outputs import Use, require_separate
from retemper.engine.files.regular import read_regular
from retemper.engine.model.config_file import CONFIG_FILE, read_hf_config
from retemper.engine.weights.checkpoint.assets import HfAssets
from retemper.engine.weights.conversion.logits import compare_logits
from retemper.engine.weights.conversion.options import HF
from retemper.engine.weights.conversion.pipeline import Conversion, checkpoint_target, hf_target
from retemper.engine.weights.conversion.provenance import ConversionRecord, file_identity
from retemper.engine.weights.conversion.stored_model import StoredModel
from retemper.engine.weights.hugging_face.weight_dtypes import (
    cast_to,
    describe_casts,
    dtype_named,
    dtypes_of,
    with_dtype,
)
from retemper.engine.weights.hugging_face.weight_options import AUTO, DEFAULT_MAX_SHARD_SIZE, parse_shard_size
from retemper.engine.weights.workers import parse_workers

from .megatron_reading import MegatronModel


def convert(
    megatron: str | Path,
    output: str | Path,
    format: str = HF,
    config: str | Path | None = None,
    tokenizer: str | None = None,
    dtype: str = AUTO,
    max_shard_size: str = DEFAULT_MAX_SHARD_SIZE,
    workers: int | None = None,
    allow_nonfinite: bool = False,
    verify: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write ``output`` from the Megatron checkpoint ``megatron``.

    The arguments are the options of checkpoint_convert/from_megatron.py, which
    documents them. ``say`` receives its output, line by line.

    Raises:
        UserError: the checkpoint cannot be used, or ``output`` exists or cannot be written. No files are left, except
            finished ones after an interruption or on a full disk: see :func:`partial_folder`.
    """
    output, workers = require_absent(output), parse_workers(workers)
    target, shard_bytes = dtype_named(dtype), parse_shard_size(max_shard_size)
    assert format == HF or not verify
    named = [("--megatron", megatron), ("--config", config), ("--tokenizer", tokenizer)]
    reads = [Use(option, path) for option, path in named if path is not None]
    require_separate(reads, folders=[Use(f"--output {output}", output)])
    model = _open(Path(megatron), config, tokenizer)
    source = model.published if format == HF else model.parameters
    tensors = cast_to(source.tensors, target, model.kept)
    assets = with_dtype(model.assets, dtypes_of(tensors, model.kept))

    def compare(content: Path) -> dict[str, Any]:
        a, parameters = model.architecture, model.parameters
        rounded_to = {**cast_to(parameters.tensors, target, model.kept), **tensors}
        return compare_logits(content, parameters, a, rounded_to, a.vocab_size, model.max_length)

    options = {"format": format, "dtype": dtype, "max_shard_size": shard_bytes, "config": assets.config}
    without = ["neither --config nor --tokenizer has a tokenizer, so the output has none"]
    conversion = Conversion(
        model=model,
        source=source,
        tensors=tensors,
        target=hf_target(tensors, shard_bytes, assets) if format == HF else checkpoint_target(tensors, assets),
        record=ConversionRecord("from_megatron", model.identify(), options, left_out=model.left_out),
        stored={**source.tensors, **model.unused},
        casts=describe_casts(source.tensors, tensors),
        notes=without if assets.tokenizer_sha256 is None else (),
    )
    conversion.write(output, workers, allow_nonfinite, say, compare if verify else None)


def _open(folder: Path, config: str | Path | None, tokenizer: str | None) -> StoredModel:
    given, where = (None, "") if config is None else (read_hf_config(config), str(_config_file(Path(config))))
    model = MegatronModel(folder, given, where)
    return StoredModel(
        folder=folder,
        config=model.config,
        architecture=model.architecture,
        parameters=model.parameters,
        published=model.published,
        published_tables=model.architecture.tables,
        kept=model.float32,
        unused=model.left_out,
        left_out={"state of the optimizer": list(model.left_out)} if model.left_out else {},
        assets=_assets(config, tokenizer, model),
        asset_folder=folder,
        notes=model.notes,
        identify=lambda: _identify(model),
    )


def _config_file(path: Path) -> Path:
    return path / CONFIG_FILE if path.is_dir() else path


def _assets(config: str | Path | None, tokenizer: str | None, model: MegatronModel) -> HfAssets:
    if config is None:
        assets = HfAssets({}).with_config(model.config)
    elif Path(config).is_dir():
        assets = HfAssets.read(config)
    else:
        assets = HfAssets({CONFIG_FILE: read_regular(config)})
    if tokenizer is None:
        return assets
    try:
        return assets.with_tokenizer(tokenizer)
    except UserError as error:
        raise UserError(str(error).replace("model.tokenizer", "--tokenizer", 1)) from None


def _identify(model: MegatronModel) -> dict[str, Any]:
    """Return the identity of this input."""
    first, *others = model.files
    return {
        "folder": str(model.folder.resolve()),
        f"{first.name}_xxh3_128": hash_file(first),
        "files": {path.name: file_identity(path) for path in others},
    }
