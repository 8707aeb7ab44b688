"""Small tokenizers of every kind, trained in a fraction of a second, and text to go with them."""

from __future__ import annotations

import base64
import io
import json
import os
import random
from pathlib import Path
from typing import Any

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


def train_tiny_sentencepiece(file: Path, **options: Any) -> Path:
    """Train a sentencepiece model on the same lines; ``options`` of its trainer, such as ``model_type``."""
    import sentencepiece

    file.parent.mkdir(parents=True, exist_ok=True)
    written = io.BytesIO()
    settings = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, **options}
    lines = (sample_text(seed, 30).replace("\n", " ") for seed in range(300))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=written, **settings)
    file.write_bytes(written.getvalue())
    return file


def write_tiny_tiktoken(file: Path, special_tokens: tuple[str, ...] = ("<|endoftext|>",)) -> dict[str, Any]:
    """Write a byte-level BPE as a tiktoken file with its description beside it, which is returned."""
    folder = train_tiny_tokenizer(file.parent / "trained", special=(), eos=None)
    vocab = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
    ranks = {bytes(byte_of[character] for character in token): rank for token, rank in vocab.items()}
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    description = {
        "pattern": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        "special_tokens": {token: len(ranks) + 5 + i for i, token in enumerate(special_tokens)},
    }
    file.with_suffix(".json").write_text(json.dumps(description))
    return description


def shared_data() -> Path | None:
    """A folder with real tokenizers and corpora, where there is one: an addition to the tests, which do without."""
    default = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("RETEMPER_SHARED_DATA", default))
    return folder if folder.is_dir() else None
