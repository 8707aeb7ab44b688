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
from retemper.engine.model.architecture import CONFIG_FILE, read_hf_config
from retemper.engine.weights.block_copy import WrittenFile
from retemper.engine.weights.checkpoint.assets import ASSET_FOLDER, HfAssets
from retemper.engine.weights.conversion.checkpoint_model import CheckpointPlan, write_converted_manifest
from retemper.engine.weights.conversion.logits import compare_logits, describe_logits
from retemper.engine.weights.conversion.options import CHECKPOINT, HF
from retemper.engine.weights.conversion.provenance import (
    ConversionRecord,
    file_identity,
    require_same_source,
)
from retemper.engine.weights.conversion.writing import nonfinite_option, size_of, write_tensors
from retemper.engine.weights.hugging_face.shards import ShardPlan
from retemper.engine.weights.hugging_face.weight_dtypes import cast_to, describe_casts, dtype_named, with_dtype
from retemper.engine.weights.hugging_face.weight_options import AUTO, DEFAULT_MAX_SHARD_SIZE, parse_shard_size
from retemper.engine.weights.partial_folder import PartialFolder, partial_folder
from retemper.engine.weights.tensor_source import StoredTensor
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

    Args:
        megatron: the folder of a checkpoint, or the one above it with ``latest_checkpointed_iteration.txt``.
        output: the folder to write; it must not exist.
        format: ``hf`` for a Hugging Face folder, ``checkpoint`` for a checkpoint that the trainer can start from.
        config: the model's config.json, or a folder that holds it and perhaps a tokenizer; None: derived from
            Megatron's stored settings.
        tokenizer: a folder, which replaces that of ``config``.
        dtype: ``auto`` keeps each tensor's own; else bfloat16, float16 or float32.
        max_shard_size: largest safetensors file, such as ``5GB``.
        workers: threads that copy tensors; by default one for each CPU, up to 8.
        allow_nonfinite: copy weights that are NaN or infinite instead of refusing them.
        verify: compare logits with transformers, for ``hf`` only. Needs 4 bytes of memory per parameter.
        say: receives the lines about casts, omitted tensors and written files.

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
    given, where = (None, "") if config is None else (read_hf_config(config), str(_config_file(Path(config))))
    model = MegatronModel(megatron, given, where)
    tensors = cast_to(model.tensors, target)
    assets = with_dtype(_assets(config, tokenizer, model), (tensor.dtype for tensor in tensors.values()))
    for line in [*model.notes, *describe_casts(model.tensors, tensors)]:
        say(line)
    if assets.tokenizer_sha256 is None:
        say("neither --config nor --tokenizer has a tokenizer, so the output has none")

    options = {"format": format, "dtype": dtype, "max_shard_size": shard_bytes, "config": assets.config}
    options |= nonfinite_option(allow_nonfinite)
    left_out = {"state of the optimizer": list(model.left_out)} if model.left_out else {}
    record = ConversionRecord("from_megatron", _identify(model), options, left_out=left_out)
    with partial_folder(output, record.identity, say) as partial:
        done = _write(format, partial, model, tensors, assets, shard_bytes, workers, allow_nonfinite)
        require_same_source(megatron, record.source, lambda: _identify(model))
        if verify:
            a, length = model.architecture, model.config.get("max_position_embeddings")
            record.logits = compare_logits(partial.content, model, a, tensors, a.vocab_size, length)
            say(describe_logits(record.logits))
        record.write(partial.content, {**model.tensors, **model.left_out}, tensors, done.values())
        if format == CHECKPOINT:
            write_converted_manifest(partial.content, done.values())
    say(f"wrote {output}: {len(tensors)} tensors, {size_of(done.values())}")


def _write(
    format: str,
    partial: PartialFolder,
    model: MegatronModel,
    tensors: dict[str, StoredTensor],
    assets: HfAssets,
    shard_bytes: int,
    workers: int,
    allow_nonfinite: bool,
) -> dict[str, WrittenFile]:
    if format == HF:
        shards = ShardPlan(tensors, shard_bytes)
        done = write_tensors(partial, shards.files, model, {}, workers, allow_nonfinite)
        shards.write_index(partial.content)
        assets.write(partial.content)
        return done
    plan = CheckpointPlan(tensors)
    done = write_tensors(partial, plan.files, model, {}, workers, allow_nonfinite)
    plan.write_table(partial.content, done.values())
    assets.write(partial.content / ASSET_FOLDER)
    return done


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
