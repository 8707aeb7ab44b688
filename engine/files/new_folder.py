"""Write an output folder that appears under its name only when it is complete."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from .outputs import sync_path, sync_tree


def require_absent(output: str | Path) -> Path:
    """Return ``output`` as a path, after checking that it does not exist.

    Raises:
        UserError: it exists.
    """
    if os.path.lexists(output):
        raise UserError(f"--output {output}: exists already and is not overwritten; remove it or choose another")
    return Path(output)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``output``; it is flushed to disk and renamed to ``output`` at the end.

    After an error or Ctrl-C the temporary folder is removed.

    Raises:
        UserError: ``output`` exists, or cannot be written.
    """
    require_absent(output)
    temporary = output.parent / f".{output.name}.{uuid.uuid4().hex}.tmp"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sync_tree(temporary)
        require_absent(output)
        temporary.rename(output)
        sync_path(output.parent)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
