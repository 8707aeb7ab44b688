"""Expands a URL of ``--input`` to the files that it names."""

from __future__ import annotations

from collections.abc import Callable

from ....engine.errors import UserError
from ..storage import files_below, forget_listings, full_url, has_pattern, is_folder, matches
from .hub import files_of_split, parse_hub_dataset, pin_revisions


def expand_url(
    url: str,
    name: str,
    choose: Callable[[str, list[str]], list[str]],
    hub_subset: str | None = None,
    hub_split: str | None = None,
) -> list[str]:
    """Return the files that ``url`` names, by path: itself, those of a folder, or those that match a pattern.

    Args:
        name: the option with its value, for messages.
        choose: ``choose(root, paths)`` returns the documents among the files of a folder.
        hub_subset, hub_split: of a whole dataset of the Hub; None: the default.

    Raises:
        UserError: it names nothing, or cannot be read.
    """
    forget_listings(url)
    if parse_hub_dataset(url):
        (url,) = pin_revisions([url])
        dataset = parse_hub_dataset(url)
        if dataset and not dataset.path:
            return files_of_split(dataset, name, hub_subset, hub_split)
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
