"""Import and create the callbacks of users: classes named in ``callbacks``, which receive the events of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.import_paths import described, import_class, search_folders
from ..errors import UserError
from .guarded import Guarded
from .observer import Observer

if TYPE_CHECKING:
    from .waiting import Say


def import_callbacks(paths: Sequence[str], folders: Iterable[Path]) -> None:
    """Import the classes with the import paths ``paths``, also from modules in ``folders``.

    Raises:
        UserError: one of them is not an observer, or its module does not exist or cannot be imported.
    """
    if paths:
        search_folders(folders)
    for path in paths:
        _import_observer(path)


def create_callbacks(paths: Sequence[str], say: Say) -> list[Observer]:
    """Return an object of each class in ``paths``. Its exceptions will not end the run.

    Raises:
        UserError: a class cannot be imported or created.
    """
    return [_create(path, say) for path in paths]


def _create(path: str, say: Say) -> Observer:
    try:
        observer = _import_observer(path)()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"callbacks: {path} cannot be created: {described(error)}; it is called without arguments"
        ) from None
    remedy = "fix it, or remove it from callbacks"
    return Guarded(f"the callback {path}", observer, remedy, say, with_traceback=True)


def _import_observer(path: str) -> type[Observer]:
    return import_class("callbacks", path, Observer, "Observer of retemper.engine.observe.observer")
