"""Match a Hugging Face folder to a model: exactly its parameters, or an error line with the difference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...model.architecture import Architecture
from ...model.config_file import CONFIG_FILE, read_hf_config
from ...model.config_keys import describe_unread
from ...model.implementations import Requested, meta_model, parse_architecture
from ...model.wrappers import names_in_wrapper, text_config_of, with_vocab_size
from ..block_copy import BLOCK_BYTES
from ..checkpoint.tensors import describe_difference
from ..parts import TensorParts
from ..raw_bytes import bytes_of
from ..tensor_source import StoredTensor, read_blocks
from .folder import HfWeights
from .layout import Layout
from .names import describe_renamed, parameter_names, renaming_hint
from .weight_dtypes import WEIGHT_DTYPES, dtype_name

_RECOMPUTED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias")
"""Suffixes of buffers that old versions of transformers saved, if no parameter has the name. They follow from the
config: rotary frequencies, and the causal masks of GPT-NeoX and GPT-2."""


@dataclass(frozen=True)
class HfModel:
    """The parameters of a model in a Hugging Face folder."""

    config: dict[str, Any]
    """Content of ``config.json``."""
    architecture: Architecture
    weights: HfWeights
    """All tensors, under their names in the files."""
    layout: Layout
    """How the files hold the parameters."""
    published: TensorParts
    """The tensors that hold parameters, under the names that transformers saves."""
    parameters: TensorParts
    """Parameters, in the model's order."""
    notes: list[str]
    """Remarks about tensors that were left out, a line each."""
    names: Mapping[str, str]
    """Name in the files of every tensor in ``published``."""
    carried: list[str] = field(default_factory=list)
    """Names in the files of the tensors that exports take from there: those of a wrapper around the model, and those
    that transformers does not load. They are among ``left_out``."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Names in the files of the tensors that hold no parameters, by reason."""

    def exported_name(self, published: str) -> str:
        """Return the name of a published tensor in files of the whole model, which may be a wrapper."""
        return self.names.get(published, published) if text_config_of(self.config)[1] else published

    def with_carried(self) -> TensorParts:
        """Return the published tensors and the carried ones, as files of the whole model hold them."""
        own = {self.exported_name(name): self.names[name] for name in self.published.tensors}
        return self.weights.renamed({**own, **{name: name for name in self.carried}})


def open_hf_model(
    folder: str | Path,
    any_vocab_size: bool = False,
    config: dict[str, Any] | None = None,
    requested: Requested = "auto",
) -> HfModel:
    """Open the Hugging Face ``folder`` and check that it holds exactly the parameters that its config requires.

    Args:
        folder: the folder.
        any_vocab_size: accept embeddings with another number of rows than the config's ``vocab_size``, which is then
            set to that number.
        config: content of its config.json, if it has been read already.
        requested: the implementation.

    Raises:
        UserError: config or weights cannot be used, or do not match.
    """
    config = read_hf_config(folder) if config is None else config
    where = str(Path(folder) / CONFIG_FILE)
    architecture = parse_architecture(config, where, requested)
    weights = HfWeights(folder)
    tensors = _Tensors(weights, architecture, config)
    rows = tensors.num_rows()
    if rows != architecture.vocab_size:
        if not any_vocab_size:
            raise UserError(
                f"{folder}: {architecture.embedding_name} has {rows} rows, {CONFIG_FILE} has vocab_size "
                f"{architecture.vocab_size}; convert it with checkpoint_convert/hf_to_dcp.py and --vocab-size {rows} "
                f"to keep all rows, or --vocab-size {architecture.vocab_size} to follow the config"
            )
        config = with_vocab_size(config, rows)
        architecture = parse_architecture(config, where, requested)
        tensors = _Tensors(weights, architecture, config)
    left_out = tensors.leave_out()
    published, layout = tensors.published(), tensors.layout
    parameters = layout.parameters(published)
    _require_floats(published.tensors, folder)
    unread = describe_unread(architecture.unread_keys(text_config_of(config)[0]), CONFIG_FILE)
    notes = [*unread, *tensors.notes, *_notes_on_ignored(config, architecture, weights)]
    names, carried = tensors.names, tensors.carried
    return HfModel(config, architecture, weights, layout, published, parameters, notes, names, carried, left_out)


class _Tensors:
    """The tensors of a folder under the names that transformers gives them, and what the model needs of them."""

    def __init__(self, weights: HfWeights, architecture: Architecture, config: dict[str, Any]):
        self._weights, self._architecture = weights, architecture
        layout = Layout.of(architecture, meta_model(architecture))
        self._prefix = layout.published_name(architecture.embedding_name).partition(".")[0] + "."
        self.notes: list[str] = []
        self.carried: list[str] = []
        """Names in the files of the tensors that exports take from there."""
        self._is_wrapped = text_config_of(config)[1]
        if self._is_wrapped:
            text = {stored: name for name, stored in names_in_wrapper(config, weights.tensors).items()}
            self.names = {text.get(stored, stored): stored for stored in weights.tensors}
        else:
            self.names = parameter_names(weights.tensors, layout.published_shapes, self._prefix, weights.folder)
            self.notes += describe_renamed(self.names)
        self.layout = layout.found_in(self.names)
        self._embedding = self.layout.published_name(architecture.embedding_name)
        self._head = self.layout.published_name(architecture.head_name)
        self._read_embedding_from_head()

    def _read_embedding_from_head(self) -> None:
        """If tied embeddings are stored only as the head, read them from there."""
        embedding, head = self._embedding, self._head
        if self._architecture.tie_word_embeddings and head in self.names and embedding not in self.names:
            self.names = {embedding if name == head else name: stored for name, stored in self.names.items()}
            self.notes.append(
                f"note: {embedding} is read from {head}, the only one of the two in the files: the config ties them"
            )

    @property
    def _tensors(self) -> dict[str, StoredTensor]:
        return {name: self._weights.tensors[stored] for name, stored in self.names.items()}

    def num_rows(self) -> int:
        """Return the rows of embedding and head, if they agree and have the width of the model; else the config's.

        In the second case the comparison with the model reports the difference.
        """
        found, architecture = self._tensors, self._architecture
        shapes = {found[name].shape for name in (self._embedding, self._head) if name in found}
        shape = shapes.pop() if len(shapes) == 1 else ()
        width = self.layout.published_shapes[self._embedding][1:]
        return shape[0] if shape and shape[1:] == width and shape[0] else architecture.vocab_size

    def leave_out(self) -> dict[str, list[str]]:
        """Return the names in the files of the tensors that the model does not need, by reason, and forget them."""
        left_out, needed = {}, self.layout.published_shapes
        others = [name for name in self.names if name not in needed]
        if self._architecture.tie_word_embeddings and self._head in others:
            self._require_tied()
            self.notes.append(f"left out {self._head}, a copy of {self._embedding}: the config ties them")
            left_out[f"the same bytes as {self._embedding}, which the config ties it to"] = [self._head]
            others.remove(self._head)
        recomputed = [] if self._is_wrapped else [name for name in others if name.endswith(_RECOMPUTED)]
        if recomputed:
            kinds = ", ".join(f"*{end}" for end in _RECOMPUTED if any(name.endswith(end) for name in recomputed))
            self.notes.append(f"left out {len(recomputed)} tensors that follow from the config: {kinds}")
            left_out["follows from the config"] = recomputed
        carried = [name for name in others if name not in recomputed and self._is_carried(name)]
        if carried:
            self.notes.append(
                f"{len(carried)} tensors are not trained, such as {carried[0]}; exports take them from here"
            )
            left_out["not trained; exports copy it from here"] = carried
            self.carried = [self.names[name] for name in carried]
        named = {reason: [self.names[name] for name in names] for reason, names in left_out.items()}
        done = {name for names in left_out.values() for name in names}
        self.names = {name: stored for name, stored in self.names.items() if name not in done}
        return named

    def _is_carried(self, name: str) -> bool:
        return self._is_wrapped or any(re.search(pattern, name) for pattern in self._architecture.unused_tensors)

    def published(self) -> TensorParts:
        """Return the tensors that hold the parameters, in the order of the parameters.

        Raises:
            UserError: the remaining tensors are not exactly those that the model needs.
        """
        needed = self.layout.published_shapes
        difference = describe_difference(self._tensors, needed)
        if difference:
            unexpected = [stored for name, stored in self.names.items() if name not in needed]
            missing = [name for name in needed if name not in self.names]
            hint = renaming_hint(unexpected, missing, self._prefix) or self._hint_about_head(missing)
            raise UserError(f"{self._weights.folder}: the weights do not fit {CONFIG_FILE}: {difference}{hint}")
        return self._weights.renamed({name: self.names[name] for name in needed})

    def _hint_about_head(self, missing: list[str]) -> str:
        if missing != [self._head]:
            return ""
        return "; set tie_word_embeddings to true if the embedding is also the output head"

    def _require_tied(self) -> None:
        """Check that a head stored with tied embeddings equals the embeddings, bit for bit."""
        embedding, head = self.names.get(self._embedding), self.names[self._head]
        # Without embeddings, the comparison with the model reports what is missing.
        if embedding is None:
            return
        tensors = self._weights.tensors
        if tensors[head] != tensors[embedding] or not _same_values(self._weights, head, embedding):
            raise UserError(
                f"{self._weights.folder}: {CONFIG_FILE} has tie_word_embeddings, but {self._head} differs from "
                f"{self._embedding}; set tie_word_embeddings to false to keep both, or remove {self._head}"
            )


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


def _same_values(weights: HfWeights, one: str, other: str) -> bool:
    """Return whether two tensors of one shape and dtype are equal, bit for bit, compared in blocks."""
    blocks = (read_blocks(weights, name, BLOCK_BYTES) for name in (one, other))
    return all(bytes_of(first) == bytes_of(second) for first, second in zip(*blocks, strict=True))


def _require_floats(tensors: Mapping[str, StoredTensor], folder: str | Path) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES.values():
            raise UserError(
                f"{folder}: {name} is {dtype_name(tensor.dtype)}, supported: {', '.join(WEIGHT_DTYPES)}; quantized "
                "weights must be dequantized first"
            )
