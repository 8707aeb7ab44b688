"""Format presets and families as text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from .families import Family
from .presets import Preset

_WIDTH = 110


def format_list(presets: Sequence[Preset], families: Sequence[Family]) -> str:
    """Return the table of all presets, and the names of all families."""
    rows = [("PRESET", "MODEL", "PARAMETERS", "CHOSEN FOR", "STATES")]
    rows += [(each.name, each.model, _count(each), each.hardware, _gigabytes(each.states_gb)) for each in presets]
    lines = [*_table(rows), "", *_families(families), ""]
    lines.append("retemper models NAME shows one preset or family; docs/models.md has what was checked.")
    return "\n".join(lines)


def format_preset(preset: Preset) -> str:
    """Return what a preset needs, and its file."""
    states = ""
    if preset.states_gb is not None:
        gpus = preset.nodes * preset.gpus_per_node
        each = f", {_gigabytes(preset.states_gb / gpus)} on each GPU" if gpus > 1 else ""
        states = f"{_gigabytes(preset.states_gb)} for weights, gradients and optimizer states{each}; and activations"
    facts = {
        "file": preset.file,
        "model": f"{preset.model} {f'({preset.model_type})' if preset.model_type else ''}",
        "parameters": _count(preset),
        "chosen for": preset.hardware,
        "memory": states,
        "disk": f"{_gigabytes(preset.checkpoint_gb)} for each checkpoint" if preset.checkpoint_gb else "",
        "predict": preset.plan_command if preset.gpus_per_node else "",
    }
    lines = [f"{name:<11} {value.strip()}" for name, value in facts.items() if value]
    return "\n".join([*lines, "", Path(preset.file).read_text(encoding="utf-8").rstrip()])


def format_family(family: Family) -> str:
    """Return what is known about a ``model_type``."""
    if family.implementation == "refused":
        return f"{family.model_type}: cannot be trained; docs/models.md has the reason"
    lines = [f"model_type  {family.model_type}", f"computed by {family.implementation}"]
    return "\n".join([*lines, f"documents   {family.documents}", f"axes        {', '.join(family.axes)}"])


def _count(preset: Preset) -> str:
    if preset.parameters is None:
        return "-"
    return f"{preset.parameters / 1e9:.2f}B" if preset.parameters >= 1e9 else f"{preset.parameters / 1e6:.3g}M"


def _gigabytes(size: float | None) -> str:
    return "-" if size is None else f"{size:,.0f} GB" if size >= 10 else f"{size:.2g} GB"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _families(families: Sequence[Family]) -> list[str]:
    titles = {
        "native": "Families of the native decoder (all axes of a layout):",
        "transformers": "Families through the modules of transformers (without tensor and pipeline parallelism):",
        "refused": "Refused:",
    }
    lines = []
    for implementation, title in titles.items():
        names = " ".join(each.model_type for each in families if each.implementation == implementation)
        lines += [title, *(f"  {line}" for line in textwrap.wrap(names, _WIDTH, break_on_hyphens=False))]
    return lines
