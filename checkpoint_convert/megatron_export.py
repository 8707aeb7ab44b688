"""Convert a Hugging Face folder or a checkpoint to a Megatron-Core checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from retemper.engine.files.atomic import require_absent
from retemper.engine.files.outputs import Use, require_separate
from retemper.engine.model.architecture import Architecture
from retemper.engine.weights.checkpoint.assets import ASSET_FOLDER, HfAssets
from retemper.engine.weights.conversion.checkpoint_model import CheckpointModel, open_checkpoint_model
from retemper.engine.weights.conversion.hf_to_dcp import identify
from retemper.engine.weights.conversion.logits import compare_logits, describe_logits
from retemper.engine.weights.conversion.provenance import ConversionRecord, require_same_source
from retemper.engine.weights.conversion.writing import nonfinite_option, size_of, write_tensors
from retemper.engine.weights.hugging_face.hub_download import find_model_folder
from retemper.engine.weights.hugging_face.model import open_hf_model
from retemper.engine.weights.hugging_face.weight_dtypes import cast_to, describe_casts, dtype_name, dtype_named
from retemper.engine.weights.hugging_face.weight_options import AUTO
from retemper.engine.weights.partial_folder import partial_folder
from retemper.engine.weights.tensor_source import StoredTensor, TensorSource
from retemper.engine.weights.workers import parse_workers

from .megatron_config import args_from_config, window_options
from .megatron_layout import Vocabulary
from .megatron_reading import MegatronModel
from .megatron_writing import Layout, MegatronPieces, complete_checkpoint


@dataclass(frozen=True)
class _Source:
    """The input of a conversion."""

    folder: Path
    weights: TensorSource
    config: dict[str, Any]
    architecture: Architecture
    assets: HfAssets
    identify: Callable[[], dict[str, Any]]
    """Returns the identity of the input."""
    notes: list[str]
    left_out: dict[str, list[str]]
    all_tensors: Mapping[str, StoredTensor]
    """All tensors, including those that are left out."""
    dtype: torch.dtype | None = None
    """Default dtype of the output; None: each tensor's own."""

    @property
    def unused(self) -> dict[str, StoredTensor]:
        """Return the tensors that are left out."""
        return {name: self.all_tensors[name] for names in self.left_out.values() for name in names}


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

    Args:
        output: the folder to write; it must not exist.
        hf: a Hugging Face folder, or a name on the Hub; or
        checkpoint: a folder written by the trainer or by hf_to_dcp.
        dtype: ``auto`` keeps each tensor's own; for a training checkpoint it is the dtype of its config, else float32.
        tensor_parallel: tensor-parallel size of the Megatron run, for the padding of the vocabulary.
        make_vocab_size_divisible_by: Megatron's option of that name. 1, on one rank, adds no padding.
        per_layer: separate keys for each layer's tensors instead of stacked ones.
        workers: threads that copy tensors; by default one for each CPU, up to 8.
        allow_nonfinite: copy weights that are NaN or infinite instead of refusing them.
        verify: compare logits with transformers, for ``hf`` only. Needs 4 bytes of memory per parameter.
        say: receives the lines about casts, omitted tensors and written files.

    Raises:
        UserError: the model cannot be used, Megatron does not support it, or ``output`` exists or cannot be written. No
            files are left, except finished ones after an interruption or on a full disk.
    """
    output, workers = require_absent(output), parse_workers(workers)
    layout = Layout(Vocabulary(make_vocab_size_divisible_by, tensor_parallel), per_layer)
    target = dtype_named(dtype)
    assert (hf is None) != (checkpoint is None)
    assert hf is not None or not verify
    source = _open_hf(hf, output) if hf is not None else _open_checkpoint(Path(checkpoint or ""), output, workers)
    where = str(source.folder)
    args = args_from_config(source.config, source.architecture, layout.vocabulary, where)
    targets = cast_to(source.weights.tensors, target or source.dtype)
    pieces = MegatronPieces(source.weights, targets, source.architecture, layout)
    for line in [*source.notes, *describe_casts(source.weights.tensors, targets), *_advice(args)]:
        say(line)

    options = {"dtype": dtype if target or source.dtype is None else dtype_name(source.dtype), **asdict(layout)}
    options |= nonfinite_option(allow_nonfinite)
    record = ConversionRecord("to_megatron", source.identify(), options, left_out=source.left_out)
    with partial_folder(output, record.identity, say) as partial:
        done = write_tensors(partial, pieces.files(), pieces, pieces.hashed_rows, workers, allow_nonfinite)
        require_same_source(source.folder, record.source, source.identify)
        complete_checkpoint(partial.content, pieces, done, source.architecture, args, layout)
        source.assets.write(partial.content / ASSET_FOLDER)
        back = MegatronModel(partial.content, source.config, where)
        assert back.tensors == targets
        if verify:
            length, vocab_size = source.config.get("max_position_embeddings"), source.architecture.vocab_size
            record.logits = compare_logits(source.folder, back, source.architecture, targets, vocab_size, length)
            say(describe_logits(record.logits))
        record.write(partial.content, {**pieces.unpadded, **source.unused}, pieces.targets, done.values())
    say(f"wrote {output}: {len(targets)} tensors, {size_of(done.values())}; load it with --ckpt-format torch_dist")


def _advice(args: argparse.Namespace) -> list[str]:
    lines = []
    padding = args.padded_vocab_size - args.vocab_size
    if padding:
        lines.append(f"padded the vocabulary of {args.vocab_size} with {padding} rows of zeros")
    if args.window_size is not None:
        lines.append(f"a Megatron checkpoint does not store sliding windows: give Megatron {window_options(args)}")
    return lines


def _open_hf(hf: str, output: Path) -> _Source:
    folder = find_model_folder(hf)
    require_separate([Use("--hf", folder)], folders=[Use(f"--output {output}", output)])
    model = open_hf_model(folder)
    return _Source(
        folder,
        model,
        model.config,
        model.architecture,
        HfAssets.read(folder),
        lambda: identify(hf, folder, model),
        model.notes,
        model.left_out,
        model.weights.tensors,
    )


def _open_checkpoint(folder: Path, output: Path, workers: int) -> _Source:
    require_separate([Use("--checkpoint", folder)], folders=[Use(f"--output {output}", output)])
    model = open_checkpoint_model(folder)
    model.verify(workers)
    return _Source(
        folder,
        model.weights,
        model.config,
        model.architecture,
        model.assets,
        lambda: _identity_of(model),
        model.notes,
        model.left_out,
        model.stored.tensors,
        model.export_dtype(),
    )


def _identity_of(model: CheckpointModel) -> dict[str, Any]:
    model.require_unchanged()
    return model.identity
