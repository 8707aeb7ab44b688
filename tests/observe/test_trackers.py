"""Trackers have the curves of metrics.jsonl, each point once, whatever happens to a run. Their own readers say so."""

import json

import pytest
from helpers.forked import Program, fork_server
from helpers.tracker_runs import csv_rows, metrics_curves, tracker_curves

pytest.importorskip("wandb")
pytest.importorskip("mlflow")
pytest.importorskip("trackio")

WITH_LIBRARY = ("wandb", "mlflow", "trackio")
PLAY = """
import json, os, sys, time
from pathlib import Path
from helpers.tracker_runs import Play
folder, after, ids, steps, wait, killed = (json.loads(argument) for argument in sys.argv[1:])
play = Play(Path(folder), ["wandb", "mlflow", "trackio", "csv"], after, ids)
Path(folder, "ids.json").write_text(json.dumps(play.trackers.run_ids))
play.steps(range(*steps))
time.sleep(wait)
if killed:
    os.kill(os.getpid(), 9)
play.end()
print(*play.lines, sep="\\n")
"""


@pytest.fixture(scope="module")
def server():
    modules = ("helpers.tracker_runs", "wandb", "mlflow", "retemper.engine.observe.reporter")
    with fork_server(*modules) as context:
        yield context


@pytest.fixture
def play(server, tmp_path):
    def start(name, after, ids, steps, wait=0.0, killed=False):
        words = [json.dumps(word) for word in (str(tmp_path / "run"), after, ids, steps, wait, killed)]
        program = Program(server, PLAY, tmp_path / name, *words)
        assert program.wait() == (-9 if killed else 0), program.err
        return json.loads((tmp_path / "run" / "ids.json").read_text()), program.out

    return start


@pytest.mark.parametrize("wait", [0.0, 4.0], ids=["trackers_behind_the_checkpoint", "trackers_ahead_of_it"])
def test_a_killed_and_resumed_run_is_one_curve_in_every_tracker(play, tmp_path, wait):
    folder = tmp_path / "run"
    ids, _ = play("first", None, {}, (1, 11), wait, True)
    assert set(ids) == set(WITH_LIBRARY)
    if wait:
        lengths = {name: len(tracker_curves(folder, name, ids[name])["train/loss"]) for name in WITH_LIBRARY}
        assert min(lengths.values()) >= 9, lengths  # more than the checkpoint; wandb holds back its last row
    resumed, printed = play("second", 8, ids, (9, 15))
    assert resumed == ids and "note" not in printed
    expected = metrics_curves(folder)
    assert [step for step, _ in expected["train/loss"]] == list(range(1, 15))
    for name in WITH_LIBRARY:
        assert tracker_curves(folder, name, ids[name]) == expected, name
    rows = csv_rows(folder, "train")
    assert [(int(row["step"]), float(row["loss"])) for row in rows] == expected["train/loss"]
    assert [row["evaluation"] for row in csv_rows(folder, "evaluation")] == ["held out"] * 2
