"""Suggest existing keys for misspelt, abbreviated or misplaced ones."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_type_hints

from .other_tools import used_instead
from .settings import RunConfig, SourceConfig, StageConfig

REMOVED = {
    "training.fused_elementwise": "PyTorch's operators compute norms, rotary positions and SwiGLU",
}
"""Keys of the version before this one, and what holds instead. A key stays here for one minor version."""
_SAME_WORD = 0.75
"""Similarity from which a user-defined name may be a misspelling of another one."""


def known_keys(kind: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, annotated type) of every key, sections included; the keys of list items are left out."""
    for key, hint in get_type_hints(kind, include_extras=True).items():
        yield f"{prefix}{key}", hint
        if dataclasses.is_dataclass(hint):
            yield from known_keys(hint, f"{prefix}{key}.")  # type: ignore[arg-type]


def did_you_mean(key: str, section: bool = False) -> str:
    """Return a hint for the unknown ``key``, as the end of a message.

    Args:
        key: dotted, as in ``data.train[0].wieght``.
        section: the value of the key is a section. Sections are suggested only for sections.
    """
    if key in REMOVED:
        return f", which was removed: {REMOVED[key]}; delete it"
    if "[" in key:  # an item of data.train or data.stages
        item = key.rsplit(".", 1)[0]
        kind = StageConfig if re.search(r"stages\[\d+\]$", item) else SourceConfig
        known = [f"{item}.{name}" for name in get_type_hints(kind)]
    else:
        known = [name for name, hint in known_keys() if dataclasses.is_dataclass(hint) == section]
    if key in known:
        nested = f", as {key.replace('.', ': {')}: ...{'}' * key.count('.')}" if "[" not in key else ""
        return f"; set it in a file{nested}"
    # Names in the same (or the most similar) section come first, so that they win among equally good ones.
    home = key.rpartition(".")[0]
    known.sort(key=lambda name: -difflib.SequenceMatcher(None, home, name.rpartition(".")[0]).ratio())
    last = key.rpartition(".")[2].replace("-", "_")
    leaves = {name: name.rpartition(".")[2] for name in known}
    exact = [name for name in known if leaves[name] == last]
    if not exact and "[" not in key and (ours := used_instead(key, {name for name, _ in known_keys()})):
        return f"; use {ours}"
    near = (
        exact
        or [name for name in known if len(last) > 1 and _abbreviates(last.replace("_", ""), leaves[name].split("_"))]
        or difflib.get_close_matches(last, leaves.values(), n=1, cutoff=0.7)
    )
    match = next((name for name in known if near and near[0] in (name, leaves[name])), None)
    return f"; did you mean '{match}'?" if match else "; see --help for all keys"


def nearest(name: str, others: Iterable[str]) -> str | None:
    """Return the one of ``others`` that ``name`` may be a misspelling of, if any."""
    return next(iter(difflib.get_close_matches(name, list(others), n=1, cutoff=_SAME_WORD)), None)


def _abbreviates(short: str, words: Sequence[str]) -> bool:
    """Return whether ``short`` consists of beginnings of all ``words`` in order: lr, seqlen, warmup."""
    if not short or not words:
        return not short
    return any(
        short.startswith(words[0][:length]) and _abbreviates(short[length:], words[1:])
        for length in range(1, len(words[0]) + 1)
    )
