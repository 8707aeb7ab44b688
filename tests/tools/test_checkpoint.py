"""tools/checkpoint.py: what it says, what it exits with, and what it leaves alone."""

from __future__ import annotations

import errno
import json
import os
import re

import pytest
import saved_runs
import torch

from retemper.engine.errors import UserError
from retemper.engine.files.lock import run_folder_lock
from retemper.engine.weights.checkpoint.store import CheckpointStore
from retemper.tools import checkpoint as command


@pytest.fixture
def run(capsys):
    """Run the command line; (status, lines that it printed)."""

    def call(*arguments):
        status = command.main([str(argument) for argument in arguments])
        return status, capsys.readouterr().out.splitlines()

    return call


def folder_of(run_folder, step):
    return run_folder / "checkpoints" / f"step-{step:08d}"


def test_ls(run, run_folder):
    records = [{"step": 8, "loss": 5.5}, {"step": 8, "loss": 9.0, "evaluation": "validation"}]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + "{half")
    (folder_of(run_folder, 12) / "hf" / "config.json").unlink()
    (run_folder / "checkpoints" / "step-00000002.damaged").mkdir()
    (run_folder / "checkpoints" / "mine").mkdir()
    status, [head, *lines] = run("ls", run_folder)
    assert status == 0 and " ".join(head.split()) == "checkpoint step tokens loss evaluation size age kept state"
    assert [line.split()[0] for line in lines] == [
        "step-00000002.damaged", "step-00000004", "step-00000008", "step-00000012"]  # fmt: skip
    assert lines[0].endswith("quarantined")
    assert lines[1].split()[-3:] == ["last,", "best", "complete"]
    size = sum(path.stat().st_size for path in folder_of(run_folder, 8).rglob("*") if path.is_file())
    assert lines[2].split()[1:7] == ["8", "2,048", "5.5000", "4.9200", f"{size / 1000:.3g}", "kB"]
    assert lines[2].split()[-3:] == ["last,", "every", "complete"]
    assert "damaged: " in lines[3] and "config.json: missing" in lines[3]
    with pytest.raises(UserError, match="has no folder checkpoints"):
        run("ls", run_folder / "checkpoints")


def test_ls_knows_what_is_kept_for_a_rewind(run, run_folder):
    training = {"loss_spike_action": "rewind", "rewind_steps": 8}
    saved_runs.rewrite_manifest(folder_of(run_folder, 12), lambda content: content["config"].update(training=training))
    _, [_, *lines] = run("ls", run_folder)
    # keep_last is 2, and no younger one than the first is 8 steps older than the last.
    assert [re.split("  +", line)[-2] for line in lines] == ["best, rewind", "last, every, rewind", "last"]


def test_ls_shows_what_a_rewind_has_left(run, run_folder):
    folder_of(run_folder, 12).rename(run_folder / "checkpoints" / "step-00000012.rewound.2")
    _, [_, *lines] = run("ls", run_folder)
    assert lines[-1].split()[0] == "step-00000012.rewound.2" and lines[-1].endswith("rewound")
    assert "last" in lines[-2] and "last" not in lines[-1]


def test_verify(run, run_folder):
    checkpoints = [folder_of(run_folder, step) for step in (4, 8, 12)]
    status, lines = run("verify", run_folder)
    assert status == 0 and [line.split(":")[0] for line in lines] == [str(path) for path in checkpoints]
    assert run("verify", *checkpoints) == (status, lines)
    shard = checkpoints[1] / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    status, lines = run("verify", run_folder)
    assert status == 1 and len(lines) == 3 and lines[1].startswith(f"damaged: {shard}")
    assert run("verify", checkpoints[0])[0] == 0
    (checkpoints[0] / "manifest.json").unlink()
    status, lines = run("verify", checkpoints[0])
    assert (status, lines) == (1, [f"damaged: {checkpoints[0]}: manifest.json is missing"])
    with pytest.raises(UserError, match="no such folder"):
        run("verify", run_folder / "none")


def test_verify_says_what_it_cannot_tell(run, run_folder):
    saved_runs.rewrite_manifest(folder_of(run_folder, 4), lambda content: None, version=1)
    status, [line] = run("verify", folder_of(run_folder, 4))
    assert status == 0 and "not verified" in line


def test_diff(run, run_folder, one_rank):
    first, second = folder_of(run_folder, 4), folder_of(run_folder, 8)
    assert run("diff", first, first) == (0, ["no differences"])
    status, lines = run("diff", first, second)
    assert status == 1
    settings = [line for line in lines if line.startswith("manifest")]
    assert lines[0] == f"summary   step 4 | step 8: {len(settings)} entries of the manifest and 3 of 3 tensors differ"
    assert "manifest  step: 4 | 8" in lines and "manifest  evaluation.validation: 4.96 | 4.92" in lines
    assert [line for line in lines if line.startswith("tensor")] == [
        "tensor    model.embed_tokens.weight: 48 of 48 values differ, by at most 4",
        "tensor    model.norm.weight: 7 of 7 values differ, by at most 4",
        "tensor    optimizer.step.model.norm.weight: 1 of 1 values differ, by at most 4",
    ]
    tensors = saved_runs.tensors_at(4)
    tensors["model.embed_tokens.weight"] = torch.zeros(3)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["model.norm.weight"][2] = float("nan")
    tensors["new"] = tensors.pop("optimizer.step.model.norm.weight")
    store = CheckpointStore(run_folder, one_rank, 9, False)
    other = store.save(tensors, saved_runs.ASSETS, saved_runs.manifest_at(16))
    assert run("diff", other, other) == (0, ["no differences"])
    _, lines = run("diff", first, other)
    assert lines[0].endswith("and 4 of 4 tensors differ")
    assert [line for line in lines if line.startswith("tensor")] == [
        f"tensor    optimizer.step.model.norm.weight: only in {first}",
        f"tensor    new: only in {other}",
        "tensor    model.embed_tokens.weight: shape [12, 4] | [3]",
        "tensor    model.norm.weight: dtype bfloat16 | float32",
        "tensor    model.norm.weight: 1 of 7 values differ, by at most nan",
    ]


def test_prune(run, run_folder, one_rank):
    saved_runs.save(one_rank, run_folder, 16, 20, 24)
    (folder_of(run_folder, 12) / "hf" / "config.json").unlink()
    there = sorted((run_folder / "checkpoints").iterdir())
    arguments = ["prune", run_folder, "--keep-last", "1", "--keep-every", "8"]
    _, lines = run(*arguments, "--dry-run")
    assert sorted((run_folder / "checkpoints").iterdir()) == there and not (run_folder / ".lock").exists()
    assert [line.split()[0] for line in lines] == ["keep", "keep", "keep", "remove", "keep", "damaged"]
    with run_folder_lock(run_folder), pytest.raises(UserError, match="is writing to it"):
        run(*arguments)
    assert run(*arguments)[0] == 0
    left = [int(path.name[5:]) for path in sorted((run_folder / "checkpoints").iterdir())]
    assert left == [4, 8, 12, 16, 24]  # best, every, damaged, every, last
    assert run("verify", *[folder_of(run_folder, step) for step in (4, 8, 16, 24)])[0] == 0


def test_prune_unlinks_links_and_names_what_it_cannot_remove(run, run_folder, tmp_path, monkeypatch):
    folder_of(run_folder, 4).rename(tmp_path / "archived")
    folder_of(run_folder, 4).symlink_to(tmp_path / "archived")
    saved_runs.rewrite_manifest(folder_of(run_folder, 12), lambda content: content["best"].update(step=12))
    refused, unlink = folder_of(run_folder, 8).name, os.unlink

    def refusing(path, *rest, **options):
        if refused in str(path) and str(path).endswith("config.json"):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), "config.json")
        unlink(path, *rest, **options)

    monkeypatch.setattr(os, "unlink", refusing)
    with pytest.raises(UserError) as error:
        run("prune", run_folder, "--keep-last", "1")
    [left] = (run_folder / "checkpoints").glob(f".{refused}.*.tmp")
    assert str(error.value).startswith(f"{left}/hf/config.json: Operation not permitted")
    assert (tmp_path / "archived" / "manifest.json").is_file() and not os.path.lexists(folder_of(run_folder, 4))


@pytest.mark.parametrize("arguments", [[], ["ls"], ["prune", "x"], ["prune", "x", "--keep-last", "0"], ["diff", "a"]])
def test_a_wrong_command_line_is_a_line(run, arguments):
    with pytest.raises(UserError, match=r"see .* --help"):
        run(*arguments)
