"""A run whose folder, data or evaluation changed under it: refused, continued, or started over with a line."""

from __future__ import annotations

import json
import os
import shutil
import types

import numpy as np
import pytest
import tiny_run
import yaml

from retemper.engine import pretrain
from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.data.sidecar import Sidecar
from retemper.engine.errors import UserError
from retemper.engine.evaluation import BestMetric, fingerprint
from retemper.engine.files.hashing import hash_file
from retemper.engine.weights.checkpoint import destination
from retemper.engine.weights.checkpoint.destination import checkpoint_bytes


@pytest.fixture(scope="module")
def interrupted(one_rank, run_file, tmp_path_factory):
    """Folder of a run that ended after 6 of 20 steps; evaluated and saved at step 4."""
    folder = tmp_path_factory.mktemp("history") / "run"
    tiny_run.train_until(one_rank, run_file, ["--run_folder", str(folder), "--training.eval_interval", "4"], 6)
    return folder


@pytest.fixture
def folder(interrupted, tmp_path):
    """A copy of it."""
    return tiny_run.copy_of(interrupted, tmp_path / "run")


def trainer_of(one_rank, run_file, folder, *options):
    return pretrain.build(tiny_run.configure(run_file, "--run_folder", str(folder), *options), one_rank)


def refused(one_rank, run_file, folder, *options):
    with pytest.raises(UserError) as error:
        trainer_of(one_rank, run_file, folder, *options)
    return str(error.value)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------------------------
# The run folder


def test_lost_checkpoints_are_refused_and_resume_none_keeps_the_curve(one_rank, run_file, folder, tmp_path, capsys):
    (folder / "checkpoints").rename(tmp_path / "moved")
    (folder / "checkpoints").symlink_to(tmp_path / "unmounted")
    before = contents(folder)
    assert "has written checkpoints up to step 4" in refused(one_rank, run_file, folder)
    assert "a link to" in refused(one_rank, run_file, folder, "--resume", "none")
    assert contents(folder) == before
    (folder / "checkpoints").unlink()
    options = ["--run_folder", str(folder), "--resume", "none", "--training.train_tokens", "1024"]
    tiny_run.train(one_rank, run_file, options)
    assert (folder / "metrics.6.jsonl").read_bytes() == before[folder / "metrics.jsonl"]
    assert (folder / "config.6.yaml").read_bytes() == before[folder / "config.yaml"]
    assert [record["step"] for record in tiny_run.records(folder)] == [1, 2, 3, 4, 4]
    assert "renamed to metrics.6.jsonl" in capsys.readouterr().out
    assert json.loads((folder / "run.json").read_text())["newest_step"] == 4


def test_killed_before_its_first_checkpoint_a_run_starts_again(one_rank, run_file, reference, tmp_path):
    tiny_run.train_until(one_rank, run_file, ["--run_folder", str(tmp_path)], 3)
    first = (tmp_path / "metrics.jsonl").read_bytes()
    tiny_run.train_until(one_rank, run_file, ["--run_folder", str(tmp_path)], 4)
    assert tiny_run.curve(tmp_path) == tiny_run.curve(reference)[:4]
    assert (tmp_path / "metrics.3.jsonl").read_bytes() == first


def test_the_same_command_with_a_path_comes_to_the_same_end(one_rank, run_file, folder, tmp_path):
    """As an unattended restart gives it; compared with the run that was not killed."""
    base = str(folder / "checkpoints" / "step-00000004")
    options = [
        "--resume",
        base,
        *EVALUATES_NOTHING,
        "--training.train_tokens",
        "2560",
        "--checkpoint.save_interval",
        "2",
    ]
    killed, whole = (["--run_folder", str(tmp_path / name), *options] for name in ("killed", "whole"))
    tiny_run.train(one_rank, run_file, whole)
    for step in (5, 7):  # before its first checkpoint, and after it
        tiny_run.train_until(one_rank, run_file, killed, step)
    tiny_run.train(one_rank, run_file, killed)
    assert tiny_run.curve(tmp_path / "killed") == tiny_run.curve(tmp_path / "whole")
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["began_at"]["step"] == 4


def test_the_model_of_another_run_is_not_trained_on_unnoticed(one_rank, run_file, folder, tmp_path):
    """The run folder belongs to one model, and the command asks for another to start from."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**tiny_run.ARCHITECTURE, "num_hidden_layers": 3}))
    content = yaml.safe_load(run_file.read_text())
    content["model"] = {"initialize_from": str(other)}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    message = refused(one_rank, path, folder)
    assert f"model.initialize_from {other} differs" in message and "num_layers 3 is 2 there" in message
    assert "choose another run_folder" in message
    (other / "config.json").write_text(json.dumps(tiny_run.ARCHITECTURE))
    assert trainer_of(one_rank, path, folder).progress.step == 4
    shutil.rmtree(other)  # which only a fresh run needs
    assert trainer_of(one_rank, path, folder).progress.step == 4


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("checkpoints", []),
        ("hf", ["--checkpoint.export_hf", "true"]),
        ("hf/step-00000020", ["--checkpoint.export_hf", "true"]),
        ("tensorboard", ["--logging.tensorboard", "true"]),
        ("", []),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_refused_before_the_first_step(name, options, one_rank, run_file, tmp_path):
    path = tmp_path / "run" / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("mine")
    said = "this name is needed for the export" if "step" in name else "a file, where the run needs"
    assert f"{path}: {said}" in refused(one_rank, run_file, tmp_path / "run", *options)
    assert path.read_text() == "mine" and len(list(path.parent.iterdir())) == 1


def test_a_disk_smaller_than_a_checkpoint_is_refused(one_rank, run_file, folder, tmp_path, monkeypatch):
    run = trainer_of(one_rank, run_file, folder)
    size = run.store.expected_bytes
    shards = (folder / "checkpoints" / "step-00000004").glob("*.safetensors")
    # What torch.save adds to each tensor is much in a model as small as this.
    assert (
        0.5 * sum(path.stat().st_size for path in shards)
        < size
        == 12 * sum(parameter.numel() for parameter in run.model.parameters())
    )
    for free, refuses in ((size - 1, True), (size, False)):
        monkeypatch.setattr(
            destination.os, "statvfs", lambda path, free=free: types.SimpleNamespace(f_bavail=free, f_frsize=1)
        )
        if refuses:
            assert "no space left for a checkpoint" in refused(one_rank, run_file, tmp_path / "new")
        else:
            [note] = [line for line in trainer_of(one_rank, run_file, tmp_path / "new").remarks if "note" in line]
            assert "lower checkpoint.keep_last" in note
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options", [[], ["--training.weight_dtype", "bf16"], ["--training.trainable", "embeddings"]])
def test_the_estimated_size_is_that_of_the_tensors(options, one_rank, run_file, tmp_path):
    options = [
        "--optimizer.state_dtype",
        "bf16",
        "--training.train_tokens",
        "256",
        "--training.warmup_tokens",
        "0",
        *options,
    ]
    run = trainer_of(one_rank, run_file, tmp_path, *options)
    pretrain.train(run)
    tensors = tiny_run.tensors_of(tmp_path / "checkpoints" / "step-00000001")
    steps = [tensor for name, tensor in tensors.items() if name.startswith("optimizer.step.")]
    size = sum(tensor.nbytes for tensor in tensors.values()) - sum(tensor.nbytes for tensor in steps)
    assert checkpoint_bytes(run.config, run.start.architecture) == size


# ----------------------------------------------------------------------------------------------------------------------
# The best so far


def best_notes(run):
    return run.validation.metric.describe_reset(run.progress.best)


def test_the_record_of_the_best_continues_where_the_same_is_measured(one_rank, run_file, folder):
    for options in ([], ["--training.micro_batch_size", "2"], ["--training.eval_interval", "3"]):
        run = trainer_of(one_rank, run_file, folder, *options)
        assert best_notes(run) == [] and run.validation.metric.matches(run.progress.best)


@pytest.mark.parametrize(
    "change",
    [
        ["--training.eval_tokens", "250"],
        ["--data.validation", "{other_name: {validation}}"],
        ["--data.validation", "{validation: {first}}"],
        ["--data.attend_across_documents", "true"],
        ["--training.sequence_length", "16", "--allow_changes", "[training.sequence_length]"],
    ],
)
def test_the_record_of_the_best_starts_over_where_something_else_is_measured(
    change, one_rank, run_file, folder, capsys
):
    data = {name: str(run_file.parent / name) for name in ("validation", "first")}
    change = [part.replace("{validation}", data["validation"]).replace("{first}", data["first"]) for part in change]
    run = trainer_of(one_rank, run_file, folder, *change, "--training.train_tokens", "1536", *EVERY_STEP)
    former = run.progress.best
    [line] = best_notes(run)
    assert line.startswith("note: ") and f"{former['loss']:.4f}" in line
    # However much worse the loss is now.
    run.validation.evaluate = lambda *_: {run.validation.metric.name: 99.0}
    pretrain.train(run)
    best = run.progress.best
    assert (best["step"], best["loss"]) == (5, 99.0)
    assert line in capsys.readouterr().out


EVALUATES_NOTHING = ["--data.validation", "{}"]
EVERY_STEP = ["--training.eval_interval", "1", "--checkpoint.save_interval", "1"]


@pytest.mark.slow
def test_the_fingerprint_does_not_depend_on_the_layout(one_rank, two_ranks, run_file, tmp_path):
    """Of a loss mask too, and of a set whose last micro-batch is filled up."""
    options = ["--run_folder", str(tmp_path), "--training.eval_tokens", "10000"]
    expected = pretrain.build(tiny_run.configure(run_file, *options), one_rank).validation.metric.fingerprint
    for more in ([], ["--training.micro_batch_size", "2"], ["--parallel.context", "2"]):
        assert two_ranks.run(measured, run_file, [*options, *more]) == [expected] * 2, more


def measured(ranks, path, overrides):
    return pretrain.build(tiny_run.configure(path, *overrides), ranks).validation.metric.fingerprint


def test_a_fingerprint_changes_with_every_token_and_mask(one_rank, run_file, tmp_path):
    run = trainer_of(one_rank, run_file, tmp_path)
    batches = run.data.micro_batches(0)
    former = fingerprint(batches, True, 32, one_rank)
    assert former == fingerprint(reversed(batches), True, 32, one_rank) != fingerprint(batches, True, 64, one_rank)
    seen = {former}
    for name in ("tokens", "targets", "position_ids"):
        column = getattr(batches[1], name)
        place = int(np.flatnonzero(batches[1].targets.numpy() >= 0)[3])
        column[place] += 1
        seen.add(fingerprint(batches, True, 32, one_rank))
        column[place] -= 1
    batches[1].targets[place] = -100
    assert len(seen | {fingerprint(batches, True, 32, one_rank)}) == 5


def test_records_without_a_fingerprint_go_by_the_name():
    metric = BestMetric("validation", "32:ab")
    old = {"step": 4, "name": "validation", "loss": 2.0}
    assert metric.matches(old) and not metric.improves(old, 2.0) and metric.improves(old, 1.9)
    assert metric.improves({**old, "name": "other"}, 9.0) and metric.improves({**old, "measured": "32:ac"}, 9.0)
    assert metric.describe_reset({}) == [] == metric.describe_reset(metric.record(4, 2.0))


# ----------------------------------------------------------------------------------------------------------------------
# Renamed sources


def rename(source, target):
    for suffix in (".bin", ".idx", ".json"):
        if os.path.exists(f"{source}{suffix}"):
            os.rename(f"{source}{suffix}", f"{target}{suffix}")


@pytest.fixture
def own_data(run_file, tmp_path):
    """Function: the options for training on copies of the two sources under the names given, in a folder of its own."""
    for name in ("first", "second"):
        for suffix in (".bin", ".idx"):
            shutil.copy(run_file.parent / f"{name}{suffix}", tmp_path / f"{name}{suffix}")

    def options(first="first", second="second"):
        return ["--data.train", f"[{{path: {tmp_path / first}, weight: 2.0}}, {{path: {tmp_path / second}}}]"]

    return options


def seal(prefix, vocab_size=97):
    """A sidecar that fits the dataset."""
    dataset = IndexedDataset(str(prefix))
    sidecar = Sidecar(
        tokenizer="t", tokenizer_sha256="0" * 64, vocab_size=vocab_size, append_eod=True, eod_token="<eod>",
        eod_id=vocab_size - 1, sources=(), options={}, dtype="uint16", documents=dataset.num_documents,
        tokens=dataset.num_tokens, max_token_id=vocab_size - 1, bin_xxh3_128=hash_file(f"{prefix}.bin"),
        idx_xxh3_128=hash_file(f"{prefix}.idx"),
    )  # fmt: skip
    prefix.with_name(f"{prefix.name}.json").write_bytes(sidecar.to_json())


def test_a_renamed_source_keeps_its_place(one_rank, run_file, reference, own_data, tmp_path, capsys):
    seal(tmp_path / "first")
    seal(tmp_path / "second")
    folder = tmp_path / "run"
    tiny_run.train_until(one_rank, run_file, ["--run_folder", str(folder), *own_data()], 6)
    rename(tmp_path / "first", tmp_path / "moved")
    renamed = ["--run_folder", str(folder), *own_data("moved")]
    capsys.readouterr()
    tiny_run.train_until(one_rank, run_file, renamed, 9)
    said = capsys.readouterr().out
    assert f"{tmp_path / 'moved'} is the source first of the checkpoint, and continues from its position" in said
    assert [line for line in said.splitlines() if line.startswith("changed")] == [
        f"changed     data.train[first].path {tmp_path / 'first'} -> {tmp_path / 'moved'}"
    ]
    # And again, from a checkpoint that was written under the new name: bit for bit the run that was never renamed.
    tiny_run.train_until(one_rank, run_file, renamed, 13)
    assert tiny_run.curve(folder) == tiny_run.curve(reference)[: len(tiny_run.curve(folder))]


def test_another_name_for_the_same_files_keeps_its_place_without_a_sidecar(one_rank, run_file, own_data, tmp_path):
    folder = tmp_path / "run"
    tiny_run.train_until(one_rank, run_file, ["--run_folder", str(folder), *own_data()], 6)
    (tmp_path / "link.bin").symlink_to("first.bin")
    (tmp_path / "link.idx").symlink_to("first.idx")
    named = ["--data.train", f"[{{path: {tmp_path}/./first, weight: 2.0, name: web}}, {{path: {tmp_path / 'second'}}}]"]
    run = trainer_of(one_rank, run_file, folder, *named)
    assert [source.name for source in run.catalog.train] == ["first", "second"]
    assert run.order.cursors(32)["first"] > 0


def test_what_cannot_be_told_apart_is_reported(one_rank, run_file, own_data, tmp_path):
    """Both sources hold the same data, and one of them was renamed... or both."""
    for suffix in (".bin", ".idx"):
        shutil.copy(tmp_path / f"first{suffix}", tmp_path / f"second{suffix}")
    seal(tmp_path / "first")
    seal(tmp_path / "second")
    folder = tmp_path / "run"
    tiny_run.train_until(one_rank, run_file, ["--run_folder", str(folder), *own_data()], 5)
    for name in ("first", "second"):
        rename(tmp_path / name, tmp_path / f"{name}_new")
    run = trainer_of(one_rank, run_file, folder, *own_data("first_new", "second_new"))
    said = [line for line in run.remarks if "same data as first and second" in line]
    assert len(said) == 2 and all(line.startswith("note: ") for line in said)


def test_other_data_under_another_name_is_a_new_source(one_rank, run_file, own_data, tmp_path):
    seal(tmp_path / "first")
    seal(tmp_path / "second")
    folder = tmp_path / "run"
    tiny_run.train_until(one_rank, run_file, ["--run_folder", str(folder), *own_data()], 5)
    tiny_run.write_dataset(tmp_path / "third", seed=9)
    seal(tmp_path / "third")
    run = trainer_of(one_rank, run_file, folder, *own_data("third"))
    assert run.remarks == [] and run.order.cursors(32)["third"] == 0
