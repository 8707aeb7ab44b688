"""The configurations that the fast path is taken for: the same ids as ``tokenizers`` for every code point there is.

A vocabulary shows where a text is cut only where a merge reaches over the cut. Here every two bytes have a merge, those
between characters first, so that every cut shows.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from retemper.tools.tokenizer.fast import EXACT
from retemper.tools.tokenizer.handle import load_tokenizer

pytest.importorskip("fastokens", reason="the fast path is an optional package: pip install fastokens")

NUM_CODE_POINTS = 0x110000 - 0x800  # 1,112,064: surrogates are none
CONTEXT = "a{c}b {c}{c} 1{c}2{c} \n{c}\r\n .{c}!{c} '{c}s  {c} \u00e9{c}\u0301"
PACKED = 16
CHUNK = 1 << 13


def every_cut_shows(folder: Path, name: str) -> Path:
    """A tokenizer.json of the configuration ``name``."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: place for place, character in enumerate(characters)}
    byte_of = {pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(chr(b))[0][0]: b for b in range(128)}
    inside = {character for character in characters if is_continuation(character, byte_of)}
    pairs = [[left, right] for left in characters for right in characters]
    merges = sorted(pairs, key=lambda pair: pair[1] in inside)
    for left, right in merges:
        vocab[left + right] = len(vocab)
    normalizer, cuts = EXACT[name]
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": normalizer} if normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"trim_offsets": True, **cut} for cut in cuts]},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    for cut in content["pre_tokenizer"]["pretokenizers"]:
        if cut["type"] == "Split":
            del cut["trim_offsets"]
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


def is_continuation(character: str, byte_of: dict[str, int]) -> bool:
    """Whether GPT-2's ``character`` stands for a byte of the form 10xxxxxx."""
    if character in byte_of:
        return False
    number = ord(character)
    byte = number if number < 0x100 else None
    if byte is None:  # those that are not printable follow one another: 0-32, 127-160, 173
        others = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
        byte = others[number - 0x100]
    return byte & 0xC0 == 0x80


def first_difference(path: Path, code_points: list[int], alone: list[int]) -> str | None:
    """``code_points`` in contexts, several in a text, and those in ``alone`` as a text each."""
    handle = load_tokenizer(path)
    assert handle.encoder.startswith("fastokens"), handle.fallback_reason
    rows = [code_points[at : at + PACKED] for at in range(0, len(code_points), PACKED)]
    texts = ["".join(CONTEXT.format(c=chr(code)) for code in row) for row in rows] + list(map(chr, alone))
    for start in range(0, len(texts), CHUNK):
        batch = texts[start : start + CHUNK]
        ids, lengths = handle.encode_flat(batch)
        expected, expected_lengths = handle.reference_encode(batch)
        if not (np.array_equal(lengths, expected_lengths) and np.array_equal(ids, expected)):
            return handle.check_fast_path(batch)
    assert handle.fast_path_failures == 0
    return None


def test_some_code_points(tmp_path):
    """Every 300th, and all below U+0400."""
    some = [*range(0x400), *(code for code in range(0x400, 0x110000, 300) if not 0xD800 <= code < 0xE000)]
    assert first_difference(every_cut_shows(tmp_path, "Qwen2"), some, some) is None


def test_every_cut_shows(tmp_path):
    """Between any two characters: other rules give other ids."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    path = every_cut_shows(one, "Qwen2")
    content = json.loads(path.read_text())
    regex = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    regex["Regex"] = regex["Regex"].replace("\\p{L}+|", "[\\p{L}\u0982]+|", 1)  # one mark more is a letter
    (other / "tokenizer.json").write_text(json.dumps(content))
    handles = [load_tokenizer(folder, backend="reference") for folder in (one, other)]
    for text, same in (("a\u0982b", False), ("a\u0983b", True)):
        ids = [handle.encode_flat([text])[0].tolist() for handle in handles]
        assert (ids[0] == ids[1]) is same


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.extended] if name == "GPT-2" else []) for name in EXACT]
)
def test_every_code_point(name, tmp_path):
    """Alone too, but for 15 of 16 that are not assigned or for private use: some minutes."""
    everything = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    assert len(everything) == NUM_CODE_POINTS
    alone = [code for code in everything if code % 16 == 0 or unicodedata.category(chr(code)) not in ("Cn", "Co")]
    assert first_difference(every_cut_shows(tmp_path, name), everything, alone) is None
