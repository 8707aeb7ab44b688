"""What documents begin and end with: against transformers for tokenizers like those of known models, and token by
token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.framed_tokenizers import KINDS, SENTENCEPIECE, byte_level, save
from oracles.tiny_tokenizer import sample_text, shared_data, train_tiny_sentencepiece, write_tiny_tiktoken
from transformers import AutoTokenizer

from retemper.engine.errors import UserError
from retemper.engine.tokenizer.auto_class import loaded_class
from retemper.engine.tokenizer.frame import frame_of_files, ids_of, read_tokenizer_frame, tokenizer_frame
from retemper.engine.weights.checkpoint.assets import HfAssets
from retemper.tools.tokenizer.document_frame import DocumentFrame
from retemper.tools.tokenizer.handle import load_tokenizer

TEXTS = ["rain fell over the old town", "the cat", sample_text(3, 20)]


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_of_transformers(tmp_path, name):
    folder = KINDS[name](tmp_path / "t")
    handle = load_tokenizer(folder)
    frame = read_tokenizer_frame(handle.file)
    around = DocumentFrame(ids_of(frame.prefix), ids_of(frame.suffix))
    reference = AutoTokenizer.from_pretrained(folder)
    expected = [reference(text)["input_ids"] for text in TEXTS]
    ids, lengths = handle.encode_documents(TEXTS, around)
    assert [one.tolist() for one in np.split(ids, np.cumsum(lengths)[:-1])] == expected
    for token, number in (*frame.prefix, *frame.suffix):
        assert reference.convert_ids_to_tokens(number) == token
    # A run sees the same files as bytes.
    assert frame_of_files(HfAssets.read(folder).files) == frame


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("eos", [None, True, False])
@pytest.mark.parametrize("tokenizer_class", [None, "LlamaTokenizer", "CodeLlamaTokenizer"])
def test_sentencepiece_models_follow_tokenizer_config(tmp_path, bos, eos, tokenizer_class):
    train_tiny_sentencepiece(tmp_path / "tokenizer.model")
    config = {"tokenizer_class": tokenizer_class, "add_bos_token": bos, "add_eos_token": eos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    frame = read_tokenizer_frame(tmp_path / "tokenizer.model")
    ids = AutoTokenizer.from_pretrained(tmp_path)("the cat")["input_ids"]
    assert (frame.prefix, frame.suffix) == ((("<s>", 1),) * (ids[0] == 1), (("</s>", 2),) * (ids[-1] == 2))
    assert frame.bos == ("<s>", 1)
    assert ("--bos yes adds it" in frame.remark) is (bos is None and not frame.prefix)


@pytest.mark.slow
@pytest.mark.parametrize("single", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize(
    "tokenizer_class",
    [
        *("TokenizersBackend", "LlamaTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer"),
        *("Qwen2Tokenizer", "GemmaTokenizer", "CodeLlamaTokenizer", "CohereTokenizer"),
    ],
)
def test_every_class_and_post_processor(tmp_path, tokenizer_class, single):
    for number, add in enumerate((None, True, False)):
        extra: dict[str, Any] = {} if add is None else {"add_bos_token": add, "add_eos_token": add}
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        content = byte_level(SENTENCEPIECE)
        folder = save(tmp_path / str(number), content, single, tokenizer_class=tokenizer_class, **names, **extra)
        frame = read_tokenizer_frame(folder / "tokenizer.json")
        ids = AutoTokenizer.from_pretrained(folder)("the cat")["input_ids"]
        assert (ids_of(frame.prefix), ids_of(frame.suffix)) == ((1,) * (ids[0] == 1), (2,) * (ids[-1] == 2))


@pytest.mark.parametrize("declared", [None, "GPTNeoXTokenizer"])
@pytest.mark.parametrize("model_type", ["gpt_neox", "olmo", "olmo2", "llama", "qwen2", "qwen3", "mistral", "gpt2"])
def test_the_model_type_has_a_say_in_the_class(tmp_path, model_type, declared):
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": declared}
    named = {key: name for key, name in names.items() if name is not None}
    folder = save(tmp_path / "t", byte_level(SENTENCEPIECE), "<s> $A </s>", **named)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(folder)
    loaded = loaded_class(named, {"model_type": model_type})
    assert type(theirs).__name__ == loaded
    frame, ids = load_tokenizer(folder).frame(), theirs("the cat")["input_ids"]
    assert (ids_of(frame.prefix), ids_of(frame.suffix)) == ((1,) * (ids[0] == 1), (2,) * (ids[-1] == 2))
    assert bool(frame.prefix) is (loaded != "GPTNeoXTokenizer")


@pytest.mark.slow
@pytest.mark.skipif(shared_data() is None, reason="no real tokenizers here")
@pytest.mark.parametrize("name", ["gpt2", "qwen2.5"])
def test_real_tokenizers(name):
    shared = shared_data()
    assert shared is not None
    folder = shared / "tokenizers" / name
    handle = load_tokenizer(folder)
    frame = read_tokenizer_frame(handle.file)
    ids, _ = handle.encode_documents(TEXTS[:1], DocumentFrame(ids_of(frame.prefix), ids_of(frame.suffix)))
    assert ids.tolist() == AutoTokenizer.from_pretrained(folder)(TEXTS[0])["input_ids"]


DOCUMENTS = st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=8)


@settings(deadline=None, max_examples=150)
@given(DOCUMENTS, st.lists(st.integers(0, 3), max_size=2), st.lists(st.integers(0, 3), max_size=2), st.booleans())
def test_documents_get_a_frame_once(documents, prefix, suffix, long):
    if long:  # another way to the same: documents that begin and end alike
        documents = [[*document, *[9] * 600, *document] if document else [] for document in documents]
    ids = np.array([token for document in documents for token in document], np.int32)
    frame = DocumentFrame(tuple(prefix), tuple(suffix))
    framed, lengths = frame.around(ids, np.array([len(document) for document in documents], np.int64))
    expected = []
    for document in documents:
        front = [] if document[: len(prefix)] == prefix else prefix
        behind = [] if suffix and document[-len(suffix) :] == suffix else suffix
        expected.append([*front, *document, *behind] if document else [])
        if document:
            array = np.array(document, np.int32)
            assert (frame.missing_prefix(array), frame.missing_suffix(array)) == (tuple(front), tuple(behind))
    assert [one.tolist() for one in np.split(framed, np.cumsum(lengths))[: len(documents)]] == expected
    assert framed.dtype == np.int32 and framed.flags.writeable


class TestBosYes:
    def test_names_in_any_file(self, tmp_path):
        for number, (file, content) in enumerate(
            {
                "tokenizer_config.json": {"bos_token": "<s>"},
                "special_tokens_map.json": {"bos_token": {"content": "<s>"}},
                "config.json": {"bos_token_id": 1},
            }.items()
        ):
            folder = save(tmp_path / str(number), byte_level(SENTENCEPIECE), offsets=True)
            (folder / file).write_text(json.dumps(content))
            frame = read_tokenizer_frame(folder / "tokenizer.json")
            assert frame.documents_begin_with("auto") == frame.documents_begin_with("no") == ()
            assert frame.documents_begin_with("yes") == (("<s>", 1),)

    def test_a_token_of_the_vocabulary_alone(self, tmp_path):
        content = json.loads(byte_level(SENTENCEPIECE))
        content["added_tokens"] = []
        # Sorted, as other programs write JSON: the vocabulary comes before the post-processor.
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps(content, sort_keys=True))
        (tmp_path / "config.json").write_text('{"bos_token_id": 1}')
        assert read_tokenizer_frame(file).bos == ("<s>", 1)

    def test_tiktoken(self, tmp_path):
        description = write_tiny_tiktoken(tmp_path / "t.tiktoken", ("<|endoftext|>", "<|begin_of_text|>"))
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|begin_of_text|>"}')
        frame = read_tokenizer_frame(tmp_path / "t.tiktoken", description["special_tokens"])
        assert frame.documents_begin_with("auto") == ()
        (token,) = frame.documents_begin_with("yes")
        assert token == ("<|begin_of_text|>", description["special_tokens"]["<|begin_of_text|>"])

    def test_no_name(self, tmp_path):
        folder = KINDS["qwen 2"](tmp_path / "t")
        with pytest.raises(UserError, match="--bos yes: the tokenizer has no BOS"):
            read_tokenizer_frame(folder / "tokenizer.json").documents_begin_with("yes")


def test_what_the_configuration_says_and_transformers_does_not_do(tmp_path):
    frame = read_tokenizer_frame(KINDS["no such bos"](tmp_path / "t") / "tokenizer.json")
    assert frame.remark.startswith("tokenizer_config.json has add_bos_token: true, but the tokenizer adds none")


def test_a_token_called_post_processor():
    """Keys of the vocabulary look like keys of the file."""
    content = json.loads(byte_level(SENTENCEPIECE))
    content["model"]["vocab"]["post_processor"] = 999
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    for keys in (False, True):
        frame = tokenizer_frame("tokenizer.json", json.dumps(content, sort_keys=keys).encode(), {}, {}, {})
        assert frame.prefix == (("<s>", 1),)


def test_damaged_tokenizers():
    for content in (b"", b"[]", b'{"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": 1}]}}'):
        assert frame_of_files({"tokenizer.json": content}) is None
        with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer"):
            tokenizer_frame("tokenizer.json", content, {}, {}, {})
    assert frame_of_files({"config.json": b"{}"}) is None
    assert frame_of_files({"tokenizer.json": Path(__file__).read_bytes()}) is None
