"""Train the tokenizer of the demo: Qwen2's byte-level BPE with a small vocabulary.

Decoding gives back every text, up to Unicode normalization form C. transformers builds Qwen2's tokenizer class, with
this normalizer, for every folder with a Qwen2 ``config.json``; with other rules the model's folder would have another
tokenizer than the bare folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

END_OF_DOCUMENT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_DOCUMENT, "<|im_start|>", "<|im_end|>")
"""Ids 0, 1 and 2."""

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Boundaries of merges, as in Qwen2: words, single digits, runs of punctuation, white space."""


def train_tokenizer(corpus_files: Sequence[Path], folder: Path, vocab_size: int = 4096) -> int:
    """Train on the ``text`` of JSONL files, and write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``.

    ``transformers.AutoTokenizer.from_pretrained`` gives the same tokens, with or without a Qwen2 ``config.json`` in the
    folder. The same files give the same bytes. Returns the size of the vocabulary, which is below ``vocab_size`` only
    if the text is too small.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus_files), trainer)

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": END_OF_DOCUMENT,
        "pad_token": END_OF_DOCUMENT,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()


def _texts(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]
