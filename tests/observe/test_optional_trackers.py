"""SwanLab and Comet write offline what they are given.

They are not in the lock, since they limit the versions of other packages. To run these tests, install them elsewhere:
``pip install --target /tmp/clients comet_ml swanlab`` and set ``PYTHONPATH=/tmp/clients``.
"""

import json

import pytest
from helpers.forked import Program, fork_server

PLAY = """
import json, sys
from pathlib import Path
from helpers.tracker_runs import Play
from retemper.engine.observe.observer import Sample
folder, name = Path(sys.argv[1]), sys.argv[2]
first = Play(folder, [name])
first.steps(range(1, 8))
first.samples(5, [Sample("Once", " upon a time")])
first.end()
second = Play(folder, [name], 6, first.ids)
second.steps(range(7, 11))
second.end()
print(json.dumps([first.ids == second.ids, first.lines + second.lines]))
"""


@pytest.fixture(scope="module")
def server():
    with fork_server("helpers.tracker_runs") as context:
        yield context


@pytest.mark.parametrize(("package", "name"), [("comet_ml", "comet"), ("swanlab", "swanlab")])
def test_a_resumed_run_is_written_offline_under_one_id(server, tmp_path, package, name):
    pytest.importorskip(package, reason=f"needs {package}: pip install {package}")
    program = Program(server, PLAY, tmp_path / "log", tmp_path / "run", name)
    assert program.wait() == 0, program.err
    same, lines = json.loads(program.out.splitlines()[-1])
    assert same and not [line for line in lines if "failed" in line], lines
    assert any((tmp_path / "run" / "trackers" / name).rglob("*"))
    if name == "comet":
        from retemper.engine.observe.trackers.comet_client import metrics

        archives = (tmp_path / "run" / "trackers" / name).rglob("*.zip")
        points = [one for archive in archives for one in metrics(archive) if one["metricName"] == "train/loss"]
        losses = sorted((one["step"], float(one["metricValue"])) for one in points)
        assert losses == [(step, 1 / step) for step in range(1, 11)]
