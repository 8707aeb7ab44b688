"""Expand ``~`` and ``$VARIABLE`` in paths, in every option and setting that is a path."""

from __future__ import annotations

import os
import re

from ..errors import UserError

_URL = re.compile(r"[A-Za-z][\w+.-]*://")
_VARIABLE = re.compile(r"\$(?:(?P<bare>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)\})", re.ASCII)


def is_url(path: str) -> bool:
    """Return whether ``path`` is a URL, such as ``s3://bucket/key``."""
    return _URL.match(path) is not None


def expand_path(path: str, name: str, urls: bool = False) -> str:
    """Return ``path`` with ``~``, ``~user``, ``$VARIABLE`` and ``${VARIABLE}`` expanded, as a shell does.

    Args:
        path: as given by the user. Names on the Hub (``namespace/name``) and ``-`` are returned unchanged.
        name: the option or setting with this value, for the error.
        urls: return URLs unchanged instead of refusing them.

    Raises:
        UserError: the user or the variable does not exist, or the path is a URL or needs a shell. Folders called ``~``,
            ``$HOME`` or ``s3:`` are not supported.
    """
    if is_url(path):
        if urls:
            return path
        raise UserError(
            f"{name} {path}: a URL, not a path; mount or download it and name the local path, or for a model give its "
            "name on the Hub (namespace/name)"
        )

    def value(match: re.Match[str]) -> str:
        variable = match["bare"] or match["braced"]
        if variable not in os.environ:
            raise UserError(
                f"{name} {path}: the environment variable {variable} is not set; set it, or write the path out"
            )
        return os.environ[variable]

    home, slash, rest = path.partition("/")
    if home.startswith("~"):
        if os.path.expanduser(home) == home:
            raise UserError(
                f"{name} {path}: this machine has no user {home[1:]!r}; for a file of that name write ./{path}"
            )
        home = os.path.expanduser(home)
    expanded = _VARIABLE.sub(value, home + slash + rest)
    if needs_shell := re.search(r"\$[({]", _VARIABLE.sub("", path)):
        raise UserError(
            f"{name} {path}: {needs_shell[0]}...{')' if needs_shell[0] == '$(' else '}'} is not expanded here, only "
            "$VARIABLE and ${VARIABLE} are; write the path out"
        )
    return expanded
