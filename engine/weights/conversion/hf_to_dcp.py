"""Convert a Hugging Face folder to a checkpoint for training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...files.atomic import require_absent
from ...files.hashing import hash_file
from ...files.outputs import Use, require_separate
from ...model.architecture import CONFIG_FILE, parse_architecture
from ..checkpoint.assets import ASSET_FOLDER, HfAssets
from ..checkpoint.tensors import open_tensors
from ..hugging_face.folder import INDEX_FILE
from ..hugging_face.hub_download import find_model_folder
from ..hugging_face.model import HfModel, open_hf_model
from ..hugging_face.weight_dtypes import cast_to, describe_casts, dtype_named, with_dtype
from ..hugging_face.weight_options import AUTO
from ..partial_folder import partial_folder
from ..workers import parse_workers
from .checkpoint_model import CheckpointPlan, write_converted_manifest
from .logits import compare_logits, describe_logits
from .provenance import ConversionRecord, file_identity, require_same_source
from .vocabulary import ResizedVocabulary, resized_vocabulary
from .writing import nonfinite_option, size_of, write_tensors


def convert(
    hf: str,
    output: str | Path,
    dtype: str = AUTO,
    vocab_size: int | None = None,
    pad_vocab_to_multiple_of: int | None = None,
    workers: int | None = None,
    allow_nonfinite: bool = False,
    verify: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write the checkpoint ``output`` from the Hugging Face model ``hf``.

    Args:
        hf: a folder, or a name on the Hub.
        output: the checkpoint folder; it must not exist.
        dtype: ``auto`` keeps each tensor's own; else bfloat16, float16 or float32.
        vocab_size: number of rows of embedding and head; by default unchanged.
        pad_vocab_to_multiple_of: alternatively, round the number of rows up to a multiple of this number.
        workers: threads that copy tensors; by default one for each CPU, up to 8.
        allow_nonfinite: copy weights that are NaN or infinite instead of refusing them.
        verify: compare logits with transformers. Needs 4 bytes of memory per parameter.
        say: receives the lines about casts, omitted tensors and written files.

    Raises:
        UserError: the model cannot be used, or ``output`` exists or cannot be written. No files are left, except
            finished ones after an interruption or on a full disk: see :func:`partial_folder`.
    """
    output, workers = require_absent(output), parse_workers(workers)
    target = dtype_named(dtype)
    folder = find_model_folder(hf)
    require_separate([Use("--hf", folder)], folders=[Use(f"--output {output}", output)])
    model, assets = open_hf_model(folder, any_vocab_size=vocab_size is not None), HfAssets.read(folder)
    rows = model.architecture.vocab_size
    source = resized_vocabulary(model, rows, vocab_size, pad_vocab_to_multiple_of, assets)
    tensors = cast_to(source.tensors, target)
    assets = with_dtype(_with_vocabulary(assets, source), (tensor.dtype for tensor in tensors.values()))
    config = assets.config or {}
    for line in [*model.notes, *describe_casts(model.tensors, tensors), *source.describe(), *_missing(assets, folder)]:
        say(line)

    options = {"dtype": dtype, "vocab_size": source.vocab_size, **nonfinite_option(allow_nonfinite)}
    record = ConversionRecord("hf_to_dcp", identify(hf, folder, model), options, source.record, model.left_out)
    with partial_folder(output, record.identity, say) as partial:
        plan = CheckpointPlan(tensors)
        done = write_tensors(partial, plan.files, source, source.hashed_rows, workers, allow_nonfinite)
        require_same_source(folder, record.source, lambda: identify(hf, folder, model))
        plan.write_table(partial.content, done.values())
        assets.write(partial.content / ASSET_FOLDER)
        if verify:
            record.logits = compare_logits(
                folder,
                open_tensors(partial.content),
                parse_architecture(config),
                tensors,
                min(rows, source.vocab_size),
                config.get("max_position_embeddings"),
            )
            say(describe_logits(record.logits))
        record.write(partial.content, model.weights.tensors, tensors, done.values())
        write_converted_manifest(partial.content, done.values())
    say(f"wrote {output}: {len(tensors)} tensors, {size_of(done.values())}")


def _missing(assets: HfAssets, folder: Path) -> list[str]:
    if assets.tokenizer is not None:
        return []
    return [f"{folder} holds no tokenizer, so the checkpoint has none"]


def _with_vocabulary(assets: HfAssets, source: ResizedVocabulary) -> HfAssets:
    """Return ``assets`` with the config's ``vocab_size`` set to the number of rows of the output."""
    wanted = source.vocab_size
    config = assets.config
    if config is None or config.get("vocab_size") == wanted:
        return assets
    return assets.with_config({**config, "vocab_size": wanted})


def identify(hf: str, folder: Path, model: HfModel) -> dict[str, Any]:
    """Return the identity of the model named ``hf``, in ``folder``."""
    index = folder / INDEX_FILE
    return {
        "name": hf,
        "folder": str(folder.resolve()),
        "config_xxh3_128": hash_file(folder / CONFIG_FILE),
        "index_xxh3_128": hash_file(index) if index.is_file() else None,
        "files": {path.name: file_identity(path) for path in model.weights.files},
    }
