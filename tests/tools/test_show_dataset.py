"""The show_dataset command on datasets made by preprocess and by the independent Megatron-LM writer."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.html_page import Page
from oracles.megatron_index import read_megatron, write_megatron
from oracles.preprocessing import jsonl, run
from oracles.tiny_tokenizer import train_tiny_tokenizer

from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.data.sidecar import Sidecar
from retemper.engine.errors import UserError, run_command
from retemper.tools import show_dataset
from retemper.tools.reports.dataset.verification import verify_dataset
from retemper.tools.tokenizer.handle import load_tokenizer

HOSTILE = "<script>alert('&')</script> \x1b[31m\x00 </pre>"
TEXTS = ["the cat", "sat 🙂 on a mat " * 3, "rain", HOSTILE]
MORE = ["天色如洗", "the cat", ""]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "a.jsonl").write_bytes(jsonl(TEXTS))
    (folder / "b.jsonl").write_bytes(jsonl(MORE))
    run(tiny_tokenizer, folder, folder / "a.jsonl", folder / "b.jsonl")
    return folder / "out"


@pytest.fixture
def foreign(tmp_path) -> Path:
    write_megatron(tmp_path / "m", [[[300, 0]], [], [[5], [6, 7]]], 4)
    return tmp_path / "m"


@pytest.fixture
def refused(capsys):
    """Run the command, require exit status 1 and one line on stderr alone, and return that line."""

    def check(*arguments: Path | str) -> str:
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: show_dataset.main([str(argument) for argument in arguments]))
        captured = capsys.readouterr()
        assert (exit_.value.code, captured.out) == (1, "")
        assert len(captured.err.splitlines()) == 1, captured.err
        return captured.err

    return check


def show(capsys, *arguments: Path | str) -> str:
    capsys.readouterr()
    show_dataset.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def record(capsys, *arguments: Path | str) -> dict[str, Any]:
    return json.loads(show(capsys, *arguments, "--json"))


def rows(out: str) -> dict[str, str]:
    return {line[:21].strip(): line[22:] for line in out.split("\n\n")[0].splitlines()}


def test_json_holds_the_numbers_of_a_slow_count(made, capsys):
    facts = record(capsys, f"{made}.idx", "--documents", "99")
    documents = [[token for part in document for token in part] for document in read_megatron(made).documents]
    tokens = [token for document in documents for token in document]
    texts = [*TEXTS, *MORE]
    kept = [text for text in texts if text]
    assert (facts["documents"], facts["tokens"], facts["dtype"]) == (len(documents), len(tokens), "uint16")
    assert facts["bytes_per_token"] == pytest.approx(sum(len(text.encode()) for text in texts) / len(tokens))
    assert facts["bytes_per_token_is_exact"] and not facts["counts"]["tokens"]["sampled"]
    frequent = {item["id"]: item["count"] for item in facts["most_frequent"]}
    assert all(Counter(tokens)[token] == count for token, count in frequent.items())
    assert facts["counts"]["duplicates"]["copies"] == len(documents) - len(set(map(tuple, documents)))
    assert facts["counts"]["ends"]["ended"] == len(kept) == len([document for document in documents if document])
    sources = facts["sidecar"]["sources"]
    assert [source["text_bytes"] for source in sources] == [sum(len(t.encode()) for t in s) for s in (TEXTS, MORE)]
    assert sum(source["tokens"] for source in sources) == len(tokens)
    shown = [item["text"] for item in facts["decoded"] if item["text"]]
    assert shown == [f"{text}<|endoftext|>" for text in kept]
    assert facts["warnings"] == [] or all("empty" in warning for warning in facts["warnings"])


def test_text_says_the_same(made, capsys):
    out = show(capsys, made)
    lengths = [sum(map(len, document)) for document in read_megatron(made).documents]
    facts = rows(out)
    assert facts["documents"] == str(len(lengths)) and facts["tokens"] == str(sum(lengths))
    assert facts["tokens in a document"] == f"mean {sum(lengths) / len(lengths):,.1f}, longest {max(lengths)}"
    assert facts["duplicates"].startswith("1 document is an exact copy of another")
    assert facts["unknown share"] == "0: the tokenizer has no unknown token"
    assert "<|endoftext|> (0), at the end of 100.00% of the documents, 0 times inside" in out
    assert f"{made.parent}/a.jsonl" in out and f"{made.parent}/b.jsonl" in out
    assert "steps and epochs of a run: name its configuration with --config" in out


def test_what_a_terminal_would_obey_is_written_out(made, capsys):
    out = show(capsys, made, "--documents", "99")
    assert "<script>alert('&')</script> \\x1b[31m\\x00 </pre><|endoftext|>\n--- end of document 3 ---" in out
    assert not {"\x1b", "\x00"} & set(out)


def test_one_document(made, capsys):
    assert show(capsys, made, "--index", "1") == (
        f"--- document 1, {len(read_megatron(made).sequences[1])} tokens ---\n{TEXTS[1]}<|endoftext|>\n"
        "--- end of document 1 ---\n"
    )
    rest = len(read_megatron(made).sequences[1]) - 2
    out = show(capsys, made, "--index", "1", "--max-tokens", "2")
    assert out.endswith(f"--- cut here: {rest} more tokens ---\n") and len(out.splitlines()[1]) < len(TEXTS[1])


def test_random_documents_follow_the_seed(made, capsys):
    draws = [show(capsys, made, "--documents", "2", "--seed", str(seed)) for seed in range(8)]
    assert draws[3] == show(capsys, made, "--documents", "2", "--seed", "3")
    assert len({tuple(line for line in out.splitlines() if line.startswith("---")) for out in draws}) > 2
    assert "--- document" not in show(capsys, made, "--documents", "0")


def test_masked_text_is_marked(made, capsys, tmp_path, tiny_tokenizer):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"x{suffix}").write_bytes(Path(f"{made}{suffix}").read_bytes())
    lengths = read_megatron(made).lengths
    mask = bytes([0] * lengths[0] + [1] * sum(lengths[1:]))
    (tmp_path / "x.mask.bin").write_bytes(mask)
    tokenizer = ("--tokenizer", tiny_tokenizer)
    out = show(capsys, tmp_path / "x", *tokenizer, "--documents", "2", "--seed", "4", "--max-tokens", "50")
    assert rows(out)["loss mask"] == f"{sum(mask)} tokens ({sum(mask) / len(mask):.2%}) are targets"
    assert "1 documents have no target" in out
    assert "\n⟦the cat<|endoftext|>⟧\n" in show(capsys, tmp_path / "x", *tokenizer, "--index", "0")
    assert "\nrain<|endoftext|>\n" in show(capsys, tmp_path / "x", *tokenizer, "--index", "2")


def test_dataset_without_sidecar_says_what_it_cannot_show(foreign, capsys, refused, tiny_tokenizer):
    out = show(capsys, foreign)
    assert "the dataset has no sidecar" in out and "name the dataset's tokenizer with --tokenizer" in out
    assert "--- document" not in out and rows(out)["tokenizer"] == "not known"
    assert rows(out)["documents"].startswith("3 in 3 sequences")
    assert "33.33% of the documents are empty" in out
    assert "--tokenizer" in refused(foreign, "--index", "0")
    assert "--tokenizer" in refused(foreign, "--documents", "1")
    known = show(capsys, foreign, "--tokenizer", tiny_tokenizer)
    assert "--- document 2, 3 tokens, 2 sequences ---" in known
    assert "--- end of document 2, without the token that ends documents ---" in known
    assert "the dataset has no sidecar" in known and "--tokenizer" not in known


def test_a_tokenizer_that_is_gone_leaves_the_rest(made, capsys, tmp_path, refused):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"x{suffix}").write_bytes(Path(f"{made}{suffix}").read_bytes())
    sidecar = json.loads(Path(f"{made}.json").read_text("utf-8"))
    (tmp_path / "x.json").write_text(json.dumps({**sidecar, "tokenizer": str(tmp_path / "gone")}))
    out = show(capsys, tmp_path / "x")
    assert rows(out)["duplicates"] and f"{tmp_path / 'gone'}: no such tokenizer folder or file" in out
    assert "no such tokenizer" in refused(tmp_path / "x", "--documents", "1")


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_nothing_to_show(tmp_path, capsys, documents, tiny_tokenizer):
    write_megatron(tmp_path / "m", documents, 4)
    for more in ((), ("--tokenizer", tiny_tokenizer), ("--quick", "--html", tmp_path / "page.html")):
        assert rows(show(capsys, tmp_path / "m", *more))["documents"] == str(len(documents))
    Page((tmp_path / "page.html").read_text("utf-8")).require_self_contained()


def test_a_page_is_sound_and_shows_text_as_text(made, capsys, tmp_path):
    show(capsys, made, "--documents", "99", "--html", tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    page.require_self_contained()
    assert page.tags.count("svg") == 3
    assert "<script>alert('&')</script>" in "".join(page.words)  # as text
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    for name, value in rows(show(capsys, made)).items():
        assert f"{name} {' '.join(value.split())}" in page.text
    for text in (text for text in (*TEXTS, *MORE) if text != HOSTILE):
        assert text in "".join(page.words)
    show(capsys, made, "--documents", "99", "--html", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "page.html").read_bytes()


def test_verify(made, capsys, refused, foreign, tmp_path):
    assert show(capsys, made, "--verify").endswith("the content hashes of .bin, .idx\n")
    assert "no sidecar, so no hashes" in show(capsys, foreign, "--verify")
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"x{suffix}").write_bytes(Path(f"{made}{suffix}").read_bytes())
    path = tmp_path / "x.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert "x.bin: hash is " in refused(tmp_path / "x", "--verify")
    (tmp_path / "x.mask.bin").write_bytes(bytes(path.stat().st_size // 2))
    assert "says a loss mask: False, but the dataset's files say True" in refused(tmp_path / "x")
    assert "says a loss mask: False, but the dataset's files say True" in refused(tmp_path / "x", "--verify")


def test_bad_requests_are_refused(tmp_path, made, capsys, refused, tiny_tokenizer):
    assert "no such file" in refused(tmp_path / "absent")
    assert "has documents 0 to " in refused(made, "--index", "300")
    assert "--documents: '-1' is not an integer" in refused(made, "--documents", "-1")
    assert "--seed has no effect with --index" in refused(made, "--index", "0", "--seed", "0")
    assert "--quick has no effect with --verify" in refused(made, "--verify", "--quick")
    assert "does not exist; create it" in refused(made, "--html", tmp_path / "no" / "page.html")
    assert "is a folder" in refused(made, "--html", tmp_path)
    assert "none.yaml" in refused(made, "--config", tmp_path / "none.yaml")
    write_megatron(tmp_path / "big", [[[100_000]], [[5]]], 4)
    assert "holds token 100000" in refused(tmp_path / "big", "--index", "0", "--tokenizer", tiny_tokenizer)
    out = show(capsys, tmp_path / "big", "--tokenizer", tiny_tokenizer)  # the report says it, and goes on
    assert "! 50.00% of the tokens lie outside the tokenizer's" in out and "--- end of document 1" in out
    other = train_tiny_tokenizer(tmp_path / "other", special=("<|endoftext|>",))
    show_dataset.main([str(made), "--index", "0", "--tokenizer", str(other)])
    assert "which differs from this one" in capsys.readouterr().err


def test_verify_checks_every_token_id(foreign, tiny_tokenizer, capsys, refused):
    """Against the vocabulary that is named; without one, what no vocabulary has."""
    assert "every token id: at most 300, name --tokenizer" in show(capsys, foreign, "--verify")
    vocabulary = load_tokenizer(str(tiny_tokenizer)).vocab_size
    assert f"at most 300, below {vocabulary:,}" in show(capsys, foreign, "--verify", "--tokenizer", tiny_tokenizer)
    tokens = np.array([300, 0, 5, 6, vocabulary], "<i4")
    tokens.tofile(f"{foreign}.bin")
    message = refused(foreign, "--verify", "--tokenizer", tiny_tokenizer)
    assert f"m.bin: token id {vocabulary} at token 4 is outside the tokenizer's vocabulary of {vocabulary:,}" in message
    tokens[2] = -7
    tokens.tofile(f"{foreign}.bin")
    assert "m.bin: token id -7 at token 2 is negative" in refused(foreign, "--verify")


def test_verify_compares_the_largest_id_of_a_sidecar(made):
    """Whose hash says that the tokens are those that were counted."""
    dataset, sidecar = IndexedDataset(made, check_whole=True), Sidecar.read(made)
    too_small = dataclasses.replace(sidecar, vocab_size=sidecar.max_token_id)
    verify_dataset(dataset, dataclasses.replace(sidecar, vocab_size=sidecar.max_token_id + 1))
    with pytest.raises(UserError, match=r"out: holds token id \d+, outside the tokenizer's vocabulary of \d+"):
        verify_dataset(dataset, too_small)


def test_an_index_out_of_order_is_shown_and_said(foreign, capsys):
    """The second and the first sequence of three, as documents; decoded, counted and verified alike."""
    index = bytearray(Path(f"{foreign}.idx").read_bytes())
    index[34:46] = np.array([1, 2, 2], "<i4").tobytes()
    index[46:70] = np.array([8, 0, 12], "<i8").tobytes()
    Path(f"{foreign}.idx").write_bytes(index)
    report = json.loads(show(capsys, foreign, "--json"))
    assert (report["tokens"], report["lengths"]["longest"]) == (5, 4)
    assert "3 of 3 sequences do not begin in .bin at the end of the previous one" in report["warnings"][0]
    assert "note: " in show(capsys, foreign, "--verify")
    counted = {one["id"] for one in report["most_frequent"]}
    assert counted == {5, 300, 0, 6, 7}
