"""Generate text from a Hugging Face folder or a checkpoint with our own decoder.

Decoding is simple on purpose: every new token runs the whole sequence again, without a key/value cache, one prompt at
a time. It is meant for inspecting a model during training, not for serving it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.batch import Batch
from ..engine.errors import UserError
from ..engine.model.architecture import Architecture
from ..engine.model.attention_choice import choose_for_model
from ..engine.model.config_file import CONFIG_FILE, read_hf_config
from ..engine.model.implementations import architecture_of_tensors, checked, parse_architecture
from ..engine.model.language_model import LanguageModel
from ..engine.model.wrappers import text_config_of
from ..engine.tokenizer.frame import ids_of
from ..engine.weights.checkpoint.assets import ASSET_FOLDER
from ..engine.weights.checkpoint.manifest import MANIFEST_FILE, read_manifest
from ..engine.weights.checkpoint.tensors import load_tensors, model_tensors, require_model_tensors, stored_tensors
from ..engine.weights.checkpoint.verify import require_undamaged
from ..engine.weights.damage import METADATA_FILE, TABLE_FILE
from ..engine.weights.hugging_face.model import meta_model, open_hf_model
from ..engine.weights.hugging_face.weight_dtypes import declared_dtype, dtype_named
from .sampling import Sampling
from .tokenizer.document_frame import DocumentFrame
from .tokenizer.handle import TokenizerHandle, load_prompt_tokenizer

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt."""

    text: str
    """The new text, without the token that ended it."""
    num_tokens: int
    """Number of new tokens, including the one that ended it."""
    ended_by: str
    """Reason of the end: ``end of text``, ``--max-new-tokens`` or ``full context``."""


class TextGenerator:
    """A model with its tokenizer.

    Args:
        folder: a Hugging Face folder, or a checkpoint folder (training or converted).
        tokenizer: folder, file or Hub name of the tokenizer, of any kind that preprocess accepts; None for the model's
            own.
        dtype: ``auto`` for the dtype in the model's config, else float32; or bfloat16, float16, float32.
        device: where to run: auto, cpu, cuda, cuda:1, ...
        bos: whether a prompt begins with the BOS: yes, no, or auto. auto: as the documents that a checkpoint was
            trained on, or, if that is not recorded, as the tokenizer begins texts.

    Raises:
        UserError: the folder, its weights or its tokenizer cannot be used, or there is no such device.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        bos: str = "auto",
    ):
        folder = Path(folder)
        self.device = find_device(device)
        is_checkpoint = _is_checkpoint(folder)
        assets = folder / ASSET_FOLDER if is_checkpoint else folder
        where = assets / CONFIG_FILE
        config = read_hf_config(where)
        architecture = checked(
            architecture_of_tensors(config, str(where), stored_tensors(folder))
            if is_checkpoint
            else parse_architecture(config, str(where))
        )
        self.tokenizer, document_end = _load_tokenizer(tokenizer, assets, architecture)
        frame = self.tokenizer.frame()
        trained = _bos_of_training(folder) if is_checkpoint and tokenizer is None and bos == "auto" else None
        self.prefix = ids_of(frame.documents_begin_with(bos)) if trained is None else trained
        """Ids in front of every prompt."""
        self.notes = []
        """Remarks about settings that the user may not have intended."""
        if trained is not None and trained != ids_of(frame.prefix):
            here, there = (
                f"with token {' '.join(map(str, ids))}" if ids else "without a BOS"
                for ids in (trained, ids_of(frame.prefix))
            )
            self.notes.append(
                f"prompts begin {here}, like the documents in training; the tokenizer begins texts {there}; choose "
                "with --bos"
            )
        self.stop_ids = _stop_ids(config, assets) | document_end
        self.context: int | None = text_config_of(config)[0].get("max_position_embeddings")
        """Maximum number of tokens of the model, if its config has it."""
        weights_dtype = dtype_named(dtype) or declared_dtype(config, str(where)) or torch.float32
        load = _checkpoint_decoder if is_checkpoint else _hf_decoder
        self.decoder = load(folder, architecture, weights_dtype, self.device)
        # Not as documents of equal lengths: every call has another length, and cuDNN would plan each one again.
        self.attention_backend = choose_for_model("auto", architecture, self.device, weights_dtype).backend

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of ``prompt``, with special tokens recognized, after a BOS if configured.

        A BOS at the beginning of the prompt is not doubled. Tokens that the tokenizer adds after a text are left out,
        since the model continues the text.

        Raises:
            UserError: the prompt is empty, leaves no room in the context, or has tokens that the model does not know.
        """
        if not prompt:
            raise UserError("the prompt is empty; give at least one character")
        ids = self.tokenizer.encode_flat([prompt])[0].tolist()
        if not ids:
            raise UserError(f"prompt {prompt[:40]!r}: the tokenizer makes no tokens from it; give another")
        ids = [*DocumentFrame(self.prefix).missing_prefix(np.array(ids)), *ids]
        if self.context is not None and len(ids) >= self.context:
            raise UserError(
                f"the prompt has {len(ids):,} tokens, and the model's context (max_position_embeddings) is "
                f"{self.context:,}; leave room for at least one more"
            )
        vocab_size = self.decoder.architecture.vocab_size
        if max(ids) >= vocab_size:
            raise UserError(
                f"the prompt has token {max(ids)}, and the model's vocab_size is {vocab_size}; name the tokenizer that "
                "the model was trained with by --tokenizer"
            )
        return ids

    @torch.inference_mode()
    def generate(self, prompt: str, sampling: Sampling) -> Completion:
        """Continue ``prompt``. The same prompt and ``sampling`` give the same text on the same device.

        Raises:
            UserError: see :meth:`encode`.
        """
        prompt_ids = self.encode(prompt)
        generator = torch.Generator(self.device).manual_seed(sampling.seed)
        ids, ended_by = list(prompt_ids), "--max-new-tokens"
        for _ in range(sampling.max_new_tokens):
            if self.context is not None and len(ids) >= self.context:
                ended_by = "full context"
                break
            ids.append(choose_token(self.next_logits(ids), sampling, generator))
            if ids[-1] in self.stop_ids:
                ended_by = "end of text"
                break
        new_ids = ids[len(prompt_ids) :]
        visible = new_ids[:-1] if ended_by == "end of text" else new_ids
        return Completion(self._continuation(prompt_ids, visible), len(new_ids), ended_by)

    def next_logits(self, ids: list[int]) -> Tensor:
        """Return the [V] fp32 logits of the token that follows ``ids``."""
        batch = Batch.of_documents(torch.tensor(ids), [len(ids)])
        batch = batch.prepare(self.device, self.attention_backend, self.decoder.architecture.sliding_windows)
        # The head runs only on the last position: logits of all positions would need T times the memory.
        last_H = self.decoder.hidden_states(batch)[-1]
        return self.decoder.head_logits(last_H[None])[0].float()

    def _continuation(self, prompt_ids: list[int], new_ids: list[int]) -> str:
        """Return the text of ``new_ids`` after the prompt: decoded alone, some tokenizers drop its leading space."""
        prompt, whole, alone = (
            self.tokenizer.decode(ids, special_tokens=False) for ids in (prompt_ids, [*prompt_ids, *new_ids], new_ids)
        )
        return whole[len(prompt) :] if whole.startswith(prompt) else alone


def choose_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose a token id from [V] fp32 logits: the most likely one, or a random one after temperature, top-k and
    top-p.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    scaled_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < scaled_V.numel():
        lowest_kept = scaled_V.topk(sampling.top_k).values[-1]
        scaled_V = scaled_V.masked_fill(scaled_V < lowest_kept, -math.inf)
    probabilities_V, order_V = scaled_V.softmax(-1).sort(descending=True, stable=True)
    # A token is kept if those before it have not reached top_p, so the most likely one always is.
    before_V = probabilities_V.cumsum(-1) - probabilities_V
    probabilities_V = probabilities_V.masked_fill(before_V >= sampling.top_p, 0.0)
    return int(order_V[torch.multinomial(probabilities_V, 1, generator=generator)])


def find_device(name: str) -> torch.device:
    """Return the device of ``--device name``.

    Raises:
        UserError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown kind of device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine shows {torch.cuda.device_count()} GPUs; use --device cpu")
    return device


def _is_checkpoint(folder: Path) -> bool:
    """Return whether ``folder`` is a checkpoint and not a Hugging Face folder."""
    if not folder.is_dir():
        raise UserError(f"--model {folder}: no such folder")
    if any((folder / name).is_file() for name in (MANIFEST_FILE, TABLE_FILE, METADATA_FILE)):
        read_manifest(folder)
        return True
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"--model {folder}: neither a Hugging Face folder ({CONFIG_FILE}) nor a checkpoint ({MANIFEST_FILE}); name "
            "one, such as runs/x/checkpoints/step-00001000"
        )
    return False


def _empty_decoder(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    return meta_model(architecture).cast_parameters(dtype).materialize(device).eval()


def _checkpoint_decoder(
    folder: Path, architecture: Architecture, dtype: torch.dtype, device: torch.device
) -> LanguageModel:
    decoder = _empty_decoder(architecture, dtype, device)
    require_model_tensors(folder, stored_tensors(folder), decoder)
    require_undamaged(folder)
    load_tensors(folder, model_tensors(decoder), distributed=False)
    return decoder


def _hf_decoder(folder: Path, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    model = open_hf_model(folder)
    decoder = _empty_decoder(architecture, dtype, device)
    for name, parameter in model_tensors(decoder).items():
        model.parameters.load(name, parameter)
    return decoder


def _load_tokenizer(name: str | None, assets: Path, architecture: Architecture) -> tuple[TokenizerHandle, set[int]]:
    """Return the tokenizer, and the id of the token that ends its documents, if the model knows it."""
    try:
        tokenizer = load_prompt_tokenizer(name if name is not None else assets)
    except UserError as error:
        raise error if name is not None else UserError(f"{error}; or name one with --tokenizer") from None
    try:
        _, document_end = tokenizer.eod()
    except UserError:  # it has no EOD token: then only the model's own configuration ends a text
        return tokenizer, set()
    return tokenizer, {document_end} if document_end < architecture.vocab_size else set()


def _bos_of_training(checkpoint: Path) -> tuple[int, ...] | None:
    """Return the BOS ids of the documents that a checkpoint was trained on; None if unrecorded or different between
    sources.
    """
    recorded = [dataset.get("bos") for dataset in read_manifest(checkpoint).datasets.values()]
    first: list[int] | None = recorded[0] if recorded else None
    return None if first is None or any(ids != first for ids in recorded) else tuple(first)


def _stop_ids(config: dict[str, Any], assets: Path) -> set[int]:
    """Return ``eos_token_id`` of config and generation config: a number, a list of them, or nothing."""
    path = assets / GENERATION_CONFIG
    generation = read_hf_config(path) if path.is_file() else {}
    found: set[int] = set()
    for source in (config, generation):
        value = source.get("eos_token_id")
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return found
