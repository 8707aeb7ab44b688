"""Tokenizers are compared by vocabulary and behaviour: saved again they are the same, changed they are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import vocabulary_models as models
from sidecars import SIDECAR
from transformers import AutoTokenizer

from retemper.engine.data.sidecar import Sidecar
from retemper.engine.data.tokenizer_identity import TokenizerIdentity
from retemper.engine.errors import UserError
from retemper.engine.tokenizer.fingerprint import same_tokenizer
from retemper.engine.weights.checkpoint.assets import HfAssets
from retemper.tools.reports.dataset.tokenizers import choose_tokenizer
from retemper.tools.tokenizer.handle import load_tokenizer

KINDS = ("byte-level", "json bpe", "json unigram")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders with tokenizer and config.json, by kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in (*KINDS, "json+model bpe", "json+model unigram"):
        models.write_tokenizer(root / kind, kind)
        model_type = {"model_type": "qwen2" if kind == "byte-level" else "llama"}
        (root / kind / "config.json").write_text(json.dumps(model_type))
    return {path.name: path for path in root.iterdir()}


def fingerprint(path: Path) -> str:
    return load_tokenizer(path, backend="reference").fingerprint


@pytest.mark.parametrize(
    ("kind", "class_name"),
    [
        *((kind, "PreTrainedTokenizerFast") for kind in KINDS),
        ("byte-level", "Qwen2Tokenizer"),
        ("json bpe", "LlamaTokenizer"),
    ],
)
def test_saved_by_transformers_it_is_the_same(kind, class_name, folders, tmp_path):
    """These classes build normalizer, pre-tokenizer and model themselves."""
    folder = Path(shutil.copytree(folders[kind], tmp_path / "before"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": class_name}))
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "after")
    AutoTokenizer.from_pretrained(tmp_path / "after").save_pretrained(tmp_path / "again")
    before, after, again = (load_tokenizer(tmp_path / name) for name in ("before", "after", "again"))
    assert before.sha256 != after.sha256
    assert same_tokenizer(before.fingerprint, after.fingerprint) and same_tokenizer(
        again.fingerprint, after.fingerprint
    )


@pytest.mark.parametrize("kind", ["json+model bpe", "json+model unigram"])
def test_a_sentencepiece_model_and_its_tokenizer_json_are_the_same(kind, folders):
    model, other = (
        folders[kind] / "tokenizer.model",
        {"json+model bpe": "json+model unigram"}.get(kind, "json+model bpe"),
    )
    assert same_tokenizer(fingerprint(model), fingerprint(folders[kind] / "tokenizer.json"))
    assert not same_tokenizer(fingerprint(model), fingerprint(folders[other] / "tokenizer.json"))
    assert not same_tokenizer(fingerprint(model), fingerprint(folders[other] / "tokenizer.model"))


def swapped(entries: list[Any]) -> None:
    entries[-1], entries[-2] = entries[-2], entries[-1]


def ids_swapped(content: dict) -> None:
    vocab = content["model"]["vocab"]
    one, other = list(vocab)[300:302]
    vocab[one], vocab[other] = vocab[other], vocab[one]


def normalizer(kind: str, **fields: Any) -> Callable[[dict], None]:
    return lambda content: content.update(normalizer={"type": kind, **fields})


def cut(content: dict) -> dict:
    return content["pre_tokenizer"]["pretokenizers"][0]["pattern"]


CHANGES: dict[str, Callable[[dict], object]] = {
    "two merges swapped": lambda content: swapped(content["model"]["merges"]),
    "two ids swapped": ids_swapped,
    "an added token missing": lambda content: content["added_tokens"].pop(),
    "an added token's text": lambda content: content["added_tokens"][-1].update(content="<thought>"),
    "an added token strips": lambda content: content["added_tokens"][-1].update(lstrip=True),
    "no normalizer": lambda content: content.update(normalizer=None),
    "NFKC": normalizer("NFKC"),
    "NFD": normalizer("NFD"),
    "lower case": normalizer("Lowercase"),
    "accents": normalizer("StripAccents"),
    "strip": normalizer("Strip", strip_left=True, strip_right=True),
    "apostrophes": normalizer("Replace", pattern={"String": "\u2019"}, content="'"),
    "full-width forms": normalizer("Replace", pattern={"Regex": "\uff01"}, content="!"),
    "three digits": lambda content: cut(content).update(Regex=cut(content)["Regex"].replace("\\p{N}|", "\\p{N}{1,3}|")),
    "a space first": lambda content: content["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
}
SAME: dict[str, Callable[[dict], object]] = {
    "merges as text": lambda content: content["model"].update(merges=[" ".join(m) for m in content["model"]["merges"]]),
    "dropout": lambda content: content["model"].update(dropout=0.1),
    "no decoder": lambda content: content.update(decoder=None),
    "truncation": lambda content: content.update(
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    ),
    "keys in another order": lambda content: content["model"].update(
        vocab=dict(reversed(content["model"]["vocab"].items()))
    ),
}


@pytest.mark.parametrize("change", [*CHANGES, *SAME])
def test_what_makes_another_tokenizer(change, folders, tmp_path):
    content = json.loads((folders["byte-level"] / "tokenizer.json").read_text())
    content["model"]["vocab"]["12"] = max(token["id"] for token in content["added_tokens"]) + 1
    content["model"]["merges"].append(["1", "2"])
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
        (CHANGES | SAME)[change](content)
    found = same_tokenizer(fingerprint(tmp_path / "before"), fingerprint(tmp_path / "after"))
    assert found == (change in SAME)


def test_scores_of_a_unigram_model(folders, tmp_path):
    content = json.loads((folders["json unigram"] / "tokenizer.json").read_text())
    content["model"]["vocab"][-1][1] -= 1e-6
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert not same_tokenizer(fingerprint(folders["json unigram"]), fingerprint(tmp_path))


def test_the_token_that_ends_documents_does_not_matter(folders):
    handle = load_tokenizer(folders["byte-level"])
    before = handle.fingerprint
    handle.eod("<think>")
    assert handle.fingerprint == before != ""


def test_unknown_fingerprints_are_not_the_same():
    assert not same_tokenizer("", "") and not same_tokenizer("1:BPE:a:b", "2:BPE:a:b") and not same_tokenizer("x", "x")
    assert same_tokenizer("1:BPE:a:b", "1:BPE:a:b") and same_tokenizer("1:BPE:a:b", "1:sentencepiece:c:b")
    assert not same_tokenizer("1:BPE:a:b", "1:BPE:c:b")


def test_a_model_whose_tokenizer_was_saved_again_takes_the_dataset(folders, tmp_path):
    """The check of a run (HfAssets) and that of show_dataset."""
    first = folders["byte-level"]
    AutoTokenizer.from_pretrained(first).save_pretrained(tmp_path / "again")
    handle = load_tokenizer(first)
    sidecar = replace(
        SIDECAR, tokenizer="gone", tokenizer_sha256=handle.sha256, tokenizer_fingerprint=handle.fingerprint
    )
    for folder, expected in ((first, True), (tmp_path / "again", True), (folders["json bpe"], False)):
        identity = HfAssets.read(folder).tokenizer
        assert identity is not None and identity.made(sidecar) is expected
    for found in (replace(sidecar, tokenizer=str(tmp_path / "again")), replace(sidecar, tokenizer=str(first))):
        assert choose_tokenizer(None, found, "x").vocab_size == handle.vocab_size
    with pytest.raises(UserError, match="--tokenizer"):
        choose_tokenizer(None, replace(sidecar, tokenizer=str(folders["json bpe"])), "x")


def test_sidecars_without_a_fingerprint(folders, tmp_path):
    """It is computed from the tokenizer that the sidecar names, where that is still there and unchanged."""
    first = folders["byte-level"]
    record = json.loads(replace(SIDECAR, tokenizer=str(first), tokenizer_sha256=load_tokenizer(first).sha256).to_json())
    del record["tokenizer_fingerprint"]
    (tmp_path / "old.json").write_text(json.dumps(record))
    sidecar = Sidecar.read(tmp_path / "old")
    assert sidecar is not None and sidecar.tokenizer_fingerprint == ""
    same = TokenizerIdentity("of another file", lambda: fingerprint(first))
    other = TokenizerIdentity("of another file", lambda: fingerprint(folders["json bpe"]))
    assert same.made(sidecar) and not other.made(sidecar)
    assert not same.made(replace(sidecar, tokenizer=str(tmp_path / "gone")))
    assert not same.made(replace(sidecar, tokenizer_sha256="changed since"))
