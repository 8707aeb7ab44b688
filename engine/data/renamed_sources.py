"""Keep a training source's place in the data if its dataset has been renamed or moved.

A source's name is the key of its sample order and of its number of used samples. Moving or renaming the files of a
dataset changes its default name, and the run would start it from the beginning.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config.settings import DataConfig, SourceConfig
from .sidecar import Sidecar


def keep_names(config: DataConfig, datasets: Mapping[str, Mapping[str, Any]]) -> tuple[DataConfig, list[str]]:
    """Give renamed sources the names that they have in a checkpoint.

    Args:
        config: of the run that continues from the checkpoint.
        datasets: fingerprints of the checkpoint's training sources, by name.

    Returns:
        The configuration, and lines for the log.

    Raises:
        UserError: the sidecar of a source cannot be read.
    """
    mixtures = [stage.train for stage in config.stages] or [config.train]
    sources = {source.identity: source for mixture in mixtures for source in mixture}
    gone = {name: record for name, record in datasets.items() if name not in sources}
    former: dict[str, str] = {}
    lines = []
    for name, source in sources.items():
        matches = [other for other, record in gone.items() if _is(source, record)] if name not in datasets else []
        if len(matches) == 1 and matches[0] not in former.values():
            former[name] = matches[0]
            lines.append(
                f"data        {source.path} is the source {matches[0]} of the checkpoint, and continues from "
                "its position"
            )
        elif matches:
            lines.append(
                f"note: {source.path} has the same data as {' and '.join(matches)} of the checkpoint, and begins with "
                "its first sample; to continue one of them, give the source its name"
            )

    def named(mixture: list[SourceConfig]) -> list[SourceConfig]:
        return [replace(source, name=former.get(source.identity, source.name)) for source in mixture]

    if not former:
        return config, lines
    stages = [replace(stage, train=named(stage.train)) for stage in config.stages]
    return replace(config, train=named(config.train), stages=stages), lines


def _is(source: SourceConfig, record: Mapping[str, Any]) -> bool:
    """Return whether ``source`` is the dataset of ``record`` in a checkpoint, by the hash of its bytes, or else by its
    path.
    """
    sidecar = Sidecar.read(source.path)
    if sidecar is not None and record.get("hash"):
        masks = {sidecar.mask_xxh3_128 or None, record.get("mask") or None}
        return (sidecar.bin_xxh3_128, sidecar.tokens) == (record["hash"], record["tokens"]) and len(masks) == 1
    return os.path.realpath(source.path) == os.path.realpath(str(record.get("path", "")))
