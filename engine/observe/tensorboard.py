"""Write TensorBoard events: curves, texts and hyperparameters."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.yaml_loader import dump_yaml
from ..schedule import Progress
from .curves import TENSORBOARD_FOLDER
from .observer import Observer, RunDescription, Sample, StepRecord

_HYPERPARAMETERS = ("data", "training", "model", "optimizer", "parallel", "seed")
"""Sections of the configuration in the tab HPARAMS; the others do not change what is learned."""


class TensorBoard(Observer):
    """Writes scalars, texts and hyperparameters to a folder in ``run_folder``."""

    def __init__(self, run_folder: str | Path):
        self._folder = Path(run_folder) / TENSORBOARD_FOLDER
        self._writer: Any = None
        self._run: RunDescription | None = None

    def open(self, run: RunDescription) -> None:
        """See :class:`Observer`."""
        self._run = run

    def start(self, after_step: int | None, evaluates_again: bool = False) -> None:
        """See :class:`Observer`. Hides earlier records after ``after_step``."""
        from torch.utils.tensorboard import SummaryWriter

        self._close()
        _wait_for_a_later_name(self._folder)
        self._writer = SummaryWriter(str(self._folder), purge_step=0 if after_step is None else after_step + 1)
        if self._run is not None:
            self._describe(self._run, after_step or 0)

    def step(self, record: StepRecord) -> None:
        """See :class:`Observer`."""
        self._record(record.progress.step, {f"train/{key}": value for key, value in record.values.items()})

    def evaluation(self, progress: Progress, name: str, values: Mapping[str, Any]) -> None:
        """See :class:`Observer`. ``evaluation/news/loss`` is followed by its sources, as ``evaluation/news/loss/web``;
        TensorBoard sorts by name.
        """
        of_set, slash, source = name.partition("/")
        self._record(
            progress.step, {f"evaluation/{of_set}/{key}{slash}{source}": value for key, value in values.items()}
        )

    def samples(self, progress: Progress, samples: Sequence[Sample]) -> None:
        """See :class:`Observer`."""
        for number, sample in enumerate(samples, 1):
            text = f"Prompt:\n\n{_verbatim(sample.prompt)}\n\nContinuation:\n\n{_verbatim(sample.text)}"
            self._writer.add_text(f"samples/{number}", text, progress.step)
        self._writer.flush()

    def end(self, summary: Mapping[str, Any]) -> None:
        """Write the pending events."""
        if self._run is not None:
            self._writer.file_writer.add_summary(_hparams_summaries({})[1])
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _describe(self, run: RunDescription, step: int) -> None:
        self._writer.add_text("configuration", _verbatim(dump_yaml(run.config)), step)
        self._writer.file_writer.add_summary(_hparams_summaries(dict(_hyperparameters(run)))[0])
        self._writer.flush()

    def _record(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers of ``values`` as scalars."""
        for tag, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(tag, value, step)
        self._writer.flush()


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait until a new file sorts after all others.

    TensorBoard reads files in the order of their names, which begin with the second in which they were opened. The
    numbers that follow do not sort: 10 comes before 9.
    """
    seconds = [int(file.name.split(".")[3]) for file in folder.glob("events.out.tfevents.*")]
    now = time.time()
    if seconds and max(seconds) == int(now):
        time.sleep(1 - now % 1)


def _hyperparameters(run: RunDescription) -> Iterator[tuple[str, Any]]:
    """Yield (name, number or text) of settings and of the model."""
    yield "parameters", run.model["parameters"]
    for name in _HYPERPARAMETERS:
        yield from _flat(name, run.config[name])


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item)
    elif value is not None:
        yield name, value if type(value) in (int, float, str) else json.dumps(value)


def _hparams_summaries(values: dict[str, Any]) -> tuple[Any, Any]:
    """Return what begins and ends a session of the tab HPARAMS.

    Without a summary of the experiment, TensorBoard finds names and metrics itself: the hyperparameters of all runs,
    and the last value of each curve. ``SummaryWriter.add_hparams`` would write one, and a second run with copies.
    """
    from torch.utils.tensorboard.summary import hparams

    _, begin, end = hparams(values, {})
    return begin, end


def _verbatim(text: str) -> str:
    """Return ``text`` as a block of code in Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())
