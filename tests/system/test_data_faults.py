"""Data that cannot be read ends the run on every rank with one line that names the file, and never by a signal."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys

import faulty_run
import pytest
import tiny_run
import torch

from retemper.engine import pretrain
from retemper.engine.data import file_entries
from retemper.engine.errors import UserError

OPTIONS = ["--training.train_tokens", str(10 * 8 * 32), "--training.eval_interval", "0", "--data.prefetch_steps", "1"]


def train_on_failing_disk(ranks, path, overrides, rank, file, after):
    """What the run says when the disk fails ``rank``, after ``after`` reads of ``file``."""
    os_pread, left = os.pread, [after]

    def pread(descriptor, size, place):
        if ranks.rank == rank and os.readlink(f"/proc/self/fd/{descriptor}") == str(file):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os_pread(descriptor, size, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_entries.os, "pread", pread)
        try:
            run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
            pretrain.train(run)
        except UserError as error:
            return str(error), "run" in locals()
    return None, True


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("name", "after", "began"), [("first.bin", 165, True), ("validation.bin", 3, False)])
def test_a_disk_that_fails_one_rank(name, after, began, rank, two_ranks, run_file, tmp_path):
    """Training data is read by a thread during the run, after a sample of 150 chunks; a validation set before."""
    file = run_file.parent / name
    options = [*OPTIONS, "--run_folder", str(tmp_path)]
    said = two_ranks.run(train_on_failing_disk, run_file, options, rank, file, after)
    line = rf"{re.escape(str(file))}: cannot be read at byte [\d,]+: Input/output error"
    assert re.fullmatch(line, said[rank][0])
    assert re.fullmatch(rf"rank {rank}: {line}", said[1 - rank][0])
    assert [has_begun for _, has_begun in said] == [began, began]


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_files_cut_short_while_they_are_read(suffix, two_ranks, run_file, tmp_path):
    tiny_run.write_dataset(tmp_path / "first", seed=0)
    options = [*OPTIONS, "--run_folder", str(tmp_path / "run"), "--data.train", f"[{{path: {tmp_path / 'first'}}}]"]
    messages = two_ranks.run(faulty_run.cut_short, run_file, options, tmp_path / f"first.{suffix}")
    assert all(re.search(rf"first\.{suffix}: ends at byte [\d,]+, but was longer", message) for message in messages)


def test_files_removed_while_they_are_read_are_still_there_for_the_run(one_rank, run_file, tmp_path):
    for name in ("here", "removed"):
        tiny_run.write_dataset(tmp_path / name / "first", seed=0)
        source = f"[{{path: {tmp_path / name / 'first'}}}]"
        options = [*OPTIONS, "--run_folder", str(tmp_path / name), "--data.train", source]
        run = pretrain.build(tiny_run.configure(run_file, *options), one_rank)
        if name == "removed":
            (tmp_path / name / "first.bin").unlink()
            (tmp_path / name / "first.idx").unlink()
        pretrain.train(run)
    assert tiny_run.curve(tmp_path / "removed") == tiny_run.curve(tmp_path / "here")
    last = [tiny_run.tensors_of(tmp_path / name / "checkpoints" / "step-00000010") for name in ("here", "removed")]
    assert all(torch.equal(tensor, last[1][name]) for name, tensor in last[0].items())


OPEN_AND_CUT = """
import os, sys
from retemper.engine.data import indexed_dataset
from retemper.engine.errors import UserError
map_file = indexed_dataset._map_file

def then_cut(path):
    mapped = map_file(path)
    if path.endswith(".idx"):
        os.truncate(path, 0)
    return mapped

indexed_dataset._map_file = then_cut
try:
    indexed_dataset.IndexedDataset(sys.argv[1])
except UserError as error:
    print(error)
"""


def test_an_index_that_is_cut_as_it_is_opened_is_no_signal(tmp_path):
    """Maps of it are for tools: a page that is not there any more would end the process with SIGBUS."""
    tiny_run.write_dataset(tmp_path / "first", seed=0)
    command = [sys.executable, "-c", OPEN_AND_CUT, str(tmp_path / "first")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r".*first\.idx: ends at byte 0, but was longer when it was opened.*\n", done.stdout)
