"""final_model and best_model: the bytes of dcp_to_hf, replaced as a whole, at no cost for what is there already."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import hf_exports
import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from retemper.engine.errors import UserError
from retemper.engine.files import atomic
from retemper.engine.weights.checkpoint.manifest import read_manifest
from retemper.engine.weights.conversion import dcp_to_hf, model_folders
from retemper.tools.reports.run import read_run

SHORT = [
    *("--training.train_tokens", str(4 * 8 * 32), "--optimizer.schedule", "constant", "--training.eval_interval", "1"),
    *("--checkpoint.save_interval", "1", "--checkpoint.keep_last", "9", "--checkpoint.keep_best", "true"),
]
AUTO = [*SHORT, "--checkpoint.model_folders", "auto"]
DIVERGING = ["--optimizer.learning_rate", "1", "--training.warmup_tokens", "0"]
"""The first evaluation is the best."""


def contents(folder: Path) -> dict[str, object]:
    """All files, but for the hash of the code that made them."""
    files: dict[str, object] = {path.name: path.read_bytes() for path in folder.iterdir()}
    proof = json.loads((folder / "conversion.json").read_text())
    del proof["versions"]["code"]
    return {**files, "conversion.json": proof}


def assert_export_of(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """``folder`` has the bytes that the command makes of ``checkpoint``."""
    output = tmp_path / f"of-{checkpoint.name}"
    if not output.exists():
        dcp_to_hf.convert(checkpoint, output, max_shard_size=hf_exports.SHARD_SIZE, say=lambda line: None)
    assert contents(folder) == contents(output)


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def leftovers(run: Path) -> list[str]:
    return [path.name for path in run.iterdir() if path.name.startswith(".") and "model" in path.name]


def train(ranks, path: Path, overrides: list[str]) -> None:
    """The run, whose exports have several files."""
    with hf_exports.changed():
        tiny_run.train(ranks, path, overrides)


def test_two_ranks_write_the_final_and_the_best(two_ranks, run_file, tmp_path):
    run = tmp_path / "run"
    two_ranks.run(train, run_file, [*AUTO, *DIVERGING, "--run_folder", str(run)])
    best = read_manifest(checkpoint(run, 4)).best["step"]
    assert best < 4
    assert_export_of(run / "final_model", checkpoint(run, 4), tmp_path)
    assert_export_of(run / "best_model", checkpoint(run, best), tmp_path)
    assert AutoModelForCausalLM.from_pretrained(run / "final_model").config.vocab_size == tiny_run.VOCAB_SIZE
    assert not leftovers(run)
    reported = {one.name: one for one in read_run(run).models}
    assert {name: one.step for name, one in reported.items()} == {"final_model": 4, "best_model": best}
    assert reported["best_model"].evaluation == pytest.approx(read_manifest(checkpoint(run, 4)).best["loss"])
    assert reported["best_model"].evaluation < reported["final_model"].evaluation


def test_the_same_weights_are_written_once(one_rank, run_file, tmp_path, capsys):
    run = tmp_path / "run"
    options = [*AUTO, "--checkpoint.export_hf", "true", "--run_folder", str(run)]
    train(one_rank, run_file, options)
    assert read_manifest(checkpoint(run, 4)).best["step"] == 4
    places = [run / "hf/step-00000004", run / "final_model", run / "best_model"]
    for file in places[0].glob("*.safetensors"):
        assert len({(place / file.name).stat().st_ino for place in places}) == 1
    assert len({(place / "config.json").stat().st_ino for place in places}) == 3  # may be edited
    assert contents(places[0]) == contents(places[1]) == contents(places[2])
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for place in places for path in place.iterdir()}
    train(one_rank, run_file, options)
    printed = capsys.readouterr().out
    assert f"exported    {run / 'best_model'} already exists" in printed
    assert f"next        retemper generate --model {run / 'final_model'}" not in printed  # hf/step-... is named
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_continued_run_replaces_them(one_rank, run_file, tmp_path, capsys):
    run = tmp_path / "run"
    train(one_rank, run_file, [*AUTO, "--run_folder", str(run)])
    printed = capsys.readouterr().out
    assert "models      final_model and best_model at the end, from 37.5 kB each" in printed
    assert f"--model {run / 'final_model'} --prompt '...'" in printed
    assert printed.count("\nmodel ") == 1  # the report shows and counts these lines of the log: one of each start
    opened = (run / "final_model/config.json").open()
    train(one_rank, run_file, [*AUTO, "--training.train_tokens", str(5 * 8 * 32), "--run_folder", str(run)])
    assert_export_of(run / "final_model", checkpoint(run, 5), tmp_path)
    assert json.load(opened)["vocab_size"] == tiny_run.VOCAB_SIZE  # who reads the former one goes on
    opened.close()
    assert not leftovers(run)


def test_files_of_others_are_not_lost(one_rank, run_file, tmp_path, capsys):
    run = tmp_path / "run"
    train(one_rank, run_file, [*AUTO, "--run_folder", str(run)])
    (run / "final_model/notes.txt").write_text("mine")
    longer = [*AUTO, "--training.train_tokens", str(5 * 8 * 32), "--run_folder", str(run)]
    train(one_rank, run_file, longer)
    said = "final_model: holds notes.txt, which is not of the export and would be lost; move it away; "
    assert f"note: checkpoint.model_folders: {run / said}" in capsys.readouterr().out
    assert_export_of_with = contents(run / "final_model")
    assert assert_export_of_with["notes.txt"] == b"mine" and not leftovers(run)
    with pytest.raises(UserError, match=r"^checkpoint.model_folders: .*notes.txt.* itself is complete"):
        train(one_rank, run_file, [*longer, "--checkpoint.model_folders", "on"])
    (run / "final_model/notes.txt").unlink()
    train(one_rank, run_file, longer)
    assert_export_of(run / "final_model", checkpoint(run, 5), tmp_path)


def test_a_folder_of_another_kind_stays(one_rank, run_file, tmp_path, capsys):
    (tmp_path / "run/final_model").mkdir(parents=True)
    (tmp_path / "run/final_model/config.json").write_text("mine")
    options = [*AUTO, "--run_folder", str(tmp_path / "run")]
    refusal = tiny_run.refusal(one_rank, run_file, [*options, "--checkpoint.model_folders", "on"])
    assert "final_model: this name is needed for checkpoint.model_folders" in refusal
    assert not (tmp_path / "run/checkpoints").exists()
    train(one_rank, run_file, options)
    assert "note: checkpoint.model_folders: " in capsys.readouterr().out
    assert (tmp_path / "run/final_model/config.json").read_text() == "mine"
    assert (tmp_path / "run/best_model/conversion.json").is_file()


@pytest.mark.parametrize("switch", ["auto", "on"])
def test_a_full_disk_damages_nothing(two_ranks, run_file, tmp_path, switch):
    run = tmp_path / "run"
    options = [*AUTO, *DIVERGING, "--checkpoint.model_folders", switch, "--run_folder", str(run)]
    options += ["--checkpoint.export_hf", "false"]
    messages = two_ranks.run(hf_exports.train_on_a_full_disk, run_file, options, 1)
    for message in messages:
        if switch == "auto":
            assert message == "finished"
        else:
            assert "checkpoint.model_folders: " in message and "No space left on device" in message
    assert not (run / "final_model").exists() and not leftovers(run)
    two_ranks.run(train, run_file, options)
    assert_export_of(run / "final_model", checkpoint(run, 4), tmp_path)


def test_a_killed_run_is_completed(one_rank, run_file, tmp_path, monkeypatch):
    run = tmp_path / "run"
    options = [*AUTO, "--run_folder", str(run)]

    class Killed(BaseException):
        pass

    def kill(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(model_folders, "_publish", kill)
        with pytest.raises(Killed):
            train(one_rank, run_file, options)
    assert not (run / "final_model").exists() and leftovers(run) == [".final_model.new"]
    with monkeypatch.context() as patch:
        patch.setattr(model_folders, "write_export", kill)  # what is written is used
        patch.setattr(model_folders, "_wanted", lambda *given: [("final_model", checkpoint(run, 4))])
        train(one_rank, run_file, options)
    assert_export_of(run / "final_model", checkpoint(run, 4), tmp_path)
    shutil.copytree(checkpoint(run, 3) / "hf", run / ".best_model.new")  # of a kill in the middle
    (run / "..best_model.new.0123.partial").mkdir()
    train(one_rank, run_file, options)
    assert_export_of(run / "best_model", checkpoint(run, 4), tmp_path)
    assert not leftovers(run)


@pytest.mark.parametrize("exchanges", [True, False])
def test_replacing_a_folder(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    new, folder = tmp_path / "new", tmp_path / "folder"
    (tmp_path / ".folder.old").mkdir()  # of a kill
    for content in ("first", "second"):
        new.mkdir()
        (new / content).write_text(content)
        atomic.replace_folder(new, folder)
        assert os.listdir(tmp_path) == ["folder"] and os.listdir(folder) == [content]


def test_which_folders_are_written(run_file):
    def planned(*options: str, parameters: int = 10**9) -> list[str]:
        return model_folders.planned_folders(tiny_run.configure(run_file, *SHORT, *options), parameters)

    on, off = ["--checkpoint.model_folders", "on"], ["--checkpoint.model_folders", "off"]
    best = ["--checkpoint.export_best", "true"]
    auto = ["--checkpoint.model_folders", "auto"]
    both = ["final_model", "best_model"]
    assert planned(*auto) == planned(*auto, parameters=10**10) == planned(*on, parameters=10**12) == both
    assert planned(*auto, parameters=10**10 + 1) == planned(*off) == []
    assert planned(*auto, *best, parameters=10**11) == planned(*off, *best) == ["best_model"]
    assert planned(*on, "--checkpoint.keep_best", "false") == ["final_model"]
    assert planned(*on, "--data.validation", "{}") == ["final_model"]
    config = tiny_run.configure(run_file, *SHORT, *auto)
    [line] = model_folders.prepare_model_folders(config, 10**11)
    assert "more than 10 billion parameters; checkpoint.model_folders on" in line
    huge = tiny_run.configure(run_file, *SHORT, *on)
    with pytest.raises(UserError, match=r"no space left for final_model and best_model of checkpoint.model_folders"):
        model_folders.prepare_model_folders(huge, 10**15)
    with pytest.raises(UserError, match=r"checkpoint.keep_best is false, so the best checkpoint is not kept"):
        tiny_run.configure(run_file, *best)


def test_the_average_is_exported_on_request(one_rank, run_file, tmp_path):
    options = [*AUTO, "--training.ema_decay", "0.5", "--run_folder", str(tmp_path / "run")]
    train(one_rank, run_file, options)
    train(one_rank, run_file, [*options, "--checkpoint.export_ema", "true"])
    dcp_to_hf.convert(
        checkpoint(tmp_path / "run", 4), tmp_path / "ema", max_shard_size=hf_exports.SHARD_SIZE, ema=True, say=print
    )
    assert contents(tmp_path / "run/final_model") == contents(tmp_path / "ema")


def are_averages(run: Path) -> dict[str, bool]:
    """Whether each folder of the run was made of an average, as its record says."""
    records = {name: json.loads((run / name / "conversion.json").read_text()) for name in ("best_model", "final_model")}
    return {name: bool(record["options"].get("ema")) for name, record in records.items()}


def test_the_best_is_of_the_weights_that_were_evaluated(one_rank, run_file, tmp_path):
    """Also if the average is turned off later, and the best evaluation is from before."""
    options, average = [*AUTO, "--run_folder", str(tmp_path / "run")], ["--training.ema_decay", "0.5"]
    train(one_rank, run_file, [*options, *average, "--training.eval_ema", "true"])
    assert are_averages(tmp_path / "run") == {"best_model": True, "final_model": False}
    worse = [*DIVERGING, "--training.train_tokens", str(5 * 8 * 32)]
    train(one_rank, run_file, [*options, *worse])
    assert are_averages(tmp_path / "run") == {"best_model": True, "final_model": False}
    assert tiny_run.records(tmp_path / "run")[-1]["step"] == 5


def test_an_average_that_begins_after_the_last_step_is_its_weights(one_rank, run_file, tmp_path, capsys):
    options = [*AUTO, "--checkpoint.export_hf", "true", "--run_folder", str(tmp_path / "run")]
    train(one_rank, run_file, options)
    before = contents(tmp_path / "run/final_model")
    capsys.readouterr()
    on = ["--training.ema_decay", "0.5", "--training.eval_ema", "true", "--checkpoint.export_ema", "true"]
    train(one_rank, run_file, [*options, *on, "--checkpoint.export_best", "true"])
    notes = [line for line in capsys.readouterr().out.splitlines() if "written without training.ema_decay" in line]
    assert len(notes) >= 2 and all("step-" in line and line.endswith("which are exported") for line in notes)
    assert contents(tmp_path / "run/final_model") == before
    assert are_averages(tmp_path / "run") == {"best_model": False, "final_model": False}


def test_an_average_that_begins_late_is_exported_and_the_best_may_be_from_before(one_rank, run_file, tmp_path):
    options, run = [*AUTO, "--run_folder", str(tmp_path / "run")], tmp_path / "run"
    train(one_rank, run_file, options)
    on = ["--training.ema_decay", "0.5", "--training.eval_ema", "true", "--checkpoint.export_ema", "true"]
    longer = ["--training.train_tokens", str(6 * 8 * 32), "--optimizer.schedule", "constant"]
    train(one_rank, run_file, [*options, *on, *longer, *DIVERGING])
    assert are_averages(run) == {"best_model": False, "final_model": True}
    tensors = tiny_run.tensors_of(checkpoint(run, 6))
    exported = {n: t for file in (run / "final_model").glob("*.safetensors") for n, t in load_file(file).items()}
    assert exported and all(torch.equal(tensor, tensors[f"ema.{name}"]) for name, tensor in exported.items())
