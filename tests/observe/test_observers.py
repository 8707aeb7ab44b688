"""The metrics of a run that is killed and resumed: one curve, whole lines, readable TensorBoard events."""

import errno
import json
import sys
import types
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from retemper.engine.observe.curves import _TAIL_BYTES, last_record
from retemper.engine.observe.guarded import Guarded
from retemper.engine.observe.metrics_file import METRICS_FILE, MetricsFile
from retemper.engine.observe.observer import Observer, StepRecord
from retemper.engine.observe.tensorboard import TensorBoard
from retemper.engine.observe.waiting import rank0_printer
from retemper.engine.schedule import Progress


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]


def observers_of(folder: Path, tensorboard: bool) -> list[Observer]:
    board = Guarded("TensorBoard", TensorBoard(folder), "logging.tensorboard: false silences this", print)
    return [MetricsFile(folder, print), *([board] if tensorboard else [])]


def record_of(step: int, values: dict) -> StepRecord:
    return StepRecord(Progress(step, step, 10 * step), values, 0, 0.0, [])


def write_run(
    folder: Path, resumed_step: int | None, steps: range, tensorboard: bool = False, shift: float = 0.0
) -> None:
    observers = observers_of(folder, tensorboard)
    for observer in observers:
        observer.start(resumed_step, False)
    for step in steps:
        for observer in observers:
            observer.step(record_of(step, {"loss": step + shift, "note": "text"}))
    for observer in observers:
        observer.end({})


def test_records(tmp_path):
    write_run(tmp_path / "new" / "run", 0, range(1, 4))
    assert records(tmp_path / "new" / "run") == [
        {"step": step, "tokens": 10 * step, "loss": float(step), "note": "text"} for step in (1, 2, 3)
    ]


@pytest.mark.parametrize("resumed_step", [0, 3, 5, 9])
def test_later_records_than_the_resumed_step_are_moved(tmp_path, resumed_step, capsys):
    write_run(tmp_path, 0, range(1, 6))
    write_run(tmp_path, resumed_step, range(resumed_step + 1, resumed_step + 3), shift=0.5)
    kept = [(step, float(step)) for step in range(1, min(resumed_step, 5) + 1)]
    added = [(step, step + 0.5) for step in (resumed_step + 1, resumed_step + 2)]
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == kept + added
    moved = tmp_path / "metrics.5.jsonl"
    steps = [json.loads(line)["step"] for line in moved.read_text().splitlines()] if moved.exists() else []
    assert steps == list(range(resumed_step + 1, 6))
    assert (f"{len(steps)} of metrics.jsonl after step {resumed_step} moved to {moved}" in capsys.readouterr().out) == (
        resumed_step < 5
    )


def test_no_record_is_lost_in_many_restarts(tmp_path):
    """Each start makes the steps after 2 again, or starts over; every record ever written is in some file."""
    shift = 0.0
    for start in (None, 2, 2, None, 0, 2, None):
        shift += 0.01
        write_run(tmp_path, start, range((start or 0) + 1, 5), shift=shift)
    lines = [line for path in tmp_path.glob("metrics*.jsonl") for line in path.read_text().splitlines()]
    expected, shift = [], 0.0
    for start in (None, 2, 2, None, 0, 2, None):
        shift += 0.01
        expected += [round(step + shift, 2) for step in range((start or 0) + 1, 5)]
    assert sorted(round(json.loads(line)["loss"], 2) for line in lines) == sorted(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.4-2.jsonl", "metrics.4-3.jsonl",
        "metrics.4-4.jsonl", "metrics.4-5.jsonl", "metrics.4-6.jsonl", "metrics.4.jsonl", "metrics.jsonl"]  # fmt: skip


def test_lines_that_are_no_records_are_moved_too(tmp_path):
    write_run(tmp_path, None, range(1, 3))
    noise = b'\xff\xfe{]\n[1]\n{"step": "x"}\n'
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(noise)
    write_run(tmp_path, 2, range(3, 4))
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "metrics.unreadable.jsonl").read_bytes() == noise


def test_a_run_that_starts_over_renames_curve_events_and_configuration(tmp_path):
    write_run(tmp_path, None, range(1, 6), tensorboard=True)
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    write_run(tmp_path, None, range(1, 2), tensorboard=True, shift=6.0)
    assert [record["loss"] for record in records(tmp_path)] == [7.0]
    assert (tmp_path / "config.5.yaml").read_text() == "seed: 1\n" and not (tmp_path / "config.yaml").exists()
    assert len((tmp_path / "metrics.5.jsonl").read_text().splitlines()) == 5
    for name, count in (("tensorboard.5", 5), ("tensorboard", 1)):
        events = EventAccumulator(str(tmp_path / name))
        events.Reload()
        assert len(events.Scalars("train/loss")) == count


def test_the_last_record_is_found_from_the_end(tmp_path):
    assert last_record(tmp_path) is None
    path = tmp_path / METRICS_FILE
    path.write_text("")
    assert last_record(tmp_path) is None
    lines = [json.dumps({"step": step, "note": "x" * 100}) for step in range(20_000)]
    path.write_text("\n".join([*lines, '{"step": 99999, "no']))
    assert path.stat().st_size > 2 * _TAIL_BYTES and last_record(tmp_path)["step"] == 19_999


def test_a_torn_last_line_is_dropped(tmp_path):
    """A killed run can leave any beginning of a record, a crashed machine zeros."""
    write_run(tmp_path, 0, range(1, 3))
    whole = (tmp_path / METRICS_FILE).read_bytes()
    record = b'{"step": 3, "tokens": 30, "loss": 3.0}'
    for torn in (*(record[:length] for length in range(1, len(record))), b"\0" * 40):
        (tmp_path / METRICS_FILE).write_bytes(whole + torn)
        write_run(tmp_path, 5, range(6, 7))
        assert [record["step"] for record in records(tmp_path)] == [1, 2, 6], torn


def test_records_are_on_disk_at_once(tmp_path):
    metrics = MetricsFile(tmp_path, print)
    metrics.start(0)
    metrics.step(record_of(1, {"loss": 1.0}))
    assert [record["step"] for record in records(tmp_path)] == [1]
    metrics.end({})


def test_only_the_main_rank_prints(capsys):
    rank0_printer(False)("hello from another rank")
    rank0_printer(True)("hello")
    assert capsys.readouterr().out == "hello\n"


def test_tensorboard_reads_one_curve_after_a_resume(tmp_path, monkeypatch):
    """Also where names of files do not sort, because the number in the second one has a digit more."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    write_run(tmp_path, 0, range(1, 6), tensorboard=True)
    write_run(tmp_path, 3, range(4, 8), tensorboard=True, shift=0.5)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    curve = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert curve == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5), (6, 6.5), (7, 7.5)]


def test_numbers_that_are_not_finite_are_valid_json(tmp_path):
    metrics = MetricsFile(tmp_path, print)
    metrics.start(0)
    metrics.step(record_of(1, {"loss": float("nan"), "grad_norm": float("inf"), "learning_rate": 0.5}))
    metrics.end({})
    text = (tmp_path / METRICS_FILE).read_text()
    assert text == '{"step": 1, "tokens": 10, "loss": null, "grad_norm": null, "learning_rate": 0.5}\n'


def test_a_full_disk_is_said_and_its_records_follow_when_there_is_space(tmp_path, capsys):
    metrics = MetricsFile(tmp_path, print)
    metrics.start(0)

    class Disk:
        """Takes some bytes, then no more."""

        space = 30

        def __init__(self, file):
            self.file, self.fileno, self.close = file, file.fileno, file.close

        def write(self, data):
            if not self.space:
                raise OSError(errno.ENOSPC, "No space left on device")
            count = self.file.write(data[: self.space])
            self.space -= count
            return count

    metrics._file = Disk(metrics._file)
    for step in (1, 2, 3):
        if step == 3:
            metrics._file.space = 10_000
        metrics.step(record_of(step, {"loss": float(step)}))
    metrics.end({})
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
    [note] = capsys.readouterr().out.splitlines()
    assert note.startswith(f"note: {tmp_path / METRICS_FILE} cannot be written now: No space left on device")


class _Unusable(types.ModuleType):
    """A library whose parts raise what incompatible versions of NumPy, protobuf or setuptools raise."""

    def __init__(self, error):
        super().__init__("torch.utils.tensorboard")
        self.error = error

    def __getattr__(self, name):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        ImportError("cannot import name notf"),
        ValueError("numpy.dtype size changed"),
        TypeError("Descriptors cannot be created directly"),
        SystemExit(1),
    ],
    ids=lambda error: type(error).__name__,
)
def test_tensorboard_that_cannot_be_used_is_one_note(error, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", _Unusable(error))
    write_run(tmp_path, 0, range(1, 4), tensorboard=True)
    [note] = capsys.readouterr().out.splitlines()
    assert note.startswith(f"note: TensorBoard failed: {type(error).__name__}: {error}; training continues")
    assert "logging.tensorboard: false" in note
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("call", ["add_scalar", "flush", "close"])
@pytest.mark.parametrize(
    "error", [UnicodeEncodeError("ascii", "ü", 0, 1, "not in range"), OSError(28, "No space left")]
)
def test_tensorboard_that_stops_working_is_one_note(call, error, monkeypatch, tmp_path, capsys):
    from torch.utils.tensorboard import SummaryWriter

    def fail(*arguments, **named):
        raise error

    monkeypatch.setattr(SummaryWriter, call, fail)
    write_run(tmp_path, 0, range(1, 4), tensorboard=True)
    [note] = capsys.readouterr().out.splitlines()
    assert note.startswith(f"note: TensorBoard failed: {type(error).__name__}")
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
