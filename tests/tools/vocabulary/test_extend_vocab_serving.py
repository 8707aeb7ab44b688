"""tools/extend_vocab.py: transformers' AutoTokenizer gives the ids that the model is trained on."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import vocabulary_models as models
from oracles.tiny_tokenizer import sample_text
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from retemper.engine.errors import UserError
from retemper.tools.vocabulary import serving
from retemper.tools.vocabulary.command import extend
from retemper.tools.vocabulary.options import ExtendOptions
from retemper.tools.vocabulary.token_list import read_list, texts_of
from retemper.tools.vocabulary.vocabulary import NewToken

TOKENS = [" ribosome", "cytochrome b", "p53-gene", "<|cell|>"]
TEXTS = [
    *("the ribosome sat", "ribosome", "a cytochrome b c", "acytochrome bc", "<|cell|>", "x <|cell|> y", "a<|cell|>b"),
    *("p53-gene p53-gene", " p53-gene ", "  cytochrome b  cytochrome b", " ribosome ribosome\n ribosome"),
]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "special": True, "normalized": False}


def extended(folder: Path, tokens: list[str] | None = None) -> tuple[Path, list[str]]:
    """The output for listed ``tokens``, and what was printed."""
    listed, lines = folder.with_name("list.txt"), []
    listed.write_text("\n".join(tokens or TOKENS) + "\n", encoding="utf-8")
    output = folder.with_name(f"{folder.name}-new")
    extend(ExtendOptions(str(folder), str(output), tokens=str(listed)), lines.append)
    return output, lines


def expect_served_alike(folder: Path, used: list[str] | None = None) -> None:
    """AutoTokenizer and the tokenizers library give the same ids, and each new token is made of text."""
    ours, theirs = Tokenizer.from_file(str(folder / "tokenizer.json")), AutoTokenizer.from_pretrained(folder)
    found: set[int] = set()
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert ours.decode(ids).strip() == text.strip()
        found.update(ids)
    report = json.loads((folder / "vocabulary.json").read_text())["tokens"]
    whole = {token["id"]: token["text"] for token in report if token["kind"] != "part"}
    assert sorted(whole.values()) == sorted(used or TOKENS) and set(whole) <= found


def set_config(folder: Path, **settings: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def qwen(folder: Path) -> Path:
    """With the lists of added tokens that transformers reads before tokenizer.json."""
    models.write_model(folder)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    decoder = {str(token.pop("id")): token for token in map(dict, added)}
    set_config(folder, added_tokens_decoder=decoder)
    (folder / "added_tokens.json").write_text(json.dumps({token["content"]: token["id"] for token in added}))
    return folder


@pytest.mark.parametrize("lists", ["both", "added_tokens.json", "none"])
def test_qwen(lists, tmp_path):
    folder = qwen(tmp_path / "model")
    if lists != "both":
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({key: config[key] for key in config if key != "added_tokens_decoder"}))
    if lists == "none":
        (folder / "added_tokens.json").unlink()
    output, _ = extended(folder)
    expect_served_alike(output)
    assert json.loads((output / "tokenizer_config.json").read_text())["tokenizer_class"] == "Qwen2Tokenizer"
    if lists == "both":  # what programs do that read vocab.json and merges.txt
        expected = Tokenizer.from_file(str(output / "tokenizer.json"))
        (output / "tokenizer.json").unlink()
        theirs = AutoTokenizer.from_pretrained(output)
        for text in TEXTS:
            assert theirs.encode(text) == expected.encode(text).ids


def test_a_class_with_other_rules_than_the_file(tmp_path):
    """Qwen2Tokenizer cuts numbers into digits whatever tokenizer.json says."""
    folder = qwen(tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    cut = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    cut["Regex"] = cut["Regex"].replace("\\p{N}|", "\\p{N}{1,3}|")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"gives '53' the ids \[\d+\], but AutoTokenizer of transformers .* gives"):
        extended(folder, ["53"])
    assert not folder.with_name("model-new").exists()


@pytest.mark.parametrize("class_name", ["LlamaTokenizer", None])
@pytest.mark.parametrize("kind", ["json bpe", "json unigram", "model bpe", "model unigram"])
def test_llama(kind, class_name, tmp_path):
    folder = models.write_model(tmp_path / "model", kind)
    if class_name:
        set_config(folder, tokenizer_class=class_name, add_bos_token=True)
        if "json" in kind:
            special = dict(enumerate(("<unk>", "<s>", "</s>")))
            set_config(folder, added_tokens_decoder={str(i): {"content": s, **FLAGS} for i, s in special.items()})
    output, _ = extended(folder)
    expect_served_alike(output)
    if class_name and kind == "model bpe":  # the BOS is as before
        assert [AutoTokenizer.from_pretrained(path).encode("x")[0] for path in (folder, output)] == [1, 1]


def test_words_alone_leave_the_rules_for_spaces(tmp_path):
    """Old texts keep their ids, those that begin with spaces too; LlamaTokenizer would change these."""
    folder = models.write_model(tmp_path / "model", "model bpe")
    set_config(folder, tokenizer_class="LlamaTokenizer")
    output, lines = extended(folder, [" ribosome"])
    assert any("tokenizer_class" in line for line in lines)
    slow = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    theirs = AutoTokenizer.from_pretrained(output)
    for text in ("the cat", " the cat", "  a\n b ", "線 \u2581x"):
        assert theirs.encode(text, add_special_tokens=False) == slow.Encode(text)
    assert theirs.eos_token == "</s>" and theirs.bos_token == "<s>"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_with_default_normalization(kind, tmp_path):
    """nmt_nfkc, and extra spaces removed."""
    folder, written = models.write_model(tmp_path / "model", "model bpe"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(sample_text(seed, 30).replace("\n", " ") for seed in range(300)),
        model_writer=written,
        **{"vocab_size": 290, "model_type": kind, "byte_fallback": True, "minloglevel": 2},
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    output, _ = extended(folder, [" ribosome"])
    slow, theirs = (
        sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()),
        AutoTokenizer.from_pretrained(output),
    )
    for text in ("the cat", "  the   cat ", "ﬁ ①\tx", "a\u3000b"):
        assert theirs.encode(text, add_special_tokens=False) == slow.Encode(text)
    shutil.rmtree(output)
    output, _ = extended(folder)
    theirs, ours = AutoTokenizer.from_pretrained(output), Tokenizer.from_file(str(output / "tokenizer.json"))
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False).ids


def test_a_model_that_tokenizer_json_cannot_express_is_refused(tmp_path):
    folder, written = models.write_model(tmp_path / "model", "model bpe"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(sample_text(seed, 30) for seed in range(99)),
        model_writer=written,
        **{"vocab_size": 290, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2},
        treat_whitespace_as_suffix=True,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    with pytest.raises(UserError, match=r"puts spaces behind words, which tokenizer\.json cannot express"):
        extended(folder)


def test_a_difference_that_remains_is_refused(tmp_path, monkeypatch):
    folder = models.write_model(tmp_path / "model")

    class Other:
        def __init__(self) -> None:
            self.special_tokens_map: dict[str, str] = {}

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [0]

    monkeypatch.setattr(serving, "auto_tokenizer", lambda folder: Other())
    with pytest.raises(UserError, match=r"gives ' ri' the ids .* so the served model would get other ids"):
        extended(folder, [" ribosome"])
    assert not folder.with_name("model-new").exists()
    monkeypatch.setattr(serving, "auto_tokenizer", lambda folder: "it cannot load the tokenizer: why")
    assert "note: the new ids were not compared: it cannot load the tokenizer: why" in extended(folder)[1]


def test_probes_cover_every_token():
    tokens = [NewToken(i, text, text, (), "merge") for i, text in enumerate(("a", " b", "\ufffd"))]
    texts = serving.probes(tokens)
    assert {"a", "xay", "x a y", " b", "x by", "x  b y"} <= set(texts) and not any("\ufffd" in text for text in texts)


# ----------------------------------------------------------------------------------------------------------------------
# Lists


def listed(tmp_path: Path, content: str) -> list[str]:
    path = tmp_path / "list.txt"
    path.write_text(content, encoding="utf-8")
    return texts_of(read_list(str(path)), lambda piece: piece.replace("Ġ", " "), str(path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (' one\n"New York"\n{"text": " two"}\n', [" one", "New York", " two"]),
        ('{"piece": "Ġone", "id": 7}\n{"piece": "two"}', [" one", "two"]),
        ('{"piece": "Ġone", "text": " 1"}', [" 1"]),
        ('["one", {"piece": "Ġtwo"}, {"content": "a b"}]', ["one", " two", "a b"]),
        ('[\n  "one",\n  " two"\n]\n', ["one", " two"]),
        ('{"model": "m", "tokens": [{"text": " r", "kind": "part"}, {"text": " ri", "kind": "merge"}]}', [" ri"]),
        (
            '{\n"\n[INST]\n[1]\n{}\n[]\n""\n{{x}}\n123\nnull\n',
            ["{", '"', "[INST]", "[1]", "{}", "[]", '""', "{{x}}", "123", "null"],
        ),
        ("[1]", ["[1]"]),
    ],
)
def test_lists_in_json(content, expected, tmp_path):
    assert listed(tmp_path, content) == expected


@pytest.mark.parametrize(
    "content",
    [
        *('one\n{"piece": "a"\n', 'one\n{"word": "a"}\n', 'one\n{"piece": ""}\n', 'one\n{"piece": 3}\n'),
        *(
            'one\n"a\\x"\n',
            'one\n["a", "b"]\n',
            '["a", 3]',
            '{"tokens": [3]}',
            "one\n{'piece': 'a'}\n",
            '{"a": 1, "b": 2}',
        ),
        *('[\n"one",\n"two"\n', '"one",\n"two",\n'),
    ],
)
def test_what_looks_like_json_and_names_no_token_is_refused(content, tmp_path):
    with pytest.raises(UserError, match=r"--tokens .* JSON"):
        listed(tmp_path, content)


def test_its_own_report_is_read_back(tmp_path):
    """Learned from a corpus once, the same tokens come from the list."""
    folder = models.write_model(tmp_path / "model")
    corpus = models.write_corpus(tmp_path / "corpus.jsonl")
    options = {"corpus": [str(corpus)], "num_tokens": 20, "min_count": 5}
    extend(ExtendOptions(str(folder), str(tmp_path / "one"), **options), lambda line: None)
    again = ExtendOptions(str(folder), str(tmp_path / "two"), tokens=str(tmp_path / "one" / "vocabulary.json"))
    extend(again, lambda line: None)
    one, two = (json.loads((tmp_path / name / "vocabulary.json").read_text())["tokens"] for name in ("one", "two"))
    assert {token["text"] for token in one} - {token["text"] for token in two} <= {
        t for t in (o["text"] for o in one) if "\ufffd" in t
    }
