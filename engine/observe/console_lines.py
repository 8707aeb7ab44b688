"""Show the steps of a run to people: a live line on a terminal, a line for each reported step otherwise."""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from tqdm import tqdm

from ..config.settings import LoggingConfig
from ..schedule import Progress
from .console import live_output, log_only
from .observer import Observer, Sample, StepRecord
from .progress import live_text, step_line
from .terminal import shows_bars
from .text import shortened, visible
from .waiting import Say


class LiveLine:
    """A progress bar of the steps of a run, with its newest numbers. Printed lines appear above it.

    Args:
        stream: on which it redraws itself.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._bar: tqdm[Any] | None = None

    def show(self, record: StepRecord) -> None:
        """Show a step."""
        step, text = record.progress.step, live_text(record)
        total = step + record.remaining_steps
        if self._bar is None:
            self._bar = tqdm(
                total=total, initial=step, desc=text, file=self._stream, leave=False, dynamic_ncols=True, miniters=1,
                bar_format="{percentage:3.0f}%|{bar}| {desc}",
            )  # fmt: skip
            atexit.register(self.close)  # a run that fails does not reach Observer.end
            return
        self._bar.total = total
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(step - self._bar.n)  # negative after a rollback

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            atexit.unregister(self.close)


class ConsoleLines(Observer):
    """Prints a line for each reported step and evaluation.

    Args:
        say: prints a line.
        live: shows the steps instead, whose lines are then only in the log file; all but the last one.
    """

    def __init__(self, say: Say, live: LiveLine | None = None):
        self._say, self._live = say, live

    def step(self, record: StepRecord) -> None:
        """See :class:`Observer`."""
        step, tokens = record.progress.step, record.progress.tokens
        line = step_line(step, record.remaining_steps, tokens, record.values, record.seconds_left)
        if self._live is None:
            self._say(line)
        elif record.remaining_steps == 0:
            self._live.close()
            self._say(line)
        else:
            log_only(line)
            self._live.show(record)
        for remark in record.remarks:
            self._say(remark)

    def evaluation(self, progress: Progress, name: str, values: Mapping[str, Any]) -> None:
        """See :class:`Observer`."""
        change = values.get("change_since_start")
        since = "" if change is None else f", {change:+.3f} since the start"
        self._say(
            f"  evaluation of {name} at step {progress.step}: loss {values['loss']:.4f}, perplexity "
            f"{values['perplexity']:.2f}{since}"
        )

    def samples(self, progress: Progress, samples: Sequence[Sample]) -> None:
        """See :class:`Observer`. Long texts are shortened."""
        for sample in samples:
            prompt, text = shortened(sample.prompt, 40), shortened(sample.text, 100)
            self._say(f"  sample at step {progress.step}: {visible(prompt)} -> {visible(text)}")

    def end(self, summary: Mapping[str, Any]) -> None:
        """See :class:`Observer`."""
        if self._live is not None:
            self._live.close()


def console_lines(logging: LoggingConfig, say: Say) -> ConsoleLines:
    """Return the observer for the console, with a live line if ``logging`` and the terminal allow it."""
    stream = live_output()
    return ConsoleLines(say, LiveLine(stream) if shows_bars(stream, logging.progress_bar) else None)
