"""Compare configuration, code and PyTorch version of all ranks before the run begins."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..config.settings import RunConfig, to_dict
from ..errors import UserError
from ..files.code import PACKAGE, code_files, digest

if TYPE_CHECKING:
    from .rendezvous import Rendezvous

_UNREADABLE_CONFIG_SECONDS = 30
"""How long a rank with an unreadable configuration waits for the others, to send them the error."""
_MOST_SHOWN = 3


def agree_on_config(read: Callable[[], RunConfig], several: bool) -> tuple[RunConfig, Rendezvous | None]:
    """Return the result of ``read``, if configuration, code and PyTorch version are the same on all ranks.

    Args:
        read: parses the configuration.
        several: True if a launcher has started more than one rank.

    Returns:
        the configuration, and the rendezvous of several ranks.

    Raises:
        UserError: on every rank, naming the ranks that differ, or whose configuration is wrong.
    """
    if not several:
        return read(), None
    config, mine = None, None
    try:
        config = read()
    except UserError as error:
        mine = error
    import torch  # needed by several ranks only, and after ``read`` has imported what else the run needs

    from .rendezvous import join

    problem = mine and str(mine)
    settings = flatten(to_dict(config)) if config else {}
    files = code_files(PACKAGE)
    note = {"problem": problem, "config": digest(settings), "code": digest(files), "torch": str(torch.__version__)}
    try:
        rendezvous = join(note, config.parallel.timeout_seconds if config else _UNREADABLE_CONFIG_SECONDS)
    except UserError as error:
        raise mine or error from None
    problems = [f"rank {rank}: {its['problem']}" for rank, its in enumerate(rendezvous.notes) if its["problem"]]
    if problem or problems:
        rendezvous.leave()
        raise _of_all(rendezvous, mine or UserError(problems[0]))
    details = {"config": settings, "code": files}
    if differences := compare(rendezvous, details):
        rendezvous.leave()
        what = f"{'; '.join(differences)}; start every node with the same files and the same command"
        raise _of_all(rendezvous, UserError(what))
    assert config is not None
    return config, rendezvous


def _of_all(rendezvous: Rendezvous, error: UserError) -> UserError:
    """Return ``error``, which every rank raises and rank 0 prints."""
    error.printed_elsewhere = rendezvous.rank > 0
    return error


def flatten(value: Any, name: str = "") -> dict[str, str]:
    """Return a nested configuration as ``{"training.seed": "1", "data.train[0].path": '"a"'}``; values in JSON."""
    if isinstance(value, dict) and value:
        items = [(f"{name}.{key}" if name else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value:
        items = [(f"{name}[{place}]", item) for place, item in enumerate(value)]
    else:
        return {name: json.dumps(value, default=str)}
    return {key: text for inner, item in items for key, text in flatten(item, inner).items()}


def compare(rendezvous: Rendezvous, mine: dict[str, dict[str, str]]) -> list[str]:
    """Return the differences between ranks, a clause for each kind; the same text on every rank.

    Args:
        rendezvous: its notes have the digests ``config`` and ``code``, and ``torch``.
        mine: the content of the digests, sent only if they differ.
    """
    clauses = []
    for kind, title in (("config", "the configuration"), ("code", "the code")):
        odd, usual = _odd_ones(rendezvous, kind)
        if not odd:
            continue
        key = f"{kind}/{{}}"
        rendezvous.store.set(key.format(rendezvous.rank), json.dumps(mine[kind]))
        theirs, ours = (json.loads(rendezvous.store.get(key.format(rank))) for rank in (odd[0], usual))
        keys = [name for name in [*ours, *(name for name in theirs if name not in ours)]
                if ours.get(name) != theirs.get(name)]  # fmt: skip
        shown = [
            name if kind == "code" else f"{name} is {theirs.get(name, 'unset')}, not {ours.get(name, 'unset')}"
            for name in keys[:_MOST_SHOWN]
        ]
        more = f" and {len(keys) - _MOST_SHOWN} more" if len(keys) > _MOST_SHOWN else ""
        clauses.append(f"{title} differs on {rendezvous.name(odd)} from rank {usual}'s: {', '.join(shown)}{more}")
    odd, usual = _odd_ones(rendezvous, "torch")
    if odd:
        version, other = rendezvous.notes[odd[0]]["torch"], rendezvous.notes[usual]["torch"]
        clauses.append(f"PyTorch is {version} on {rendezvous.name(odd)}, not {other} as on rank {usual}")
    return clauses


def _odd_ones(rendezvous: Rendezvous, kind: str) -> tuple[list[int], int]:
    """Return the ranks that differ from the most frequent value (of two, the first), and a rank that has it."""
    values = [note[kind] for note in rendezvous.notes]
    [(usual, _)] = Counter(values).most_common(1)
    return [rank for rank, value in enumerate(values) if value != usual], values.index(usual)
