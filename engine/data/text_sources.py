"""Decide which sources of a run are text, and describe how tools/preprocess.py makes datasets from them.

The engine does not tokenize. It runs tools/preprocess.py as a process of its own, which writes to a cache of datasets.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.settings import DataConfig, SourceConfig
from ..errors import UserError
from ..files.paths import is_url
from .index_format import dataset_prefix

CACHE_VARIABLE = "RETEMPER_CACHE"
TRAIN, VALID = "train", "valid"
_NOT_DIVISIBLE = frozenset(["dedup", "shuffle", "max_documents"])
"""Options of tools/preprocess.py that need the whole corpus at once."""
_NOT_FOR_RUNS = frozenset(
    [
        *("input", "json_key", "hf_split", "hf_subset", "split", "tokenizer", "model", "list_inputs"),
        *("output_prefix", "cache_folder", "report", "overwrite", "shard", "signatures", "exclude_documents"),
        *("to_jsonl", "bins", "bin_weights"),
    ]
)
"""Options of tools/preprocess.py that a run sets itself, or that make something else than one dataset."""


@dataclass(frozen=True)
class TextSource:
    """Text that becomes a dataset, or two: for training and for validation.

    Args:
        key: setting that names it, for errors.
        path: file, folder, pattern or URL.
        settings: keys of ``for_text`` of a :class:`SourceConfig` or :class:`ValidationConfig`.
    """

    key: str
    path: str
    settings: Mapping[str, Any]

    @property
    def is_divisible(self) -> bool:
        """Return whether parts of the text, joined, give the same dataset."""
        return _NOT_DIVISIBLE.isdisjoint(_underscored(self.settings.get("preprocess") or {}))

    def arguments(self) -> list[str]:
        """Return options of tools/preprocess.py for this text.

        Raises:
            UserError: a setting is impossible for this text.
        """
        words = ["--input", self.path]
        for key, option in (("split", "hf-split"), ("subset", "hf-subset")):
            if (value := self.settings.get(key)) is not None:
                if not self.path.startswith("hf://"):
                    raise UserError(f"{self.key}.{key} is {value}, but {self.path} is not a dataset of the Hub (hf://)")
                words += [f"--{option}", value]
        if (column := self.settings.get("column")) is not None:
            words += ["--json-key", column]
        if fraction := self.settings.get("validation_fraction"):
            words += ["--split", f"{TRAIN}={1 - fraction:.12g},{VALID}={fraction:.12g}"]
        return words + self._more_options()

    def _more_options(self) -> list[str]:
        words: list[str] = []
        for name, value in _underscored(self.settings.get("preprocess") or {}).items():
            if name in _NOT_FOR_RUNS:
                raise UserError(f"{self.key}.preprocess sets {name}, which is not possible in a run; remove it")
            flag = name.replace("_", "-")
            if value is False and name == "append_eod":
                words.append("--no-append-eod")
            elif value is True:
                words.append(f"--{flag}")
            elif value is not None and value is not False:  # 0 is a value
                words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
        return words


def _underscored(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in options.items()}


def is_text(path: str) -> bool:
    """Return whether ``path`` is text and not the prefix of a dataset. A path that does not exist is a dataset's."""
    if is_url(path):
        return True
    prefix = dataset_prefix(path)
    if os.path.lexists(f"{prefix}.idx") or os.path.lexists(f"{prefix}.bin"):
        return False
    return os.path.exists(path) or bool(glob.has_magic(path) and glob.glob(path, recursive=True))


def text_sources(data: DataConfig) -> list[TextSource]:
    """Return the sources of a run that are text, each once.

    Raises:
        UserError: a dataset has settings that only text has.
    """
    found: dict[str, TextSource] = {}
    for key, source in _sources(data):
        if is_text(source.path):
            found.setdefault(source.identity, TextSource(key, source.path, source.for_text))
        elif source.for_text:
            raise _not_text(key, source.path, source.for_text)
    for name, path in data.validation_paths.items():
        key, entry = f"data.validation.{name}", data.validation[name]
        settings = {} if isinstance(entry, str) else entry.for_text
        if is_text(path):
            found[f"validation {name}"] = TextSource(key, path, settings)
        elif settings:
            raise _not_text(key, path, settings)
    return list(found.values())


def with_datasets(data: DataConfig, prefixes: Mapping[str, Mapping[str, str]]) -> DataConfig:
    """Return ``data`` with datasets in place of text. Parts of sources that are held out are the first validation sets.

    Args:
        prefixes: by :attr:`TextSource.key`: the prefixes by side, ``train`` and ``valid``; without a validation part
            the side is empty.
    """
    held_out: dict[str, str] = {}
    by_name = {source.identity: prefixes[key] for key, source in _sources(data) if key in prefixes}

    def resolved(source: SourceConfig) -> SourceConfig:
        sides = by_name.get(source.identity)
        if sides is None:
            return source
        if VALID in sides:
            held_out[source.identity] = sides[VALID]
        plain: dict[str, Any] = {key: getattr(SourceConfig(""), key) for key in source.for_text}
        return replace(source, path=sides.get(TRAIN) or sides[""], name=source.identity, **plain)

    train = [resolved(source) for source in data.train]
    stages = [replace(stage, train=[resolved(source) for source in stage.train]) for stage in data.stages]
    named = {
        name: prefixes.get(f"data.validation.{name}", {}).get("", path) for name, path in data.validation_paths.items()
    }
    return replace(data, train=train, stages=stages, validation={**held_out, **named}, cache_folder=None)


def _not_text(key: str, path: str, settings: Mapping[str, Any]) -> UserError:
    [name, *_] = settings
    return UserError(
        f"{key}.{name} is for text, but {path} is not text that exists: it names a dataset; remove {name}, or correct "
        "the path"
    )


def cache_folder(data: DataConfig) -> Path:
    """Return the folder of datasets made from text."""
    named = data.cache_folder or os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path("~/.cache/retemper").expanduser()


def _sources(data: DataConfig) -> Iterator[tuple[str, SourceConfig]]:
    mixtures = [(f"data.stages[{number}].train", stage.train) for number, stage in enumerate(data.stages)]
    for key, sources in mixtures or [("data.train", data.train)]:
        for place, source in enumerate(sources):
            yield f"{key}[{place}]", source
