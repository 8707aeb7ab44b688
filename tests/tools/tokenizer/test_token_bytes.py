"""The bytes of tokens are those of the texts that they came from, for tokenizers of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from oracles.tiny_tokenizer import sample_text, train_tiny_sentencepiece, write_tiny_tiktoken
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from retemper.tools.tokenizer.handle import load_tokenizer
from retemper.tools.tokenizer.token_bytes import TokenBytes, read_token_bytes

TEXTS = [sample_text(seed, 40) for seed in range(20)]
"""With letters, Chinese characters and emoji that byte-level tokens divide."""


def bytes_of(file: Path, text: str) -> list[int]:
    """Bytes of each token of a text."""
    table = read_token_bytes(file, 500)
    assert isinstance(table, TokenBytes), table
    [ids] = load_tokenizer(file).encode_batch([text])
    return table.count(ids, np.arange(len(ids)) == 0).tolist()


@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_byte_level_tokens(add_prefix_space: bool, tiny_tokenizer: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.add_tokens(["<think>", "é!"])  # matched in text, and not of the alphabet of bytes
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    # After an added token a prefix space would be added again.
    for text in (*TEXTS, "天🚀é", "天🚀é" if add_prefix_space else "a<think>bé!c"):
        counts = bytes_of(tmp_path / "tokenizer.json", text)
        assert sum(counts) == len(text.encode())
    assert len(bytes_of(tmp_path / "tokenizer.json", "🚀")) > 1  # divided


def test_special_tokens_have_no_text(tiny_tokenizer: Path) -> None:
    table = read_token_bytes(tiny_tokenizer / "tokenizer.json", 500)
    assert isinstance(table, TokenBytes)
    tokenizer = Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))
    special = [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>")]
    size = tokenizer.get_vocab_size()
    assert np.flatnonzero(~table.has_text_V).tolist() == sorted([*special, *range(size, 500)])
    assert not table.without([300]).has_text_V[300] and table.has_text_V[300]


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece(model_type: str, byte_fallback: bool, tmp_path: Path) -> None:
    file = train_tiny_sentencepiece(
        tmp_path / "tokenizer.model",
        model_type=model_type,
        byte_fallback=byte_fallback,
        vocab_size=1000,
        hard_vocab_limit=False,
        character_coverage=1.0 if byte_fallback else 0.98,
    )
    model = SentencePieceProcessor(model_file=str(file))
    for text in TEXTS:
        decoded = model.decode(model.encode(text))
        lost = 0 if byte_fallback else len(" \u2047 ".encode()) * model.encode(text).count(model.unk_id())
        assert sum(bytes_of(file, text)) == len(decoded.encode()) - lost


def test_pieces_in_the_format_of_the_tokenizers_library(tmp_path: Path) -> None:
    """Like Llama's: spaces are pieces, unknown characters are bytes, and the first space is not part of the text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=pieces[:1], initial_alphabet=["\u2581"], show_progress=False
    )
    tokenizer.train_from_iterator(["\u2581the\u2581cat\u2581sat"] * 5, trainer)
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    for piece in pieces[1:]:
        vocab[piece] = len(vocab)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    for text in ("the cat sat", "the 天 cat 🙂", " the  cat"):
        assert sum(bytes_of(tmp_path / "tokenizer.json", text)) == len(text.encode())


def test_tiktoken(tmp_path: Path) -> None:
    write_tiny_tiktoken(tmp_path / "tiny.tiktoken")
    for text in TEXTS:
        assert sum(bytes_of(tmp_path / "tiny.tiktoken", text)) == len(text.encode())


def test_a_decoder_that_changes_texts_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=3000, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(["I'm we'll abc ABC the cat sat on the mat", *TEXTS], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = read_token_bytes(tmp_path / "tokenizer.json", 3000)
    assert isinstance(found, str) and "decoder" in found
