"""A small byte-level BPE tokenizer, trained in a fraction of a second, and text to go with it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "rain",
    "fell",
    "over",
    "old",
    "stone",
    "roofs",
    "and",
    "nobody",
    "in",
    "town",
    "had",
    "seen",
    "such",
    "weather",
]


def sample_text(seed: int, words: int) -> str:
    """Reproducible text of ``words`` words, with some non-ASCII characters."""
    draw = random.Random(seed)
    return " ".join(draw.choice([*WORDS, "naïve", "天色如洗", "🙂", "\n"]) for _ in range(words))


def train_tiny_tokenizer(
    folder: Path, special: tuple[str, ...] = ("<|endoftext|>", "<|im_end|>"), eos: str | None = "<|im_end|>"
) -> Path:
    """Train on a few hundred lines and save ``tokenizer.json``, with ``eos`` in ``tokenizer_config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sample_text(seed, 30) for seed in range(300)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    if eos is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}), encoding="utf-8")
    return folder


def shared_data() -> Path | None:
    """A folder with real tokenizers and corpora, where there is one: an addition to the tests, which do without."""
    default = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("RETEMPER_SHARED_DATA", default))
    return folder if folder.is_dir() else None
