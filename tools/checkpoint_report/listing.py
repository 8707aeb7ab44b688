"""List the checkpoints of a run in a table, with the reasons why each is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...engine.errors import UserError
from ...engine.files.disk_space import format_bytes
from ...engine.observe.curves import METRICS_FILE
from ...engine.weights.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from ...engine.weights.checkpoint.names import DAMAGED, REWOUND, is_checkpoint_name, step_of
from ...engine.weights.checkpoint.retention import reasons_to_keep
from ...engine.weights.checkpoint.verify import wrong_sizes


@dataclass(frozen=True)
class Row:
    """One checkpoint."""

    name: str
    manifest: Manifest | None
    """None if it cannot be read."""
    loss: float | None
    """Training loss of the step, if it was logged."""
    bytes: int
    """Total size of the existing files."""
    age_seconds: float
    kept: list[str]
    """Reasons of :func:`~retemper.engine.weights.checkpoint.retention.reasons_to_keep`."""
    state: str
    """complete, unverifiable (format 1, without hashes), quarantined, rewound, or the problem."""


def checkpoint_folder(run_folder: Path) -> Path:
    """Return the folder of a run's checkpoints.

    Raises:
        UserError: ``run_folder`` has none.
    """
    folder = run_folder / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run_folder}: has no folder checkpoints; name the run_folder of a run")
    return folder


def list_checkpoints(run_folder: Path, losses: Mapping[int, float] | None = None) -> list[Row]:
    """Return every checkpoint of the run, by step, including those that are damaged, quarantined or rewound.

    Args:
        losses: training loss by step; None: they are read from the run's records.

    Raises:
        UserError: it is not a run folder, or cannot be read.
    """
    folder = checkpoint_folder(run_folder)
    entries = [entry for entry in sorted(folder.iterdir()) if entry.is_dir()]
    names = [entry for entry in entries if is_checkpoint_name(_original_name(entry))]
    states = {entry: _state(entry) for entry in names}
    whole = {entry: manifest for entry, (manifest, state) in states.items() if manifest and state in _WHOLE}
    whole = dict(sorted(whole.items(), key=lambda item: step_of(item[0])))
    reasons = reasons_to_keep(whole, *_retention(list(whole.values())))
    losses = _losses(run_folder) if losses is None else losses
    return [
        Row(
            entry.name,
            manifest,
            losses.get(manifest.step) if manifest else None,
            sum(path.stat().st_size for path in entry.rglob("*") if path.is_file()),
            time.time() - (entry / MANIFEST_FILE if (entry / MANIFEST_FILE).is_file() else entry).stat().st_mtime,
            reasons.get(entry, []),
            state,
        )
        for entry, (manifest, state) in states.items()
    ]


_WHOLE = ("complete", "complete, without hashes")


def _state(folder: Path) -> tuple[Manifest | None, str]:
    manifest, state = None, f"damaged: {MANIFEST_FILE} is missing"
    try:
        if (folder / MANIFEST_FILE).is_file():
            manifest = read_manifest(folder)
            wrong = wrong_sizes(folder, manifest)
            state = f"damaged: {wrong[0].what}" if wrong else _WHOLE[0 if manifest.files else 1]
    except UserError as error:
        state = f"damaged: {error}"
    suffix = folder.name.removeprefix(_original_name(folder))
    if suffix:
        state = "rewound" if suffix.startswith(REWOUND) else "quarantined"
    return manifest, state


def _original_name(folder: Path) -> str:
    """Return the name of the folder before it was renamed."""
    return folder.name.partition(DAMAGED)[0].partition(REWOUND)[0]


def _retention(manifests: Sequence[Manifest]) -> tuple[int, int, int | None, int]:
    """Return keep_last, keep_every, the best step and rewind_steps, as recorded in the newest checkpoint."""
    if not manifests:
        return 1, 0, None, 0
    newest = manifests[-1]
    settings = newest.config.get("checkpoint")
    settings = settings if isinstance(settings, dict) else {}
    last, every = settings.get("keep_last"), settings.get("keep_every")
    training = newest.config.get("training")
    training = training if isinstance(training, dict) else {}
    steps = training.get("rewind_steps") if training.get("loss_spike_action") == "rewind" else 0
    return (
        last if type(last) is int and last > 0 else 1,
        every if type(every) is int and every > 0 else 0,
        newest.best.get("step") if settings.get("keep_best", True) else None,
        steps if type(steps) is int and steps > 0 else 0,
    )


def _losses(run_folder: Path) -> dict[int, float]:
    """Return the training loss by step from the run's records; invalid lines are skipped."""
    losses: dict[int, float] = {}
    path = run_folder / METRICS_FILE
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "evaluation" not in record and isinstance(record.get("loss"), float):
            step = record.get("step")
            losses |= {step: record["loss"]} if isinstance(step, int) else {}
    return losses


COLUMNS = ("checkpoint", "step", "tokens", "loss", "evaluation", "size", "kept", "state")


def listing_cells(row: Row) -> tuple[str, ...]:
    """Return the cells of one checkpoint under :data:`COLUMNS`."""
    manifest = row.manifest
    evaluation = next(iter(manifest.evaluation.values()), None) if manifest else None
    return (
        row.name,
        f"{manifest.step:,}" if manifest else "",
        f"{manifest.consumed_tokens:,}" if manifest else "",
        "" if row.loss is None else f"{row.loss:.4f}",
        "" if evaluation is None else f"{evaluation:.4f}",
        format_bytes(row.bytes),
        ", ".join(row.kept),
        f"{row.state}, an adapter" if manifest is not None and manifest.base else row.state,
    )


def format_listing(rows: Sequence[Row]) -> str:
    """Return the table, a line each, with ages."""
    if not rows:
        return "no checkpoints"
    table: list[tuple[str, ...]] = [(*COLUMNS[:6], "age", *COLUMNS[6:])]
    for row in rows:
        cells = listing_cells(row)
        table.append((*cells[:6], _format_age(row.age_seconds), *cells[6:]))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in table)  # fmt: skip


def _format_age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
