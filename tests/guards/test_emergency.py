"""A step that fails: the state before it is saved, where it is whole and finite and all ranks are there; marked so."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import tiny_run
import torch
import torch.distributed as dist

from retemper.engine import pretrain
from retemper.engine import step as step_module
from retemper.engine.data.loader import Prefetcher
from retemper.engine.errors import UserError
from retemper.engine.guards.emergency import EmergencySave
from retemper.engine.optim.local import local_part
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.weights.checkpoint.manifest import Manifest, read_manifest
from retemper.engine.weights.checkpoint.retention import reasons_to_keep
from retemper.engine.weights.checkpoint.store import CheckpointStore

OPTIONS = [
    "--training.train_tokens",
    str(8 * 8 * 32),
    "--checkpoint.save_interval",
    "3",
    "--training.eval_interval",
    "7",
]
STEP = 5
"""After which the run fails. There is a checkpoint of step 3."""


class Failure(RuntimeError):
    """As a kernel that does not run."""


def fail_in(run, phase, patch, error):
    """Let ``phase`` of the step after :data:`STEP` raise."""

    def due():
        return run.progress.step == STEP

    def failing(owner, name, first=lambda: None):
        function = getattr(owner, name)

        def wrapper(*arguments, **named):
            if due():
                first()
                raise error
            return function(*arguments, **named)

        patch.setattr(owner, name, wrapper)

    decoder = run.model.decoders[0]
    if phase == "forward":  # while the parameters are gathered
        failing(decoder.model.blocks[1], "forward")
    elif phase == "backward":

        def hook(grad):
            if due():
                raise error

        def watch(block, inputs, output):
            if output.requires_grad:  # an activation, in the middle of the backward pass
                output.register_hook(hook)

        decoder.model.blocks[0].register_forward_hook(watch)
    elif phase == "data":
        failing(Prefetcher, "get")
    elif phase == "clipping":
        failing(step_module, "global_norm")
    elif phase == "update":
        failing(run.optimizer, "step")
    elif phase == "report":
        report = run.report.step

        def failing_report(*arguments):
            if run.progress.step == STEP + 1:
                raise error
            return report(*arguments)

        patch.setattr(run.report, "step", failing_report)
    elif phase == "nan":  # of which no earlier step knows

        @torch.no_grad()
        def spoil():
            local_part(next(iter(run.model.parameters()))).view(-1)[3] = float("nan")

        failing(run.forward_backward, "accumulate_gradients", spoil)


def train(ranks, path, overrides, phase, error):
    """What the run says, and what it raises, where ``phase`` of a step fails on this rank."""
    if ranks.world_size > 1:
        ranks = replace(ranks, store=dist.distributed_c10d._get_default_store())
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
    with pytest.MonkeyPatch.context() as patch:
        fail_in(run, phase, patch, error)
        try:
            pretrain.train(run)
        except Exception as raised:
            kind = UserError if isinstance(raised, UserError) else type(raised)
            return f"{kind.__name__}: {raised}"
    raise AssertionError("the run went through")


def _checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith("step-"))


@pytest.fixture(scope="module")
def undisturbed(one_rank, run_file, tmp_path_factory):
    """A run that keeps the checkpoint of every step."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    every = ["--checkpoint.save_interval", "1", "--checkpoint.keep_last", "100", "--run_folder", str(folder)]
    tiny_run.train(one_rank, run_file, [*OPTIONS, *every])
    return folder


def _same_tensors(folder, other, step):
    ours, theirs = (tiny_run.tensors_of(run / "checkpoints" / f"step-{step:08d}") for run in (folder, other))
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("phase", "error", "saved"),
    [
        ("forward", Failure("CUDA error: an illegal kernel"), STEP),
        pytest.param("backward", Failure("CUDA error: a kernel"), STEP, marks=pytest.mark.slow),
        pytest.param("clipping", AssertionError("no such thing"), STEP, marks=pytest.mark.slow),
        ("data", UserError("data/first.bin: ends at byte 0"), STEP),
        pytest.param("data", KeyError("a bug"), STEP, marks=pytest.mark.slow),
        pytest.param("report", OSError(5, "Input/output error"), STEP + 1, marks=pytest.mark.slow),
    ],
)
def test_the_state_before_the_step_is_saved(phase, error, saved, one_rank, run_file, undisturbed, tmp_path, capsys):
    folder = tmp_path / "run"
    options = [*OPTIONS, "--run_folder", str(folder)]
    assert train(one_rank, run_file, options, phase, error).startswith(type(error).__name__)
    said = capsys.readouterr().out
    assert said.count(f"after step {saved} the run failed ({type(error).__name__}: ") == 1
    newest = folder / "checkpoints" / f"step-{saved:08d}"
    # In step 6 there was an ordinary checkpoint to come.
    assert _checkpoints(folder) == ["step-00000003", newest.name]
    assert read_manifest(newest).emergency.startswith(type(error).__name__)
    assert _same_tensors(folder, undisturbed, saved)
    tiny_run.train(one_rank, run_file, options)
    lost = [saved] if phase == "report" else []  # whose record was not written any more
    assert tiny_run.curve(folder) == [record for record in tiny_run.curve(undisturbed) if record[0] not in lost]
    assert _same_tensors(folder, undisturbed, 8)
    assert newest.name not in _checkpoints(folder)  # an ordinary one is newer


@pytest.mark.parametrize(
    ("phase", "reason"), [("update", "the update of the weights had begun"), ("nan", "are not finite")]
)
def test_a_state_that_is_not_sound_is_not_saved(phase, reason, one_rank, run_file, tmp_path, capsys):
    options = [*OPTIONS, "--run_folder", str(tmp_path)]
    train(one_rank, run_file, options, phase, Failure("a kernel"))
    assert _checkpoints(tmp_path) == ["step-00000003"]
    assert reason in capsys.readouterr().out


def test_a_rank_alone_completes_the_checkpoint_that_is_being_written(one_rank, run_file, tmp_path, monkeypatch):
    save = CheckpointStore.save

    def slowly(*arguments):
        time.sleep(1)
        return save(*arguments)

    monkeypatch.setattr(CheckpointStore, "save", slowly)
    train(one_rank, run_file, [*OPTIONS, "--run_folder", str(tmp_path)], "update", Failure("a kernel"))
    assert _checkpoints(tmp_path) == ["step-00000003"]


def test_a_step_that_has_a_checkpoint_is_not_saved_again(one_rank, run_file, tmp_path, capsys):
    options = [*OPTIONS, "--checkpoint.save_interval", str(STEP), "--run_folder", str(tmp_path)]
    train(one_rank, run_file, options, "forward", Failure("a kernel"))
    assert _checkpoints(tmp_path) == [f"step-{STEP:08d}"]
    assert read_manifest(tmp_path / "checkpoints" / f"step-{STEP:08d}").emergency == ""
    assert f"step-{STEP:08d} has that step" in capsys.readouterr().out


def test_a_run_that_refuses_to_go_on_saves_nothing(one_rank, run_file, tmp_path):
    """Its message names an older checkpoint for a reason: a loss that diverges."""
    said = train(one_rank, run_file, [*OPTIONS, "--run_folder", str(tmp_path)], "report", UserError("diverges"))
    assert said == "UserError: diverges" and _checkpoints(tmp_path) == ["step-00000003"]


def test_two_ranks_that_fail_alike_save_together(two_ranks, one_rank, run_file, tmp_path):
    folder = tmp_path / "run"
    error = Failure("CUDA error: device-side assert")
    both = two_ranks.run(train, run_file, [*OPTIONS, "--run_folder", str(folder)], "forward", error)
    assert both == [f"Failure: {error}"] * 2
    assert _checkpoints(folder) == ["step-00000003", f"step-{STEP:08d}"]
    manifest = json.loads((folder / "checkpoints" / f"step-{STEP:08d}" / "manifest.json").read_text())
    assert manifest["emergency"] == f"Failure: {error}" and manifest["world_size"] == 2
    tiny_run.train(one_rank, run_file, [*OPTIONS, "--run_folder", str(folder)])
    assert "step-00000008" in _checkpoints(folder)


def _emergency(said, store, timeout_seconds=0.4, rank=0):
    ranks = Ranks(rank, 2, torch.device("cpu"), store=store)
    return EmergencySave(ranks, {}, None, said.append, timeout_seconds)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({}, "rank 1 did not fail in the same step within 0.2 s, and saving needs all ranks"),
        ({"emergency/4/1": "1"}, "rank 1 did not fail in the same step"),  # in another step
        ({"emergency/5/1": "0"}, "the update of the weights had begun"),
    ],
)
def test_a_rank_that_fails_alone_gives_up_soon_and_says_so(other, reason):
    said, store = [], dist.HashStore()
    for key, value in other.items():
        store.set(key, value)
    _emergency(said, store)(Failure("a kernel"), STEP, None, None, None)
    [line] = said
    assert line.startswith("  after step 5 the run failed (Failure: a kernel): not saved: ") and reason in line


def test_where_the_main_rank_has_not_failed_another_one_prints(capsys):
    said = []
    _emergency(said, dist.HashStore(), rank=1)(Failure("a kernel"), STEP, None, None, None)
    assert said == []
    line = capsys.readouterr().out
    assert line.startswith("[rank 1]  after step 5 the run failed") and "rank 0 did not fail in the same step" in line


def test_a_rank_that_has_lost_another_does_not_wait():
    said, store = [], dist.HashStore()
    _emergency(said, store, 60)(
        RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), STEP, *[None] * 3
    )
    assert said == []


def _manifests(*steps):
    return {
        f"step-{abs(step)}": Manifest("training", step=abs(step), emergency="OOM" if step < 0 else "") for step in steps
    }


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ((10, 20, 30, -35), [20, 30, 35]),
        ((10, 20, -25, 30), [20, 30]),
        ((10, -11, -12, -13), [10, 11, 12, 13]),
        ((-5,), [5]),
        ((-5, 10, 20), [10, 20]),
    ],
)
def test_it_takes_no_place_of_another_and_goes_when_one_is_newer(steps, kept):
    reasons = reasons_to_keep(_manifests(*steps), keep_last=2, keep_every=0, best_step=None)
    assert [int(name.removeprefix("step-")) for name, why in reasons.items() if why] == kept
