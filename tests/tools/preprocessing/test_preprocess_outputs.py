"""The preprocess and merge commands never replace an input, whatever option names it, nor a file of others."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from oracles.preprocessing import jsonl, run

from retemper.engine.errors import UserError
from retemper.tools.preprocessing.dataset.checks import require_free_shards
from retemper.tools.preprocessing.dataset_files import is_of_dataset
from retemper.tools.preprocessing.merging.merge import MergeOptions, merge
from retemper.tools.preprocessing.options import PreprocessOptions
from retemper.tools.preprocessing.pipeline import preprocess

RECORDS = jsonl(["one two", "three"])
CASES = {
    "input as sidecar": {"input": ["c.json"], "output_prefix": "c"},
    "input as rejects": {"input": ["q.rejects.jsonl"], "output_prefix": "q"},
    "input as metadata": {"input": ["q.metadata.jsonl"], "output_prefix": "q"},
    "input as tokens": {"input": ["q.bin"], "output_prefix": "q", "input_format": "jsonl"},
    "a prefix with its suffix": {
        "input": ["q.bin"],
        "output_prefix": "q.bin",
        "input_format": "jsonl",
    },
    "input in a folder": {"input": ["data"], "output_prefix": "data/d"},
    "input by a pattern": {"input": ["data/*.json"], "output_prefix": "data/d"},
    "a side of a split": {"input": ["c.train.json"], "output_prefix": "c", "split": "train=0.5,valid=0.5"},
    "a shard": {"input": ["c.shard-0-of-2.json"], "output_prefix": "c", "shard": "0/2"},
    "a hard link": {"input": ["hard.json"], "output_prefix": "c"},
    "a symbolic link": {"input": ["soft.json"], "output_prefix": "c"},
    "tokenizer": {"input": ["a.jsonl"], "output_prefix": "tk/tokenizer"},
    "tokenizer's configuration": {"input": ["a.jsonl"], "output_prefix": "tk/tokenizer_config"},
    "tokenizer's file": {"input": ["a.jsonl"], "tokenizer": "tk/tokenizer.json", "output_prefix": "tk/tokenizer"},
    "held-out": {"input": ["a.jsonl"], "held_out": ["c.json"], "output_prefix": "c"},
    "chat template": {"input": ["a.jsonl"], "chat": True, "chat_template": "c.json", "output_prefix": "c"},
}


@pytest.fixture
def here(tmp_path, tiny_tokenizer, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_tokenizer, "tk")
    Path("tk/tokenizer_config.json").write_text("{}")
    Path("data").mkdir()
    names = ["a.jsonl", "c.json", "c.train.json", "c.shard-0-of-2.json", "data/d.json", "q.bin"]
    for name in [*names, "q.rejects.jsonl", "q.metadata.jsonl"]:
        Path(name).write_bytes(RECORDS)
    os.link("c.json", "hard.json")
    os.symlink("c.json", "soft.json")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_an_input_is_never_replaced(here, case):
    before = contents(here)
    for overwrite in (False, True):
        options = PreprocessOptions(**{"tokenizer": "tk", "workers": 1, "overwrite": overwrite, **CASES[case]})
        with pytest.raises(UserError, match=r"^--output-prefix \S+: \S+ is an input \(--\S+ \S+\)") as caught:
            preprocess(options)
        assert "pass --overwrite" not in str(caught.value)
    assert contents(here) == before


def test_a_run_in_parts_is_refused_as_its_parts_are(here):
    os.rename("c.shard-0-of-2.json", "p.shard-0-of-2.json")
    options = PreprocessOptions(["p.shard-0-of-2.json"], "tk", "p")
    with pytest.raises(UserError, match=r"p.shard-0-of-2.json is an input"):
        require_free_shards(options, 2)
    require_free_shards(options, 3)
    for others in ({"to_jsonl": "plain", "tokenizer": None}, {"bins": "kind"}):
        with pytest.raises(UserError, match=r"--(to-jsonl|bins)"):
            require_free_shards(replace(options, **others), 3)


def test_files_of_others_and_work_folders_of_others_stay(here):
    Path("x.json").write_text("[]")
    Path(".y.partial").mkdir()
    Path(".y.partial/thesis.tex").write_text("mine")
    Path("z.idx").symlink_to(here / "unmounted")
    before = contents(here)
    wrong = {
        "x": "x.json: exists and is not recognised",
        "y": "temporary folder .*y.partial was not created by",
        "z": "z.idx: exists and is not recognised",
    }
    for name, message in wrong.items():
        with pytest.raises(UserError, match=message):
            preprocess(PreprocessOptions(["a.jsonl"], "tk", name, overwrite=True, workers=1))
    assert contents(here) == before


def test_files_of_a_dataset_are_recognised_whole_and_in_part(here):
    made = PreprocessOptions(["b.jsonl"], "tk", "own", metadata=["id"], skip_bad_lines=True, workers=1)
    Path("b.jsonl").write_bytes(jsonl(["one"]).replace(b"}", b', "id": 7}') + b"oops\n")
    preprocess(made)
    ends = (".bin", ".idx", ".json", ".metadata.jsonl", ".rejects.jsonl")
    assert all(is_of_dataset(f"own{end}") for end in ends)
    # A sidecar that says that there is no mask: the file of that name is another's.
    Path("own.mask.bin").write_bytes(b"\1")
    with pytest.raises(UserError, match=r"^own.mask.bin: exists and is not recognised"):
        preprocess(PreprocessOptions(["a.jsonl"], "tk", "own", overwrite=True, workers=1))
    os.unlink("own.mask.bin")
    os.unlink("own.json")
    assert is_of_dataset("own.bin") and is_of_dataset("own.metadata.jsonl")
    os.unlink("own.idx")
    assert not is_of_dataset("own.bin")  # the weights of a model may be called so


def test_a_merge_replaces_no_file_of_its_inputs(here, tiny_tokenizer):
    run(tiny_tokenizer, here / "d", here / "a.jsonl")
    before = contents(here)
    os.link("d/out.json", "d/new.json")
    for output in ("d/out", "d/out.bin", "d/new"):
        for overwrite in (False, True):
            with pytest.raises(UserError, match=r"is an input \(--inputs "):
                merge(MergeOptions(["d/out"], output, overwrite))
    os.unlink("d/new.json")
    assert contents(here) == before
