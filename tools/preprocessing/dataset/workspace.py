"""The hidden work folder of a run, next to its dataset: finished outputs, for a restart, and temporary files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ....engine.errors import UserError
from ....engine.files.hashing import hash_file
from ....engine.files.lock import exclusive_lock
from ....engine.files.outputs import require_own_folder
from ..workers.task_output import TaskOutput, TaskResult

_LOCK = "lock"


def workspace_folder(prefix: str) -> Path:
    """Return the hidden folder of the dataset ``prefix``."""
    folder, name = os.path.split(os.path.abspath(prefix))
    return Path(folder) / f".{name}.partial"


@contextmanager
def open_workspace(prefix: str) -> Iterator[Path]:
    """Create and lock the work folder of the dataset ``prefix``; remove it at the end if no finished output is in it.

    Raises:
        UserError: it cannot be written, or another run uses it.
    """
    work = workspace_folder(prefix)
    folder, stack = work.parent, ExitStack()
    remedy = "wait for it, or choose another --output-prefix"
    busy = lambda holder: f"{prefix}: another run is writing this dataset ({holder}); {remedy}"  # noqa: E731
    try:
        require_own_folder(work, _LOCK, f"--output-prefix {prefix}")
        work.mkdir(parents=True, exist_ok=True)
        stack.enter_context(exclusive_lock(work / _LOCK, busy))
    except OSError as error:
        raise UserError(f"{folder}: cannot write there: {error.strerror}; name another --output-prefix") from error
    with stack:
        _clear_temporaries(work)
        try:
            yield work
        finally:
            if not any(work.glob("*.json")):
                shutil.rmtree(work, ignore_errors=True)


def remove_workspace(work: Path) -> None:
    """Remove the work folder: the dataset is complete."""
    shutil.rmtree(work, ignore_errors=True)


def _clear_temporaries(work: Path) -> None:
    """Remove everything but finished outputs: what a killed run left."""
    finished = {path.name.partition(".")[0] for path in work.glob("*.json")}
    for path in work.iterdir():
        is_folder = path.is_dir() and not path.is_symlink()
        if path.name != _LOCK and (is_folder or path.name.partition(".")[0] not in finished):
            shutil.rmtree(path) if is_folder else path.unlink()


def finished_results(work: Path, keys: Iterable[str], refused: Set[str]) -> dict[str, TaskResult]:
    """Return the results of those of ``keys`` whose outputs are finished and undamaged; remove the other outputs.

    Args:
        refused: reasons for which no record may be left out; the run that made an output may have allowed them.
    """
    results: dict[str, TaskResult] = {}
    for key in keys:
        output = TaskOutput(work, key)
        if not output.result.exists():
            continue
        with suppress(UserError, OSError):
            result = TaskResult.read(output.result)
            allowed = all(refused.isdisjoint(reasons) for reasons in result.left_out.values())
            if allowed and output.sizes() == result.sizes and hash_file(output.tokens) == result.tokens_xxh3_128:
                results[key] = result
        if key not in results:
            output.remove()
    return results
