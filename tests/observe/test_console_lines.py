"""The live line of a run, as a user sees it in a terminal, and what stays in the log file."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from pseudo_terminal import PseudoTerminal
from tiny_run import write_config

from retemper.engine.config.settings import LoggingConfig
from retemper.engine.observe import console as console_module
from retemper.engine.observe.console import LOG_FILE, Console
from retemper.engine.observe.console_lines import ConsoleLines, console_lines
from retemper.engine.observe.observer import Sample, StepRecord
from retemper.engine.observe.terminal import heading
from retemper.engine.observe.waiting import ProgressBar, rank0_printer
from retemper.engine.schedule import Progress

ROOT = Path(__file__).parents[2]
STEPS = 20
say = rank0_printer(True)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = PseudoTerminal()
    yield terminal
    terminal.close()


@contextmanager
def standard_streams(monkeypatch, folder, output, error=None):
    """Write to these descriptors and to the log file in ``folder``."""
    for name, descriptor in (("stdout", output), ("stderr", output if error is None else error)):
        monkeypatch.setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8", closefd=False))
    console = Console()
    console.install()
    console.open(folder)
    try:
        yield
    finally:
        console.restore()


def record(step: int, loss: float | None = None, remarks: tuple[str, ...] = ()) -> StepRecord:
    values = {
        **{"loss": step / 10 if loss is None else loss, "learning_rate": 1e-3, "grad_norm": 1.5, "mfu": 0.412},
        **{"tokens_per_second": 12345.6, "tokens_per_second_per_rank": 12345.6, "peak_memory_bytes": 2**30},
    }
    return StepRecord(Progress(step, step, 10 * step), values, STEPS - step, 65.0, list(remarks))


def logged(folder: Path) -> list[str]:
    text = (folder / LOG_FILE).read_text(encoding="utf-8")
    assert "\x1b" not in text and "\r" not in text
    return [line.partition("+0000 ")[2] or line.split(" ", 2)[2] for line in text.splitlines()]


def steps_in(lines: list[str]) -> list[int]:
    """The steps of the plain lines."""
    return [int(found[1]) for line in lines if (found := re.match(r"step +(\d+)/\d+ \| tokens ", line))]


def bars_in(lines: list[str]) -> list[str]:
    return [line for line in lines if "%|" in line]


def test_a_terminal_shows_one_line_below_all_others_and_the_log_has_each_step(terminal, monkeypatch, tmp_path):
    printed = []
    with standard_streams(monkeypatch, tmp_path, terminal.descriptor):
        lines = console_lines(LoggingConfig(), say)
        for step in range(1, STEPS):
            lines.step(record(step, remarks=("  rank 1 is slow",) if step == 7 else ()))
            if step == 7:
                printed.append("  rank 1 is slow")
            if step % 5 == 0:
                lines.evaluation(Progress(step, step, step), "news", {"loss": 2.0, "perplexity": 7.4})
                print(f"note: by a library at {step}", file=sys.stderr)
                print(f"{step} in\ntwo lines", flush=True)
                printed += [f"  evaluation of news at step {step}: loss 2.0000, perplexity 7.40"]
                printed += [f"note: by a library at {step}", f"{step} in", "two lines"]
            time.sleep(0.02)
        *above, bar = terminal.shown()
        assert above == printed
        assert re.fullmatch(
            r" \d+%\|.+\| step \d+/20 \| loss \d\.\d{4} \| ETA 0:01:05 \| 12,346 tokens/s \| MFU 41.2%", bar
        )
        assert len(bar) < 100
        lines.step(record(STEPS))
        lines.end({})
        print("finished")
    shown = terminal.shown()
    assert not bars_in(shown) and steps_in(shown) == [STEPS] and shown[-1] == "finished"
    assert steps_in(logged(tmp_path)) == list(range(1, STEPS + 1))
    assert [line for line in logged(tmp_path) if not line.startswith("step ")] == [*printed, "finished"]


@pytest.mark.parametrize("columns", [10, 40, 60])
def test_a_narrow_terminal_keeps_the_line_in_one_row(columns, terminal, monkeypatch, tmp_path):
    terminal.resize(columns)
    with standard_streams(monkeypatch, tmp_path, terminal.descriptor):
        lines = console_lines(LoggingConfig(), say)
        for step in range(1, 4):
            lines.step(record(step))
            print(f"line {step}")
        *above, bar = terminal.shown()
    assert above == ["line 1", "line 2", "line 3"] and len(bar) < columns and " 15%|" in bar


def test_a_window_that_grows_or_shrinks_gets_a_line_of_its_width(terminal, monkeypatch, tmp_path):
    with standard_streams(monkeypatch, tmp_path, terminal.descriptor):
        lines = console_lines(LoggingConfig(), say)
        lines.step(record(1))
        for columns in (180, 70):
            print("x")  # a long line that a smaller window wraps is cleared by the shell, not by programs
            terminal.shown()
            terminal.resize(columns)
            print("y")
            assert columns / 2 < len(terminal.shown()[-1]) < columns


@pytest.mark.parametrize(
    ("setting", "environment", "bar"),
    [("off", {}, False), ("auto", {"TERM": "dumb"}, False), ("on", {"TERM": "dumb"}, True), ("auto", {}, True)],
)
def test_setting_and_environment_decide(setting, environment, bar, terminal, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with standard_streams(monkeypatch, tmp_path, terminal.descriptor):
        lines = console_lines(LoggingConfig(progress_bar=setting), say)
        lines.step(record(1))
        lines.step(record(2))
        shown = terminal.shown()
    assert (len(bars_in(shown)), steps_in(shown)) == ((1, []) if bar else (0, [1, 2]))
    assert steps_in(logged(tmp_path)) == [1, 2]


@pytest.mark.parametrize("kind", ["file", "pipe to a program that writes to the terminal"])
def test_output_that_is_not_a_terminal_has_plain_lines(kind, terminal, monkeypatch, tmp_path):
    """``retemper train | tee``: the bar must not be torn by what the other program writes."""
    output = os.open(tmp_path / "output", os.O_CREAT | os.O_WRONLY)
    with standard_streams(monkeypatch, tmp_path, output, terminal.descriptor if "pipe" in kind else output):
        lines = console_lines(LoggingConfig(), say)
        print(heading("Model"))
        lines.step(record(1))
        with ProgressBar("evaluation", 2, say) as bar:
            bar.update(1)
        lines.step(record(2))
    text = (tmp_path / "output").read_text()
    assert steps_in(text.splitlines()) == [1, 2] and not set("\r\x1b") & set(text) and terminal.shown() == []


def test_colors_are_on_terminals_only(terminal, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "100")
    texts = ["plain", "note: careful", "[rank 3] error: wrong", "error: wrong", heading("Model"), "a note: no"]
    for no_color, styles in (("", [b"33", b"31", b"31", b"1"]), ("1", [])):
        monkeypatch.setenv("NO_COLOR", no_color)
        terminal.received = b""
        with standard_streams(monkeypatch, tmp_path, terminal.descriptor):
            for text in texts:
                print(text)
        assert terminal.shown()[-len(texts) :] == texts
        assert re.findall(rb"\x1b\[([1-9]\d*)m", terminal.received) == styles
    assert logged(tmp_path) == 2 * texts


def test_a_bar_of_an_evaluation_is_below_and_leaves_nothing(terminal, monkeypatch, tmp_path):
    with standard_streams(monkeypatch, tmp_path, terminal.descriptor):
        lines = console_lines(LoggingConfig(), say)
        lines.step(record(1))
        bar = ProgressBar("evaluation at step 1", 4, say)
        bar._bar.delay = 0
        for part in range(3):
            bar.update(1)
            bar._bar.refresh()
            print(f"part {part}")
        assert [line.split("|")[0] for line in terminal.shown()] == [
            *(f"part {part}" for part in range(3)), "  5%", "  evaluation at step 1:  75%",
        ]  # fmt: skip
        bar.__exit__()
        lines.step(record(2))
        assert len(bars_in(terminal.shown())) == 1
    assert steps_in(logged(tmp_path)) == [1, 2] and not bars_in(logged(tmp_path))


def test_threads_that_print_neither_tear_lines_nor_block(terminal, monkeypatch, tmp_path):
    terminal.resize(100, 50)
    with standard_streams(monkeypatch, tmp_path, terminal.descriptor):
        lines = console_lines(LoggingConfig(), say)

        def talk(name: str) -> None:
            for number in range(50):
                print(f"{name} {number}", file=sys.stderr if number % 2 else sys.stdout)

        threads = [threading.Thread(target=talk, args=(name,), daemon=True) for name in ("a", "b", "c")]
        for thread in threads:
            thread.start()
        step = 0
        while any(thread.is_alive() for thread in threads):
            step = step % 18 + 1
            lines.step(record(step))
            terminal.shown()  # the buffer of a terminal is small
        *printed, bar = terminal.shown()
    assert sorted(printed) == sorted(f"{name} {number}" for name in "abc" for number in range(50)) and "%|" in bar
    assert sorted(line for line in logged(tmp_path) if not line.startswith("step ")) == sorted(printed)


def test_a_rollback_moves_the_bar_back(terminal, monkeypatch, tmp_path):
    with standard_streams(monkeypatch, tmp_path, terminal.descriptor):
        lines = console_lines(LoggingConfig(), say)
        for step in (14, 15, 6):
            lines.step(record(step))
            time.sleep(0.11)
        lines.step(record(7))
        [bar] = terminal.shown()
    assert " 35%|" in bar and "step 7/20" in bar


def test_a_closed_window_does_not_end_the_run(terminal, monkeypatch, tmp_path):
    with standard_streams(monkeypatch, tmp_path, terminal.descriptor):
        lines = console_lines(LoggingConfig(), say)
        lines.step(record(1))
        terminal.hang_up()
        for step in range(2, STEPS + 1):
            lines.step(record(step))
        lines.end({})
    assert steps_in(logged(tmp_path)) == list(range(1, STEPS + 1))
    notes = [line for line in logged(tmp_path) if not line.startswith("step ")]
    assert len(notes) == 2 and all("cannot be written: Input/output error" in note for note in notes)


def test_ctrl_s_delays_a_run_once_and_ctrl_q_shows_the_line_again(terminal, monkeypatch, tmp_path):
    monkeypatch.setattr(console_module, "_READER_SECONDS", 0.2)
    with standard_streams(monkeypatch, tmp_path, terminal.descriptor):
        lines = console_lines(LoggingConfig(), say)
        lines.step(record(1))
        terminal.press(b"\x13")
        began = time.perf_counter()
        for step in range(2, 12):
            lines.step(record(step))
            print(f"line {step}")
        assert time.perf_counter() - began < 1.5
        terminal.press(b"\x11")
        time.sleep(0.11)
        lines.step(record(12))
        assert "step 12/20" in terminal.shown()[-1]
    assert steps_in(logged(tmp_path)) == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]])
def test_a_run_in_a_terminal(launcher, terminal, tmp_path):
    """Screen and log of a real run, alone and with torchrun, whose other rank is silent."""
    config = write_config(tmp_path)
    command = [sys.executable, *launcher, ROOT / "engine" / "pretrain.py", "--config", config]
    assert terminal.run([*command, "--logging.progress_bar", "auto"], OMP_NUM_THREADS="1") == 0
    shown, log = terminal.shown(), logged(tmp_path / "run")
    assert steps_in(log) == list(range(1, 21)) and steps_in(shown) == [20] and not bars_in(shown)
    assert b"\r" in terminal.received.replace(b"\r\n", b"") and "%|" in terminal.received.decode()
    evaluations = [line for line in log if line.startswith("  evaluation of ")]
    assert len(evaluations) == 4 and [line for line in shown if line.startswith("  evaluation of ")] == evaluations


def test_samples_of_scripts_without_spaces_are_shortened_too():
    lines: list[str] = []
    samples = [Sample("日本語" * 50, "文" * 500), Sample("a\n b", "one " * 100), Sample("short", "text")]
    ConsoleLines(lines.append).samples(Progress(1, 1, 1), samples)
    assert "日本語日本語" in lines[0] and "文文文" in lines[0]
    assert lines[1].startswith("  sample at step 1: a b -> one one") and lines[2].endswith("short -> text")
    assert all(line.count("\n") == 0 and len(line) < 180 for line in lines)
