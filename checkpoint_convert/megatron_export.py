"""Convert a Hugging Face folder or a checkpoint to a Megatron-Core checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from retemper.engine.errors import UserError
from retemper.engine.files.atomic import require_absent
from retemper.engine.files.outputs import Use, require_separate
from retemper.engine.model.families import DecoderArchitecture, require_native
from retemper.engine.model.wrappers import text_config_of
from retemper.engine.weights.checkpoint.assets import ASSET_FOLDER
from retemper.engine.weights.conversion.logits import compare_logits
from retemper.engine.weights.conversion.pipeline import Conversion, Target, Written
from retemper.engine.weights.conversion.provenance import ConversionRecord
from retemper.engine.weights.conversion.stored_model import StoredModel, open_checkpoint, open_hf
from retemper.engine.weights.hugging_face.hub_download import find_model_folder
from retemper.engine.weights.hugging_face.weight_dtypes import cast_to, describe_casts, dtype_name, dtype_named
from retemper.engine.weights.hugging_face.weight_options import AUTO
from retemper.engine.weights.workers import parse_workers

from .megatron_config import args_from_config, window_options
from .megatron_layout import Vocabulary, is_homogeneous
from .megatron_mixture import mixture_options
from .megatron_reading import MegatronModel
from .megatron_writing import MegatronLayout, MegatronParts, complete_checkpoint


def convert(
    output: str | Path,
    hf: str | None = None,
    checkpoint: str | Path | None = None,
    dtype: str = AUTO,
    tensor_parallel: int = 1,
    make_vocab_size_divisible_by: int = Vocabulary.divisible_by,
    per_layer: bool = False,
    workers: int | None = None,
    allow_nonfinite: bool = False,
    verify: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write a Megatron checkpoint into ``output``.

    The arguments are the options of checkpoint_convert/to_megatron.py, which
    documents them. ``say`` receives its output, line by line.

    Raises:
        UserError: the model cannot be used, Megatron does not support it, or ``output`` exists or cannot be written. No
            files are left, except finished ones after an interruption or on a full disk.
    """
    output, workers = require_absent(output), parse_workers(workers)
    layout = MegatronLayout(Vocabulary(make_vocab_size_divisible_by, tensor_parallel), per_layer)
    target = dtype_named(dtype)
    assert (hf is None) != (checkpoint is None)
    assert hf is not None or not verify
    folder, model, architecture = _open_source(hf, checkpoint, output)
    layout = replace(layout, per_layer=per_layer or not is_homogeneous(architecture))
    args = args_from_config(model.config, architecture, layout.vocabulary, str(folder))
    source, written = model.published, target or model.export_dtype
    targets = cast_to(source.tensors, written, model.kept)
    parts = MegatronParts(source, targets, architecture, layout)

    def complete(content: Path, done: Written) -> None:
        complete_checkpoint(content, parts, done, architecture, args, layout)
        model.assets.write(content / ASSET_FOLDER)
        assert MegatronModel(content, model.config, str(folder)).published.tensors == targets

    def compare(content: Path) -> dict[str, Any]:
        back = MegatronModel(content, model.config, str(folder)).parameters
        rounded_to = {**cast_to(back.tensors, written, model.kept), **targets}
        return compare_logits(folder, back, architecture, rounded_to, architecture.vocab_size, model.max_length)

    options = {"dtype": dtype if target or model.export_dtype is None else dtype_name(model.export_dtype)}
    conversion = Conversion(
        model=model,
        source=parts,
        tensors=parts.targets,
        target=Target(parts.files(), complete),
        record=ConversionRecord(
            "to_megatron", model.identify(), {**options, **asdict(layout)}, left_out=model.left_out
        ),
        stored={**parts.unpadded, **model.unused},
        hashed_rows=parts.hashed_rows,
        casts=describe_casts(source.tensors, targets),
        notes=_advice(args),
    )
    ending = "; load it with --ckpt-format torch_dist"
    conversion.write(output, workers, allow_nonfinite, say, compare if verify else None, ending)


def _open_source(
    hf: str | None, checkpoint: str | Path | None, output: Path
) -> tuple[Path, StoredModel, DecoderArchitecture]:
    """Return the folder to read, which must not overlap ``output``, its model, and the model's architecture.

    Raises:
        UserError: the folder cannot be used, or holds more than a text model of a native family.
    """
    folder = find_model_folder(hf) if hf is not None else Path(checkpoint or "")
    read = Use("--hf" if hf is not None else "--checkpoint", folder)
    require_separate([read], folders=[Use(f"--output {output}", output)])
    model = open_hf(hf, folder) if hf is not None else open_checkpoint(folder)
    architecture = require_native(model.architecture, str(folder))
    if text_config_of(model.config)[1]:
        raise UserError(
            f"{folder}: model_type {model.config.get('model_type')} is a text model with other parts around it; only "
            "text models can be converted to Megatron's format"
        )
    return folder, model, architecture


def _advice(args: argparse.Namespace) -> list[str]:
    lines = []
    padding = args.padded_vocab_size - args.vocab_size
    if padding:
        lines.append(f"padded the vocabulary of {args.vocab_size} with {padding} rows of zeros")
    if args.num_experts is not None:
        options = mixture_options(vars(args))
        lines.append(f"if Megatron does not take the settings of experts from the checkpoint, give it {options}")
    if args.window_size is not None:
        lines.append(f"a Megatron checkpoint does not store sliding windows: give Megatron {window_options(args)}")
    return lines
