"""A Hugging Face folder as our decoder sees it: exactly its parameters, or a line that says what differs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.tensors import StoredTensor, describe_difference
from ..errors import UserError
from ..model.architecture import CONFIG_FILE, Architecture, parse_architecture, read_hf_config
from ..model.decoder import meta_decoder
from .folder import HfWeights
from .weight_dtypes import DTYPES, dtype_name

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_RECOMPUTED = ".rotary_emb.inv_freq"
"""Ending of a buffer that old versions of transformers saved; it follows from the config."""


@dataclass(frozen=True)
class HfModel:
    """The parameters of a decoder in a Hugging Face folder."""

    config: dict[str, Any]
    """Content of ``config.json``."""
    architecture: Architecture
    tensors: dict[str, StoredTensor]
    """Names, shapes and dtypes, in the decoder's order."""
    notes: list[str]
    """What was left out, a line each."""
    weights: HfWeights

    def read(self, name: str) -> Tensor:
        """See :meth:`HfWeights.read`."""
        return self.weights.read(name)


def open_hf_model(folder: str | Path) -> HfModel:
    """Open the Hugging Face ``folder`` and check that it holds exactly the parameters that its config calls for.

    Raises:
        UserError: config or weights cannot be used, or do not fit each other.
    """
    config = read_hf_config(folder)
    architecture = parse_architecture(config, str(Path(folder) / CONFIG_FILE))
    weights = HfWeights(folder)
    tensors, notes = dict(weights.tensors), []
    if weights.ignored_files:
        notes.append(
            f"ignored {len(weights.ignored_files)} safetensors files that are not part of the model: "
            + ", ".join(weights.ignored_files)
        )
    recomputed = [name for name in tensors if name.endswith(_RECOMPUTED)]
    if recomputed:
        notes.append(f"left out {len(recomputed)} tensors that follow from the config: *{_RECOMPUTED}")
    if architecture.tie_word_embeddings and HEAD in tensors:
        _require_tied(weights)
        notes.append(f"left out {HEAD}, a copy of {EMBEDDING}: the config ties them")
        recomputed.append(HEAD)
    for name in recomputed:
        del tensors[name]
    decoder = meta_decoder(architecture)
    difference = describe_difference(tensors, decoder)
    if difference:
        raise UserError(f"{folder}: the weights do not fit {CONFIG_FILE}: {difference}")
    ordered = {name: tensors[name] for name, _ in decoder.named_parameters()}
    _require_floats(ordered, folder)
    return HfModel(config, architecture, ordered, notes, weights)


def _require_tied(weights: HfWeights) -> None:
    """A head stored beside tied embeddings must be the embeddings, bit for bit."""
    head, embedding = weights.tensors[HEAD], weights.tensors.get(EMBEDDING)
    # Without embeddings, the comparison with the decoder names what is missing.
    if embedding is None:
        return
    same = head == embedding and torch.equal(*(weights.read(name).view(torch.uint8) for name in (HEAD, EMBEDDING)))
    if not same:
        raise UserError(
            f"{weights.folder}: {CONFIG_FILE} says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}; set "
            f"tie_word_embeddings to false to keep both, or remove {HEAD}"
        )


def _require_floats(tensors: dict[str, StoredTensor], folder: str | Path) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise UserError(
                f"{folder}: {name} is {dtype_name(tensor.dtype)}, supported: {', '.join(DTYPES)}; quantized weights "
                "must be dequantized first"
            )
