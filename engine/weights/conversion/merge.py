"""Average the weights of several checkpoints, or of several Hugging Face folders, of one model.

Averaging checkpoints along a run is LAWA (Kaddour, 2022, https://arxiv.org/abs/2209.14981). With a constant learning
rate it replaces much of a decay (Hägele et al., 2024, https://arxiv.org/abs/2405.18392; Li et al., 2025,
https://arxiv.org/abs/2505.12082). Optimizer states are not averaged: the output has weights only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...files.atomic import require_absent
from ...files.hashing import hash_file
from ...files.outputs import Use, require_separate
from ..checkpoint.assets import is_hf_folder
from ..checkpoint.manifest import read_manifest
from ..checkpoint.tensors import describe_difference
from ..finite import require_finite
from ..hugging_face.weight_dtypes import dtype_name
from ..hugging_face.weight_options import DEFAULT_MAX_SHARD_SIZE, parse_shard_size
from ..tensor_source import ReadRows, StoredTensor, TensorSource
from ..workers import parse_workers
from .pipeline import Conversion, checkpoint_target, hf_target
from .provenance import ConversionRecord
from .stored_model import StoredModel, open_checkpoint, open_hf


class AveragedTensors:
    """The weighted averages of the tensors of several sources (a ``TensorSource``).

    Sums are in float64 and rounded once, to the stored dtype. Memory: one block of each dtype and its float64 sum.

    Args:
        sources: with the same tensors.
        weights: of each source; their sum is 1.
        folders: of each source, for errors.
    """

    def __init__(self, sources: Sequence[TensorSource], weights: Sequence[float], folders: Sequence[Path]):
        self.tensors: Mapping[str, StoredTensor] = sources[0].tensors
        self._sources, self._weights, self._folders = sources, weights, folders

    @contextmanager
    def rows(self, name: str) -> Iterator[ReadRows]:
        """Read rows, see :class:`~retemper.engine.weights.tensor_source.TensorSource`."""
        with ExitStack() as stack:
            readers = [stack.enter_context(source.rows(name)) for source in self._sources]
            yield lambda first, rows: self._average(name, readers, first, rows)

    def _average(self, name: str, readers: Sequence[ReadRows], first: int, rows: Tensor) -> None:
        if not rows.dtype.is_floating_point:
            self._require_equal(name, readers, first, rows)
            return
        total = torch.zeros(rows.shape, dtype=torch.float64)
        for read, weight, folder in zip(readers, self._weights, self._folders, strict=True):
            read(first, rows)
            require_finite(f"{folder}: {name}", rows, "leave it out, or use another one")
            total.add_(rows.double(), alpha=weight)
        rows.copy_(round_to_odd(total) if rows.dtype.itemsize < 4 else total)

    def _require_equal(self, name: str, readers: Sequence[ReadRows], first: int, rows: Tensor) -> None:
        other = torch.empty_like(rows)
        readers[0](first, rows)
        for read, folder in zip(readers[1:], self._folders[1:], strict=True):
            read(first, other)
            if not torch.equal(rows, other):
                raise UserError(
                    f"{folder}: {name} has dtype {dtype_name(rows.dtype)} and other values than in {self._folders[0]}; "
                    "only floating-point tensors can be averaged"
                )


def round_to_odd(values: Tensor) -> Tensor:
    """Return float64 ``values`` in float32 such that a further cast, to bf16 or fp16, rounds as a single one would.

    PyTorch casts float64 to 16 bits through float32, which rounds twice. A first rounding to the neighbour with an odd
    last bit has no effect on the second (Boldo and Melquiond, 2008, https://doi.org/10.1109/TC.2007.70819).
    """
    nearest = values.float()
    inexact = nearest.isfinite() & (nearest.double() != values)
    even = nearest.view(torch.int32) & 1 == 0
    toward = torch.where(nearest.double().abs() < values.abs(), 1, -1).int()  # magnitudes are in the lower bits
    return torch.where(inexact & even, nearest.view(torch.int32) + toward, nearest.view(torch.int32)).view(
        torch.float32
    )


def merge(
    folders: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    max_shard_size: str = DEFAULT_MAX_SHARD_SIZE,
    workers: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Write the average of ``folders`` to ``output``, in their format: a checkpoint or a Hugging Face folder.

    Config and tokenizer are those of the first folder. ``conversion.json`` records every folder with its hashes, and
    the weights.

    Args:
        folders: checkpoints or Hugging Face folders of one model, with equal dtypes.
        output: the folder to write; it must not exist.
        weights: of each folder, positive; divided by their sum. None: all are equal.
        max_shard_size: largest safetensors file of a Hugging Face folder, such as 5GB.
        workers: threads that read and write; None: one for each CPU, up to 8.
        say: receives the lines about sources and output.

    Raises:
        UserError: the folders are of different models, or damaged, or ``output`` exists or cannot be written. No files
            are left, except finished ones after an interruption or on a full disk: see :func:`partial_folder`.
    """
    output, threads, shard_bytes = require_absent(output), parse_workers(workers), parse_shard_size(max_shard_size)
    sources = [Path(folder) for folder in folders]
    shares = _shares(sources, weights)
    require_separate([Use("merge", source) for source in sources], folders=[Use(f"--output {output}", output)])
    models = _opened(sources)
    first = models[0]
    source_of = lambda model: model.parameters if first.is_checkpoint else model.published  # noqa: E731
    for model in models[1:]:
        _require_same_model(first, model)
        _require_same_tensors(first.folder, source_of(first).tensors, model.folder, source_of(model).tensors)
    averaged = AveragedTensors([source_of(model) for model in models], shares, sources)

    def identify() -> dict[str, Any]:
        return {"models": [model.identify() for model in models]}

    def verify(count: int) -> None:
        for model in models:
            model.verify(count)

    options: dict[str, Any] = {"weights": shares}
    if not first.is_checkpoint:
        options["xxh3_128"] = [_file_hashes(model, threads) for model in models]
    conversion = Conversion(
        model=replace(first, identify=identify, verify=verify),
        source=averaged,
        tensors=averaged.tensors,
        target=checkpoint_target(averaged.tensors, first.assets)
        if first.is_checkpoint
        else hf_target(averaged.tensors, shard_bytes, first.assets),
        record=ConversionRecord("merge", identify(), options, left_out=first.left_out),
        stored={**averaged.tensors, **first.unused},
        notes=[
            *(note for model in models[1:] for note in model.notes if note not in first.notes),
            *_notes_on_tokenizers(models),
            *(f"weight {share:.4g}: {model.folder}" for share, model in zip(shares, models, strict=True)),
        ],
    )
    conversion.write(output, threads, allow_nonfinite=False, say=say)


def _shares(folders: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    """Return the weight of each folder, with a sum of 1."""
    if len(folders) < 2:
        raise UserError(f"merge {folders[0]}: name two or more checkpoints or Hugging Face folders")
    if weights is None:
        return [1 / len(folders)] * len(folders)
    if len(weights) != len(folders):
        raise UserError(f"--weights has {len(weights)} numbers for {len(folders)} folders; give one for each")
    bad = next((weight for weight in weights if not (weight > 0 and math.isfinite(weight))), None)
    if bad is not None:
        raise UserError(f"--weights has {bad:g}; weights are positive and finite, and are divided by their sum")
    return [weight / math.fsum(weights) for weight in weights]


def _opened(folders: Sequence[Path]) -> list[StoredModel]:
    """Open ``folders``, which are all checkpoints or all Hugging Face folders."""
    published = [is_hf_folder(folder) for folder in folders]
    if len(set(published)) > 1:
        hf, checkpoint = folders[published.index(True)], folders[published.index(False)]
        raise UserError(
            f"{hf} is a Hugging Face folder and {checkpoint} is not; convert one of them with "
            "checkpoint_convert/hf_to_dcp.py or dcp_to_hf.py"
        )
    for folder in folders if not published[0] else ():
        if read_manifest(folder).base:
            raise UserError(
                f"{folder} holds an adapter, and averages are of whole models; export each with "
                "checkpoint_convert/dcp_to_hf.py, and average these folders"
            )
    return [open_hf(str(folder), folder) if published[0] else open_checkpoint(folder) for folder in folders]


def _require_same_model(first: StoredModel, other: StoredModel) -> None:
    ours, theirs = first.architecture.facts(), other.architecture.facts()
    differing = [name for name in ours if ours[name] != theirs.get(name)]
    if differing:
        what = ", ".join(f"{name} {ours[name]} | {theirs.get(name)}" for name in differing)
        raise UserError(f"{first.folder} and {other.folder} are different models: {what}; average those of one model")


def _require_same_tensors(
    folder: Path, tensors: Mapping[str, StoredTensor], other: Path, others: Mapping[str, StoredTensor]
) -> None:
    difference = describe_difference(others, {name: tensor.shape for name, tensor in tensors.items()})
    if difference:
        raise UserError(f"{other} does not have the tensors of {folder}: {difference}; average those of one model")
    for name, tensor in tensors.items():
        if tensor.dtype != others[name].dtype:
            raise UserError(
                f"{name} is {dtype_name(tensor.dtype)} in {folder} and {dtype_name(others[name].dtype)} in {other}; "
                "convert one of them with --dtype"
            )


def _file_hashes(model: StoredModel, threads: int) -> dict[str, str]:
    """Return the xxh3_128 of every file with weights of a Hugging Face folder, by name."""
    files = [model.folder / name for name in model.identify()["files"]]
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip((file.name for file in files), pool.map(hash_file, files), strict=True))


def _notes_on_tokenizers(models: Sequence[StoredModel]) -> list[str]:
    first = models[0]
    ours = first.assets.tokenizer_sha256
    return [
        f"note: {model.folder} has another tokenizer file than {first.folder}, whose tokenizer the output has"
        for model in models[1:]
        if model.assets.tokenizer_sha256 != ours
    ]
