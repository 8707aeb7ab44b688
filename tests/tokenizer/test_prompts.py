"""Prompts begin as texts do in transformers, or as the documents of the training; continuations keep their spaces."""

from __future__ import annotations

import pytest
from oracles import framed_tokenizers
from oracles.tiny_tokenizer import train_tiny_sentencepiece, train_tiny_tokenizer, write_tiny_tiktoken

from retemper.engine.tokenizer.prompts import PromptTokenizer

TEXT = "the cat sat on a mat"


@pytest.mark.parametrize("make", [framed_tokenizers.llama2, framed_tokenizers.qwen3])
def test_a_prompt_begins_as_in_transformers(make, tmp_path):
    from transformers import AutoTokenizer

    folder = make(tmp_path / "tokenizer")
    expected = AutoTokenizer.from_pretrained(folder)
    tokenizer = PromptTokenizer(folder, None)
    assert tokenizer.encode(TEXT) == expected(TEXT).input_ids
    begin = expected(TEXT).input_ids[: -len(expected(TEXT, add_special_tokens=False).input_ids)]
    assert PromptTokenizer(folder, (7, 8)).encode(TEXT) == [7, 8, *expected(TEXT).input_ids[len(begin) :]]
    if begin:
        assert tokenizer.encode(f"{expected.bos_token}{TEXT}")[:2].count(begin[0]) == 1


def sentencepiece(folder):
    train_tiny_sentencepiece(folder / "tokenizer.model")
    return folder


def tiktoken(folder):
    write_tiny_tiktoken(folder / "tiny.tiktoken")
    return folder


@pytest.mark.parametrize("make", [framed_tokenizers.llama2, train_tiny_tokenizer, sentencepiece, tiktoken])
def test_a_continuation_is_the_rest_of_the_text(make, tmp_path):
    tokenizer = PromptTokenizer(make(tmp_path / "tokenizer"), None)
    ids = tokenizer.encode(TEXT)
    for cut in range(2, len(ids)):
        joined = tokenizer.continuation([], ids[:cut]) + tokenizer.continuation(ids[:cut], ids[cut:])
        assert joined.replace(" ", "") == TEXT.replace(" ", "") and joined.endswith(" mat")
    assert tokenizer.encode("") == []


def test_the_end_of_documents(tmp_path):
    tokenizer = PromptTokenizer(train_tiny_tokenizer(tmp_path / "a"), None)
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.document_end]
    assert PromptTokenizer(train_tiny_tokenizer(tmp_path / "b", special=(), eos=None), None).document_end is None
