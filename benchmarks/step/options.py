"""Define the options of the step benchmark."""

from __future__ import annotations

from dataclasses import dataclass

from ...engine.errors import UserError
from .synthetic import DocumentLengths


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
