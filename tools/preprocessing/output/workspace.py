"""The hidden folder of a run beside its output: finished shards that a restart finds again, and temporary files."""

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
from ..workers.task_output import Shard, TaskResult

_LOCK = "lock"


def workspace_folder(prefix: str) -> Path:
    """The hidden folder of the dataset ``prefix``."""
    folder, name = os.path.split(os.path.abspath(prefix))
    return Path(folder) / f".{name}.partial"


@contextmanager
def open_workspace(prefix: str) -> Iterator[Path]:
    """The work folder of the dataset ``prefix``, ours alone. Afterwards it is removed unless a shard in it is finished.

    Raises:
        UserError: it cannot be written, or another run is at work there.
    """
    work = workspace_folder(prefix)
    folder, stack = work.parent, ExitStack()
    busy = "is writing this dataset; wait for it, or choose another --output-prefix"
    try:
        require_own_folder(work, _LOCK, f"--output-prefix {prefix}")
        work.mkdir(parents=True, exist_ok=True)
        stack.enter_context(exclusive_lock(work / _LOCK, lambda holder: f"{prefix}: {holder} {busy}"))
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
    """Remove all of it: the dataset is complete."""
    shutil.rmtree(work, ignore_errors=True)


def _clear_temporaries(work: Path) -> None:
    """Remove what a killed run left besides finished shards."""
    finished = {path.name.partition(".")[0] for path in work.glob("*.json")}
    for path in work.iterdir():
        is_folder = path.is_dir() and not path.is_symlink()
        if path.name != _LOCK and (is_folder or path.name.partition(".")[0] not in finished):
            shutil.rmtree(path) if is_folder else path.unlink()


def finished_results(work: Path, keys: Iterable[str], refused: Set[str]) -> dict[str, TaskResult]:
    """Results of those of ``keys`` whose shards are finished and whole; others are removed.

    Args:
        refused: reasons for which nothing may have been left out. A run that allowed it may have made the shard.
    """
    results: dict[str, TaskResult] = {}
    for key in keys:
        shard = Shard(work, key)
        if not shard.result.exists():
            continue
        with suppress(UserError, OSError):
            result = TaskResult.read(shard.result)
            allowed = all(refused.isdisjoint(reasons) for reasons in result.left_out.values())
            if allowed and shard.sizes() == result.sizes and hash_file(shard.tokens) == result.tokens_xxh3_128:
                results[key] = result
        if key not in results:
            shard.remove()
    return results
