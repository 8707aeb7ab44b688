"""On a GPU the numbers of a step are read while the next step runs. Here the CPU plays the GPU: reports are late, and
reading a number of the device is noticed."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch
from helpers import tiny_run
from torch import Tensor
from torch.overrides import TorchFunctionMode

from retemper.engine import pretrain
from retemper.engine.errors import UserError
from retemper.engine.observe import reporter
from retemper.engine.observe.host_copy import HostCopy

ROOT = Path(pretrain.__file__).parents[1]
LOGGED = ["--logging.log_interval", "1", "--training.eval_interval", "5", "--checkpoint.save_interval", "4"]


class NotedWait(HostCopy):
    """Notes after how many launched steps each one's numbers are read."""

    launched = 0
    waits: list[tuple[int, int]] = []  # noqa: RUF012, of the class on purpose

    def __init__(self, numbers: Tensor):
        super().__init__(numbers)
        self._of_step = NotedWait.launched

    def wait(self) -> list[float]:
        NotedWait.waits.append((self._of_step, NotedWait.launched))
        return super().wait()


class Reads(TorchFunctionMode):
    """Notes who reads the value of a tensor: on a GPU, that waits."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[str] = set()

    def __torch_function__(self, function, types, arguments=(), options=None):
        if getattr(function, "__name__", "") in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
            frames = [Path(frame.filename) for frame in traceback.extract_stack()]
            ours = [path for path in frames if path.is_relative_to(ROOT) and "tests" not in path.parts]
            self.readers.add(str(ours[-1].relative_to(ROOT)))
        return function(*arguments, **(options or {}))


def build(ranks, folder: Path, *overrides: str):
    folder.mkdir()
    return pretrain.build(tiny_run.configure(tiny_run.write_config(folder), *LOGGED, *overrides), ranks)


@pytest.fixture
def late(monkeypatch):
    NotedWait.launched, NotedWait.waits = 0, []
    monkeypatch.setattr(reporter, "HostCopy", NotedWait)
    one_step = pretrain.one_step

    def counted(*arguments):
        NotedWait.launched += 1
        return one_step(*arguments)

    monkeypatch.setattr(pretrain, "one_step", counted)


def test_the_same_records_one_step_later(one_rank, tmp_path, late):
    run = build(one_rank, tmp_path / "at_once")
    pretrain.train(run)
    assert NotedWait.waits == [(step, step) for step in range(1, 21)]

    NotedWait.launched, NotedWait.waits = 0, []
    run = build(one_rank, tmp_path / "late")
    run.report.reports_late = True
    pretrain.train(run)
    # Evaluations (5, 10, ...), checkpoints (4, 8, ...) and the end wait in any case.
    waiting = {step for step in range(1, 21) if step % 5 == 0 or step % 4 == 0}
    assert NotedWait.waits == [(step, step if step in waiting else step + 1) for step in range(1, 21)]
    at_once, later = (tiny_run.curve(tmp_path / name / "run") for name in ("at_once", "late"))
    assert len(at_once) == 20 + 4 and later == at_once


def test_a_step_reads_no_number_of_the_device(one_rank, tmp_path, late):
    """Others read what is on the host: document lengths for the attention, and sums over ranks through gloo."""
    run = build(one_rank, tmp_path / "run", "--data.validation", "{}", "--checkpoint.save_interval", "1000")
    run.report.reports_late = True
    of_host = {"engine/batch.py", "kernels/attention/plan.py", "engine/parallel/process_group.py"}
    reads, steps = Reads(), []

    def before_step():
        steps.append(run.progress.step)
        if len(steps) == 4:
            reads.readers.clear()
        if len(steps) == 10:
            seen.extend(reads.readers)

    seen: list[str] = []
    tiny_run.before_step(run, before_step)
    with reads:
        pretrain.train(run)
    assert set(seen) - of_host == {"engine/observe/host_copy.py"}


def test_too_many_skipped_steps_end_the_run(one_rank, tmp_path, late):
    """One step later than if the host had waited; the message names the step that failed."""
    run = build(one_rank, tmp_path / "run", "--training.max_skipped_steps", "0")
    run.report.reports_late = True

    @torch.no_grad()
    def spoil():
        if run.progress.step == 2:
            next(iter(run.model.parameters())).fill_(float("nan"))

    tiny_run.before_step(run, spoil)
    with pytest.raises(UserError, match=r"^step 3: loss nan, gradient norm nan: not finite; "):
        pretrain.train(run)
    assert run.progress.step == 4
    assert [record["step"] for record in tiny_run.records(tmp_path / "run" / "run")] == [1, 2, 3]
