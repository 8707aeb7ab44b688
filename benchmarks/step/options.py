"""Define the options of the step benchmark."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ...engine.errors import UserError
from .synthetic import DocumentLengths

TABLE_FILE, TRACE_FILE = "operators.txt", "trace.json.gz"
"""Files of a profile: the table as text, and the trace for https://ui.perfetto.dev or chrome://tracing."""


@dataclass(frozen=True)
class StepBenchmarkOptions:
    """Settings of the measurement, in addition to the run's configuration. The fields are the command's flags."""

    steps: int = 20
    warmup_steps: int = 5
    real_data: bool = False
    documents: str = "whole"
    """See :class:`~retemper.benchmarks.step.synthetic.DocumentLengths`."""
    matmul_seconds: float = 0.2
    """Seconds for each size and dtype of the matmul sweep; 0 skips it."""
    profile: str | None = None
    """Folder for a profile of a few further steps on the main rank; see :mod:`retemper.benchmarks.step.profile`."""

    def check(self) -> None:
        """Refuse impossible settings.

        Raises:
            UserError: names the flag, its value and the remedy.
        """
        if not 1 <= self.steps <= 10**6:
            raise UserError(f"--steps {self.steps}: must be at least 1 and at most 1,000,000")
        if not 0 <= self.warmup_steps <= 10**6:
            raise UserError(f"--warmup-steps {self.warmup_steps}: must be at least 0 and at most 1,000,000")
        if not 0 <= self.matmul_seconds <= 60:
            raise UserError(f"--matmul-seconds {self.matmul_seconds:g}: must be between 0 and 60")
        if self.real_data and self.documents != "whole":
            raise UserError(f"--documents {self.documents}: is only for random data; remove it, or --real-data")
        DocumentLengths.parse(self.documents)
        if self.profile is not None:
            folder = Path(self.profile)
            if folder.exists() and not (
                folder.is_dir() and (TABLE_FILE in os.listdir(folder) or not any(folder.iterdir()))
            ):
                raise UserError(f"--profile {folder}: exists, and is not a folder with a profile; choose another one")
