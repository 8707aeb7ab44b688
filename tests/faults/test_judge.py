"""The judge of the fault harness: it finds nothing in an undisturbed run, and everything that was made wrong."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace

import fault_judge as judge
import fault_mounts as mounts
import fault_sweep
import pytest
import tiny_run
from fault_cases import KINDS, catalogue, draw
from fault_damage import FILES, checkpoints, seal
from fault_judge import Rest

from retemper.engine.weights.checkpoint.manifest import with_checksum
from retemper.engine.weights.saving import save_tensors


@pytest.fixture
def finished(short_run_once, tmp_path):
    """A copy of the finished run that may be changed."""
    return shutil.copytree(short_run_once, tmp_path / "run")


@pytest.fixture(scope="module")
def short_run_once(short_run):
    return short_run("--checkpoint.keep_last", "3")


def _records(folder, change):
    path = folder / "metrics.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def _manifest(checkpoint, **changes):
    content = json.loads((checkpoint / "manifest.json").read_text()) | changes
    content.pop("manifest_xxh3_128")
    (checkpoint / "manifest.json").write_text(with_checksum(content))


def _flip_a_bit(checkpoint, name):
    """In one value of the tensor ``name``; all hashes fit."""
    tensors = tiny_run.tensors_of(checkpoint)
    value = tensors[name].view(-1)[:1].numpy().view("uint8")
    value[0] ^= 1
    for path in checkpoint.glob("*.safetensors"):
        path.unlink()
    save_tensors(checkpoint, tensors, distributed=False)
    content = json.loads((checkpoint / "manifest.json").read_text())
    names = [name for name in content["files"] if (checkpoint / name).exists()]
    _manifest(checkpoint, files={name: content["files"][name] for name in names})
    seal(checkpoint)


def test_an_undisturbed_run_is_right(finished, short_reference):
    assert judge.finished(finished, short_reference, set()) == []
    assert len(checkpoints(finished)) == 3 and short_reference.last_step == 8


CHANGES = {
    "a step that is missing": lambda lines: lines[:3] + lines[4:],
    "a step twice": lambda lines: lines[:4] + lines[3:],
    "the order": lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
    "a last digit": lambda lines: [*lines[:5], lines[5].replace('"loss": ', '"loss": 1'), *lines[6:]],
    "the end": lambda lines: lines[:-1],
    "a torn line": lambda lines: [*lines[:-1], lines[-1][:20]],
    "noise": lambda lines: [*lines[:4], "{]\n", *lines[5:]],
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_wrong_curve_is_found(what, finished, short_reference):
    _records(finished, CHANGES[what])
    try:
        problems = judge.finished(finished, short_reference, set())
    except ValueError:
        problems = ["no JSON"]
    assert any("metrics.jsonl" in problem or "no JSON" in problem for problem in problems)


def test_another_seed_is_found(short_run, short_reference):
    problems = judge.finished(short_run("--seed", "7"), short_reference, set())
    assert any("metrics.jsonl: line 1 is" in problem for problem in problems)
    assert any("tensors differ" in problem for problem in problems)


@pytest.mark.parametrize("prefix", ["", "optimizer.exp_avg_sq."])
def test_one_bit_of_one_tensor_is_found_though_all_hashes_fit(prefix, finished, short_reference):
    name = prefix + "model.layers.1.mlp.up_proj.weight"
    _flip_a_bit(checkpoints(finished)[-1], name)
    assert judge.finished(finished, short_reference, set()) == [
        f"step-00000008: 1 tensors differ from undisturbed, such as {name}"
    ]


def test_other_wrong_states_are_found(finished, short_reference):
    first, second, last = checkpoints(finished)
    _manifest(first, consumed_samples=999)
    (second / "rank-00000.safetensors").write_bytes((last / "rank-00000.safetensors").read_bytes())
    (last / "manifest.json").unlink()
    (last.parent / "who knows").mkdir()
    (last.parent / f".step-00000003.{'0' * 32}.tmp").mkdir()
    problems = "\n".join(judge.finished(finished, short_reference, set()))
    assert f"{first.name}: 999 samples consumed" in problems
    assert f"{second.name}/rank-00000.safetensors is not what its manifest says" in problems
    assert f"{last.name} has no manifest" in problems
    assert "who knows in checkpoints/" in problems and "leftovers in the finished run" in problems
    last.rename(last.with_name("step-00000007"))
    assert "step-00000008 is missing in the finished run" in judge.finished(finished, short_reference, set())


def test_an_evaluation_may_be_due_but_no_other_best(finished, short_reference):
    """As a run leaves it that was asked to stop at the step of an evaluation that would have been the best."""
    evaluated = max(step for step, place in short_reference.places.items() if place["evaluation"])
    places = {step: dict(place) for step, place in short_reference.places.items()}
    before = {"step": 2, "name": "validation", "loss": 9.0}
    places[evaluated - 1]["best"] = before
    reference = replace(short_reference, places=places)
    checkpoint = finished / "checkpoints" / f"step-{evaluated:08d}"
    _manifest(checkpoint, evaluation={}, best=before)
    assert judge.wrong_checkpoint(checkpoint, reference) == []
    _manifest(checkpoint, best={})
    assert judge.wrong_checkpoint(checkpoint, reference) == [f"{checkpoint.name}: best is {{}}, undisturbed {before}"]


def test_what_retention_must_keep():
    assert judge.lost(Rest([3, 6, 8], best=6), Rest([6, 8], best=6), keep_last=2) == []
    assert judge.lost(Rest([3, 6], best=3), Rest([6, 8, 9], best=3), keep_last=2) == [
        "step-00000003 is gone, and was to be kept"
    ]
    assert judge.lost(Rest([3, 6]), Rest([3]), keep_last=2) == ["step-00000006 is gone, and was to be kept"]


def test_every_damaged_file_is_found_without_a_launch(kept_run, tmp_path, monkeypatch):
    tried, wrong = fault_sweep.sweep(kept_run, tmp_path / "sweep", seed=1)
    assert (tried, wrong) == (325, [])
    # One that finds nothing.
    monkeypatch.setattr(fault_sweep, "find", lambda folder: (checkpoints(folder)[-1], ""))
    tried, wrong = fault_sweep.sweep(kept_run, tmp_path / "sweep", seed=1)
    assert tried == len(wrong)


def test_a_checkpoint_has_no_other_files(kept_run):
    newest = checkpoints(kept_run)[-1]
    assert sorted(path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()) == sorted(FILES)


def test_cases_are_drawn_from_their_names():
    cases = catalogue(200, seed=1)
    assert len(cases) >= 200 and {case.kind for case in cases} == KINDS.keys()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        kind, _, number = case.name.rpartition(".")
        assert draw(kind, int(number), seed=1) == case
    assert catalogue(200, seed=2) != cases
    damaged = {(case.rest["name"], case.rest["form"]) for case in cases if case.kind == "damage"}
    assert damaged >= {(name, form) for name in FILES for form in ("flip", "truncate", "delete")}


@pytest.mark.skipif(not mounts.can_mount(), reason="mounting a file system needs root")
def test_a_full_disk_stays_full(tmp_path):
    mounts.mount_disk(tmp_path)
    try:
        old = tmp_path / "old"
        old.write_bytes(bytes(2_000_000))
        with mounts.filled(tmp_path, left=100_000):
            assert _comes_true(lambda: shutil.disk_usage(tmp_path).free <= 100_000)
            old.unlink()
            assert _comes_true(lambda: shutil.disk_usage(tmp_path).free <= 100_000)
            (tmp_path / "small").write_bytes(bytes(50_000))
            with pytest.raises(OSError, match="No space left"):
                (tmp_path / "large").write_bytes(bytes(1_000_000))
        assert shutil.disk_usage(tmp_path).free > 20_000_000
    finally:
        mounts.unmount(tmp_path)


def _comes_true(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
