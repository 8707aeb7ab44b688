"""Trackers have the curves of metrics.jsonl, each point once, whatever happens to a run. Their own readers say so."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import tracker_runs
from helpers.forked import Program, fork_server
from helpers.pseudo_terminal import PseudoTerminal
from helpers.tracker_runs import Play, csv_rows, metrics_curves, mlflow_run, tracker_curves, trackio_run

from retemper.engine.config.packages import require_trackers
from retemper.engine.config.settings import LoggingConfig
from retemper.engine.errors import UserError
from retemper.engine.observe.guarded import Guarded
from retemper.engine.observe.observer import StepRecord
from retemper.engine.observe.trackers.all_trackers import Trackers
from retemper.engine.observe.trackers.background import Background
from retemper.engine.observe.trackers.client import TrackerClient
from retemper.engine.observe.trackers.curve import TrackedCurve
from retemper.engine.observe.trackers.facts import tracked_run
from retemper.engine.observe.trackers.wandb_client import WeightsAndBiases
from retemper.engine.schedule import Progress

wandb = pytest.importorskip("wandb")
pytest.importorskip("mlflow")
pytest.importorskip("trackio")

WITH_LIBRARY = ("wandb", "mlflow", "trackio")
PLAY = """
import json, os, sys
from pathlib import Path
from helpers.tracker_runs import Play, wait_for_trackers
folder, after, ids, steps, wait, killed = (json.loads(argument) for argument in sys.argv[1:])
play = Play(Path(folder), ["wandb", "mlflow", "trackio", "csv"], after, ids)
Path(folder, "ids.json").write_text(json.dumps(play.ids))
play.steps(range(*steps))
if wait:
    wait_for_trackers(Path(folder), play.ids, 9)
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
    def start(name, after, ids, steps, wait=False, killed=False):
        words = [json.dumps(word) for word in (str(tmp_path / "run"), after, ids, steps, wait, killed)]
        program = Program(server, PLAY, tmp_path / name, *words)
        assert program.wait() == (-9 if killed else 0), program.err
        return json.loads((tmp_path / "run" / "ids.json").read_text()), program.out

    return start


def test_a_killed_and_resumed_run_is_one_curve_in_every_tracker(play, tmp_path):
    folder = tmp_path / "run"
    ids, _ = play("first", None, {}, (1, 8), killed=True)  # before the trackers have anything
    assert set(ids) == set(WITH_LIBRARY)
    again, _ = play("second", 6, ids, (7, 11), wait=True, killed=True)  # they have steps after the next checkpoint
    resumed, printed = play("third", 8, ids, (9, 15))
    assert resumed == again == ids and "note" not in printed
    expected = metrics_curves(folder)
    assert [step for step, _ in expected["train/loss"]] == list(range(1, 15))
    for name in WITH_LIBRARY:
        assert tracker_curves(folder, name, ids[name]) == expected, name
    rows = csv_rows(folder, "train")
    assert [(int(row["step"]), float(row["loss"])) for row in rows] == expected["train/loss"]
    assert [row["evaluation"] for row in csv_rows(folder, "evaluation")] == ["held out"] * 2


ROLL_BACK = """
import json, sys
from pathlib import Path
from helpers.tracker_runs import Play
folder = Path(sys.argv[1])
play = Play(folder, ["wandb", "mlflow", "trackio", "csv"], None)
ids = [play.ids]
play.steps(range(1, 8))
play.go_back(5)
ids.append(play.ids)
play.steps(range(6, 11), shift=0.5)
play.end()
print(json.dumps([ids, play.lines]))
"""


def test_a_rollback_continues_in_new_runs_that_have_the_whole_curve(server, tmp_path):
    folder = tmp_path / "run"
    program = Program(server, ROLL_BACK, tmp_path / "log", folder)
    assert program.wait() == 0, program.err
    (before, after), lines = json.loads(program.out.splitlines()[-1])
    assert not set(before.values()) & set(after.values()) and not [line for line in lines if "note" in line]
    expected = metrics_curves(folder)
    assert expected["train/loss"][5] == (6, 1 / 6 + 0.5)
    for name in WITH_LIBRARY:
        assert tracker_curves(folder, name, after[name]) == expected, name
        assert tracker_curves(folder, name, before[name])["train/loss"][-1] == (7, 1 / 7), name
    assert [float(row["loss"]) for row in csv_rows(folder, "train")] == [loss for _, loss in expected["train/loss"]]
    assert mlflow_run(folder, after["mlflow"])[1].data.params["facts.continues"] == before["mlflow"]
    assert trackio_run(folder, after["trackio"])[0]["facts"]["continues"] == before["trackio"]


def test_a_tracker_that_is_added_at_a_resume_receives_the_whole_curve(tmp_path):
    first = Play(tmp_path, ["csv"])
    first.steps(range(1, 8))
    first.end()
    second = Play(tmp_path, ["mlflow"], after_step=6)
    second.steps(range(7, 10))
    second.end()
    assert tracker_curves(tmp_path, "mlflow", second.ids["mlflow"]) == metrics_curves(tmp_path)


SAMPLES = [("Once", " upon a time\n**there** was"), ("<b>\u00fc", " \u4e2d")]
WITH_SAMPLES = """
import json, sys
from pathlib import Path
from helpers.tracker_runs import Play
from retemper.engine.observe.observer import Sample
from wandb.sdk.data_types._private import MEDIA_TMP
Path(MEDIA_TMP.name).mkdir(exist_ok=True)  # another program of the fork server may have removed what all inherit
play = Play(Path(sys.argv[1]), ["wandb", "mlflow", "trackio", "csv"])
play.steps(range(1, 6))
play.samples(5, [Sample(*sample) for sample in json.loads(sys.argv[2])])
play.steps(range(6, 8))
play.end()
print(json.dumps([play.ids, play.lines]))
"""


def test_generated_texts_are_in_every_tracker(server, tmp_path):
    folder = tmp_path / "run"
    program = Program(server, WITH_SAMPLES, tmp_path / "log", folder, json.dumps(SAMPLES))
    assert program.wait() == 0, program.err
    ids, lines = json.loads(program.out.splitlines()[-1])
    assert not [line for line in lines if "note" in line]
    for name in WITH_LIBRARY:
        curves = tracker_curves(folder, name, ids[name])
        assert [step for step, _ in curves["train/loss"]] == list(range(1, 8)), name
    (table,) = (folder / "trackers" / "wandb").glob("offline-run-*/files/media/table/**/*.table.json")
    assert json.loads(table.read_text())["data"] == [[5, *sample] for sample in SAMPLES]
    client, run = mlflow_run(folder, ids["mlflow"])
    text = Path(client.download_artifacts(run.info.run_id, "samples/step-00000005.json")).read_text()
    assert [(one["prompt"], one["text"]) for one in json.loads(text)["samples"]] == SAMPLES
    ((step, shown),) = trackio_run(folder, ids["trackio"])[1]["samples"]
    assert step == 5 and all(part in json.dumps(shown, ensure_ascii=False) for part in ("Once", "there", "\u4e2d"))


class Hanging(TrackerClient):
    """A client whose server does not answer."""

    def connect(self, run):
        time.sleep(600)


class Failing(TrackerClient):
    """A client that raises, with a secret in its message."""

    def __init__(self):
        self.calls = 0

    def connect(self, run):
        self.calls += 1
        raise ConnectionError("no route to https://user:CANARY-1@host/api?signature=CANARY-2 (CANARY-3)")


def trackers_of(client: TrackerClient, lines: list[str], most_waiting: int = 100) -> Trackers:
    curve = TrackedCurve("one", client, lambda: None, lines.append)
    guarded = Guarded("one", curve, "", lines.append)
    return Trackers([Background("one", guarded, lines.append, most_waiting)], end_seconds=0.5)


def send(trackers: Trackers, folder, steps: int) -> float:
    """Send a run; the seconds that it has waited."""
    began = time.perf_counter()
    trackers.open(tracker_runs.description(folder, LoggingConfig()))
    trackers.start(None, False)
    for step in range(1, steps + 1):
        trackers.step(StepRecord(Progress(step, step, step), {"loss": 1.0}, 0, 0.0, []))
    trackers.end({"finished": True})
    return time.perf_counter() - began


@pytest.mark.parametrize("steps", [10, 500], ids=["a_short_run", "more_events_than_may_wait"])
def test_a_server_that_does_not_answer_costs_one_note_and_no_time(tmp_path, steps):
    lines: list[str] = []
    assert 0.4 < send(trackers_of(Hanging(), lines), tmp_path, steps) < 5
    assert len([line for line in lines if line.startswith("note")]) == (1 if steps == 10 else 2)


def test_a_tracker_that_fails_is_left_out_after_one_note_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "CANARY-3")
    lines: list[str] = []
    client = Failing()
    assert send(trackers_of(client, lines), tmp_path, 50) < 5
    assert client.calls == len(lines) == 1 and "https://host/api" in lines[0] and "CANARY" not in lines[0]


def test_a_tracker_that_never_had_the_run_receives_all_of_it_at_the_next_start(tmp_path):
    for resumed in (False, True):
        trackers = trackers_of(Failing(), [])
        known = {"one": "0" * 32} if resumed else {}
        trackers.open(tracker_runs.description(tmp_path, LoggingConfig(), resumed=resumed, tracker_runs=known))
        trackers.start(None, False)
        trackers.end({"finished": True})
        assert trackers.run_ids == known  # an id in a checkpoint means that the tracker has the earlier records


class Interrupted(Failing):
    """A client whose library asks at the terminal, where the user presses Ctrl-C or Ctrl-D."""

    def connect(self, run):
        self.calls += 1
        raise KeyboardInterrupt


def test_a_library_that_interrupts_its_thread_does_not_end_the_training(tmp_path):
    lines: list[str] = []
    trackers = trackers_of(Interrupted(), lines)
    trackers.open(tracker_runs.description(tmp_path, LoggingConfig()))
    time.sleep(0.3)
    assert send(trackers, tmp_path, 3) < 5
    assert len(lines) == 1 and "KeyboardInterrupt" in lines[0]


NO_LOGIN = """
import sys
from pathlib import Path
from helpers.tracker_runs import description
from retemper.engine.config.settings import LoggingConfig
from retemper.engine.observe.trackers.facts import tracked_run
from retemper.engine.observe.trackers.wandb_client import WeightsAndBiases

run = description(Path(sys.argv[1]), LoggingConfig(), tracker_runs={"wandb": "0"})
WeightsAndBiases().connect(tracked_run(run, "wandb"))
"""


@pytest.mark.slow
def test_wandb_without_a_login_fails_instead_of_asking_at_the_terminal(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    terminal = PseudoTerminal()
    home = {"HOME": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    terminal.press(b"3\n" * 3)  # wandb's choice of no login, so that the test ends in any case
    assert terminal.run([sys.executable, "-c", NO_LOGIN, tmp_path / "run"], **home) == 1
    assert any("UsageError: No API key configured" in line for line in terminal.shown())
    assert not any("choice" in line for line in terminal.shown())
    terminal.close()


def evaluate(play: Play, step: int, names: list[str]) -> None:
    """Record an evaluation of sets with these names."""
    for name in names:
        for observer in play._observers:
            observer.evaluation(Progress(step, step, step), name, {"loss": 1 / step, "perplexity": 2.0})


def test_mlflow_receives_names_that_it_refuses_in_a_spelling_that_it_allows(tmp_path):
    names, tags = ["wiki (en)", "news//b", "../up", "x" * 300, "ünï=1", "end."], ["lr=1e-5", "a,b", "/x"]
    first = Play(tmp_path, ["mlflow"], tags=tags, group="(a)")
    first.steps([1, 2])
    evaluate(first, 2, names)
    first.end()
    second = Play(tmp_path, ["mlflow"], after_step=1, ids=first.ids, tags=tags)
    second.steps([2, 3])
    evaluate(second, 2, names)
    evaluate(second, 3, names)
    second.end()
    assert not [line for line in first.lines + second.lines if line.startswith("note")]
    curves = tracker_curves(tmp_path, "mlflow", first.ids["mlflow"])
    assert curves["evaluation/wiki _en_/loss"] == [(2, 1 / 2), (3, 1 / 3)]
    losses = [points for name, points in curves.items() if name.startswith("evaluation") and name.endswith("loss")]
    assert losses == [[(2, 1 / 2), (3, 1 / 3)]] * len(names)


class OneLastStep(TrackerClient):
    """A client whose server has the first ``last`` steps."""

    def __init__(self, last: int):
        self.last, self.steps = last, []

    def connect(self, run):
        return "somewhere"

    def recorded(self):
        return self.last

    def log(self, step, values):
        self.steps.append(step)


@pytest.mark.parametrize("last", [-1, 3])
def test_what_a_server_has_missed_is_sent_by_the_next_start(tmp_path, last):
    first = Play(tmp_path, ["csv"])
    first.steps(range(1, 7))
    first.end()
    client = OneLastStep(last)
    curve = TrackedCurve("one", client, lambda: None, print)
    resumed = {"resumed": True, "tracker_runs": {"one": "0"}, "recorded_step": 6}
    curve.open(tracker_runs.description(tmp_path, LoggingConfig(), **resumed))
    curve.start(5, False)
    assert sorted(set(client.steps)) == list(range(max(1, last + 1), 6))


def test_wandb_tells_the_last_step_of_its_server(tmp_path, monkeypatch):
    run = SimpleNamespace(id="0", url="https://server/0", settings=SimpleNamespace(mode="online"), starting_step=4)
    monkeypatch.setattr("wandb.init", lambda **settings: run)
    client = WeightsAndBiases()
    described = tracker_runs.description(tmp_path, LoggingConfig(), tracker_runs={"wandb": "0"})
    assert client.connect(tracked_run(described, "wandb")) == run.url
    assert client.recorded() == 3


@pytest.mark.parametrize("missing", [set(), {"x_transaction_log_flush_interval"}], ids=["0.31", "0.27 to 0.30"])
def test_older_versions_of_wandb_receive_no_settings_that_they_refuse(missing, tmp_path, monkeypatch):
    class Older:
        model_fields = frozenset(wandb.Settings.model_fields) - missing

        def __init__(self, **given):
            assert given.keys() <= self.model_fields
            self.given = given

    opened = []
    run = SimpleNamespace(id="0", url="", settings=SimpleNamespace(mode="online"))
    monkeypatch.setattr("wandb.Settings", Older)
    monkeypatch.setattr("wandb.setup", lambda settings: None)
    monkeypatch.setattr("wandb.init", lambda settings, **others: opened.append(settings.given) or run)
    described = tracker_runs.description(tmp_path, LoggingConfig(), tracker_runs={"wandb": "0"})
    WeightsAndBiases().connect(tracked_run(described, "wandb"))
    assert ("x_transaction_log_flush_interval" in opened[0]) == (not missing)


def test_names_in_trackers_have_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "CANARY-3")
    logging = LoggingConfig(project="of CANARY-3", run_name="CANARY-3", group="CANARY-3", tags=["CANARY-3"])
    assert "CANARY" not in str(tracked_run(tracker_runs.description(tmp_path, logging, tracker_runs={"a": "0"}), "a"))


def test_missing_packages_are_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("wandb", "comet_ml") else name)
    require_trackers(LoggingConfig(trackers=["csv", "mlflow"]))
    with pytest.raises(UserError) as refused:
        require_trackers(LoggingConfig(trackers=["wandb", "mlflow", "comet", "csv"]))
    assert len(refused.value.problems) == 2
    assert all("pip install" in line for line in refused.value.problems)


UNREACHABLE = """
import sys, time
from pathlib import Path
from helpers.tracker_runs import description
from retemper.engine.config.settings import LoggingConfig
from retemper.engine.observe.guarded import Guarded
from retemper.engine.observe.observer import StepRecord
from retemper.engine.observe.trackers.all_trackers import Trackers
from retemper.engine.observe.trackers.background import Background
from retemper.engine.observe.trackers.creation import CLIENTS
from retemper.engine.observe.trackers.curve import TrackedCurve
from retemper.engine.schedule import Progress

folder, end = Path(sys.argv[1]), sys.argv[2]
say = lambda line: print(line, flush=True)
curves = {name: TrackedCurve(name, CLIENTS[name](), lambda: None, say) for name in ("wandb", "mlflow")}
workers = [Background(name, Guarded(name, curve, "", say), say) for name, curve in curves.items()]
trackers = Trackers(workers, end_seconds=5.0)
trackers.open(description(folder, LoggingConfig()))
trackers.start(None, False)
for step in range(1, 100):
    trackers.step(StepRecord(Progress(step, step, step), {"loss": 1.0}, 0, 0.0, []))
time.sleep(5)  # they are busy with their server
if end == "crash":
    raise SystemExit(3)
trackers.end({"finished": True})
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["regular", "crash"])
def test_the_process_ends_although_no_server_can_be_reached(tmp_path, end):
    servers = {"WANDB_BASE_URL": "http://127.0.0.1:9", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    environment = {**os.environ, **servers, "WANDB_API_KEY": "0" * 40, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", UNREACHABLE, str(tmp_path), end]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == (3 if end == "crash" else 0), done.stderr
    assert time.perf_counter() - began < 60
    if end == "regular":
        assert {line.split()[1] for line in done.stdout.splitlines() if line.startswith("note")} == {"wandb", "mlflow"}
