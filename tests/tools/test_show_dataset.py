"""The show_dataset command on datasets made by preprocess and by the independent Megatron-LM writer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from oracles.megatron_index import read_megatron, write_megatron
from oracles.tiny_tokenizer import train_tiny_tokenizer
from tokenizers import Tokenizer

from retemper.engine.errors import run_command
from retemper.tools import show_dataset
from retemper.tools.ingest.pipeline import PreprocessOptions, preprocess

TEXTS = ["the cat", "sat 🙂 on a mat " * 3, "rain"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("made")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "a.jsonl").write_text("\n".join(lines))
    preprocess(PreprocessOptions([str(folder / "a.jsonl")], str(tiny_tokenizer), str(folder / "x"), workers=1))
    return folder / "x"


@pytest.fixture
def refused(capsys):
    def check(*arguments: Path | str) -> str:
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: show_dataset.main([str(argument) for argument in arguments]))
        captured = capsys.readouterr()
        assert (exit_.value.code, captured.out) == (1, "")
        assert len(captured.err.splitlines()) == 1
        return captured.err

    return check


def show(capsys, *arguments: Path | str) -> str:
    show_dataset.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_counts_lengths_and_histogram(made, capsys):
    lengths = read_megatron(made).lengths
    out = show(capsys, f"{made}.idx")
    rows = {line[:21].strip(): line[22:] for line in out.splitlines()}
    assert (rows["documents"], rows["tokens"], rows["dtype"]) == ("3", str(sum(lengths)), "uint16")
    assert rows["tokens in a document"].startswith(f"mean {sum(lengths) / 3:,.1f}, median {sorted(lengths)[1]}, ")
    assert rows["tokens in a document"].endswith(f"longest {max(lengths)}")
    bars = out.split("tokens in a document, documents\n")[1].splitlines()
    counted = {}
    for bar in bars:
        first, _, last, count = bar.split()[:4]
        counted[int(first), int(last)] = int(count)
    assert counted == {edge: sum(edge[0] <= n <= edge[1] for n in lengths) for edge in counted}
    assert sum(counted.values()) == 3


def test_decodes_with_the_sidecars_tokenizer(made, capsys, tiny_tokenizer):
    for index, text in enumerate(TEXTS):
        assert show(capsys, made, "--index", str(index)).endswith(f" tokens ---\n{text}<|endoftext|>\n")
    assert all(f"{text}<|endoftext|>\n" in show(capsys, made, "--documents", "9") for text in TEXTS)
    assert show(capsys, made, "--documents", "1") == show(capsys, made, "--documents", "1", "--seed", "0")
    plain = Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))
    first = plain.decode(read_megatron(made).sequences[1][:2])
    assert show(capsys, made, "--index", "1", "--max-tokens", "2").endswith(f", the first 2 ---\n{first}\n")


def test_dataset_without_sidecar(tmp_path, capsys, refused, tiny_tokenizer):
    write_megatron(tmp_path / "m", [[[300, 0]], [], [[5], [6, 7]]], 4)
    out = show(capsys, tmp_path / "m", "--verify")
    assert "no sidecar, so no hashes" in out
    assert "mean 1.7, median 2, " in out
    assert "--tokenizer" in refused(tmp_path / "m", "--index", "0")
    assert "--- document 2, 3 tokens ---" in show(capsys, tmp_path / "m", "--index", "2", "--tokenizer", tiny_tokenizer)
    assert "--- document 1, 0 tokens ---" in show(capsys, tmp_path / "m", "--index", "1", "--tokenizer", tiny_tokenizer)


def test_verify(made, capsys, refused):
    assert "both files' content hashes" in show(capsys, made, "--verify")
    path = Path(f"{made}.bin")
    original = path.read_bytes()
    path.write_bytes(bytes([original[0] ^ 1]) + original[1:])
    assert "hash of .bin is" in refused(made, "--verify")
    path.write_bytes(original)


def test_bad_requests_are_refused(tmp_path, made, capsys, refused, tiny_tokenizer):
    assert "no such file" in refused(tmp_path / "absent")
    assert "has documents 0 to 2" in refused(made, "--index", "3")
    write_megatron(tmp_path / "big", [[[100_000]]], 4)
    assert "holds token 100000" in refused(tmp_path / "big", "--index", "0", "--tokenizer", tiny_tokenizer)
    other = train_tiny_tokenizer(tmp_path / "other", special=("<|endoftext|>",))
    show_dataset.main([str(made), "--index", "0", "--tokenizer", str(other)])
    assert "differs from this one" in capsys.readouterr().err
