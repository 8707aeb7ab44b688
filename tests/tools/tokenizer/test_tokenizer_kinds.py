"""Tokenizers that are no tokenizer.json, sentencepiece models and tiktoken files, against their own libraries."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.tiny_tokenizer import (
    sample_text,
    shared_data,
    train_tiny_sentencepiece,
    train_tiny_tokenizer,
    write_tiny_tiktoken,
)
from tokenizers import Tokenizer, models, pre_tokenizers

from retemper.engine.data.index_format import best_dtype
from retemper.engine.errors import UserError
from retemper.engine.weights.checkpoint.assets import HfAssets
from retemper.tools.tokenizer.document_frame import DocumentFrame
from retemper.tools.tokenizer.handle import TokenizerHandle, load_tokenizer

sentencepiece = pytest.importorskip("sentencepiece", reason="an optional package: pip install sentencepiece")
tiktoken = pytest.importorskip("tiktoken", reason="an optional package: pip install tiktoken")

END = 1_000_000
"""An id that no text has."""
PIECES = [
    *("<s>", "</s>", "<unk>", "<think>", "<|endoftext|>", "<0x41>", "▁", "the", " cat", "  ", "\n", "\t", "\0"),
    *("\u2028", "\u3000", "\ufeff", "e\u0301", "é", "ﬁ", "Å", "天", "🙂", "\u200d", "'s", "12", "!", "\r\n"),
]
TEXTS = ["", " ", "a</s>b<s>", "x<think>y", "a<|endoftext|>", *(sample_text(seed, 30) for seed in range(4))]
HUGE = ["a" * 1_000_000, " " * 300_000 + "x", "天" * 300_000, "the cat\n" * 60_000]


def batches() -> st.SearchStrategy[list[str]]:
    any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    return st.lists(st.lists(st.sampled_from(PIECES) | any_text, max_size=8).map("".join), max_size=8)


def expect_ids(handle: TokenizerHandle, texts: list[str], expected: list[list[int]]) -> None:
    """All ways of encoding give ``expected``, with END as the end of documents."""
    ids, lengths = handle.encode_flat(texts)
    assert ids.tolist() == [token for one in expected for token in one]
    assert lengths.tolist() == list(map(len, expected))
    assert [one.tolist() for one in handle.encode_batch(texts)] == expected
    ids, lengths = handle.encode_documents(texts, DocumentFrame(suffix=(END,)))
    assert ids.tolist() == [token for one in expected if one for token in [*one, END]]
    assert (ids.dtype, lengths.dtype, ids.flags.writeable) == (np.int32, np.int64, True)
    assert handle.check_fast_path(texts) is None and handle.fallback_reason is None


MODELS = {
    "llama": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram", "vocab_size": 300},
    "as it stands": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "no prefix, symbols": {"add_dummy_prefix": False, "user_defined_symbols": ["<think>", "  "]},
    "no bytes": {"byte_fallback": False, "vocab_size": 150},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    return train_tiny_sentencepiece(folder / "tokenizer.model", **MODELS[request.param])


class TestSentencePiece:
    @settings(max_examples=60, deadline=None)
    @given(texts=batches())
    def test_fuzzed_text_gives_the_librarys_ids(self, model, texts):
        handle = load_tokenizer(model.parent)
        assert (handle.kind, handle.file) == ("sentencepiece", model)
        library = sentencepiece.SentencePieceProcessor(model_file=str(model))
        expect_ids(handle, texts, [library.encode(text) for text in texts])
        assert not {1, 2} & set(handle.encode_flat(texts)[0].tolist())  # <s> and </s>

    def test_huge_texts(self, model):
        handle = load_tokenizer(model)
        library = sentencepiece.SentencePieceProcessor(model_file=str(model))
        for text in HUGE:
            assert handle.encode_flat([text])[0].tolist() == library.encode(text)

    def test_size_end_and_decoding(self, model):
        handle = load_tokenizer(model)
        library = sentencepiece.SentencePieceProcessor(model_file=str(model))
        assert (handle.vocab_size, handle.eod()) == (library.get_piece_size(), ("</s>", 2))
        assert handle.eod("<s>") == ("<s>", 1)
        assert handle.sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
        ids = [*library.encode("the cat"), 2, *library.encode("sat"), handle.vocab_size + 3, -1]
        assert handle.decode(ids) == "the cat</s>sat"
        assert handle.spec.load().encode_flat(TEXTS)[0].tolist() == handle.encode_flat(TEXTS)[0].tolist()

    def test_what_cannot_end_a_document_is_refused(self, tmp_path):
        file = train_tiny_sentencepiece(tmp_path / "x.model", user_defined_symbols=["<think>"])
        handle = load_tokenizer(file)
        with pytest.raises(UserError, match=r"'<eot>' is not in the vocabulary; .* --eod-token"):
            handle.eod("<eot>")
        for word in ("<think>", "▁the", "<unk>"):
            with pytest.raises(UserError, match=f"'{word}' is not a control piece"):
                handle.eod(word)
        without = load_tokenizer(train_tiny_sentencepiece(tmp_path / "y.model", eos_id=-1))
        with pytest.raises(UserError, match=r"y.model: the model has no EOS piece; name a control piece with"):
            without.eod()
        with pytest.raises(UserError, match="--allow-special-tokens does not apply to a sentencepiece model"):
            load_tokenizer(file, allow_special_tokens=True)

    def test_a_lone_surrogate_is_refused(self, model):
        with pytest.raises(UserError, match=r"text 1 of the batch holds a lone surrogate \(U\+D800 at character 1\)"):
            load_tokenizer(model).encode_flat(["fine", "a\ud800"])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "not a sentencepiece model"),
            (b"\0" * 50, "not a sentencepiece model"),
            (b"{}", "not a sentencepiece model"),
            (b"aGVsbG8= 0\nd29ybGQ= 1\n", "it holds tiktoken ranks; use the tokenizer.json of the same model, or copy"),
        ],
    )
    def test_what_is_no_model_is_refused(self, tmp_path, content, message):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("tiktoken") / "tiny.tiktoken"
    write_tiny_tiktoken(file, ("<|endoftext|>", "<|im_end|>"))
    return file


@pytest.fixture(scope="module")
def library(file) -> tiktoken.Encoding:
    description = json.loads(file.with_suffix(".json").read_text())
    lines = (line.split() for line in file.read_text().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding(
        "tiny",
        pat_str=description["pattern"],
        mergeable_ranks=ranks,
        special_tokens=description["special_tokens"],
    )


class TestTiktoken:
    @settings(max_examples=60, deadline=None)
    @given(texts=batches())
    def test_fuzzed_text_gives_the_librarys_ids(self, file, library, texts):
        handle = load_tokenizer(file)
        assert handle.kind == "tiktoken" and handle.encoder.startswith("tiktoken ")
        expect_ids(handle, texts, [library.encode_ordinary(text) for text in texts])
        assert not {library.eot_token} & set(handle.encode_flat(texts)[0].tolist())
        for text, ids in zip(texts, handle.encode_batch(texts), strict=True):
            assert handle.decode(ids) == text
        allowed = load_tokenizer(file, allow_special_tokens=True)
        expect_ids(allowed, texts, [library.encode(text, allowed_special="all") for text in texts])

    def test_huge_texts(self, file, library):
        handle = load_tokenizer(file)
        for text in HUGE:
            assert handle.encode_flat([text])[0].tolist() == library.encode_ordinary(text)

    def test_size_end_and_decoding(self, file, library):
        handle = load_tokenizer(file.parent)
        assert (handle.vocab_size, handle.eod()) == (library.n_vocab, ("<|endoftext|>", library.eot_token))
        assert handle.eod("<|im_end|>")[1] == library.encode_single_token("<|im_end|>")
        with pytest.raises(UserError, match=r"'the' is not a special token of this encoding \(it has <\|endoftext\|>,"):
            handle.eod("the")
        hole = library.eot_token - 1  # in the numbering
        ids = [*library.encode("the"), library.eot_token, hole, 10**6, library.encode("Ж")[0]]
        assert handle.decode(ids) == "the<|endoftext|>\ufffd"

    def test_the_hash_tells_what_the_ids_depend_on(self, file, tmp_path):
        """The same ranks with another pattern are another tokenizer."""
        for name in ("tiny.tiktoken", "tiny.json"):
            shutil.copy(file.parent / name, tmp_path)
        digest = load_tokenizer(tmp_path).sha256
        assert digest == load_tokenizer(file).sha256 == HfAssets.read(tmp_path).tokenizer_sha256
        description = json.loads((tmp_path / "tiny.json").read_text())
        (tmp_path / "tiny.json").write_text(json.dumps({**description, "pattern": r"\S+|\s"}))
        other = load_tokenizer(tmp_path)
        assert other.sha256 != digest and other.sha256 == HfAssets.read(tmp_path).tokenizer_sha256
        assert other.encode_flat(["a cat"])[0].tolist() != load_tokenizer(file).encode_flat(["a cat"])[0].tolist()

    def test_nfc_is_applied_where_the_description_says_so(self, file, library, tmp_path):
        for name in ("tiny.tiktoken", "tiny.json"):
            shutil.copy(file.parent / name, tmp_path)
        description = json.loads((tmp_path / "tiny.json").read_text())
        (tmp_path / "tiny.json").write_text(json.dumps({**description, "normalization": "NFC"}))
        text = "e\u0301 \u212b \u1100\u1161"
        expected = library.encode_ordinary(unicodedata.normalize("NFC", text))
        assert load_tokenizer(tmp_path).encode_flat([text])[0].tolist() == expected
        assert library.encode_ordinary(text) != expected

    def test_a_lone_surrogate_is_refused(self, file):
        with pytest.raises(UserError, match=r"text 1 of the batch holds a lone surrogate \(U\+D800 at character 1\)"):
            load_tokenizer(file).encode_flat(["fine", "a\ud800"])

    def test_a_text_that_the_library_gives_up_on_is_refused(self, file, tmp_path):
        """Qwen's pattern, on a million spaces."""
        shutil.copy(file, tmp_path)
        (tmp_path / "tiny.json").write_text(json.dumps({"pattern": r"\S+|\s+(?!\S)|\s+", "special_tokens": {}}))
        with pytest.raises(UserError, match="tiktoken cannot encode the text of 1,000,000 characters that begins with"):
            load_tokenizer(tmp_path).encode_flat(["a", " " * 1_000_000])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda lines: [], "256 of the 256 bytes have no rank; the first is 0x00"),
            (lambda lines: [*lines, "x"], "tiny.tiktoken:359: not a tiktoken line"),
            (lambda lines: [*lines, "=?= 7"], "tiny.tiktoken:359: not a tiktoken line"),
            (lambda lines: [*lines, "YWJjZA== -5"], "tiny.tiktoken:359: rank -5 is not a token id"),
            (
                lambda lines: [*lines, f"YWJjZA== {2**31}"],
                "tiny.tiktoken:359: rank 2147483648 is not a token id: ids are",
            ),
            (lambda lines: [*lines, "YWJjZA== 0"], "id 0 belongs to two tokens"),
            (lambda lines: [*lines, "YWJjZA== 363"], "id 363 belongs to two tokens, special tokens included"),
        ],
    )
    def test_malformed_ranks_are_refused(self, file, tmp_path, change, message):
        shutil.copy(file.with_suffix(".json"), tmp_path)
        lines = file.read_text().splitlines()
        assert len(lines) == 358
        (tmp_path / "tiny.tiktoken").write_text("\n".join(change(lines)))
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)

    def test_ids_that_are_all_taken_twice_are_refused_at_once(self, file, tmp_path):
        """In time that is linear in the size of the vocabulary."""
        shutil.copy(file.with_suffix(".json"), tmp_path)
        tokens = [base64.b64encode(str(number).encode()).decode() for number in range(100_000)]
        bytes_ = file.read_text().splitlines()[:256]
        lines = [*bytes_, *(f"{token} {500 + number // 2}" for number, token in enumerate(tokens))]
        (tmp_path / "tiny.tiktoken").write_text("\n".join(lines))
        with pytest.raises(UserError, match="id 500 belongs to two tokens"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        ("description", "message"),
        [
            ("{", "tiny.json: cannot be read as JSON"),
            ("[]", 'tiny.json: must be a JSON object with "pattern"'),
            ('{"special_tokens": {}}', 'tiny.json: must be a JSON object with "pattern"'),
            ('{"pattern": "x", "special_tokens": {}, "colour": 1}', "unknown key 'colour'"),
            ('{"pattern": "x"}', '"special_tokens" must map tokens to ids'),
            ('{"pattern": "x", "special_tokens": {"a": -1}}', '"special_tokens" must map tokens to ids'),
            ('{"pattern": "x", "special_tokens": {"a": 2147483648}}', '"special_tokens" must map tokens to ids'),
            ('{"pattern": "x", "special_tokens": {}, "normalization": "NFD"}', "\"normalization\" is 'NFD'"),
            ('{"pattern": "(", "special_tokens": {}}', "tiny.json: pattern is not a regular expression"),
        ],
    )
    def test_a_malformed_description_is_refused(self, file, tmp_path, description, message):
        shutil.copy(file, tmp_path)
        (tmp_path / "tiny.json").write_text(description)
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)

    def test_which_file_of_a_folder(self, file, tmp_path):
        shutil.copy(file, tmp_path / "unknown.tiktoken")
        with pytest.raises(UserError, match=r"those of 'unknown' are not known .*; write them to .*unknown.json as"):
            load_tokenizer(tmp_path)
        shutil.copy(file, tmp_path / "cl100k_base.tiktoken")
        with pytest.raises(UserError, match=r"holds cl100k_base.tiktoken and unknown.tiktoken; name one of these"):
            load_tokenizer(tmp_path)
        with pytest.raises(UserError, match=r"holds 358 ranks, but the encoding 'cl100k_base' has 100,256; give"):
            load_tokenizer(tmp_path / "cl100k_base.tiktoken")
        train_tiny_sentencepiece(tmp_path / "tokenizer.model")
        assert load_tokenizer(tmp_path).kind == "sentencepiece"
        train_tiny_tokenizer(tmp_path)
        assert load_tokenizer(tmp_path).kind == "tokenizer.json"


def test_a_unigram_model_may_not_end_documents_with_what_text_may_hold(tmp_path):
    """Its control pieces are pieces: AutoTokenizer too makes </s> of the text </s>."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -1.0) for letter in "▁ab<>/s")]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match=r"'</s>' written in a text becomes id 2 in this Unigram model, .*--allow-spec"):
        load_tokenizer(tmp_path).eod()
    assert load_tokenizer(tmp_path, allow_special_tokens=True).eod() == ("</s>", 2)


def test_an_ordinary_word_may_not_end_documents(tmp_path):
    handle = load_tokenizer(train_tiny_tokenizer(tmp_path))
    with pytest.raises(UserError, match="'the' written in a text becomes id"):
        handle.eod("the")


# The library writes a vocabulary by going through all ids up to the largest: half a minute for 2**31.
@pytest.mark.parametrize(
    "token_id",
    [
        pytest.param(2**31 - 1, marks=(pytest.mark.slow, pytest.mark.extended)),
        pytest.param(2**31, marks=(pytest.mark.slow, pytest.mark.extended)),
        2**32 - 1,
    ],
)
def test_ids_that_no_dataset_can_hold_are_refused(tmp_path, token_id):
    file = train_tiny_tokenizer(tmp_path) / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    content["model"]["vocab"]["t"] = token_id
    file.write_text(json.dumps(content), encoding="utf-8")
    if token_id < 2**31:
        handle = load_tokenizer(file, backend="reference")
        assert handle.encode_flat(["tt"])[0].tolist() == [token_id] * 2
        assert best_dtype(handle.vocab_size) == np.int32
    else:
        with pytest.raises(UserError, match=f"has a token of id {token_id:,}, but datasets hold ids up to 2,147,483,6"):
            load_tokenizer(file)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cl100k/cl100k_base.tiktoken", "qwen-tiktoken/qwen.tiktoken"])
def test_real_ranks(name):
    """cl100k_base against the package's own definition of it, which it would download ranks for; Qwen's against its
    later tokenizer.json, of the same vocabulary."""
    folder = shared_data()
    if folder is None:
        pytest.skip("no folder ../shared/data with real tokenizers and corpora")
    handle = load_tokenizer(folder / "tokenizers" / name)
    texts = [*TEXTS, "".join(PIECES), "a" * 100_000]
    for corpus in sorted((folder / "corpora").glob("*.jsonl")):
        with open(corpus, "rb") as lines:
            texts += [json.loads(line)["text"][:20_000] for line, _ in zip(lines, range(6), strict=False)]
    if "cl100k" in name:
        from tiktoken import load
        from tiktoken_ext import openai_public

        with pytest.MonkeyPatch.context() as patch:
            ranks = load.load_tiktoken_bpe(str(folder / "tokenizers" / name))
            patch.setattr(openai_public, "load_tiktoken_bpe", lambda *arguments, **keywords: ranks)
            library = tiktoken.Encoding(**openai_public.cl100k_base())
        assert (handle.vocab_size, handle.eod()) == (library.n_vocab, ("<|endoftext|>", library.eot_token))
        expect_ids(handle, texts, [library.encode_ordinary(text) for text in texts])
        return
    plain = Tokenizer.from_file(str(folder / "tokenizers" / "qwen2.5" / "tokenizer.json"))
    plain.encode_special_tokens = True
    assert handle.eod() == ("<|endoftext|>", plain.token_to_id("<|endoftext|>"))
    texts = [text for text in texts if "think" not in text]  # not flagged special there
    expect_ids(handle, texts, [plain.encode(text, add_special_tokens=False).ids for text in texts])
