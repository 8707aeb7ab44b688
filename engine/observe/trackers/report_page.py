"""Make the page of a run's results with tools/report.py, for trackers that keep files."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from ...system import environment_of_tool
from .facts import TRACKERS_FOLDER

REPORT = Path(__file__).resolve().parents[3] / "tools" / "report.py"
_SECONDS = 120.0


class ReportPage:
    """Makes the page once, when the first tracker asks for it.

    Args:
        run_folder: of the run.
    """

    def __init__(self, run_folder: Path):
        self._folder, self._lock = run_folder, threading.Lock()
        self._path = run_folder / TRACKERS_FOLDER / "report.html"
        self._made: bool | None = None

    def __call__(self) -> Path | None:
        """Return the page, or None if it could not be made."""
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._path if self._made else None

    def _make(self) -> bool:
        words = [str(self._folder), "--output", str(self._path), "--overwrite"]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            done = subprocess.run(
                [sys.executable, str(REPORT), *words],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=environment_of_tool(),
                timeout=_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0 and self._path.is_file()
