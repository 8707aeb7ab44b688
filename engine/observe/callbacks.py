"""Import and create the callbacks of users: classes named in ``callbacks``, which receive the events of a run."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files.masking import without_secrets
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
        added = dict.fromkeys(str(folder.resolve()) for folder in folders)
        # Last, so that no file there replaces a library.
        sys.path += [folder for folder in added if folder not in sys.path]
    for path in paths:
        _import_class(path)


def create_callbacks(paths: Sequence[str], say: Say) -> list[Observer]:
    """Return an object of each class in ``paths``. Its exceptions will not end the run.

    Raises:
        UserError: a class cannot be imported or created.
    """
    return [_create(path, say) for path in paths]


def _create(path: str, say: Say) -> Observer:
    try:
        observer = _import_class(path)()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"callbacks: {path} cannot be created: {_described(error)}; it is called without arguments"
        ) from None
    remedy = "fix it, or remove it from callbacks"
    return Guarded(f"the callback {path}", observer, remedy, say, with_traceback=True)


def _import_class(path: str) -> type[Observer]:
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"callbacks: {path}: there is no module {error.name}; put it into the folder of the --config file or "
                "the working directory, or name the folder that has it in PYTHONPATH"
            ) from None
        raise UserError(f"callbacks: {path}: importing {module_name} failed: {_described(error)}") from None
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, Observer):
        return found
    problem = f"has no class {name}" if found is None else f"has a {name} that is not a subclass of Observer"
    raise UserError(
        f"callbacks: {path}: the module {module_name} ({getattr(module, '__file__', None)}) {problem}; name a class "
        "that inherits from Observer of retemper.engine.observe.observer"
    )


def _described(error: BaseException) -> str:
    """Return type, message and place of ``error``, without secrets."""
    place = ""
    if not isinstance(error, SyntaxError):  # which names its place
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f" ({last.filename}, line {last.lineno})"
    return without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:300] + place
