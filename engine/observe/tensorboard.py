"""TensorBoard events: an extra that never ends a run, whatever its libraries raise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes scalars to ``folder`` until something fails, which ``say`` is told once.

    Args:
        folder: of the events.
        purge_step: records of this step and later ones, of a run before, are hidden.
        say: prints a line for people.
    """

    def __init__(self, folder: Path, purge_step: int, say: Callable[[str], None]):
        self._folder, self._say = folder, say
        self._writer: Any = None
        with self._tolerant("cannot be used"):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def record(self, step: int, values: Mapping[str, Any], group: str) -> None:
        """Keep the numbers of ``values`` as scalars named ``group/key``."""
        if self._writer is None:
            return
        with self._tolerant(f"cannot write to {self._folder}"):
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{group}/{key}", value, step)
            self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            with self._tolerant(f"cannot write to {self._folder}"):
                self._writer.close()
            self._writer = None

    @contextmanager
    def _tolerant(self, what: str) -> Iterator[None]:
        # Any exception: of NumPy, protobuf, setuptools or a codec. Importing them has ended with SystemExit as well.
        try:
            yield
        except (Exception, SystemExit) as error:
            self._writer = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._say(
                f"note: TensorBoard {what}: {reason}; training continues without it, metrics.jsonl has the same "
                "numbers (logging.tensorboard: false silences this)"
            )
