"""Expands a URL of ``--input`` to the files that it names."""

from __future__ import annotations

from collections.abc import Callable

from ....engine.errors import UserError
from ..storage import files_below, forget_listings, full_url, has_pattern, is_folder, matches


def expand_url(url: str, name: str, choose: Callable[[str, list[str]], list[str]]) -> list[str]:
    """Return the files that ``url`` names, by path: itself, those of a folder, or those that match a pattern.

    Args:
        name: the option with its value, for messages.
        choose: ``choose(root, paths)`` returns the documents among the files of a folder.

    Raises:
        UserError: it names nothing, or cannot be read.
    """
    forget_listings(url)
    if not has_pattern(url):
        return choose(name, files_below(url)) if is_folder(url) else [full_url(url)]
    found = matches(url)
    named = [path for path, folder in found.items() if not folder]
    below = {path: files_below(path) for path, folder in found.items() if folder}
    if url.rpartition("/")[2] in ("*", "**", "*.*") and found:
        return choose(name, sorted({*named, *(path for paths in below.values() for path in paths)}))
    chosen = [path for folder, paths in below.items() for path in choose(folder, paths)]
    if not named and not chosen:
        raise UserError(f"{name}: no file matches this pattern")
    return sorted({*named, *chosen})
