"""Windows: against transformers' ``return_overflowing_tokens``, and against a count of the targets of every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.framed_tokenizers import LLAMA3, QWEN, byte_level, save
from oracles.megatron_index import read_megatron
from oracles.preprocessing import jsonl, run
from oracles.tiny_tokenizer import sample_text
from transformers import PreTrainedTokenizerFast

from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.data.packing import pack
from retemper.engine.data.source import Source
from retemper.engine.errors import UserError
from retemper.kernels.linear_cross_entropy import IGNORE_INDEX
from retemper.tools.preprocess import parse_arguments
from retemper.tools.preprocessing import run_setup
from retemper.tools.preprocessing.merging.merge import MergeOptions, merge
from retemper.tools.preprocessing.pipeline import preprocess
from retemper.tools.preprocessing.readers import lines
from retemper.tools.preprocessing.records import long_text
from retemper.tools.preprocessing.workers.worker import TaskRunner

TEXTS = [sample_text(seed, 2 + 3 * (seed % 19)) for seed in range(60)]
HERE = {"encoder": "reference"}
TOKENIZERS = {"no BOS": (QWEN, "$A"), "BOS": (LLAMA3, f"{LLAMA3[0]} $A")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        name: save(root / name.replace(" ", "-"), byte_level(special), single, eos_token=special[1])
        for name, (special, single) in TOKENIZERS.items()
    }


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TEXTS))
    return path


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("window", "overlap"), [(32, 8), (16, 0), (9, 7), (400, 100)])
def test_windows_are_those_of_transformers(folders, tmp_path, corpus, kind, window, overlap):
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(folders[kind] / "tokenizer.json"))
    expected = [
        oracle(text, max_length=window, stride=overlap, truncation=True, return_overflowing_tokens=True).input_ids
        for text in TEXTS
    ]
    options: dict[str, Any] = {"window": window, "append_eod": False}
    options |= {"window_overlap": overlap} if overlap else {}
    sidecar = run(folders[kind], tmp_path, corpus, **HERE, **options)
    assert read_megatron(tmp_path / "out").documents == expected
    assert sidecar.documents == len(TEXTS) and sidecar.tokens == sum(
        len(ids) for windows in expected for ids in windows
    )
    longer = sum(len(windows) > 1 for windows in expected)
    assert sidecar.sources[0].changed == ({"--window": longer} if longer else {})
    assert sidecar.options == {name: value for name, value in options.items() if name != "append_eod"}
    assert (tmp_path / "out.mask.bin").exists() == (overlap > 0)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_token_is_a_target_once(folders, tmp_path, corpus, kind):
    """As it is without windows, whatever the sequences of training are."""
    run(folders[kind], tmp_path, corpus, **HERE)
    whole = IndexedDataset(tmp_path / "out")
    length = whole.num_tokens - 1

    def targets(dataset: IndexedDataset) -> np.ndarray:
        size = dataset.num_tokens - 1
        source = Source("s", dataset, size, 0, dataset.num_tokens)
        found = pack([source.chunk(0, 10_000)], size, attend_across_documents=False).targets.numpy()
        return np.sort(found[found != IGNORE_INDEX])

    expected = targets(whole)
    assert len(expected) == length + 1 - len(TEXTS)
    for loss in ("new", "all"):
        prefix = tmp_path / loss
        run(
            folders[kind],
            tmp_path,
            corpus,
            output_prefix=str(prefix),
            window=24,
            window_overlap=6,
            window_loss=loss,
            **HERE,
        )
        found = targets(IndexedDataset(prefix))
        assert np.array_equal(found, expected) == (loss == "new") and len(found) >= len(expected)


def test_order_shards_long_texts_and_shuffles_cut_alike(folders, tmp_path, corpus, monkeypatch):
    options: dict[str, Any] = {"window": 24, "window_overlap": 6, **HERE}
    names = [".bin", ".idx", ".mask.bin"]
    run(folders["BOS"], tmp_path, corpus, **options)
    expected = [(tmp_path / f"out{name}").read_bytes() for name in names]
    for index in range(3):
        run(folders["BOS"], tmp_path, corpus, shard=f"{index}/3", task_bytes=500, **options)
    merge(MergeOptions([str(tmp_path / "out.shard-*-of-3")], str(tmp_path / "joined")))
    assert [(tmp_path / f"joined{name}").read_bytes() for name in names] == expected
    documents = read_megatron(tmp_path / "out").documents
    run(folders["BOS"], tmp_path, corpus, shuffle=True, output_prefix=str(tmp_path / "shuffled"), **options)
    shuffled = read_megatron(tmp_path / "shuffled").documents
    assert shuffled != documents and sorted(shuffled) == sorted(documents)
    monkeypatch.setattr(run_setup, "are_small", lambda *_: True)  # in this process
    monkeypatch.setattr(long_text, "_CONTEXT", 8)
    monkeypatch.setattr(lines, "LONG_BYTES", 100)
    monkeypatch.setattr(long_text, "LONG_BYTES", 100)
    monkeypatch.setattr(long_text, "_LONG_STRING", 50)
    monkeypatch.setattr(long_text, "_PIECE_BYTES", 64)
    seen = []
    write = TaskRunner._write_long
    monkeypatch.setattr(TaskRunner, "_write_long", lambda self, *given: seen.append(write(self, *given)))
    run(folders["BOS"], tmp_path, corpus, overwrite=True, **options)
    assert len(seen) > 10 and [(tmp_path / f"out{name}").read_bytes() for name in names] == expected


def test_filters_and_splits_see_whole_documents(folders, tmp_path, corpus):
    """A document counts with its own tokens, and its windows stay together."""
    run(folders["no BOS"], tmp_path, corpus, **HERE)
    whole = [ids for [ids] in read_megatron(tmp_path / "out").documents]
    limits = {"min_tokens": 30, "max_tokens": 100}
    run(
        folders["no BOS"],
        tmp_path,
        corpus,
        overwrite=True,
        window=24,
        window_overlap=6,
        dedup="exact",
        **limits,
        **HERE,
    )
    found = read_megatron(tmp_path / "out").documents
    joined = [[*first, *(token for ids in others for token in ids[6:])] for first, *others in found]
    assert joined == [ids for ids in whole if 30 <= len(ids) <= 100]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--window 1", "--window 1: must be at least 2"),
        ("--window-overlap 3", "--window-overlap 3 needs --window; add it, or remove --window-overlap"),
        ("--window 8 --window-loss all", "--window-loss all needs --window-overlap; add it, or remove --window-loss"),
        ("--window 8 --window-overlap 8", "--window-overlap 8: must be less than --window 8"),
        ("--window 8 --window-overlap 7", "--window 8: must be more than --window-overlap 7 and the 1 tokens"),
        ("--window 8 --fim-rate 0.5", "--fim-rate 0.5 and --window 8: a window would cut rearranged documents"),
        ("--window 8 --chat", "--window is for texts, not for --chat; remove one of them"),
        ("--window 8 --to-jsonl", "--window is for tokens, --to-jsonl writes text; remove one of them"),
    ],
)
def test_refused(folders, tmp_path, corpus, words, line):
    named = [] if "--to-jsonl" in words else ["--tokenizer", str(folders["BOS"])]
    options = parse_arguments(["--input", str(corpus), *named, "--output-prefix", str(tmp_path / "o"), *words.split()])
    with pytest.raises(UserError) as refusal:
        preprocess(options)
    assert str(refusal.value).startswith(line)
