"""Which documents the preprocess command keeps, where it writes them and in which order: each option end to end,
against plain Python over the made-up corpus. What decides is tested by itself in test_dedup.py and its neighbours."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from oracles.megatron_index import read_megatron
from oracles.preprocessing import jsonl, plain_ids, report, run
from oracles.tiny_tokenizer import sample_text

from retemper.tools.preprocessing.report import format_report

UNIQUE = [sample_text(seed, 8 + seed % 5) for seed in range(60)]
SMALL_TASKS = {"task_bytes": 700, "workers": 2}


def documents(prefix: Path) -> list[list[list[int]]]:
    return read_megatron(prefix).documents


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(UNIQUE))
    return path


def test_limits_on_characters_tokens_and_documents(tmp_path, tiny_tokenizer, corpus):
    (tmp_path / "b.jsonl").write_bytes(jsonl(UNIQUE[:20]))
    ids = plain_ids(tiny_tokenizer, UNIQUE)
    sizes = sorted(len(document[0]) for document in ids)
    least, most, chars = sizes[15], sizes[45], sorted(map(len, UNIQUE))[10]
    options = {"min_chars": chars, "min_tokens": least, "max_tokens": most, "max_documents": 9}
    sidecar = run(tiny_tokenizer, tmp_path, corpus, tmp_path / "b.jsonl", **options, **SMALL_TASKS)
    expected, left_out = [], []
    for texts in (UNIQUE, UNIQUE[:20]):
        long_enough = [text for text in texts if len(text) >= chars]
        encoded = plain_ids(tiny_tokenizer, long_enough)
        kept = [document for document in encoded if least <= len(document[0]) <= most]
        expected += kept[:9]
        reasons = {
            "below --min-chars": len(texts) - len(long_enough),
            "below --min-tokens": sum(len(document[0]) < least for document in encoded),
            "above --max-tokens": sum(len(document[0]) > most for document in encoded),
            "beyond --max-documents": max(len(kept) - 9, 0),
        }
        left_out.append({reason: count for reason, count in reasons.items() if count})
    assert documents(tmp_path / "out") == expected
    assert [source.left_out for source in sidecar.sources] == left_out
    assert sidecar.options == options


def test_exact_duplicates_are_left_out_over_all_parts_and_sources(tmp_path, tiny_tokenizer):
    texts = [*UNIQUE, *UNIQUE[::3], "new", *UNIQUE[::2]]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts[:70]))
    (tmp_path / "b.jsonl").write_bytes(jsonl(texts[70:]))
    for options in ({}, SMALL_TASKS):
        inputs = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
        found = report(tiny_tokenizer, tmp_path, *inputs, dedup="exact", overwrite=True, **options)
        assert documents(tmp_path / "out") == plain_ids(tiny_tokenizer, [*UNIQUE, "new"])
        (sidecar,) = found.sidecars.values()
        assert [source.left_out for source in sidecar.sources] == [{"duplicate": 10}, {"duplicate": 40}]
        assert "duplicate" in format_report(found)


def test_near_duplicates_are_left_out(tmp_path, tiny_tokenizer):
    long = [sample_text(seed, 200) for seed in range(12)]
    near = [text + " and one more word" for text in long[::2]]
    (tmp_path / "a.jsonl").write_bytes(jsonl([*long, *near]))
    for options in ({}, {"task_bytes": 3000, "workers": 2}):
        sidecar = run(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", dedup="minhash", overwrite=True, **options)
        assert documents(tmp_path / "out") == plain_ids(tiny_tokenizer, long)
        assert sidecar.left_out == {"near-duplicate": 6}
        assert sidecar.options == {"dedup": "minhash"}


def test_a_split_puts_each_document_on_one_side_for_good(tmp_path, tiny_tokenizer, corpus):
    shares = "train=0.7,valid=0.2,test=0.1"
    found = report(tiny_tokenizer, tmp_path, corpus, split=shares, **SMALL_TASKS)
    assert list(found.sidecars) == [f"{tmp_path}/out.{side}" for side in ("train", "valid", "test")]
    before = {side: documents(tmp_path / f"out.{side}") for side in ("train", "valid", "test")}
    everything = [document for side in before.values() for document in side]
    assert sorted(everything) == sorted(plain_ids(tiny_tokenizer, UNIQUE))
    assert sum(sidecar.documents for sidecar in found.sidecars.values()) == len(UNIQUE)
    # The corpus grows at both ends, and is read in another format and order.
    more = [sample_text(seed, 9) for seed in range(1000, 1040)]
    (tmp_path / "b.jsonl").write_bytes(jsonl([*more, *UNIQUE[::-1], UNIQUE[0]]))
    report(tiny_tokenizer, tmp_path / "grown", tmp_path / "b.jsonl", split=shares)
    for side, old in before.items():
        now = documents(tmp_path / "grown" / f"out.{side}")
        assert all(document in now for document in old)
        assert not any(document in now for other in before if other != side for document in before[other])


def test_a_side_without_documents_is_refused(tmp_path, refused):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one", "two"]))
    arguments = ("--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "o" / "out")
    error = refused(*arguments, "--split", "train=0.999999,valid=0.000001")
    assert error == (
        "error: --split: no document was assigned to 'valid'; give it a larger share, or use a larger corpus"
    )
    assert not list((tmp_path / "o").glob("out*"))
    assert "sum to 1" in refused(*arguments, "--split", "train=0.9,valid=0.2")


def test_a_shuffle_depends_on_the_seed_alone(tmp_path, tiny_tokenizer, corpus):
    expected = plain_ids(tiny_tokenizer, UNIQUE)
    orders = {}
    for name, seed, options in (("a", 0, {}), ("b", 0, SMALL_TASKS), ("c", 1, {})):
        run(tiny_tokenizer, tmp_path / name, corpus, shuffle=True, seed=seed, metadata=["text"], **options)
        orders[name] = documents(tmp_path / name / "out")
        assert sorted(orders[name]) == sorted(expected) and orders[name] != expected
        lines = (tmp_path / name / "out.metadata.jsonl").read_bytes().splitlines()
        assert plain_ids(tiny_tokenizer, [json.loads(line)["text"] for line in lines]) == orders[name]
    assert orders["a"] == orders["b"] != orders["c"]
    moved = np.array([orders["a"].index(document) for document in expected])
    # No document is near its place more often than chance would have it: 60 uniform draws, |distance| <= 2.
    assert (abs(moved - np.arange(60)) <= 2).sum() < 15


def test_selection_comes_before_shuffle_and_split(tmp_path, tiny_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(jsonl([*UNIQUE, *UNIQUE]))
    options = {"dedup": "exact", "max_documents": 50, "shuffle": True, "split": "train=0.5,valid=0.5"}
    found = report(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", **options, **SMALL_TASKS)
    both = documents(tmp_path / "out.train") + documents(tmp_path / "out.valid")
    assert sorted(both) == sorted(plain_ids(tiny_tokenizer, UNIQUE[:50]))
    for sidecar in found.sidecars.values():
        assert sidecar.left_out == {"duplicate": 60, "beyond --max-documents": 10}
        assert sidecar.options == options


def test_metadata_keeps_its_document(tmp_path, tiny_tokenizer):
    records = [{"text": text, "id": i, "meta": {"lang": "en"}} for i, text in enumerate([*UNIQUE[:9], "", "x"])]
    del records[3]["id"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {"metadata": ["id", "meta.lang"], "min_chars": 2}
    sidecar = run(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", **options, **SMALL_TASKS)
    lines = [json.loads(line) for line in (tmp_path / "out.metadata.jsonl").read_bytes().splitlines()]
    expected = [{"id": i, "meta.lang": "en"} if i != 3 else {"meta.lang": "en"} for i in range(9)]
    assert lines == expected
    assert sidecar.documents == 9 and sidecar.metadata_xxh3_128


def test_held_out_texts_are_kept_out(tmp_path, tiny_tokenizer):
    held_out = [sample_text(seed, 40) for seed in range(500, 503)]
    texts = [*UNIQUE[:10], f"as they say: {held_out[1]}; so it is", *UNIQUE[10:20]]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "test.jsonl").write_bytes(b"".join(json.dumps({"question": t}).encode() + b"\n" for t in held_out))
    options = {"held_out": [str(tmp_path / "test.jsonl")], **SMALL_TASKS}
    sidecar = run(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", **options)
    assert documents(tmp_path / "out") == plain_ids(tiny_tokenizer, UNIQUE[:20])
    assert sidecar.left_out == {"shares an n-gram with --held-out": 1}


def test_cleaning_changes_the_text_before_all_else(tmp_path, tiny_tokenizer):
    texts = ["Cafe\u0301 a\x00b", "Caf\u00e9 ab", "tabs\tand\nlines stay \x1b[0m"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts) + b'{"text": "\xff"}\n')
    options = {"normalize": "nfc", "strip_control": True, "drop_invalid_utf8": True, "dedup": "exact"}
    sidecar = run(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", **options)
    cleaned = [
        "".join(c for c in unicodedata.normalize("NFC", text) if c in "\t\n\r" or unicodedata.category(c) != "Cc")
        for text in texts
    ]
    assert cleaned[0] == cleaned[1]
    assert documents(tmp_path / "out") == plain_ids(tiny_tokenizer, [cleaned[0], cleaned[2]])
    assert sidecar.left_out == {"duplicate": 1, "invalid UTF-8": 1}
