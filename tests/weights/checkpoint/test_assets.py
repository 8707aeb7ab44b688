"""The tokenizer that travels with a checkpoint: which files it is, and that its hash is the one in datasets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from oracles.tiny_tokenizer import train_tiny_sentencepiece, train_tiny_tokenizer, write_tiny_tiktoken

from retemper.engine.errors import UserError
from retemper.engine.weights.checkpoint.assets import HfAssets
from retemper.tools.tokenizer.handle import load_tokenizer


def fill(folder: Path, kind: str) -> Path:
    """A folder with a tokenizer of ``kind``, and what is not the tokenizer's."""
    folder.mkdir()
    if kind == "tokenizer.json":
        train_tiny_tokenizer(folder)
    elif kind == "sentencepiece":
        train_tiny_sentencepiece(folder / "tokenizer.model")
    else:
        write_tiny_tiktoken(folder / "tiny.tiktoken")
    (folder / "chat_template.jinja").write_text(kind)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    (folder / "notes.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


KINDS = {
    "tokenizer.json": ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json"],
    "sentencepiece": ["chat_template.jinja", "config.json", "tokenizer.model"],
    "tiktoken": ["chat_template.jinja", "config.json", "tiny.json", "tiny.tiktoken"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_carries_the_tokenizer_whole(tmp_path, kind):
    folder = fill(tmp_path / "hf", kind)
    assets = HfAssets.read(folder)
    assert sorted(assets.files) == KINDS[kind]
    assert assets.config == {"model_type": kind}
    assets.write(tmp_path / "step" / "hf")
    kept = HfAssets.of_checkpoint(tmp_path / "step")
    assert kept.files == assets.files
    loaded, original = load_tokenizer(tmp_path / "step" / "hf"), load_tokenizer(folder)
    assert kept.tokenizer_sha256 == loaded.sha256 == original.sha256
    text = "the cat sat, naïve 天色"
    assert loaded.encode_flat([text])[0].tolist() == original.encode_flat([text])[0].tolist()
    assert loaded.eod() == original.eod()


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", KINDS)
def test_another_tokenizer_takes_the_place_of_all_its_files(tmp_path, old, new):
    before, other = HfAssets.read(fill(tmp_path / "old", old)), fill(tmp_path / "new", new)
    after = before.with_tokenizer(str(other))
    assert sorted(after.files) == KINDS[new]
    assert after.config == {"model_type": old}
    assert after.files["chat_template.jinja"] == new.encode()
    assert after.tokenizer_sha256 == load_tokenizer(other).sha256
    assert sorted(before.files) == KINDS[old]


def test_of_several_it_is_the_one_that_encodes(tmp_path):
    folder = fill(tmp_path / "x", "tiktoken")
    seen = [load_tokenizer(folder).sha256]
    train_tiny_sentencepiece(folder / "tokenizer.model")
    seen.append(load_tokenizer(folder).sha256)
    assert HfAssets.read(folder).tokenizer_sha256 == seen[-1]
    train_tiny_tokenizer(folder)
    seen.append(load_tokenizer(folder).sha256)
    assert HfAssets.read(folder).tokenizer_sha256 == seen[-1]
    assert len(set(seen)) == 3


def test_a_folder_without_a_tokenizer(tmp_path):
    folder = fill(tmp_path / "x", "tokenizer.json")
    (tmp_path / "empty").mkdir()
    assets = HfAssets.read(tmp_path / "empty")
    assert (assets.files, assets.config, assets.tokenizer_sha256) == ({}, None, None)
    for name in ("empty", "none"):
        with pytest.raises(UserError, match=rf"model.tokenizer .*{name}: no tokenizer.json there, no tokenizer.model"):
            HfAssets.read(folder).with_tokenizer(str(tmp_path / name))
    # Two of them are none: which one encodes?
    for name in ("a", "b"):
        (tmp_path / "empty" / f"{name}.tiktoken").write_bytes(b"")
    assert HfAssets.read(tmp_path / "empty").tokenizer_sha256 is None
    with pytest.raises(UserError, match=r"not one \*.tiktoken"):
        HfAssets.read(folder).with_tokenizer(str(tmp_path / "empty"))


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"hf/config.json of the checkpoint is damaged"):
        _ = HfAssets.read(tmp_path).config
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"hf/config.json of the checkpoint is damaged"):
        _ = HfAssets.read(tmp_path).config


def test_a_link_out_of_the_checkpoint_is_refused(tmp_path):
    (tmp_path / "step" / "hf").mkdir(parents=True)
    (tmp_path / "secret").write_text("of somebody")
    (tmp_path / "step" / "hf" / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"hf/vocab.json: a link to .*secret, outside its folder"):
        HfAssets.of_checkpoint(tmp_path / "step")
