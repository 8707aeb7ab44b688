"""The fast path of tokenizer.json: its ids are those of ``tokenizers``, or it is not taken."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.tiny_tokenizer import sample_text, shared_data
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from retemper.engine.errors import UserError
from retemper.tools.tokenizer.document_frame import DocumentFrame
from retemper.tools.tokenizer.fast import why_not_exact
from retemper.tools.tokenizer.handle import TokenizerHandle, load_tokenizer

pytest.importorskip("fastokens", reason="the fast path is an optional package: pip install fastokens")

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
PIECES = [
    *("<|endoftext|>", "<|im_end|>", "<think>", "cat sat", "é", "e\u0301", "Å", "\u212b", "the", " the", "cat"),
    *(" ", "  ", "\n", "\r\n", "\t", "\0", "\u2028", "\u3000", "\ufeff", "'s", "'LL", "123", "٣", "!", "…", "天色"),
    *("🙂", "\u200d", "\u0300", "ﬁ", "\U000e0001", "<", "|>"),
]
TEXTS = [
    *("", "a<|endoftext|>b", "x<think>y", "x <think> y", "  ", "e\u0301 e", "\0", "cat sat\r\n\n", "12345"),
    "<|endoftext|>",
    *(sample_text(seed, 40) for seed in range(5)),
]

END = 1_000_000
"""An id that no text has."""


def batches() -> st.SearchStrategy[list[str]]:
    """Batches of texts that mix ordinary words, tokens written out and any Unicode."""
    any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    text = st.lists(st.sampled_from(PIECES) | any_text, max_size=8).map("".join)
    return st.lists(text, max_size=12)


def byte_level(split: str | None, normalizer: object = None, **flags: bool) -> Tokenizer:
    """A byte-level BPE with two special tokens, and added words with ``flags``."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is not None:
        cut = pre_tokenizers.Split(Regex(split), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sample_text(seed, 30) + " we'll 12 34" for seed in range(200)], trainer)
    tokenizer.add_tokens([AddedToken(word, **flags) for word in ("<think>", "cat sat", "é")])
    return tokenizer


def llama2() -> Tokenizer:
    """As transformers converts a sentencepiece model: byte fallback, spaces replaced by a normalizer."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator([sample_text(seed, 30) for seed in range(200)], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(content))


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: byte_level(None),
    "qwen": lambda: byte_level(QWEN2_SPLIT, normalizers.NFC()),
    "qwen, added words normalized": lambda: byte_level(QWEN2_SPLIT, normalizers.NFC(), normalized=True),
    "llama 3, added words strip": lambda: byte_level(LLAMA3_SPLIT, lstrip=True, rstrip=True),
    "gpt2, added words single": lambda: byte_level(None, single_word=True),
}


@pytest.fixture(scope="module", params=MAKERS)
def saved(request, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("fast") / "tokenizer.json"
    MAKERS[request.param]().save(str(file))
    return file


@pytest.fixture(scope="module", params=[False, True], ids=["special tokens are text", "special tokens are tokens"])
def pair(request, saved) -> tuple[TokenizerHandle, Tokenizer]:
    """A handle on the fast path, and the plain library."""
    plain = Tokenizer.from_file(str(saved))
    plain.encode_special_tokens = not request.param
    handle = load_tokenizer(saved, allow_special_tokens=request.param)
    assert handle.encoder.startswith("fastokens ") and handle.fallback_reason is None
    return handle, plain


def ids_of(plain: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in plain.encode_batch(texts, add_special_tokens=False)]


def expect_ids(handle: TokenizerHandle, texts: list[str], expected: list[list[int]]) -> None:
    """All ways of encoding ``texts`` give ``expected``, with END as the end of documents."""
    for ids, lengths in (handle.encode_flat(texts), handle.reference_encode(texts)):
        assert ids.tolist() == [token for one in expected for token in one]
        assert lengths.tolist() == list(map(len, expected))
    ids, lengths = handle.encode_documents(texts, DocumentFrame(suffix=(END,)))
    assert ids.tolist() == [token for one in expected if one for token in [*one, END]]
    assert lengths.tolist() == [len(one) + 1 if one else 0 for one in expected]
    assert (ids.dtype, lengths.dtype, ids.flags.writeable) == (np.int32, np.int64, True)
    assert handle.fast_path_failures == 0


@settings(max_examples=60, deadline=None)
@given(batches())
def test_fuzzed_text_gives_the_librarys_ids(pair, texts):
    handle, plain = pair
    expect_ids(handle, texts, ids_of(plain, texts))
    assert handle.check_fast_path(texts) is None


def test_special_tokens_are_control_tokens_only_when_allowed(saved):
    eod = Tokenizer.from_file(str(saved)).token_to_id("<|endoftext|>")
    for backend in ("auto", "reference"):
        plain = load_tokenizer(saved, backend=backend)
        assert plain.encoder.startswith({"auto": "fastokens", "reference": "tokenizers"}[backend])
        assert eod not in plain.encode_flat(["a<|endoftext|>b"])[0]
        allowed = load_tokenizer(saved, backend=backend, allow_special_tokens=True)
        assert allowed.encode_flat(["a<|endoftext|>b"])[0].tolist().count(eod) == 1


def test_transformers_gives_the_same_ids_words_that_are_added_and_not_special_included(saved):
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(saved))
    handle = load_tokenizer(saved)
    expected = [theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in TEXTS]
    expect_ids(handle, TEXTS, expected)
    assert handle.encode_flat(["x <think> y"])[0].tolist().count(theirs.convert_tokens_to_ids("<think>")) == 1


@pytest.mark.parametrize("encode_first", [False, True])
def test_an_eod_that_is_not_flagged_special_is_text_on_the_fast_path_too(saved, encode_first):
    handle = load_tokenizer(saved)
    word = Tokenizer.from_file(str(saved)).token_to_id("<think>")
    if encode_first:
        assert word in handle.encode_flat(["x <think> y"])[0]
    assert handle.eod("<think>") == ("<think>", word)
    for used in (handle, handle.spec.load()):
        assert used.encoder.startswith("fastokens")
        assert word not in used.encode_flat(["x <think> y"])[0]
        assert used.check_fast_path(["x <think> y", "<think>"]) is None
        ids, lengths = used.encode_documents(["x <think> y", ""], DocumentFrame(suffix=(word,)))
        assert ids.tolist().count(word) == 1 and ids[-1] == word and lengths.tolist() == [len(ids), 0]
    allowed = load_tokenizer(saved, allow_special_tokens=True)
    allowed.eod("<think>")
    assert word in allowed.encode_flat(["x <think> y"])[0]


def test_asking_for_a_special_eod_does_not_load_the_fast_path_again(saved):
    handle = load_tokenizer(saved)
    assert handle.encoder
    loaded = handle._fast
    handle.eod()
    assert loaded is not None and handle._fast is loaded


def test_threads_share_a_tokenizer(saved):
    handle = load_tokenizer(saved)
    jobs = [[sample_text(seed * 20 + i, 30) for i in range(20)] for seed in range(12)]
    expected = [
        load_tokenizer(saved, backend="reference").encode_documents(texts, DocumentFrame(suffix=(0,))) for texts in jobs
    ]
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    start = threading.Barrier(6)

    def work(first: int) -> None:
        start.wait()
        for job in range(first, len(jobs), 6):
            found[job] = handle.encode_documents(jobs[job], DocumentFrame(suffix=(0,)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for job, (ids, lengths) in enumerate(expected):
        assert np.array_equal(found[job][0], ids) and np.array_equal(found[job][1], lengths)


@pytest.mark.parametrize("text", ["naïve 天色 1 " * 150_000, " " * 300_000 + "x", "a" * 300_000, "\n!" * 500_000])
def test_huge_texts(tiny_tokenizer, text):
    handle = load_tokenizer(tiny_tokenizer)
    assert handle.check_fast_path([text, "", text[:10]]) is None
    ids, lengths = handle.encode_documents(["a", text], DocumentFrame(suffix=(0,)))
    assert (ids[-1], lengths.sum()) == (0, len(ids)) and len(ids) > 10_000
    assert handle.fast_path_failures == 0 and handle.encoder.startswith("fastokens")


def test_truncation_and_bpe_dropout_of_the_file_are_ignored(tmp_path):
    tokenizer = byte_level(None)
    expected = ids_of(tokenizer, TEXTS[-5:])
    content = json.loads(tokenizer.to_str())
    content["model"]["dropout"] = 0.5
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    handle = load_tokenizer(tmp_path)
    assert handle.encoder.startswith("fastokens")
    expect_ids(handle, TEXTS[-5:], expected)


def test_control_tokens_cannot_be_written_into_a_converted_sentencepiece_model(tmp_path):
    """fastokens would accept this tokenizer, and make </s> of the text </s>."""
    plain = llama2()
    plain.save(str(tmp_path / "tokenizer.json"))
    plain.encode_special_tokens = True
    handle = load_tokenizer(tmp_path)
    assert handle.encoder.startswith("tokenizers ") and "byte_fallback" in str(handle.fallback_reason)
    texts = ["<s>bold</s>", "<0x41>", "the cat", "▁the", ""]
    expect_ids(handle, texts, ids_of(plain, texts))
    assert not {1, 2} & set(handle.encode_flat(texts)[0].tolist())
    assert handle.check_fast_path(texts) is None


def changed(config: dict, path: str, value: object) -> dict:
    config = copy.deepcopy(config)
    *folders, last = path.split("/")
    part: Any = config
    for folder in folders:
        part = part[int(folder) if isinstance(part, list) else folder]
    part[int(last) if isinstance(part, list) else last] = value
    return config


NOT_LISTED = "not among those verified to be exact"
SPLIT = "pre_tokenizer/pretokenizers/0"


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("model/type", "Unigram", "not BPE"),
        ("model/byte_fallback", True, "byte_fallback"),
        ("model/end_of_word_suffix", "</w>", "end_of_word_suffix"),
        ("model/vocab", {"a": 0}, "255 of the 256 bytes"),
        ("added_tokens/0/content", "e\u0301", "not in Unicode's form C"),
        *(
            (path, value, NOT_LISTED)
            for path, value in (
                ("normalizer", None),
                ("normalizer", {"type": "Lowercase"}),
                ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFD"}]}),
                ("pre_tokenizer", None),
                ("pre_tokenizer", {"type": "Whitespace"}),
                ("pre_tokenizer/pretokenizers/1/add_prefix_space", True),
                ("pre_tokenizer/pretokenizers/1/use_regex", True),
                (SPLIT, {"type": "Punctuation", "behavior": "Isolated"}),
                (SPLIT, {"type": "Digits", "individual_digits": True}),
                (f"{SPLIT}/behavior", "Removed"),
                (f"{SPLIT}/invert", True),
                *((f"{SPLIT}/pattern", {"Regex": regex}) for regex in (r"\w+", r"^\s|x", "(?i)ss", r"\p{L}+", "x")),
            )
        ),
    ],
)
def test_only_what_was_compared_is_taken(path, value, reason):
    config = json.loads(byte_level(QWEN2_SPLIT, normalizers.NFC()).to_str())
    assert why_not_exact(config) is None
    assert reason in str(why_not_exact(changed(config, path, value)))


def test_a_configuration_that_differs_is_encoded_by_the_reference(tmp_path):
    """fastokens takes these, and gives other ids."""
    prefix = byte_level(LLAMA3_SPLIT)
    prefix.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), pre_tokenizers.ByteLevel(True, use_regex=False)]
    )
    for number, (tokenizer, texts) in enumerate(
        [
            (byte_level(r"\w+"), ["a\u0982b", "፹", "x\U0001f142"]),
            (byte_level(r"^.|.$|\s+"), ["the cat\nthe mat\nsat", " \n the"]),
            (prefix, [f"{c}a" for c in PIECES]),
        ]
    ):
        tokenizer.save(str(tmp_path / f"{number}.json"))
        handle = load_tokenizer(tmp_path / f"{number}.json")
        assert handle.encoder.startswith("tokenizers") and "fastokens is not used" in str(handle.fallback_reason)
        tokenizer.encode_special_tokens = True
        expect_ids(handle, texts, ids_of(tokenizer, texts))


def test_added_tokens_of_one_normalized_form_are_refused(tmp_path):
    """The library matches the one or the other, as it happens."""
    twice = byte_level(QWEN2_SPLIT, normalizers.NFC(), normalized=True)
    twice.add_tokens([AddedToken("e\u0301", normalized=True)])
    twice.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        UserError, match=r"tokenizer\.json: the added tokens .* become the same text after normalization"
    ):
        load_tokenizer(tmp_path)


def test_a_difference_is_found_and_the_reference_taken(tiny_tokenizer, monkeypatch):
    handle = load_tokenizer(tiny_tokenizer)
    assert handle.check_fast_path(TEXTS) is None
    fast = handle._fast
    assert fast is not None
    right = fast.encode

    def wrong(texts):
        ids, lengths = right(texts)
        ids = ids.copy()
        ids[-2] += 1
        return ids, lengths

    monkeypatch.setattr(fast, "encode", wrong)
    difference = handle.check_fast_path([*TEXTS, "the cat sat"])
    assert difference is not None and "fastokens" in difference and "text 'the cat sat'" in difference
    expected = handle.reference_encode(["the cat sat"])[0].tolist()
    at = len(expected) - 2
    assert f"at token {at} " in difference and f"not {expected[at:]}" in difference
    monkeypatch.setattr(fast, "encode", lambda texts: (right(texts)[0][:-1], right(texts)[1] - [1]))
    assert f"at token {at + 1} " in str(handle.check_fast_path(["the cat sat"]))

    handle.use_reference(difference)
    for used in (handle, handle.spec.load()):
        assert used.encoder.startswith("tokenizers")
        assert used.encode_flat(["the cat sat"])[0].tolist() == expected
    assert handle.fallback_reason == difference


def test_a_failing_fast_path_is_counted_and_gone_around(tiny_tokenizer, monkeypatch):
    handle = load_tokenizer(tiny_tokenizer)
    assert handle.encoder.startswith("fastokens") and handle._fast is not None

    def fail(texts):
        raise ValueError("match limit exceeded")

    monkeypatch.setattr(handle._fast, "encode", fail)
    for left, right in zip(handle.encode_flat(TEXTS), handle.reference_encode(TEXTS), strict=True):
        assert np.array_equal(left, right)
    assert handle.fast_path_failures == 1
    assert "fails on a text that tokenizers" in str(handle.check_fast_path(TEXTS))


def test_a_panic_of_the_fast_path_is_a_failure_like_any_other(tiny_tokenizer, monkeypatch):
    """Rust's panics come as pyo3_runtime.PanicException, which is no Exception."""
    handle = load_tokenizer(tiny_tokenizer)
    assert handle.encoder and handle._fast is not None
    panic = type("PanicException", (BaseException,), {})

    def fail(*arguments, **keywords):
        raise panic("index out\nof bounds")

    monkeypatch.setattr(handle._fast, "_encode", fail)
    assert np.array_equal(handle.encode_flat(TEXTS)[0], handle.reference_encode(TEXTS)[0])
    assert handle.fast_path_failures == 1
    assert "fails on a text that tokenizers" in str(handle.check_fast_path(TEXTS))
    monkeypatch.setattr(handle._fast, "_encode", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        handle.encode_flat(TEXTS)


def test_without_fastokens_the_reference_encodes(tiny_tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fastokens", None)
    handle = load_tokenizer(tiny_tokenizer)
    assert handle.encoder.startswith("tokenizers ")
    assert "pip install 'retemper[fast]'" in str(handle.fallback_reason)


def test_a_lone_surrogate_is_refused(tiny_tokenizer):
    for backend in ("auto", "reference"):
        handle = load_tokenizer(tiny_tokenizer, backend=backend)
        with pytest.raises(UserError, match=r"text 1 of the batch holds a lone surrogate \(U\+DC00 at character 2\)"):
            handle.encode_documents(["fine", "ab\udc00"], DocumentFrame(suffix=(0,)))


@pytest.mark.slow
def test_real_tokenizers_and_text_where_there_are_any():
    """An addition to the tests above, for which trained tokenizers are enough."""
    folder = shared_data()
    if folder is None:
        pytest.skip("no folder ../shared/data with real tokenizers and corpora")
    for name in ("qwen3", "gpt2"):
        handle = load_tokenizer(folder / "tokenizers" / name)
        handle.eod()
        theirs = AutoTokenizer.from_pretrained(folder / "tokenizers" / name)
        texts = ["a<|im_end|>b <think>x</think> <|endoftext|>", *TEXTS]
        for corpus in sorted((folder / "corpora").glob("*.jsonl")):
            with open(corpus, "rb") as lines:
                texts += [json.loads(line)["text"][:20_000] for line, _ in zip(lines, range(6), strict=False)]
        expected = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert handle.encoder.startswith("fastokens")
        expect_ids(handle, texts, expected)
