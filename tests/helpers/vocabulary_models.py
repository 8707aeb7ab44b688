"""Tiny models with tokenizers of every kind that can be extended, and a corpus with words that they do not know."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import torch
from oracles.tiny_tokenizer import sample_text, train_tiny_tokenizer
from sentencepiece import sentencepiece_model_pb2
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from retemper.tools.demo.bpe import QWEN2_SPLIT

DOMAIN = ["mitochondrion", "ribosome", "phosphorylation", "cytochrome", "线粒体", "核糖体", "p53"]
NUM_PIECES = 305
"""Of sentencepiece models, 256 of which are bytes."""
SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def domain_text(seed: int) -> str:
    """Old words and new ones."""
    draw = random.Random(seed)
    words = sample_text(seed, 12).split(" ") + [draw.choice(DOMAIN) for _ in range(8)]
    draw.shuffle(words)
    return " ".join(words)


def write_corpus(path: Path, documents: int = 120) -> Path:
    path.write_text("".join(json.dumps({"text": domain_text(seed)}) + "\n" for seed in range(documents)))
    return path


def byte_level(folder: Path) -> int:
    """As Qwen2's: control tokens stand above the vocabulary. Returns the number of ids."""
    train_tiny_tokenizer(folder, special=(), eos="<|endoftext|>")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    # transformers has its own rules for whatever stands beside a Qwen2 config: these.
    cuts = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = cuts.Sequence(
        [cuts.Split(tokenizers.Regex(QWEN2_SPLIT), "isolated"), cuts.ByteLevel(False, use_regex=False)]
    )
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"], ensure_ascii=False))
    merges = "".join(f"{left} {right}\n" for left, right in content["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def train_sentencepiece(kind: str) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(sample_text(seed, 30).replace("\n", " ") for seed in range(300)),
        model_writer=written,
        vocab_size=NUM_PIECES,
        model_type=kind,
        byte_fallback=True,
        character_coverage=0.999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return written.getvalue()


def sentencepiece_json(model: bytes) -> dict[str, Any]:
    """``tokenizer.json`` of a sentencepiece model, as the Hub has it for Llama 2: every way to make a piece of two is a
    merge, in the order of the pieces' scores."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    pieces = {piece.piece: place for place, piece in enumerate(proto.pieces)}
    special = {"normalized": False, "single_word": False, "lstrip": False, "rstrip": False, "special": True}
    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": proto.pieces[i].piece, **special} for i in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    }
    if proto.trainer_spec.model_type == 1:
        vocab = [[piece.piece, piece.score] for piece in proto.pieces]
        content["model"] = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True}
        return content
    normal = sorted((p for p in proto.pieces if p.type == 1), key=lambda piece: -piece.score)
    merges = [
        [piece.piece[:at], piece.piece[at:]]
        for piece in normal
        for at in range(1, len(piece.piece))
        if piece.piece[:at] in pieces and piece.piece[at:] in pieces
    ]
    content["model"] = {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": pieces,
        "merges": merges,
    }
    return content


def write_tokenizer(folder: Path, kind: str) -> int:
    """Returns the number of ids."""
    if kind == "byte-level":
        return byte_level(folder)
    model = train_sentencepiece("unigram" if "unigram" in kind else "bpe")
    folder.mkdir(parents=True, exist_ok=True)
    if "json" in kind:
        content = sentencepiece_json(model)
        (folder / "tokenizer.json").write_text(json.dumps(content))
    if "model" in kind:
        (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return NUM_PIECES


def write_model(
    folder: Path, kind: str = "byte-level", tied: bool = False, dtype: torch.dtype = torch.bfloat16, spare: int = 20
) -> Path:
    """A Hugging Face folder whose embedding has at least ``spare`` rows without ids, and a multiple of 4, not 8."""
    rows = -(-(write_tokenizer(folder, kind) + spare) // 4) * 4
    rows += 4 * (rows % 8 == 0)
    torch.manual_seed(0)
    settings = {"vocab_size": rows, "tie_word_embeddings": tied, **SHAPE}
    qwen = kind == "byte-level"
    model = Qwen2ForCausalLM(Qwen2Config(**settings)) if qwen else LlamaForCausalLM(LlamaConfig(**settings))
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    return folder
