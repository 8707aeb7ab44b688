"""The sidecar of datasets that are joined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ....engine.data.sidecar import InputSource, Sidecar
from ....engine.errors import UserError
from ..dataset_files import JSON
from .inputs import MergeInput

_WITHIN_A_SHARD = ("dedup", "max_documents", "shuffle")
"""Options that work within a shard: the joined dataset is not what one machine would have made."""


def merged_sidecar(parts: Sequence[MergeInput]) -> Sidecar | None:
    """Return the sidecar of the joined datasets, for the writer to complete; None if one of them has none.

    Raises:
        UserError: the shards of a run were made from different inputs or with different options.
    """
    groups: dict[str, list[tuple[MergeInput, Sidecar]]] = {}
    for part in parts:
        if part.sidecar is None:
            return None
        groups.setdefault(part.shard.run if part.shard else part.prefix, []).append((part, part.sidecar))
    sources: list[InputSource] = []
    options: dict[str, dict[str, Any]] = {}
    for name, members in groups.items():
        sources += _sources_of_run(members)
        options[name] = _options_of_run(members)
    first = next(iter(options.values()))
    alike = all(others == first for others in options.values())
    return replace(
        next(iter(groups.values()))[0][1],
        sources=tuple(sources),
        options=first if alike else {"merged": options},
    )


def _sources_of_run(members: Sequence[tuple[MergeInput, Sidecar]]) -> list[InputSource]:
    """Return the sources of a dataset, or of a run's shards, each of which lists all inputs and counts its documents.

    Raises:
        UserError: the shards have different inputs.
    """
    first, merged = members[0][0], list(members[0][1].sources)
    for part, sidecar in members[1:]:
        names = [source.name for source in sidecar.sources]
        if names != [source.name for source in merged]:
            raise UserError(
                f"{part.prefix}{JSON}: made from {' '.join(names)}, but {first.prefix} from "
                f"{' '.join(source.name for source in merged)}: shards of different inputs; preprocess them again"
            )
        merged = [_joined(before, source, part) for before, source in zip(merged, sidecar.sources, strict=True)]
    return merged


def _joined(before: InputSource, source: InputSource, part: MergeInput) -> InputSource:
    """Add the counts of ``source`` in the shard ``part`` to those of the shards before it."""
    if (before.files, before.bytes) != (source.files, source.bytes):
        raise UserError(
            f"{part.prefix}{JSON}: {source.name} was {source.files} files of {source.bytes} bytes, but for the "
            f"shards before it {before.files} files of {before.bytes} bytes: shards of different inputs; "
            "preprocess all of them again"
        )
    return replace(
        before,
        documents=before.documents + source.documents,
        tokens=before.tokens + source.tokens,
        characters=before.characters + source.characters,
        text_bytes=before.text_bytes + source.text_bytes,
        left_out=dict(Counter(before.left_out) + Counter(source.left_out)),
        changed=dict(Counter(before.changed) + Counter(source.changed)),
    )


def _options_of_run(members: Sequence[tuple[MergeInput, Sidecar]]) -> dict[str, Any]:
    """Return the options of a dataset, or of a run's shards, with the number of shards if the contents depend on it.

    Raises:
        UserError: the shards have different options.
    """
    first = members[0][1].options
    if members[0][0].shard is None:
        return first
    shared = {name: value for name, value in first.items() if name != "shard"}
    for part, sidecar in members[1:]:
        for name in sorted({*shared, *sidecar.options} - {"shard"}):
            if shared.get(name) != sidecar.options.get(name):
                raise UserError(
                    f"{part.prefix}{JSON}: made with {name} {sidecar.options.get(name, 'at its default')}, but "
                    f"{members[0][0].prefix} with {shared.get(name, 'its default')}: shards of one run have the same "
                    "options; preprocess them again"
                )
    # Duplicates that were found in all parts are those of one machine.
    within = set(_WITHIN_A_SHARD) - ({"dedup"} if shared.pop("exclude_documents", False) else set())
    return {**shared, "shards": len(members)} if not within.isdisjoint(shared) else shared
