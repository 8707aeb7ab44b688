"""Where numbers go: a console line, ``metrics.jsonl`` and TensorBoard events, all in the run folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

METRICS_FILE = "metrics.jsonl"


class MetricLog:
    """Writes records of one run on its main rank; on others it does nothing.

    A resumed run first forgets the records after the step that it continues from, so that the file always holds one
    curve.

    Args:
        run_folder: made when it is missing.
        resumed_step: records of later steps are dropped.
        active: whether this rank writes.
        tensorboard: also write TensorBoard events.

    Raises:
        UserError: the run folder cannot be written.
    """

    def __init__(self, run_folder: str | Path, resumed_step: int, active: bool, tensorboard: bool):
        self.active = active
        self._writer = None
        if not active:
            return
        folder = Path(run_folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _forget_after(folder / METRICS_FILE, resumed_step)
            self._file = (folder / METRICS_FILE).open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"run_folder {folder}: cannot be written: {error.strerror or error}") from None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def say(self, line: str) -> None:
        """Print a line for people."""
        if self.active:
            print(line, flush=True)

    def record(self, step: int, tokens: int, values: Mapping[str, Any], group: str = "train") -> None:
        """Keep ``values`` of ``step``; numbers become TensorBoard scalars named ``group/key``."""
        if not self.active:
            return
        self._file.write(json.dumps({"step": step, "tokens": tokens, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{group}/{key}", value, step)
            self._writer.flush()

    def close(self) -> None:
        """Flush and close everything."""
        if self.active:
            self._file.close()
            if self._writer is not None:
                self._writer.close()


def _forget_after(path: Path, step: int) -> None:
    """Drop the records of steps after ``step``, and a last line that a killed run left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
