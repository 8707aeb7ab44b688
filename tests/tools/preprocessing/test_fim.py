"""Fill-in-the-middle: against a reference that takes the written documents apart, and formats written down by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.framed_tokenizers import LLAMA3, byte_fallback, byte_level, save
from oracles.megatron_index import read_megatron
from oracles.preprocessing import jsonl, run
from oracles.tiny_tokenizer import sample_text, train_tiny_sentencepiece
from tokenizers import Tokenizer

from retemper.engine.errors import UserError
from retemper.tools.preprocess import parse_arguments
from retemper.tools.preprocessing.fim import KNOWN_TOKENS, FimRule
from retemper.tools.preprocessing.merging.merge import MergeOptions, merge
from retemper.tools.preprocessing.options import PreprocessOptions
from retemper.tools.preprocessing.pipeline import preprocess
from retemper.tools.preprocessing.run_plan import RunPlan
from retemper.tools.preprocessing.run_setup import RunSetup

TEXTS = [sample_text(seed, 3 + seed % 17) for seed in range(400)]
HERE = {"encoder": "auto"}
"""Encode in this process, as a small input."""
QWEN = ("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
TOKENS = {
    "Qwen": QWEN,
    "StarCoder": ("<|endoftext|>", *KNOWN_TOKENS[1]),
    "DeepSeek": ("<|endoftext|>", *KNOWN_TOKENS[3]),
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("fim") / "qwen", byte_level(QWEN), eos_token="<|endoftext|>")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "code.jsonl"
    path.write_bytes(jsonl(TEXTS))
    return path


def documents(prefix: Path) -> list[list[int]]:
    return [ids for [ids] in read_megatron(prefix).documents]


def taken_apart(ids: list[int], pre: int, suf: int, mid: int) -> tuple[list[int], list[int], list[int], str]:
    """Prefix, middle and suffix of a document in one of the two formats of the paper."""
    assert ids[0] == pre and [ids.count(token) for token in (pre, suf, mid)] == [1, 1, 1]
    at_suf, at_mid = ids.index(suf), ids.index(mid)
    assert at_suf < at_mid
    # Without a prefix, both orders are the same.
    return ids[1:at_suf], ids[at_mid + 1 :], ids[at_suf + 1 : at_mid], "PSM" if at_suf > 1 else "SPM or no prefix"


@pytest.mark.parametrize("family", TOKENS)
def test_parts_of_rearranged_documents_are_the_text(tmp_path, corpus, family):
    """Decoded, the parts are the text; encoded by plain tokenizers, they are the ids in the dataset."""
    names = TOKENS[family]
    folder = save(tmp_path / "tokenizer", byte_level(names), eos_token="<|endoftext|>")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    _, pre, suf, mid = (
        tokenizer.token_to_id(name) for name in (names[0], *next(k for k in KNOWN_TOKENS if k[0] in names))
    )
    sidecar = run(folder, tmp_path, corpus, fim_rate=0.5, fim_spm_rate=0.3, **HERE)
    plain, found = 0, {"PSM": 0, "SPM or no prefix": 0}
    for text, [*ids, end] in zip(TEXTS, documents(tmp_path / "out"), strict=True):
        assert end == 0
        if ids[0] != pre:
            plain += 1
            assert ids == tokenizer.encode(text).ids
            continue
        prefix, middle, suffix, order = taken_apart(ids, pre, suf, mid)
        found[order] += 1
        assert tokenizer.decode(prefix + middle) + tokenizer.decode(suffix) == text
    (source,) = sidecar.sources
    psm, spm = (source.changed[f"--fim-rate, {order}"] for order in ("PSM", "SPM"))
    assert psm + spm == sum(found.values()) == 400 - plain and psm >= found["PSM"] > 0
    # Five standard deviations of the binomial distributions.
    assert abs(plain - 200) < 50 and abs(spm - 0.3 * (psm + spm)) < 33
    assert sidecar.options == {
        "fim_rate": 0.5,
        "fim_spm_rate": 0.3,
        "fim_tokens": [tokenizer.id_to_token(token) for token in (pre, suf, mid)],
    }


def permute(parts: tuple[list[int], list[int], list[int]], spm: bool, pre: int, suf: int, mid: int) -> list[int]:
    """The order of tokens in Megatron-LM's dataset for StarCoder (bigcode-project/Megatron-LM, gpt_dataset.py)."""
    prefix, middle, suffix = (np.array(part, np.int64) for part in parts)
    if spm:
        return np.concatenate([[pre, suf], suffix, [mid], prefix, middle]).tolist()
    return np.concatenate([[pre], prefix, [suf], suffix, [mid], middle]).tolist()


@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
def test_order_is_that_of_starcoder(qwen, tmp_path, corpus, spm_rate):
    tokenizer = Tokenizer.from_file(str(qwen / "tokenizer.json"))
    pre, mid, suf = (tokenizer.token_to_id(name) for name in QWEN[1:])
    run(qwen, tmp_path, corpus, fim_rate=1.0, fim_spm_rate=spm_rate, seed=5, **HERE)
    rule = FimRule((("<|fim_prefix|>", pre),), 1.0, spm_rate, 5)
    for text, ids in zip(TEXTS, documents(tmp_path / "out"), strict=True):
        cut = rule.cut(text)
        assert cut is not None and cut.prefix + cut.middle + cut.suffix == text
        parts = tuple(tokenizer.encode(part).ids for part in (cut.prefix, cut.middle, cut.suffix))
        assert ids == [*permute(parts, bool(spm_rate), pre, suf, mid), 0]


def test_cuts_are_uniform_over_characters():
    """Both places together: each of the 11 places in ten characters is as frequent as every other."""
    rule = FimRule((), 1.0, 0.5, 0)
    places = np.zeros(11, np.int64)
    for number in range(20_000):
        cut = rule.cut(f"{number:010d}")
        assert cut is not None
        places[len(cut.prefix)] += 1
        places[10 - len(cut.suffix)] += 1
    expected = places.sum() / 11
    assert ((places - expected) ** 2 / expected).sum() < 35.6  # chi-square with 10 degrees of freedom at p = 0.0001


@pytest.mark.parametrize(
    ("text", "seed", "cut"),
    [
        ("def f(x):\n    return x\n", 0, ("def f(x):\n    ret", "urn x", "\n", False)),
        ("def f(x):\n    return x\n", 1, ("def f(x):\n ", "   re", "turn x\n", True)),
        ("天色如洗万里无云", 0, ("天色如洗万", "", "里无云", True)),
        ("a", 0, ("", "", "a", False)),
        ("", 0, None),
    ],
)
def test_fixed_cuts(text, seed, cut):
    """Datasets of one version are those of the next."""
    assert FimRule((), 1.0, 0.5, seed).cut(text) == cut


@pytest.mark.parametrize("encoder", ["fast", "reference"])
def test_workers_tasks_shards_and_encoders_agree(qwen, tmp_path, corpus, encoder):
    options: dict[str, Any] = {"fim_rate": 0.5, "seed": 3}
    run(qwen, tmp_path, corpus, **HERE, **options)
    expected = (tmp_path / "out.bin").read_bytes()
    run(qwen, tmp_path, corpus, encoder=encoder, workers=2, task_bytes=900, overwrite=True, **options)
    assert (tmp_path / "out.bin").read_bytes() == expected
    if encoder == "reference":
        return
    for index in range(3):
        run(qwen, tmp_path, corpus, shard=f"{index}/3", **HERE, **options)
    merge(MergeOptions([str(tmp_path / "out.shard-*-of-3")], str(tmp_path / "joined")))
    assert (tmp_path / "joined.bin").read_bytes() == expected
    run(qwen, tmp_path, corpus, fim_rate=0.5, seed=4, overwrite=True, **HERE)
    assert (tmp_path / "out.bin").read_bytes() != expected


def test_a_restart_reuses_no_outputs_of_another_seed(qwen, tmp_path, corpus):
    def keys(**options: Any) -> set[str]:
        made = PreprocessOptions([str(corpus)], str(qwen), output_prefix=str(tmp_path / "out"), **options)
        return set(RunPlan(RunSetup(made, made.output_prefix), tmp_path).tasks)

    assert keys(seed=1) == keys(seed=2) != keys(seed=1, fim_rate=0.5) != keys(seed=2, fim_rate=0.5)


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer.json"])
def test_later_parts_of_codellama_begin_without_a_space(tmp_path, kind):
    """As Meta's ``encode_infilling``: the text after a character that is never merged, without its ids."""
    names = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
    folder = tmp_path / "tokenizer"
    if kind == "sentencepiece":
        train_tiny_sentencepiece(folder / "tokenizer.model", control_symbols=list(names), vocab_size=420)
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        encode, id_of = model.encode, model.piece_to_id
    else:
        save(folder, byte_fallback(("<unk>", "<s>", "</s>", *names)), "<s> $A", bos_token="<s>", eos_token="</s>")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        encode, id_of = lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.token_to_id
    pre, suf, mid, eot = map(id_of, names)
    skipped = len(encode("☺"))
    path = tmp_path / "code.jsonl"
    path.write_bytes(jsonl(TEXTS[:50]))
    run(folder, tmp_path, path, fim_rate=1.0, **HERE)
    orders = set()
    for text, ids in zip(TEXTS[:50], documents(tmp_path / "out"), strict=True):
        cut = FimRule((), 1.0, 0.5, 0).cut(text)
        assert cut is not None
        middle, suffix = (encode("☺" + part)[skipped:] for part in (cut.middle, cut.suffix))
        inner = permute((encode(cut.prefix), middle, suffix), cut.is_spm, pre, suf, mid)
        assert ids == [id_of("<s>"), *inner, eot, id_of("</s>")]
        orders.add(cut.is_spm)
    assert orders == {True, False}


def test_a_text_with_a_fim_token_in_it_stays_as_it_is(qwen, tmp_path):
    path = tmp_path / "code.jsonl"
    path.write_bytes(jsonl(["x = '<|fim_middle|>'", "plain"]))
    sidecar = run(qwen, tmp_path, path, fim_rate=1.0, fim_spm_rate=0.0, **HERE)
    assert sidecar.sources[0].changed == {"--fim-rate, PSM": 1}
    assert 1 not in documents(tmp_path / "out")[0]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--fim-rate 1.5", "--fim-rate 1.5: must be between 0 and 1"),
        ("--fim-spm-rate 0.2", "--fim-spm-rate 0.2 needs --fim-rate; add it, or remove --fim-spm-rate"),
        ("--fim-tokens a b c", "--fim-tokens a b c needs --fim-rate; add it, or remove --fim-tokens"),
        ("--fim-rate 0.5 --fim-tokens a b", "--fim-tokens a b: 2 tokens"),
        ("--fim-rate 0.5 --fim-tokens a b a", "--fim-tokens a b a: a token is named twice"),
        ("--fim-rate 0.5 --fim-tokens <|fim_prefix|> <b> <c>", "--fim-tokens <b>: {tokenizer} has no such token"),
        ("--fim-rate 0.5 --chat", "--fim-rate is for texts, not for --chat; remove one of them"),
        ("--fim-rate 0.5 --to-jsonl", "--fim-rate is for tokens, --to-jsonl writes text; remove one of them"),
    ],
)
def test_refused(qwen, tmp_path, corpus, words, line):
    named = [] if "--to-jsonl" in words else ["--tokenizer", str(qwen)]
    options = parse_arguments(["--input", str(corpus), *named, "--output-prefix", str(tmp_path / "o"), *words.split()])
    with pytest.raises(UserError) as refusal:
        preprocess(options)
    assert str(refusal.value).startswith(line.format(tokenizer=qwen))


def test_a_tokenizer_without_fim_tokens_is_refused(tmp_path, corpus):
    folder = save(tmp_path / "llama", byte_level(LLAMA3), eos_token="<|end_of_text|>")
    with pytest.raises(UserError, match=r"has no FIM tokens of a known name.*--fim-tokens"):
        preprocess(PreprocessOptions([str(corpus)], str(folder), output_prefix=str(tmp_path / "out"), fim_rate=0.5))
    used = ["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"]
    sidecar = run(folder, tmp_path, corpus, fim_rate=1.0, fim_tokens=used, **HERE)
    assert sidecar.options["fim_tokens"] == used
