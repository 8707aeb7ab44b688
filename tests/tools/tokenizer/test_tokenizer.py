"""Tokenizer handles against the plain ``tokenizers`` library, and the rules for finding a tokenizer and its EOD."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from oracles.tiny_tokenizer import sample_text, shared_data, train_tiny_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from retemper.engine.errors import UserError
from retemper.tools.tokenizer.handle import load_tokenizer

TEXTS = [sample_text(seed, 20) for seed in range(5)] + ["", "a<|endoftext|>b<|im_end|>", "naïve\u2028🙂\0"]


def edited_copy(source: Path, target: Path, **changes) -> Path:
    """A copy of the tokenizer folder with keys of its tokenizer.json replaced."""
    shutil.copytree(source, target)
    file = target / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}), encoding="utf-8")
    return target


def vocab_size(folder: Path) -> int:
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    return 1 + max(content["model"]["vocab"].values())


@pytest.fixture
def without_special(tiny_tokenizer: Path, tmp_path: Path) -> Tokenizer:
    """The same vocabulary and merges, told of no special token: what ordinary text must encode to."""
    return Tokenizer.from_file(str(edited_copy(tiny_tokenizer, tmp_path / "plain", added_tokens=[]) / "tokenizer.json"))


def test_special_tokens_in_text_are_ordinary_text(tiny_tokenizer, without_special):
    handle = load_tokenizer(tiny_tokenizer)
    expected = [without_special.encode(text).ids for text in TEXTS]
    assert [ids.tolist() for ids in handle.encode_batch(TEXTS)] == expected
    flat, lengths = handle.encode_flat(TEXTS)
    assert flat.tolist() == [token for ids in expected for token in ids]
    assert lengths.tolist() == list(map(len, expected))
    assert (flat.dtype, lengths.dtype) == (np.int32, np.int64)
    assert handle.encode_batch([]) == []
    assert [handle.decode(ids) for ids in handle.encode_batch(TEXTS)] == TEXTS


def test_truncation_padding_and_bos_of_the_file_are_ignored(tiny_tokenizer, tmp_path):
    loaded = Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))
    loaded.enable_truncation(3)
    loaded.enable_padding(length=50)
    saved = json.loads(loaded.to_str())
    bos = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [1], "tokens": ["<|im_end|>"]}},
    }
    changes = {"truncation": saved["truncation"], "padding": saved["padding"], "post_processor": bos}
    assert saved["truncation"] and saved["padding"]
    edited = load_tokenizer(edited_copy(tiny_tokenizer, tmp_path / "t", **changes))
    for left, right in zip(edited.encode_batch(TEXTS), load_tokenizer(tiny_tokenizer).encode_batch(TEXTS), strict=True):
        assert left.tolist() == right.tolist()


def test_identity_and_size(tiny_tokenizer, tmp_path):
    file = tiny_tokenizer / "tokenizer.json"
    for name in (tiny_tokenizer, file, str(tiny_tokenizer)):
        handle = load_tokenizer(name)
        assert (handle.name, handle.folder) == (str(name), tiny_tokenizer)
        assert handle.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert handle.vocab_size == vocab_size(tiny_tokenizer)


def test_decode_shows_special_tokens(tiny_tokenizer):
    handle = load_tokenizer(tiny_tokenizer)
    assert handle.decode(np.array([*handle.encode_batch(["cat"])[0], 0])) == "cat<|endoftext|>"


def test_document_end_is_not_the_chat_models_eos(tiny_tokenizer):
    handle = load_tokenizer(tiny_tokenizer)
    assert handle.eod() == ("<|endoftext|>", 0)
    assert handle.eod("<|im_end|>") == ("<|im_end|>", 1)
    with pytest.raises(UserError, match=r"'</s>' is not in the vocabulary; .* --eod-token"):
        handle.eod("</s>")


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "lstrip": False}])
def test_without_endoftext_it_is_the_eos(tmp_path, file, eos):
    folder = train_tiny_tokenizer(tmp_path / "t", special=("<unk>", "</s>"), eos=None)
    with pytest.raises(UserError, match=r"no <\|endoftext\|> in the vocabulary and no eos_token .* --eod-token"):
        load_tokenizer(folder).eod()
    (folder / file).write_text(json.dumps({"eos_token": eos}))
    assert load_tokenizer(folder).eod() == ("</s>", 1)


def test_an_eod_that_is_not_flagged_special_is_text_in_text(tiny_tokenizer, tmp_path, without_special):
    added = json.loads((tiny_tokenizer / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    plain = [{**token, "special": False} for token in added]
    handle = load_tokenizer(edited_copy(tiny_tokenizer, tmp_path / "t", added_tokens=plain))
    handle.eod()
    assert handle.encode_batch(["a<|endoftext|>b"])[0].tolist() == without_special.encode("a<|endoftext|>b").ids
    assert handle.vocab_size == vocab_size(tiny_tokenizer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{tmp}", "no tokenizer.json in this folder; .* --tokenizer"),
        ("{tmp}/absent/folder", "no such tokenizer folder or file; .* --tokenizer"),
        ("./absent", "no such tokenizer folder or file; .* --tokenizer"),
        ("{tmp}/broken.json", "cannot read this tokenizer"),
        ("two words/x", "no such tokenizer folder or file"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, name, message):
    (tmp_path / "broken.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(name.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)


def test_hub_name_comes_from_the_cache_without_a_network(tiny_tokenizer, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / "0123abcd"
    shutil.copytree(tiny_tokenizer, snapshot)
    (tmp_path / "models--acme--tiny" / "refs").mkdir()
    (tmp_path / "models--acme--tiny" / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    handle = load_tokenizer("acme/tiny")
    assert (handle.name, handle.folder, handle.vocab_size) == ("acme/tiny", snapshot, vocab_size(tiny_tokenizer))
    with pytest.raises(UserError, match=r"acme/other: .* cannot be reached; pass --tokenizer with a folder"):
        load_tokenizer("acme/other")


def test_a_download_that_breaks_off_is_a_line(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("Data processing error: incomplete message")  # as of Xet's storage

    monkeypatch.setattr("retemper.tools.tokenizer.finding._require_hub", lambda name: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    with pytest.raises(UserError, match=r"^acme/other: the Hub gave no tokenizer: .*incomplete message; name a folder"):
        load_tokenizer("acme/other")


@pytest.mark.slow
def test_real_tokenizers_where_there_are_any():
    """An addition to the tests above, for which the tiny tokenizer is enough."""
    folder = shared_data()
    if folder is None:
        pytest.skip("no folder ../shared/data with real tokenizers and corpora")
    expected = {"qwen3": (151669, 151643), "qwen2.5": (151665, 151643), "gpt2": (50257, 50256)}
    found = {name: folder / "tokenizers" / name for name in expected}
    for name, path in found.items():
        handle = load_tokenizer(path)
        size, eod = expected[name]
        assert (handle.vocab_size, handle.eod()) == (size, ("<|endoftext|>", eod))
        assert eod not in handle.encode_batch(["a<|endoftext|>b"])[0]
        if name != "qwen2.5":  # the others' tokens are compared in test_tokenizer_fast.py
            continue
        plain = Tokenizer.from_file(str(path / "tokenizer.json"))
        for text, ids in zip(TEXTS[:6], handle.encode_batch(TEXTS[:6]), strict=True):
            assert ids.tolist() == plain.encode(text, add_special_tokens=False).ids


# ----------------------------------------------------------------------------------------------------------------------
# Files next to tokenizer.json

ADDED = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}, "gives it the id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"900": {"content": "<x>"}}}, "does not have it"),
        ("added_tokens.json", {"<|im_end|>": 7}, "gives it the id"),
        ("added_tokens.json", {"<|rain|>": 900}, "does not have it"),
    ],
)
def test_files_that_give_added_tokens_other_ids_are_refused(name, content, message, tiny_tokenizer, tmp_path):
    folder = edited_copy(tiny_tokenizer, tmp_path / "x")
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{name}: gives the added token .*tokenizer\.json next to it {message}"):
        load_tokenizer(folder)


def test_special_tokens_that_no_text_holds_may_be_listed_alone(tiny_tokenizer, tmp_path):
    folder = edited_copy(tiny_tokenizer, tmp_path / "x")
    eos = load_tokenizer(folder).eod()[1]
    decoder = {"900": {"content": "<pad>", "special": True}, str(eos): {"content": "<|endoftext|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    (folder / "added_tokens.json").write_text('{"<|endoftext|>": 7}')  # not read where there is a decoder
    assert load_tokenizer(folder).notes == []


@pytest.mark.parametrize(
    "setting",
    [
        {"pad_token": "<|rain|>"},
        {"eos_token": {"content": "<|rain|>"}},
        {"additional_special_tokens": ["<|rain|>"]},
        {"extra_special_tokens": {"image_token": "<|rain|>"}},
    ],
)
def test_a_token_of_added_tokens_json_may_be_unknown_if_a_setting_makes_it_special(tiny_tokenizer, tmp_path, setting):
    folder = edited_copy(tiny_tokenizer, tmp_path / "x")
    (folder / "added_tokens.json").write_text('{"<|rain|>": 900}')
    (folder / "tokenizer_config.json").write_text(json.dumps(setting))
    assert load_tokenizer(folder).notes == []


def test_a_token_that_transformers_would_not_know_is_a_note(tiny_tokenizer, tmp_path):
    """As after extending a vocabulary in tokenizer.json alone."""
    added = json.loads((tiny_tokenizer / "tokenizer.json").read_text())["added_tokens"]
    token = {"id": vocab_size(tiny_tokenizer), "content": "the cat", **ADDED, "special": False}
    folder = edited_copy(tiny_tokenizer, tmp_path / "x", added_tokens=[*added, token])
    assert load_tokenizer(folder).notes == []
    decoder = {str(one["id"]): {key: one[key] for key in one if key != "id"} for one in added}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    handle = load_tokenizer(folder)
    assert len(handle.notes) == 1 and "'the cat'" in handle.notes[0]
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.encode("the cat", add_special_tokens=False) != handle.encode_flat(["the cat"])[0].tolist()
    decoder[str(token["id"])] = {key: token[key] for key in token if key != "id"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).notes == []
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.encode("the cat", add_special_tokens=False) == handle.encode_flat(["the cat"])[0].tolist()


def test_vocabulary_and_merges_alone_are_refused_with_a_remedy_that_works(tiny_tokenizer, tmp_path):
    model = json.loads((tiny_tokenizer / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
    with pytest.raises(UserError, match=r"holds vocab\.json and merges\.txt.*AutoTokenizer.*config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    handle = load_tokenizer(tmp_path)
    for text in TEXTS:
        expected = theirs.encode(text, split_special_tokens=True)
        assert handle.encode_flat([text])[0].tolist() == expected
