"""What a run starts from is opened once: files are counted as the process opens them, whoever opens them."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path

import hf_starts
import pytest
import tiny_run
import yaml

from retemper.engine import pretrain

_counting: list[Counter] = []


def _note(event, arguments):
    if event == "open" and _counting and isinstance(arguments[0], (str, bytes)):
        _counting[-1][Path(str(arguments[0])).name] += 1


@pytest.fixture(scope="module", autouse=True)
def audited():
    sys.addaudithook(_note)  # stays for the life of the process, and counts only while asked to


def files_opened(ranks, path, *options):
    """How often each file name is opened while the run is built."""
    config = tiny_run.configure(path, *options)
    _counting.append(Counter())
    try:
        pretrain.build(config, ranks)
    finally:
        opened = _counting.pop()
    return opened


@pytest.fixture(scope="module")
def left(one_rank, run_file, tmp_path_factory):
    """Run folder of a run left at step 6, with a checkpoint at step 4."""
    folder = tmp_path_factory.mktemp("left") / "run"
    tiny_run.train_until(one_rank, run_file, ["--run_folder", str(folder)], 6)
    return folder


def test_a_checkpoint_to_resume_is_opened_once(left, one_rank, run_file, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(left, folder)
    opened = files_opened(one_rank, run_file, "--run_folder", str(folder))
    assert opened["manifest.json"] == 1
    assert opened["config.json"] == 2  # read, and hashed with all files of the checkpoint
    assert opened["tensors.json"] == 2  # the table of tensors, in the same way


def test_a_checkpoint_to_start_from_is_opened_once(left, one_rank, run_file, tmp_path):
    start = ["--model.initialize_from", str(left / "checkpoints" / "step-00000004"), "--run_folder", str(tmp_path)]
    opened = files_opened(one_rank, run_file, *start)
    assert opened["manifest.json"] == 2  # it is looked for first, so that a missing one is named by the setting
    assert (opened["config.json"], opened["tensors.json"]) == (2, 2)


def test_a_hugging_face_folder_is_opened_once(one_rank, run_file, tmp_path):
    folder = hf_starts.save_model(tmp_path / "hf")
    config = yaml.safe_load(run_file.read_text())
    config["model"] = {"initialize_from": str(folder)}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    opened = files_opened(one_rank, path, "--run_folder", str(tmp_path / "run"))
    assert opened["config.json"] == 1
    assert opened["model.safetensors.index.json"] == 1
