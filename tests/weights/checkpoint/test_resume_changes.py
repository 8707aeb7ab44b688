"""What changes between a checkpoint and the run that goes on from it: said, refused, or allowed by name."""

from __future__ import annotations

import json
import os

import pytest
import tiny_run
import yaml

from retemper.engine import pretrain
from retemper.engine.config.settings import DataConfig, OptimizerConfig, RunConfig, TrainingConfig, to_dict
from retemper.engine.errors import UserError
from retemper.engine.schedule import learning_rate
from retemper.engine.weights.checkpoint.manifest import Manifest
from retemper.engine.weights.checkpoint.resume_changes import describe_changes

STEPS = ["--training.train_tokens", str(8 * 8 * 32)]
EVALUATION = ["--training.eval_interval", "0"]


@pytest.fixture(scope="module")
def interrupted(one_rank, run_file, tmp_path_factory):
    """Folder of a run that ended after 4 of 20 steps."""
    folder = tmp_path_factory.mktemp("changes") / "run"
    tiny_run.train_until(one_rank, run_file, ["--run_folder", str(folder)], 4)
    return folder


@pytest.fixture
def folder(interrupted, tmp_path):
    """A copy of it."""
    return tiny_run.copy_of(interrupted, tmp_path / "run")


def changed(output):
    """What the log calls changed."""
    return [line.removeprefix("changed     ") for line in output.splitlines() if line.startswith("changed")]


def test_nothing_has_changed(one_rank, run_file, folder, capsys):
    tiny_run.train(one_rank, run_file, ["--run_folder", str(folder)])
    assert changed(capsys.readouterr().out) == []


def test_other_spellings_of_the_same_settings_are_no_changes(one_rank, run_file, folder, tmp_path, monkeypatch, capsys):
    content = yaml.safe_load(run_file.read_text())
    architecture = tmp_path / "config.json"
    architecture.write_text(json.dumps(dict(reversed(content["model"]["architecture"].items()))))
    content["model"]["architecture"] = str(architecture)
    for source in content["data"]["train"]:
        source["path"] = os.path.relpath(source["path"], tmp_path)
    content["data"]["train"][1] |= {"weight": 1.0, "name": "second", "max_epochs": None}
    (tmp_path / "link").symlink_to(run_file.parent)
    content["data"]["validation"]["validation"] = "link/./validation"
    content["optimizer"] |= {"learning_rate": 0.01, "decay_tokens": None}
    content["parallel"] = {"shard": 1, "tensor": 1}
    content = {key: content[key] for key in reversed(content)}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    tiny_run.train_until(one_rank, path, ["--run_folder", os.path.relpath(folder)], 5)
    assert changed(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (None, 512, []),  # a tenth of the budget
        (512, None, []),
        (None, 500, ["optimizer.decay_tokens 512 -> 500"]),
        (None, None, []),
    ],
)
def test_a_default_that_is_written_out_is_no_change(then, now, said):
    def config(decay_tokens):
        optimizer = OptimizerConfig(schedule="wsd", decay_tokens=decay_tokens)
        return RunConfig("run", DataConfig(), TrainingConfig(train_tokens=5120), optimizer=optimizer)

    manifest = Manifest("training", config=to_dict(config(then)), layout={"shard": 2})
    assert [line.split("     ")[1] for line in describe_changes(manifest, config(now), {"shard": 2}, {})] == said


def test_every_change_is_said_with_both_values(one_rank, run_file, folder, tmp_path, capsys):
    tiny_run.write_dataset(tmp_path / "third", seed=9)
    sources = f"[{{path: {run_file.parent / 'first'}, weight: 1.5}}, {{path: {tmp_path / 'third'}}}]"
    options = ["--run_folder", str(folder), "--data.train", sources, "--training.global_batch_size", "16"]
    options += ["--training.train_tokens", "10240", "--optimizer.learning_rate", "5e-3", "--parallel.tensor", "1"]
    # As if two ranks had written it.
    manifest = folder / "checkpoints" / "step-00000004" / "manifest.json"
    tiny_run.rewrite_manifest(manifest, lambda content: content["layout"].update(shard=2))
    run = pretrain.build(tiny_run.configure(run_file, *options), one_rank)
    pretrain.train(run)
    said = changed(capsys.readouterr().out)
    config = run.config
    before = learning_rate(1024, *(getattr(tiny_run.configure(run_file), part) for part in ("training", "optimizer")))
    after = learning_rate(1024, config.training, config.optimizer)
    assert said == [
        "data.train[first].weight 2.0 -> 1.5",
        f"data.train[second].path {run_file.parent / 'second'} -> not set",
        "training.train_tokens 5,120 -> 10,240",
        "training.global_batch_size 8 -> 16",
        "optimizer.learning_rate 0.01 -> 0.005",
        f"data.train[third].path not set -> {tmp_path / 'third'}",
        "ranks shard 2 -> 1",
        f"learning rate at 1,024 tokens {before:.3g} -> {after:.3g}",
    ]


@pytest.mark.parametrize(
    "change",
    [
        ["--seed", "7"],
        ["--data.shuffle", "documents"],
        ["--data.packing", "best_fit"],
        ["--data.validation_fraction", "0.1"],
        ["--training.sequence_length", "16"],
    ],
)
def test_what_changes_the_order_is_refused_and_goes_on_where_it_is_allowed(change, one_rank, run_file, folder, capsys):
    key = change[0].removeprefix("--")
    options = ["--run_folder", str(folder), *STEPS, *EVALUATION, *change]
    with pytest.raises(UserError) as refused:
        pretrain.build(tiny_run.configure(run_file, *options), one_rank)
    assert str(refused.value).startswith(f"{key} is {change[1]}, but ") and f"allow_changes to [{key}]" in str(
        refused.value
    )
    options += ["--allow_changes", f"[{key}]"]
    run = pretrain.build(tiny_run.configure(run_file, *options), one_rank)
    # Sources go on after the tokens that they have given; so does the clock of samples.
    length = run.config.training.sequence_length
    given = json.loads((folder / "checkpoints" / "step-00000004" / "manifest.json").read_text())["consumed_samples"]
    assert run.progress.samples == given * 32 // length and run.progress.tokens == given * 32
    cursors = run.order.cursors(run.progress.samples)
    assert sum(cursors.values()) == pytest.approx(run.progress.samples, abs=len(cursors))
    pretrain.train(run)
    assert any(line.startswith(f"{key} ") and line.endswith("(allowed)") for line in changed(capsys.readouterr().out))
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    assert json.loads((newest / "manifest.json").read_text())["consumed_tokens"] == 8 * 8 * 32
    # Further on, nothing has changed any more.
    longer = ["--training.train_tokens", str(10 * 8 * 32), "--optimizer.schedule", "constant"]
    tiny_run.train(one_rank, run_file, [*options[:2], *EVALUATION, *change, *longer])
    assert not any(key in line for line in changed(capsys.readouterr().out))


def test_an_allowed_change_resumes_bitwise_when_interrupted(one_rank, run_file, folder, tmp_path):
    other = tiny_run.copy_of(folder, tmp_path / "other")
    change = [*EVALUATION, "--training.sequence_length", "16", "--allow_changes", "[training.sequence_length]"]
    tiny_run.train(one_rank, run_file, ["--run_folder", str(folder), *change])
    tiny_run.train_until(one_rank, run_file, ["--run_folder", str(other), *change], 14)
    tiny_run.train(one_rank, run_file, ["--run_folder", str(other), *change])
    assert tiny_run.curve(other) == tiny_run.curve(folder)


def test_other_data_under_the_same_name_goes_on_where_it_is_allowed(one_rank, run_file, folder, tmp_path, capsys):
    tiny_run.write_dataset(tmp_path / "first", seed=5)
    sources = f"[{{path: {tmp_path / 'first'}, weight: 2.0}}, {{path: {run_file.parent / 'second'}}}]"
    options = ["--run_folder", str(folder), "--data.train", sources, *STEPS]
    with pytest.raises(UserError, match=r"allow_changes to \[data_files\]"):
        pretrain.build(tiny_run.configure(run_file, *options), one_rank)
    tiny_run.train(one_rank, run_file, [*options, "--allow_changes", "[data_files]"])
    [line] = [line for line in changed(capsys.readouterr().out) if line.startswith("data_files")]
    assert line.startswith("data_files of first ") and line.endswith(" (allowed)")


def test_a_lost_sidecar_is_listed_and_is_no_leave(one_rank, run_file, folder, capsys):
    """What cannot be compared is not refused, and nobody has allowed it."""
    manifest = folder / "checkpoints" / "step-00000004" / "manifest.json"
    tiny_run.rewrite_manifest(manifest, lambda content: content["datasets"]["first"].update(hash="ab"))
    tiny_run.train(one_rank, run_file, ["--run_folder", str(folder), *STEPS])
    [line] = [line for line in changed(capsys.readouterr().out) if line.startswith("data_files")]
    assert ", hash ab -> " in line and line.endswith("hash None")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--allow_changes", "[sead]"],
            "allow_changes has the unknown entry 'sead'; allowed: seed, training.sequence_length",
        ),
        (["--optimizer.schedule_start_tokens", "5120"], "less than training.train_tokens 5,120"),
        (
            ["--optimizer.schedule_start_tokens", "5000"],
            "warmup_tokens 1,024 is more than training.train_tokens 5,120 - ",
        ),
        (["--optimizer.schedule_start_tokens", "1025"], "continues at 1,024 tokens, before its schedule begins"),
    ],
)
def test_what_cannot_be_is_one_line(options, message, one_rank, run_file, folder):
    with pytest.raises(UserError) as refused:
        pretrain.build(tiny_run.configure(run_file, "--run_folder", str(folder), *options), one_rank)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_an_extended_run_warms_up_once_more(one_rank, run_file, folder):
    tiny_run.train(one_rank, run_file, ["--run_folder", str(folder), *EVALUATION])
    again = ["--training.train_tokens", "10240", "--training.warmup_tokens", "512"]
    again += ["--optimizer.schedule_start_tokens", "5120", *EVALUATION]
    tiny_run.train(one_rank, run_file, ["--run_folder", str(folder), *again])
    rates = {step: rate for step, kind, _, _, rate in tiny_run.curve(folder) if kind == "train"}
    assert (rates[20], rates[21], rates[22], rates[40]) == pytest.approx((1e-3, 5.5e-3, 1e-2, 1e-3), rel=1e-9)
