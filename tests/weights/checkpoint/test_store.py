"""Checkpoints are durable and verified: any damage is noticed, set aside and said, and never loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import saved_runs
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.engine.config.settings import DataConfig, RunConfig, SourceConfig, TrainingConfig
from retemper.engine.data.catalog import Catalog
from retemper.engine.data.curriculum import Curriculum, CurriculumStage, SourceWeight
from retemper.engine.errors import UserError
from retemper.engine.weights.checkpoint.manifest import Manifest, read_manifest
from retemper.engine.weights.checkpoint.resume_changes import describe_changes, require_allowed
from retemper.engine.weights.checkpoint.retention import reasons_to_keep
from retemper.engine.weights.checkpoint.store import CheckpointStore
from retemper.engine.weights.checkpoint.verify import find_damage

NAMES = ["hf/config.json", "hf/tokenizer.json", "rank-00000.safetensors", "tensors.json", "manifest.json"]


def checkpoint(run_folder, step=12):
    return run_folder / "checkpoints" / f"step-{step:08d}"


def names(run_folder):
    return sorted(path.name for path in (run_folder / "checkpoints").iterdir())


def damage(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "flipped":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])
    else:
        path.write_bytes({"truncated": data[:-1], "longer": data + b"\0", "empty": b""}[how])


def test_the_manifest_tells_every_file(saved):
    folder = checkpoint(saved)
    content = json.loads((folder / "manifest.json").read_text())
    on_disk = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert sorted(on_disk) == sorted(NAMES)
    del on_disk["manifest.json"]
    assert content["files"] == {
        name: {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)} for name, data in on_disk.items()
    }
    assert content["versions"]["torch"] == torch.__version__
    assert (content["config"]["seed"], content["layout"], content["world_size"]) == (7, {"shard": 1}, 1)
    assert names(saved) == ["step-00000004", "step-00000008", "step-00000012"]
    for name, tensor in saved_runs.tensors_of(folder).items():
        assert torch.equal(tensor, saved_runs.tensors_at(12)[name])


def test_everything_is_on_disk_before_the_name(one_rank, tmp_path, monkeypatch):
    """The order of flushes and of the rename, as the kernel is asked for them."""
    done = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noting_rename(source, target, **options):
        done.append(f"to {os.path.basename(target)}")
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    saved_runs.save(one_rank, tmp_path / "run", 4)
    final = done.index("to step-00000004")
    before, after = done[:final], done[final + 1 :]
    assert {"rank-00000.safetensors", "tensors.json", "config.json", "tokenizer.json", "hf", "manifest.json"} <= set(
        before
    )
    manifest = before.index("manifest.json")
    assert all(name.endswith(".tmp") for name in before[manifest + 1 :]) and before[manifest + 1 :]
    assert [name for name in after if not name.startswith(".run.json.")] == ["checkpoints", "run"]


@pytest.mark.parametrize("how", ["flipped", "truncated", "longer", "empty", "missing"])
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_newest_one_is_quarantined(one_rank, run_folder, name, how):
    damage(checkpoint(run_folder) / name, how)
    resumed, [line] = saved_runs.resolve(one_rank, run_folder)
    assert resumed == "step-00000008"
    assert f"step-00000012/{name}" in line or (how == "missing" and f"step-00000012: {name} is missing" in line)
    assert line.endswith("renamed to " + str(checkpoint(run_folder)) + ".damaged")
    assert names(run_folder) == ["step-00000004", "step-00000008", "step-00000012.damaged"]
    # And again, as if step 12 had been reached once more.
    saved_runs.save(one_rank, run_folder, 12)
    damage(checkpoint(run_folder) / name, how)
    assert saved_runs.resolve(one_rank, run_folder)[0] == "step-00000008"
    assert names(run_folder)[2:] == ["step-00000012.damaged", "step-00000012.damaged.2"]


@pytest.mark.parametrize("name", NAMES)
def test_no_flipped_bit_goes_unnoticed(saved, tmp_path, name):
    folder = saved_runs.copy_of(checkpoint(saved), tmp_path / "copy")
    path = folder / name
    data, sound = path.read_bytes(), read_manifest(folder)
    for place in range(0, len(data), max(1, len(data) // 60)):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        assert find_damage(folder)[1], place
    path.write_bytes(data)
    assert find_damage(folder) == (sound, [])


def test_a_checkpoint_under_the_name_of_another_step_is_quarantined(one_rank, run_folder):
    (run_folder / "checkpoints" / "step-00000008").rename(run_folder / "checkpoints" / "step-00000020")
    name, lines = saved_runs.resolve(one_rank, run_folder)
    assert name == "step-00000012" and "step-00000020: its manifest is of step 8; renamed to " in lines[0]


def test_a_file_that_was_not_written_is_not_read_as_part_of_it(one_rank, run_folder):
    (checkpoint(run_folder) / "hf" / "added_tokens.json").write_text("{}")
    (checkpoint(run_folder, 8) / "notes.txt").write_text("mine")
    resumed, [line] = saved_runs.resolve(one_rank, run_folder)
    assert resumed == "step-00000008" and "added_tokens.json: not part of the checkpoint" in line


def test_when_none_is_left_the_run_is_refused_and_nothing_is_renamed(one_rank, run_folder):
    for step in (4, 8, 12):
        damage(checkpoint(run_folder, step) / "rank-00000.safetensors", "flipped")
    message, _ = saved_runs.resolve(one_rank, run_folder)
    assert "step-00000012/rank-00000.safetensors: damaged" in message and "no other checkpoint" in message
    assert names(run_folder) == ["step-00000004", "step-00000008", "step-00000012"]
    for step in (4, 8, 12):
        checkpoint(run_folder, step).rename(run_folder / "checkpoints" / f"step-{step:08d}.damaged")
    assert "no other checkpoint" in saved_runs.resolve(one_rank, run_folder)[0]
    for path in (run_folder / "checkpoints").iterdir():
        path.rename(run_folder / path.name)
    assert saved_runs.resolve(one_rank, run_folder, "none") == ("fresh", [])


@pytest.mark.parametrize("name", NAMES)
def test_a_named_checkpoint_is_refused_and_never_renamed(one_rank, run_folder, tmp_path, name):
    other = saved_runs.copy_of(checkpoint(run_folder), tmp_path / "base")
    assert saved_runs.resolve(one_rank, run_folder, str(checkpoint(run_folder))) == ("step-00000012", [])
    damage(checkpoint(run_folder) / name, "flipped")
    damage(other / name, "truncated")
    message, _ = saved_runs.resolve(one_rank, run_folder, str(checkpoint(run_folder)))
    assert f"step-00000012/{name}" in message
    store = CheckpointStore(run_folder, one_rank, 3, False)
    with pytest.raises(UserError, match=f"base/{name}"):
        store.require_valid(str(other), "model.initialize_from")
    assert names(run_folder) == ["step-00000004", "step-00000008", "step-00000012"] and other.is_dir()


def test_format_1_is_read_and_said_to_be_unverified(one_rank, run_folder):
    saved_runs.rewrite_manifest(checkpoint(run_folder), lambda content: None, version=1)
    resumed, [line] = saved_runs.resolve(one_rank, run_folder)
    assert resumed == "step-00000012" and "is not verified" in line
    # What can be seen without hashes is seen.
    damage(checkpoint(run_folder) / "__0_0.distcp", "truncated")
    assert saved_runs.resolve(one_rank, run_folder)[0] == "step-00000008"


def test_a_manifest_cannot_pass_for_one_without_hashes(run_folder):
    path = checkpoint(run_folder) / "manifest.json"
    content = json.loads(path.read_text())
    content["format_version"] = 1
    del content["manifest_xxh3_128"]
    path.write_text(json.dumps(content))
    assert "'files'" in find_damage(checkpoint(run_folder))[1][0].what


def test_a_newer_format_is_refused_and_stays(one_rank, run_folder):
    saved_runs.rewrite_manifest(checkpoint(run_folder), lambda content: content.update(format_version=4))
    assert "format_version is 4" in saved_runs.resolve(one_rank, run_folder)[0]
    assert names(run_folder) == ["step-00000004", "step-00000008", "step-00000012"]


def test_ranks_share_the_reading(two_ranks, run_folder):
    assert two_ranks.run(saved_runs.resolve, run_folder) == [("step-00000012", [])] * 2
    for count, name in enumerate(NAMES[:-1], 1):
        damage(checkpoint(run_folder) / name, "flipped")
        found = [find_damage(checkpoint(run_folder), (rank, 2))[1] for rank in range(2)]
        # Every file is read by one of them.
        assert sorted(item.file for of_rank in found for item in of_rank) == sorted(NAMES[:count])
    damage(checkpoint(run_folder, 8) / "tensors.json", "missing")
    assert [name for name, _ in two_ranks.run(saved_runs.resolve, run_folder)] == ["step-00000004"] * 2
    assert names(run_folder) == ["step-00000004", "step-00000008.damaged", "step-00000012.damaged"]


def test_two_ranks_save_what_both_verify(two_ranks, tmp_path):
    two_ranks.run(saved_runs.save, tmp_path, 4)
    assert find_damage(checkpoint(tmp_path, 4))[1] == []
    for name, tensor in saved_runs.tensors_of(checkpoint(tmp_path, 4)).items():
        assert torch.equal(tensor, saved_runs.tensors_at(4)[name])


def test_a_node_that_sees_an_old_folder_costs_no_checkpoint(two_ranks, run_folder):
    results = two_ranks.run(saved_runs.resolve_where_rank_1_sees_damage, run_folder)
    assert all("rank 0 finds it undamaged" in message for message, _ in results)
    assert names(run_folder) == ["step-00000004", "step-00000008", "step-00000012"]


def test_reasons_to_keep(tmp_path):
    """The last checkpoint of a budget that was raised since, of step 30, is kept for nothing."""
    manifests = {
        tmp_path / str(step): Manifest(kind="training", step=step, final=step in (30, 70)) for step in range(10, 80, 10)
    }
    kept = {int(path.name): why for path, why in reasons_to_keep(manifests, 2, 20, best_step=10).items()}
    assert kept == {10: ["best"], 20: ["every"], 30: [], 40: ["every"], 50: [],
                    60: ["last", "every"], 70: ["last", "final"]}  # fmt: skip


def test_where_the_save_of_the_best_has_failed_the_best_before_is_kept(tmp_path):
    """The record of the run names a step that has no checkpoint."""
    best = {10: 10, 20: 20, 30: 20, 40: 35, 50: 35}
    manifests = {
        tmp_path / str(step): Manifest("training", step=step, best={"step": known, "name": "validation", "loss": 1.0})
        for step, known in best.items()
    }
    for best_step, kept in ((35, [20, 50]), (20, [20, 50]), (10, [10, 50]), (None, [50])):
        reasons = reasons_to_keep(manifests, 1, 0, best_step)
        assert [int(path.name) for path, why in reasons.items() if why] == kept, best_step
    assert reasons_to_keep(manifests, 1, 0, 35)[tmp_path / "20"] == ["best"]


@settings(deadline=None)
@given(
    gaps=st.lists(st.integers(1, 40), min_size=1, max_size=60), keep_last=st.integers(1, 4), wanted=st.integers(1, 90)
)
def test_a_checkpoint_to_rewind_to_is_always_kept(gaps, keep_last, wanted):
    """Saves at any distance, such as of the best at evaluations; a spike may follow in any step before the next."""
    kept, step = {}, 0
    for number, gap in enumerate(gaps):
        step += gap
        kept[Path(str(step))] = Manifest("training", step=step)
        reasons = reasons_to_keep(kept, keep_last, 0, None, wanted)
        kept = {path: manifest for path, manifest in kept.items() if reasons[path]}
        assert len(kept) <= keep_last + 2
        following = gaps[number + 1] if number + 1 < len(gaps) else 1
        for spike in (step + 1, step + following):
            old_enough = [manifest.step for manifest in kept.values() if manifest.step <= spike - wanted]
            assert old_enough or spike - gaps[0] < wanted
            assert not old_enough or step - old_enough[-1] < 2 * wanted + max(gaps)


def test_what_is_kept_for_a_rewind(one_rank, run_folder):
    saved_runs.save(one_rank, run_folder, 16, 20)
    CheckpointStore(run_folder, one_rank, keep_last=1, keep_best=False, rewind_steps=10).prune(None)
    assert names(run_folder) == ["step-00000008", "step-00000012", "step-00000020"]


def test_killed_while_it_abandons_a_run_keeps_all_before(one_rank, run_folder, monkeypatch):
    rename, left = Path.rename, [1]

    def rename_once(path, target):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_once)
    with pytest.raises(KeyboardInterrupt):
        CheckpointStore(run_folder, one_rank, 3, False).discard_after(4)
    assert names(run_folder) == ["step-00000004", "step-00000008", "step-00000012.rewound"]


def test_retention_counts_no_damaged_one_and_touches_no_other_name(one_rank, run_folder):
    saved_runs.save(one_rank, run_folder, 16, 20)
    (checkpoint(run_folder, 20) / "rank-00000.safetensors").unlink()
    for name in ("step-00000002.damaged", "step-3", "mine", "step-00000001-copy"):
        (run_folder / "checkpoints" / name).mkdir()
    CheckpointStore(run_folder, one_rank, keep_last=2, keep_best=True, keep_every=0).prune(best_step=4)
    assert names(run_folder) == ["mine", "step-00000001-copy", "step-00000002.damaged", "step-00000004",
                                 "step-00000012", "step-00000016", "step-00000020", "step-3"]  # fmt: skip


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def _places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


_RUN = RunConfig("run", DataConfig([SourceConfig("books")]), TrainingConfig(train_tokens=100))


def _use(folder, place, value, version):
    """Put ``value`` at ``place`` of the manifest, and do with it what a resumed run does; whether that works."""

    def change(content):
        for key in place[:-1]:
            content = content[key] if isinstance(content, list) or key in content else {}
        if place and (isinstance(content, list) or place[-1] in content):
            content[place[-1]] = value

    saved_runs.rewrite_manifest(folder, change, version)
    config = {"seed": 7, "data": {"shuffle": "windows", "packing": "concat"}}
    fingerprints = {"books": {"path": "books", "tokens": 9000, "hash": "ab", "mask": None}}
    try:
        manifest = read_manifest(folder)
        require_allowed(manifest, config, (), folder)
        describe_changes(manifest, _RUN, {"shard": 2}, fingerprints)
        Catalog([], [], {}, fingerprints).require_unchanged(manifest.datasets, "x")
        if manifest.sample_order:
            Curriculum([CurriculumStage((SourceWeight("books"),))]).resumed(
                manifest.sample_order, manifest.consumed_samples
            )
        assert all(isinstance(step, int) for step in [manifest.best.get("step", 0), *manifest.layout.values()])
        assert all(len(record.xxh3_128) == 32 for record in manifest.records.values())
        return True
    except UserError as error:
        assert "\n" not in str(error)
        return False


@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_manifest_with_another_type_anywhere_is_a_line_or_works(saved, tmp_path, version):
    original = (checkpoint(saved) / "manifest.json").read_text()
    places = [place for place in _places(json.loads(original)) if place and place[0] != "manifest_xxh3_128"]
    path = tmp_path / "manifest.json"
    path.write_text(original)
    assert _use(tmp_path, (), None, version)
    for place in places:
        for value in (None, "x", -1, 1.5, 2**70, True, [], [1], {}, {"a": 1}, {"a": {}}):
            path.write_text(original)
            _use(tmp_path, place, value, version)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_manifest_with_anything_anywhere_is_a_line_or_works(saved, tmp_path_factory, data):
    original = (checkpoint(saved) / "manifest.json").read_text()
    places = [place for place in _places(json.loads(original)) if place and place[0] != "manifest_xxh3_128"]
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "manifest.json").write_text(original)
    _use(folder, data.draw(st.sampled_from(places)), data.draw(JSON), data.draw(st.sampled_from([1, 3])))
