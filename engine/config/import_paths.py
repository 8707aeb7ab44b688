"""Import the classes of users that settings name by their import path."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.masking import without_secrets


def search_folders(folders: Iterable[Path]) -> None:
    """Let modules in ``folders`` be imported. They come last, so that no file there replaces a library."""
    added = dict.fromkeys(str(folder.resolve()) for folder in folders)
    sys.path += [folder for folder in added if folder not in sys.path]


def import_class(key: str, path: str, base: type, base_words: str) -> type[Any]:
    """Return the class with the import path ``path``.

    Args:
        key: of the setting, for messages.
        path: as in ``my_module.MyClass``.
        base: of which it must be a subclass.
        base_words: where users find ``base``, as in "Observer of retemper.engine.observe.observer".

    Raises:
        UserError: it is not a subclass, or its module does not exist or cannot be imported.
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"{key}: {path}: there is no module {error.name}; put it into the folder of the --config file or "
                "the working directory, or name the folder that has it in PYTHONPATH"
            ) from None
        raise UserError(f"{key}: {path}: importing {module_name} failed: {described(error)}") from None
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, base):
        return found
    problem = f"has no class {name}" if found is None else f"has a {name} that is not a subclass of {base.__name__}"
    raise UserError(
        f"{key}: {path}: the module {module_name} ({getattr(module, '__file__', None)}) {problem}; name a class "
        f"that inherits from {base_words}"
    )


def described(error: BaseException) -> str:
    """Return type, message and place of ``error``, without secrets."""
    place = ""
    if not isinstance(error, SyntaxError):  # which names its place
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f" ({last.filename}, line {last.lineno})"
    return without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:300] + place
