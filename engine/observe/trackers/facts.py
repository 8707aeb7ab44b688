"""What trackers record about a run: names of metrics, and settings and facts as flat tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from ...files.masking import masked
from ..observer import RunDescription
from .client import TrackedRun

TRACKERS_FOLDER = "trackers"
SAMPLES = "samples"
"""Name under which generated text is recorded."""


def tracked_run(run: RunDescription, tracker: str) -> TrackedRun:
    """Return what ``tracker`` is told about ``run``. ``run.tracker_runs`` has its id."""
    settings = masked(run.config["logging"])
    facts = {"model": run.model, "datasets": run.datasets, "code": run.code, "world_size": run.world_size}
    former = run.former_tracker_runs.get(tracker)
    return TrackedRun(
        id=run.tracker_runs[tracker],
        name=settings["run_name"] or run.folder.absolute().name,
        project=settings["project"],
        group=settings["group"],
        tags=tuple(settings["tags"]),
        offline=settings["offline"],
        folder=run.folder.absolute() / TRACKERS_FOLDER,
        config=masked(run.config),
        facts=masked({**facts, **({"continues": former} if former else {})}),
        exists=run.resumed,
    )


def numbers(group: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of ``values``, named ``group/key``."""
    return {
        f"{group}/{key}": value
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    }


def of_record(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl by their names in the trackers."""
    group = f"evaluation/{record['evaluation']}" if "evaluation" in record else "train"
    return numbers(group, {key: value for key, value in record.items() if key != "step"})


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested tables and lists of tables, named ``outer.inner`` and ``list.0.inner``."""
    return dict(_leaves(tree, prefix))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        children = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, (list, tuple)) and any(isinstance(child, Mapping) for child in value):
        children = [(str(index), child) for index, child in enumerate(value)]
    else:
        yield name, value
        return
    for key, child in children:
        yield from _leaves(child, f"{name}.{key}" if name else key)
