"""A training source under another name keeps its place in the data when it is the same data.

A source's name is the key of its sample order and of the number of samples that it has given. Moving or renaming the
files of a dataset changes its default name; the run would begin with it again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import DataConfig, SourceConfig
from .sidecar import Sidecar


def keep_names(config: DataConfig, datasets: Mapping[str, Mapping[str, Any]]) -> tuple[DataConfig, list[str]]:
    """Give renamed sources the names that a checkpoint knows them by.

    Args:
        config: of the run that continues from the checkpoint.
        datasets: of the checkpoint: fingerprints of its training sources, by name.

    Returns:
        the configuration, and lines for the log.

    Raises:
        UserError: the sidecar of a source cannot be read.
    """
    blends = [stage.train for stage in config.stages] or [config.train]
    sources = {source.identity: source for blend in blends for source in blend}
    gone = {name: record for name, record in datasets.items() if name not in sources}
    former: dict[str, str] = {}
    lines = []
    for name, source in sources.items():
        matches = [other for other, record in gone.items() if _is(source, record)] if name not in datasets else []
        if len(matches) == 1 and matches[0] not in former.values():
            former[name] = matches[0]
            lines.append(f"data        {source.path} is the source {matches[0]} of the checkpoint, and keeps its place")
        elif matches:
            lines.append(
                f"note: {source.path} has the same data as {' and '.join(matches)} of the checkpoint, and begins with "
                "its first sample; to continue one of them, give the source its name"
            )

    def named(blend: list[SourceConfig]) -> list[SourceConfig]:
        return [replace(source, name=former.get(source.identity, source.name)) for source in blend]

    if not former:
        return config, lines
    stages = [replace(stage, train=named(stage.train)) for stage in config.stages]
    return replace(config, train=named(config.train), stages=stages), lines


def _is(source: SourceConfig, record: Mapping[str, Any]) -> bool:
    """Whether ``source`` is the dataset of ``record`` in a checkpoint: by the hash of its bytes, or, where that
    is not known, by its place."""
    sidecar = Sidecar.read(source.path)
    if sidecar is not None and record.get("hash"):
        masks = {sidecar.mask_xxh3_128 or None, record.get("mask") or None}
        return (sidecar.bin_xxh3_128, sidecar.tokens) == (record["hash"], record["tokens"]) and len(masks) == 1
    return os.path.realpath(source.path) == os.path.realpath(str(record.get("path", "")))
