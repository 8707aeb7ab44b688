"""Match a Hugging Face folder to our decoder: exactly its parameters, or an error line with the difference."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError
from ...model.config_file import CONFIG_FILE, read_hf_config
from ...model.config_keys import describe_unread
from ...model.implementations import meta_model, parse_architecture
from ...model.language_model import Architecture, LanguageModel
from ..block_copy import BLOCK_BYTES
from ..checkpoint.tensors import describe_difference
from ..parts import TensorParts
from ..raw_bytes import bytes_of
from ..tensor_source import StoredTensor, rows_of
from .folder import HfWeights
from .names import describe_renamed, renaming_hint
from .weight_dtypes import WEIGHT_DTYPES, dtype_name

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_RECOMPUTED = ".rotary_emb.inv_freq"
"""Suffix of a buffer that old versions of transformers saved; it follows from the config."""


@dataclass(frozen=True)
class HfModel:
    """The parameters of a decoder in a Hugging Face folder."""

    config: dict[str, Any]
    """Content of ``config.json``."""
    architecture: Architecture
    stored: HfWeights
    """All tensors."""
    parameters: TensorParts
    """Parameters, in the decoder's order."""
    notes: list[str]
    """Remarks about tensors that were left out, a line each."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Names of the tensors that are not parameters, by reason."""


def open_hf_model(folder: str | Path, any_vocab_size: bool = False, config: dict[str, Any] | None = None) -> HfModel:
    """Open the Hugging Face ``folder`` and check that it holds exactly the parameters that its config requires.

    Args:
        folder: the folder.
        any_vocab_size: accept embeddings with another number of rows than the config's ``vocab_size``, which is then
            set to that number.
        config: content of its config.json, if it has been read already.

    Raises:
        UserError: config or weights cannot be used, or do not match.
    """
    config = read_hf_config(folder) if config is None else config
    architecture = parse_architecture(config, str(Path(folder) / CONFIG_FILE))
    weights = HfWeights(folder)
    notes = [*describe_unread(config, CONFIG_FILE), *describe_renamed(weights.stored_names)]
    if architecture.tie_word_embeddings and HEAD in weights.tensors and EMBEDDING not in weights.tensors:
        weights.rename(HEAD, EMBEDDING)
        notes.append(
            f"note: {EMBEDDING} is read from {HEAD}, the only one of the two in the files: the config ties them"
        )
    tensors = dict(weights.tensors)
    left_out: dict[str, list[str]] = {}
    rows = _embedding_rows(tensors, architecture)
    if rows != architecture.vocab_size:
        if not any_vocab_size:
            raise UserError(
                f"{folder}: {EMBEDDING} has {rows} rows, {CONFIG_FILE} has vocab_size {architecture.vocab_size}; "
                f"convert it with checkpoint_convert/hf_to_dcp.py and --vocab-size {rows} to keep all rows, or "
                f"--vocab-size {architecture.vocab_size} to follow the config"
            )
        config = {**config, "vocab_size": rows}
        architecture = parse_architecture(config, str(Path(folder) / CONFIG_FILE))
    notes += _notes_on_ignored(config, architecture, weights)
    recomputed = [name for name in tensors if name.endswith(_RECOMPUTED)]
    if recomputed:
        notes.append(f"left out {len(recomputed)} tensors that follow from the config: *{_RECOMPUTED}")
        left_out["follows from the config"] = list(recomputed)
    if architecture.tie_word_embeddings and HEAD in tensors:
        _require_tied(weights)
        notes.append(f"left out {HEAD}, a copy of {EMBEDDING}: the config ties them")
        left_out[f"the same bytes as {EMBEDDING}, which the config ties it to"] = [HEAD]
        recomputed.append(HEAD)
    for name in recomputed:
        del tensors[name]
    decoder = meta_model(architecture)
    _require_parameters(tensors, decoder, weights)
    parameters = weights.only(name for name, _ in decoder.named_parameters())
    _require_floats(parameters.tensors, folder)
    return HfModel(config, architecture, weights, parameters, notes, left_out)


def _notes_on_ignored(config: dict[str, Any], architecture: Architecture, weights: HfWeights) -> list[str]:
    """Return a line about custom code, and one about weight files, that the folder has and that are not used."""
    notes = []
    if config.get("auto_map"):
        notes.append(
            f"{CONFIG_FILE} refers to custom code (auto_map), which is not run; the weights are read as model_type "
            f"{architecture.model_type}"
        )
    if weights.ignored_files:
        notes.append(
            f"ignored {len(weights.ignored_files)} weight files that are not part of the model: "
            + ", ".join(weights.ignored_files)
        )
    return notes


def _require_parameters(tensors: dict[str, StoredTensor], decoder: LanguageModel, weights: HfWeights) -> None:
    """Refuse ``tensors`` that are not exactly the parameters of ``decoder``."""
    difference = describe_difference(tensors, decoder)
    if difference:
        unexpected = tensors.keys() - {name for name, _ in decoder.named_parameters()}
        hint = renaming_hint([weights.stored_names[name] for name in tensors if name in unexpected])
        raise UserError(f"{weights.folder}: the weights do not fit {CONFIG_FILE}: {difference}{hint}")


def _embedding_rows(tensors: dict[str, StoredTensor], architecture: Architecture) -> int:
    """Return the rows of embedding and head, if they agree and have the width of the model; else the config's number.

    In the second case the comparison with the decoder reports the difference.
    """
    shapes = {tensors[name].shape for name in (EMBEDDING, HEAD) if name in tensors}
    shape = shapes.pop() if len(shapes) == 1 else ()
    return shape[0] if shape[1:] == (architecture.hidden_size,) and shape[0] else architecture.vocab_size


def _require_tied(weights: HfWeights) -> None:
    """Check that a head stored with tied embeddings equals the embeddings, bit for bit."""
    head, embedding = weights.tensors[HEAD], weights.tensors.get(EMBEDDING)
    # Without embeddings, the comparison with the decoder reports what is missing.
    if embedding is None:
        return
    if head != embedding or not _same_values(weights, HEAD, EMBEDDING):
        raise UserError(
            f"{weights.folder}: {CONFIG_FILE} has tie_word_embeddings, but {HEAD} differs from {EMBEDDING}; set "
            f"tie_word_embeddings to false to keep both, or remove {HEAD}"
        )


def _same_values(weights: HfWeights, one: str, other: str) -> bool:
    """Return whether two tensors of one shape and dtype are equal, bit for bit, compared in blocks."""
    shape, dtype = weights.tensors[one].shape, weights.tensors[one].dtype
    num_rows, *rest = rows_of(shape)
    step = max(1, BLOCK_BYTES // max(1, math.prod(rest) * dtype.itemsize))
    with weights.rows(one) as read_one, weights.rows(other) as read_other:
        for first in range(0, num_rows, step):
            blocks = [torch.empty((min(step, num_rows - first), *rest), dtype=dtype) for _ in range(2)]
            read_one(first, blocks[0])
            read_other(first, blocks[1])
            if bytes_of(blocks[0]) != bytes_of(blocks[1]):
                return False
    return True


def _require_floats(tensors: dict[str, StoredTensor], folder: str | Path) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES.values():
            raise UserError(
                f"{folder}: {name} is {dtype_name(tensor.dtype)}, supported: {', '.join(WEIGHT_DTYPES)}; quantized "
                "weights must be dequantized first"
            )
