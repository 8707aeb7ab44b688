"""Streams of text against the decoder of the whole, for all kinds of tokenizers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from oracles.tiny_tokenizer import sample_text, train_tiny_sentencepiece, write_tiny_tiktoken

from retemper.tools.generation.text_stream import TextStream
from retemper.tools.tokenizer.handle import TokenizerHandle, load_prompt_tokenizer


@pytest.fixture(scope="module", params=["tokenizer.json", "sentencepiece", "tiktoken"])
def tokenizer(request: pytest.FixtureRequest, tiny_tokenizer: Path, tmp_path_factory) -> TokenizerHandle:
    """One of each kind."""
    folder = tmp_path_factory.mktemp("streamed")
    if request.param == "sentencepiece":
        train_tiny_sentencepiece(folder / "tokenizer.model")
    elif request.param == "tiktoken":
        write_tiny_tiktoken(folder / "tiny.tiktoken")
    else:
        folder = tiny_tokenizer
    return load_prompt_tokenizer(folder)


def streamed(
    tokenizer: TokenizerHandle, prompt: list[int], new: list[int], *stops: str
) -> tuple[list[str], TextStream]:
    """The pieces of a text, and its stream."""
    stream = TextStream(lambda ids: tokenizer.decode(ids, special_tokens=False), prompt, stops)
    pieces = []
    for token in new:
        pieces.append(stream.add(token))
        if stream.stopped:
            return pieces, stream
    return [*pieces, stream.end()], stream


@pytest.mark.parametrize("seed", range(20))
def test_text_appears_as_the_whole_is_decoded(tokenizer: TokenizerHandle, seed: int) -> None:
    """Of text with characters of several bytes and spaces at every place, cut at any token."""
    text = sample_text(seed, 30) + " 🙂天 x"
    ids = tokenizer.encode_flat([text])[0].tolist()
    cut = random.Random(seed).randrange(1, 12)
    # A prompt is text, so it does not end within a character.
    while "\ufffd" in tokenizer.decode(ids[:cut]):
        cut += 1
    pieces, stream = streamed(tokenizer, ids[:cut], ids[cut:])
    whole, before = tokenizer.decode(ids), tokenizer.decode(ids[:cut])
    assert "".join(pieces) == stream.text == whole.removeprefix(before)
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > len(ids[cut:]) // 3, "text appears token by token"


def test_tokens_of_spaces_alone_are_kept(tokenizer: TokenizerHandle) -> None:
    """The encoding of sentencepiece may never have such tokens, but a model may choose them."""
    word, rain = (tokenizer.encode_flat([text])[0].tolist() for text in ("cat", " rain"))
    spaces = [token for token in range(tokenizer.vocab_size) if tokenizer.decode([*word, token]) == "cat "]
    space = spaces[-1]  # not the byte of sentencepiece
    new = [space, space, *rain]
    pieces, stream = streamed(tokenizer, word, new)
    whole = tokenizer.decode([*word, *new]).removeprefix(tokenizer.decode(word))
    assert "".join(pieces) == stream.text == whole and whole.startswith("  ")


@pytest.mark.parametrize("seed", range(8))
def test_bytes_that_are_no_text_appear_at_the_end(tokenizer: TokenizerHandle, seed: int) -> None:
    prompt = tokenizer.encode_flat(["the cat"])[0].tolist()
    draw = random.Random(seed)
    new = [draw.randrange(3, 350) for _ in range(40)]
    pieces, stream = streamed(tokenizer, prompt, new)
    whole = tokenizer.decode([*prompt, *new], special_tokens=False)
    assert "".join(pieces) == stream.text == whole.removeprefix(tokenizer.decode(prompt))


@pytest.mark.parametrize("stops", [("stone roofs",), ("e r",), ("🙂",), ("never", "天色"), ("x",)])
@pytest.mark.parametrize("seed", range(5))
def test_nothing_of_a_stop_string_appears(tokenizer: TokenizerHandle, seed: int, stops: tuple[str, ...]) -> None:
    text = f"the cat {sample_text(seed, 12)} stone rain stone roofs 🙂 天色如洗 x"
    ids = tokenizer.encode_flat([text])[0].tolist()
    while "\ufffd" in tokenizer.decode(ids[:2]):
        ids.pop(0)
    pieces, stream = streamed(tokenizer, ids[:2], ids[2:], *stops)
    whole = tokenizer.decode(ids).removeprefix(tokenizer.decode(ids[:2]))
    expected = whole[: min(whole.index(stop) for stop in stops if stop in whole)]
    assert stream.stopped
    assert "".join(pieces) == stream.text == expected


def test_what_may_begin_a_stop_string_is_held_back(tokenizer: TokenizerHandle) -> None:
    ids = tokenizer.encode_flat(["the cat sat on a stone mat"])[0].tolist()
    pieces, stream = streamed(tokenizer, ids[:1], ids[1:], "stone roofs")
    assert not stream.stopped
    assert "".join(pieces).endswith("a stone mat")
    stone = next(place for place, piece in enumerate(pieces) if "stone" in piece)
    assert "stone m" in pieces[stone], "the word appears when the next one shows that it is not the stop string"
