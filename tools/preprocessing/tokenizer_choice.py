"""Chooses the tokenizer of a run: that of ``--tokenizer`` or of ``--model``, else Qwen2's with a note."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...engine.errors import UserError
from ...engine.tokenizer.files import MODEL_CONFIG, read_config
from ...engine.tokenizer.frame import Token, describe_tokens
from ..tokenizer.handle import TokenizerHandle
from .options import PreprocessOptions

DEFAULT_TOKENIZER = "Qwen/Qwen2-72B"
_CHECKPOINT_ASSETS = "hf"


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer's name, and its model's config.json."""

    name: str
    """Folder, file or Hub name."""
    model_config: Mapping[str, Any] = field(default_factory=dict)
    """Content of the model's config.json; empty unless ``--model`` names the model."""
    notes: tuple[str, ...] = ()


def choose_tokenizer(options: PreprocessOptions) -> TokenizerChoice:
    """Return the tokenizer of ``--tokenizer`` or ``--model``, or the default. Raise UserError without such a model."""
    if options.tokenizer is not None:
        return TokenizerChoice(options.tokenizer)
    if options.model is None:
        note = (
            f"neither --model nor --tokenizer is given, so the tokenizer is that of {DEFAULT_TOKENIZER}: right for the "
            "Qwen2 family, wrong for other models; name yours with --model"
        )
        return TokenizerChoice(DEFAULT_TOKENIZER, notes=(note,))
    model = options.model
    if not os.path.lexists(model):
        return TokenizerChoice(model, _config_on_hub(model))
    if not os.path.isdir(model):
        raise UserError(f"--model {model}: not a folder; name a model's folder, or its tokenizer file with --tokenizer")
    folder = Path(model)
    # A checkpoint has a subfolder with the Hugging Face files.
    folder = folder / _CHECKPOINT_ASSETS if (folder / _CHECKPOINT_ASSETS).is_dir() else folder
    config = read_config(folder / MODEL_CONFIG)
    if not config:
        raise UserError(f"--model {model}: no {MODEL_CONFIG} in {folder}; name a model's folder or a checkpoint")
    return TokenizerChoice(str(folder), config)


def check_vocabulary(
    tokenizer: TokenizerHandle, choice: TokenizerChoice, written: tuple[Token, ...]
) -> tuple[str, ...]:
    """Compare the tokenizer with the vocabulary of ``--model``; return notes for the user.

    Args:
        written: tokens around documents.

    Raises:
        UserError: one of ``written`` is outside the model's vocabulary.
    """
    size = choice.model_config.get("vocab_size")
    if type(size) is not int or tokenizer.vocab_size <= size:
        return ()
    for token in written:
        if token[1] >= size:
            raise UserError(
                f"--model {choice.name}: the token {describe_tokens((token,))} is outside the model's vocabulary of "
                f"{size:,} ({MODEL_CONFIG}, vocab_size); use the model's own tokenizer, or add rows with extend_vocab"
            )
    return (
        f"the tokenizer has ids up to {tokenizer.vocab_size - 1:,}, but the model's vocab_size is {size:,}: a dataset "
        "that holds one of the ids above it will be refused at the start of training",
    )


def _config_on_hub(name: str) -> dict[str, Any]:
    """config.json of the Hub repository ``name``."""
    from ...engine.weights.hugging_face.hub_download import find_files

    return read_config(find_files(name, "--model", [MODEL_CONFIG]) / MODEL_CONFIG)
