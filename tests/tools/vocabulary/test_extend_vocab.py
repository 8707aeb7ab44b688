"""tools/extend_vocab.py on a byte-level BPE, from the command line: ids, texts, weights, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import vocabulary_models as models
import xxhash
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from retemper.engine.errors import run_command
from retemper.engine.weights.checkpoint.manifest import read_manifest
from retemper.engine.weights.checkpoint.tensors import load_tensors, stored_tensors
from retemper.engine.weights.checkpoint.verify import require_undamaged
from retemper.engine.weights.conversion.hf_to_dcp import convert
from retemper.tools import extend_vocab as command
from retemper.tools.tokenizer.handle import load_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONTROL = "<|endoftext|><|im_start|>a<|im_end|><think>b"
LEARN = ["--num-tokens", "40", "--min-count", "5"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return models.write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def extended(base, corpus, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("extended") / "model"
    command.main(["--model", str(base), "--corpus", str(corpus), "--output", str(output), *LEARN])
    return output


def report(folder: Path) -> dict:
    return json.loads((folder / "vocabulary.json").read_text())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def tensors_of_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    found = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in stored_tensors(folder).items()}
    load_tensors(folder, found, distributed=False)
    return found


def test_old_tokens_keep_their_ids(base, extended):
    old, new = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (base, extended))
    before, after = old.get_vocab(), new.get_vocab()
    assert {token: after[token] for token in before} == before
    assert sorted(after.values()) == list(range(len(before) + 40))
    assert old.get_added_tokens_decoder().keys() == new.get_added_tokens_decoder().keys()
    assert old.encode(CONTROL).ids == new.encode(CONTROL).ids
    merges = [json.loads((folder / "tokenizer.json").read_text())["model"]["merges"] for folder in (base, extended)]
    assert merges[1][: len(merges[0])] == merges[0] and len(merges[1]) == len(merges[0]) + 40


def test_texts_decode_to_themselves_in_fewer_tokens(base, extended):
    old, new = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (base, extended))
    fewer = 0
    for text in [*map(models.domain_text, range(500, 700)), "", "\n\n  x", "🙂 e\u0301 mitochondrionmitochondrion"]:
        before, after = (t.encode(text, add_special_tokens=False).ids for t in (old, new))
        assert new.decode(after) == old.decode(before)
        assert len(after) <= len(before)
        fewer += len(after) < len(before)
    assert fewer > 150


def test_the_learned_part_is_as_the_encoder_makes_it(base, extended, corpus):
    """The curve comes from counting merges; the library encodes the same held-out documents."""
    found = report(extended)
    curve = found["held_out_tokens_by_number_of_new_tokens"]
    assert len(curve) == 41 and curve == sorted(curve, reverse=True)
    assert (curve[0], curve[-1]) == (found["gain"]["before"]["tokens"], found["gain"]["after"]["tokens"])
    new = Tokenizer.from_file(str(extended / "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    held_out = [text for text in texts if is_held_out(text)]
    assert 0 < len(held_out) == found["gain"]["documents"] < len(texts) / 4
    assert sum(len(new.encode(text, add_special_tokens=False).ids) for text in held_out) == curve[-1]
    assert found["gain"]["after"]["tokens_per_character"] == pytest.approx(curve[-1] / sum(map(len, held_out)))


def is_held_out(text: str) -> bool:
    return xxhash.xxh3_64_intdigest(text.encode()) % 10 == 0


def test_nothing_is_learned_from_what_is_held_out(base, tmp_path):
    sides = {word: [f"{word} {number} " * 30 for number in range(200)] for word in ("zyzzyva", "syzygy")}
    texts = [text for text in sides["zyzzyva"] if is_held_out(text)][:8]
    texts += [text for text in sides["syzygy"] if not is_held_out(text)][:8]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--corpus", str(corpus), "--num-tokens", "1000", "--min-count", "100"]
    command.main(["--model", str(base), "--output", str(tmp_path / "new"), *arguments])
    learned = {token["text"].strip() for token in report(tmp_path / "new")["tokens"]}
    assert "syzygy" in learned and not any("yzz" in text for text in learned)


def test_transformers_reads_the_same_tokenizer(base, extended):
    theirs = AutoTokenizer.from_pretrained(extended)
    ours = load_tokenizer(extended, allow_special_tokens=True, backend="reference")
    for text in [models.domain_text(900), CONTROL]:
        assert theirs.encode(text) == ours.encode_flat([text])[0].tolist()
    before = AutoTokenizer.from_pretrained(base)
    assert (before.eos_token_id, before.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)


def test_the_fast_path_gives_the_same_ids(extended):
    handle = load_tokenizer(extended)
    assert handle.encoder.startswith("fastokens")
    texts = [*map(models.domain_text, range(50)), CONTROL]
    assert handle.check_fast_path(texts) is None
    assert max(handle.encode_flat(texts)[0]) >= report(extended)["first_new_id"]
    assert handle.eod()[1] == load_tokenizer(extended, backend="reference").eod()[1]


def test_vocab_and_merges_beside_it_agree(extended):
    content = json.loads((extended / "tokenizer.json").read_text())["model"]
    assert json.loads((extended / "vocab.json").read_text()) == content["vocab"]
    lines = (extended / "merges.txt").read_text().splitlines()[1:]
    assert lines == [" ".join(merge) for merge in content["merges"]]


def test_new_rows_are_means_and_the_rest_is_as_it_was(base, extended):
    """Against float64 means of the rows of what the old library makes of each token."""
    old, new, found = tensors(base), tensors(extended), report(extended)
    assert old.keys() == new.keys()
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    first, rows = found["first_new_id"], old[EMBEDDING].shape[0]
    assert rows - first >= 20 and found["rows"] % 4 == 0 and found["rows"] >= first + 40
    for name in old:
        if name not in (EMBEDDING, HEAD):
            assert torch.equal(old[name], new[name])
            continue
        assert new[name].shape == (found["rows"], 16) and new[name].dtype == torch.bfloat16
        assert torch.equal(old[name][:first], new[name][:first])
        for token in found["tokens"]:
            parts = [piece.id for piece in tokenizer.model.tokenize(token["piece"])]
            assert len(parts) > 1 and parts == token["subtokens"]
            mean = old[name][parts].double().mean(0).to(torch.bfloat16)
            torch.testing.assert_close(new[name][token["id"]], mean, rtol=2**-8, atol=1e-6)
        padding = old[name][:first].double().mean(0).to(torch.bfloat16)
        assert (new[name][max(first + 40, rows) :] == padding).all()
        assert max(first + 40, rows) < found["rows"]


@pytest.mark.parametrize("tied", [False, True])
def test_logits_over_old_ids_are_unchanged(tmp_path, corpus, tied):
    folder = models.write_model(tmp_path / "model", tied=tied, dtype=torch.float32, spare=0)
    command.main(["--model", str(folder), "--corpus", str(corpus), "--output", str(tmp_path / "new"), *LEARN])
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("the cat sat on a mat").ids
    assert Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json")).encode("the cat sat on a mat").ids == ids
    old, new = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, tmp_path / "new"))
    found = report(tmp_path / "new")
    with torch.no_grad():
        before, after = (model(torch.tensor([ids])).logits[0] for model in (old, new))
    assert after.shape[-1] == found["rows"] == new.config.vocab_size
    first = found["first_new_id"]
    torch.testing.assert_close(after[:, :first], before[:, :first], rtol=1e-6, atol=1e-6)
    if tied:
        assert HEAD not in tensors(tmp_path / "new")


def test_a_checkpoint_becomes_a_checkpoint(base, extended, corpus, tmp_path):
    convert(str(base), tmp_path / "base")
    command.main(
        ["--model", str(tmp_path / "base"), "--corpus", str(corpus), "--output", str(tmp_path / "new"), *LEARN]
    )
    assert read_manifest(tmp_path / "new").kind == "converted"
    require_undamaged(tmp_path / "new")
    ours, theirs = tensors_of_checkpoint(tmp_path / "new"), tensors(extended)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        assert (tmp_path / "new" / "hf" / name).read_bytes() == (extended / name).read_bytes()
    config = json.loads((tmp_path / "new" / "hf" / "config.json").read_text())
    assert config["vocab_size"] == report(extended)["rows"]


def test_listed_tokens_get_merges_or_are_added(base, tmp_path, capsys):
    listed = tmp_path / "words.txt"
    listed.write_text(" mitochondrion\nNew York\n线粒体\nthe\n", encoding="utf-8")
    command.main(["--model", str(base), "--tokens", str(listed), "--output", str(tmp_path / "new")])
    printed = capsys.readouterr().out
    assert "'the' is a token already" in printed and "'New York' becomes an added token" in printed
    tokenizer = load_tokenizer(tmp_path / "new")
    by_text = {token["text"]: token for token in report(tmp_path / "new")["tokens"]}
    assert by_text[" mitochondrion"]["kind"] == "merge" and by_text["New York"]["kind"] == "added"
    for text, token in (("a mitochondrion", " mitochondrion"), ("in New York", "New York"), ("线粒体", "线粒体")):
        ids = tokenizer.encode_flat([text])[0].tolist()
        assert ids[-1] == by_text[token]["id"] and tokenizer.decode(ids) == text
    theirs = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert theirs.encode("in New York")[-1] == by_text["New York"]["id"]
    assert all(len(token["subtokens"]) > 1 for token in by_text.values())


def test_rows_as_asked_for(base, corpus, tmp_path, capsys):
    arguments = ["--corpus", str(corpus), "--num-tokens", "5", "--min-count", "5"]
    command.main(["--model", str(base), "--output", str(tmp_path / "same"), *arguments])
    rows = tensors(base)[EMBEDDING].shape[0]
    assert tensors(tmp_path / "same")[EMBEDDING].shape[0] == rows
    assert f"{rows} rows, unchanged" in capsys.readouterr().out
    first = report(tmp_path / "same")["first_new_id"]
    assert torch.equal(tensors(tmp_path / "same")[EMBEDDING][first + 5 :], tensors(base)[EMBEDDING][first + 5 :])
    command.main(
        ["--model", str(base), "--output", str(tmp_path / "padded"), *arguments, "--pad-vocab-to-multiple-of", "128"]
    )
    assert tensors(tmp_path / "padded")[EMBEDDING].shape[0] == -(-rows // 128) * 128


def test_fewer_than_asked_for_is_said(base, corpus, tmp_path, capsys):
    command.main(
        ["--model", str(base), "--corpus", str(corpus), "--output", str(tmp_path / "new"), "--num-tokens", "100000"]
    )
    made = report(tmp_path / "new")["num_new_tokens"]
    assert 0 < made < 1000
    assert f"made {made:,} new tokens instead of the --num-tokens 100,000" in capsys.readouterr().out


@pytest.fixture
def refused(capfd, tmp_path):
    """One line on stderr, exit status 1, and no output."""

    def check(*arguments: object) -> str:
        output = tmp_path / "refused"
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: command.main([*map(str, arguments), "--output", str(output)]))
        lines = capfd.readouterr().err.splitlines()
        assert exit_.value.code == 1 and len(lines) == 1 and not list(tmp_path.glob("*refused*"))
        return lines[0]

    return check


def test_bad_input(base, corpus, refused, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "no document" in refused("--model", base, "--corpus", empty)
    assert "no key 'body'" in refused("--model", base, "--corpus", corpus, "--json-key", "body")
    assert "--num-tokens 0" in refused("--model", base, "--corpus", corpus, "--num-tokens", "0")
    assert "lower --min-count" in refused("--model", base, "--corpus", corpus, "--min-count", "100000")
    assert "--corpus or --tokens" in refused("--model", base)
    assert "no such" in refused("--model", tmp_path / "nowhere", "--corpus", corpus)
    listed = tmp_path / "list.txt"
    listed.write_text("one\ntwo\none\n")
    assert "line 3 repeats 'one' of line 1" in refused("--model", base, "--tokens", listed)
    listed.write_text("the\n")
    assert "tokens already" in refused("--model", base, "--tokens", listed)
    listed.write_text("\n")
    assert "holds no token" in refused("--model", base, "--tokens", listed)


def test_tokenizers_that_cannot_be_extended(base, corpus, refused, tmp_path):
    folder = shutil.copytree(base, tmp_path / "copy")
    content = json.loads((folder / "tokenizer.json").read_text())

    def write(**changes: object) -> None:
        (folder / "tokenizer.json").write_text(json.dumps({**content, "model": {**content["model"], **changes}}))

    write(end_of_word_suffix="</w>")
    assert "tokenizer.json: its BPE has a end_of_word_suffix" in refused("--model", folder, "--corpus", corpus)
    vocab = {"[UNK]": 0, "a": 1}
    content["model"] = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": vocab}
    write(max_input_chars_per_word=100)
    assert "tokenizer.json: a WordPiece model" in refused("--model", folder, "--corpus", corpus)
    (folder / "tokenizer.json").unlink()
    assert "holds no tokenizer.json" in refused("--model", folder, "--corpus", corpus)
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert "tiktoken" in refused("--model", folder, "--corpus", corpus)


def test_a_tokenizer_of_another_model_is_refused(base, corpus, refused, tmp_path):
    folder = models.write_model(tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]} | {"far": 5000}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert "ids up to 5,000, but its embedding has" in refused("--model", folder, "--corpus", corpus)
