"""Convert a Hugging Face folder to a checkpoint for training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...files.atomic import require_absent
from ...files.outputs import Use, require_separate
from ...model.config_file import read_hf_config
from ...model.generic.remote_code import register_remote_code
from ...model.implementations import parse_architecture
from ...model.wrappers import with_vocab_size
from ..checkpoint.assets import HfAssets
from ..checkpoint.tensors import open_tensors
from ..hugging_face.hub_download import find_model_folder, require_supported
from ..hugging_face.weight_dtypes import cast_to, describe_casts, dtype_named, dtypes_of, with_dtype
from ..hugging_face.weight_options import AUTO
from ..workers import parse_workers
from .logits import compare_logits
from .pipeline import Conversion, checkpoint_target
from .provenance import ConversionRecord
from .stored_model import open_hf
from .vocabulary import ResizedVocabulary, resized_vocabulary


def convert(
    hf: str,
    output: str | Path,
    dtype: str = AUTO,
    vocab_size: int | None = None,
    pad_vocab_to_multiple_of: int | None = None,
    workers: int | None = None,
    allow_nonfinite: bool = False,
    verify: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write the checkpoint ``output`` from the Hugging Face model ``hf``.

    The arguments are the options of checkpoint_convert/hf_to_dcp.py, which
    documents them. ``say`` receives its output, line by line.

    Raises:
        UserError: the model cannot be used, or ``output`` exists or cannot be written. No files are left, except
            finished ones after an interruption or on a full disk: see :func:`partial_folder`.
    """
    output, workers = require_absent(output), parse_workers(workers)
    target = dtype_named(dtype)
    folder = find_model_folder(hf, check=_trusting if trust_remote_code else require_supported)
    if trust_remote_code:
        register_remote_code(read_hf_config(folder), folder)
    require_separate([Use("--hf", folder)], folders=[Use(f"--output {output}", output)])
    model = open_hf(hf, folder, any_vocab_size=vocab_size is not None)
    rows = model.architecture.vocab_size
    tables, multiple_of = model.architecture.tables, pad_vocab_to_multiple_of
    source = resized_vocabulary(model.parameters, tables, rows, vocab_size, multiple_of, model.assets)
    tensors = cast_to(source.tensors, target, model.kept)
    assets = with_dtype(_with_vocabulary(model.assets, source), dtypes_of(tensors, model.kept))
    if trust_remote_code:
        assets = assets.with_code(folder)
    carried = model.carried()
    if carried is not None:
        assets = carried.added_to(assets)
    options = {"dtype": dtype, "vocab_size": source.vocab_size}
    missing = [] if assets.tokenizer else [f"{folder} holds no tokenizer, so the checkpoint has none"]
    conversion = Conversion(
        model=model,
        source=source,
        tensors=tensors,
        target=checkpoint_target(tensors, assets),
        record=ConversionRecord("hf_to_dcp", model.identify(), options, source.record, model.left_out),
        stored={**model.parameters.tensors, **model.unused},
        hashed_rows=source.hashed_rows,
        casts=describe_casts(model.parameters.tensors, tensors),
        notes=[*source.describe(), *missing],
    )

    def compare(content: Path) -> dict[str, Any]:
        common, architecture = min(rows, source.vocab_size), parse_architecture(assets.config or {})
        rounded_to = {**cast_to(model.published.tensors, target, model.kept), **tensors}
        return compare_logits(folder, open_tensors(content), architecture, rounded_to, common, model.max_length)

    conversion.write(output, workers, allow_nonfinite, say, compare if verify else None)


def _trusting(folder: Path) -> None:
    """As :func:`require_supported`, with the code of the model."""
    register_remote_code(read_hf_config(folder), folder)
    require_supported(folder)


def _with_vocabulary(assets: HfAssets, source: ResizedVocabulary) -> HfAssets:
    """Return ``assets`` with the config's ``vocab_size`` set to the number of rows of the output."""
    wanted = source.vocab_size
    config = assets.config
    if config is None or parse_architecture(config).vocab_size == wanted:
        return assets
    return assets.with_config(with_vocab_size(config, wanted))
