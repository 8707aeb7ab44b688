"""Measure all combinations of several settings, each in a fresh process; failures are rows of the table, too."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.config.settings import RunConfig, to_dict
from ...engine.errors import UserError
from ..report import table

_GIB = 2**30
_PATIENCE_SECONDS = 30.0
"""Seconds that a process may take to end after it was asked to."""


@dataclass(frozen=True)
class SweepRow:
    """One combination of settings."""

    settings: dict[str, str]
    """Settings by full key."""
    outcome: str
    """ok, out of memory, or the error in one line."""
    record: dict[str, Any] | None = None
    """Content of the process's ``--json`` file, if it succeeded."""

    @property
    def tokens_per_second(self) -> float:
        """Zero without a measurement."""
        return self.record["summary"]["tokens_per_second"] if self.record else 0.0


def parse_sweep(items: Sequence[str], config: RunConfig) -> list[dict[str, str]]:
    """Return the combinations of ``KEY=V1,V2 KEY=V1,V2``, the last key changing fastest.

    Keys are those of the configuration; the section may be omitted if only one section has the key.

    Raises:
        UserError: an item has another form, or its key is unknown.
    """
    known = list(_leaves(to_dict(config)))
    axes: dict[str, list[str]] = {}
    for item in items:
        name, equals, values = item.partition("=")
        if not name or not equals or not all(values.split(",")):
            raise UserError(f"--sweep {item}: use KEY=VALUE,VALUE,..., such as training.micro_batch_size=1,2,4")
        matches = [key for key in known if key == name] or [key for key in known if key.endswith(f".{name}")]
        if len(matches) != 1:
            found = f"could be {' or '.join(matches)}" if matches else "is not a key of the configuration"
            raise UserError(f"--sweep {item}: {name} {found}; write the whole key, as in --print_config")
        if matches[0] in axes:
            raise UserError(f"--sweep {item}: {matches[0]} is given twice; give all its values at once")
        axes[matches[0]] = values.split(",")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _leaves(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def run_sweep(
    combinations: Sequence[dict[str, str]], command: Sequence[str], say: Callable[[str], None] = lambda line: None
) -> list[SweepRow]:
    """Measure each combination.

    Args:
        combinations: settings by key.
        command: the benchmark without ``--sweep`` and ``--json``.
        say: receives progress lines.
    """
    rows = []
    for number, settings in enumerate(combinations, 1):
        words = [f"--{key}={value}" for key, value in settings.items()]
        say(f"{number} of {len(combinations)}: {' '.join(words)}")
        rows.append(_measure(settings, [*command, *words]))
        say(f"  {rows[-1].outcome}")
    return rows


def _measure(settings: dict[str, str], command: Sequence[str]) -> SweepRow:
    with tempfile.TemporaryDirectory(prefix="retemper-benchmark-") as folder:
        path = Path(folder) / "result.json"
        status, errors = _run([*command, "--json", str(path)])
        if status == 0:
            record = json.loads(path.read_bytes())
            del record["command"], record["generator"]  # the command names a temporary file
            return SweepRow(settings, "ok", record)
    return SweepRow(settings, _explain(status, errors))


def _run(command: Sequence[str]) -> tuple[int, str]:
    """Return exit status and standard error of a process, which is ended with its children if this one is
    interrupted.
    """
    try:
        running = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    except OSError as error:
        raise UserError(f"--launch {command[0]}: {error.strerror}") from None
    try:
        errors = running.communicate()[1]
    except BaseException:
        os.killpg(running.pid, signal.SIGTERM)
        try:
            running.communicate(timeout=_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.communicate()
        raise
    return running.returncode, errors


def _explain(status: int, errors: str) -> str:
    """Return one line about a failed process. A launcher's own lines come after those of the ranks."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    ours = [line for line in lines if "error: " in line and (line.startswith("error: ") or line.startswith("[rank "))]
    if any("error: out of memory" in line for line in ours):
        return "out of memory"
    if not ours and (status in (-signal.SIGKILL, 128 + signal.SIGKILL) or "SIGKILL" in errors):
        return "killed, usually because memory ran out"
    return ours[0].partition("error: ")[2] if ours else (lines or [f"exit status {status}"])[-1]


def format_sweep(rows: Sequence[SweepRow]) -> str:
    """Return a table of all rows, and the fastest one."""
    keys = list(rows[0].settings)
    header = [" ".join(key.rpartition(".")[2] for key in keys), "tokens/s", "per rank", "MFU, causal", "step", "memory"]
    text = "\n".join(table([*header, "outcome"], [[*_cells(row), row.outcome[:120]] for row in rows]))
    best = max(rows, key=lambda row: row.tokens_per_second)
    if best.record is None:
        return f"{text}\n\nno setting fits or succeeds"
    words = " ".join(f"--{key}={value}" for key, value in best.settings.items())
    return f"{text}\n\nbest that fits: {words}: {best.tokens_per_second:,.0f} tokens/s"


def _cells(row: SweepRow) -> list[str]:
    name = " ".join(row.settings.values())
    if row.record is None:
        return [name, "", "", "", "", ""]
    found = row.record["summary"]
    shares = found["mfu"]["causal pairs (halved)"]
    share = next(iter(shares.items()), None)
    return [
        name,
        f"{found['tokens_per_second']:,.0f}",
        f"{found['tokens_per_second_per_rank']:,.0f}",
        f"{share[1]:.1%} of {share[0]}" if share else "",
        f"{1e3 * found['step_seconds']['median']:,.1f} ms",
        f"{found['peak_memory_bytes'] / _GIB:,.2f} GiB",
    ]
