"""Write, read and check ``manifest.json``, which describes a checkpoint. It is written last and marks it complete.

It holds size and hash of every other file, and a hash of itself. Manifests of format 1 had neither.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import xxhash

from ...errors import UserError
from ...files.code import PACKAGE, code_files, digest
from ...files.hashing import FileRecord, record_file
from ...files.regular import read_regular
from ..damage import DamagedCheckpoint

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 3
WITH_DCP, WITHOUT_HASHES = 2, 1
"""Former formats that are still read. In both, PyTorch's distributed checkpoint (DCP) wrote the tensors. The manifest
of the second lists no files."""
_CHECKSUM = "manifest_xxh3_128"
_OPTIONAL = {"emergency", "trackers", "start_evaluation", "early_stopping", "base", "router_load"}
"""Fields that are written only if they are not empty: older manifests do not have them."""


@functools.cache
def code_versions() -> dict[str, str]:
    """Return a hash of the package's Python files, and the versions of PyTorch and Python.

    Cached, and first called when a program starts: its files may be edited while it runs.
    """
    import torch  # only what writes checkpoints needs it, not what reads manifests

    return {"code": digest(code_files(PACKAGE)), "torch": torch.__version__, "python": platform.python_version()}


@dataclass(frozen=True)
class Manifest:
    """The description of a checkpoint."""

    kind: Literal["training", "converted"]
    """training: with optimizer states and the position in the data; converted: weights only."""
    step: int = 0
    """Optimizer steps made."""
    consumed_samples: int = 0
    """Position in the sample order: samples that were trained on, or skipped by a rollback."""
    consumed_tokens: int = 0
    """Tokens trained on, by which schedules go."""
    final: bool = False
    """Whether the run has ended here: its token budget was used up, or it stopped early."""
    sample_order: dict[str, Any] = field(default_factory=dict)
    """See :meth:`retemper.engine.data.curriculum.Curriculum.state`."""
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Fingerprint of every training source: see :class:`retemper.engine.data.catalog.Catalog`."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """Losses of the validation sets at this step."""
    start_evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Losses before the first step, with which later ones are compared, by validation set: ``{"measured", "losses"}``.
    ``measured`` is the fingerprint of the evaluated data; ``losses`` are those of the set and of its sources."""
    best: dict[str, Any] = field(default_factory=dict)
    """Best evaluation so far: ``{"step", "name", "loss"}``."""
    early_stopping: dict[str, Any] = field(default_factory=dict)
    """State of early stopping: ``{"step", "name", "loss", "measured", "evaluations"}``; see
    :class:`retemper.engine.early_stopping.EarlyStopping`."""
    health: dict[str, Any] = field(default_factory=dict)
    """See :meth:`retemper.engine.guards.step_guard.StepGuard.state`."""
    emergency: str = ""
    """The failure of the next step, if the checkpoint was written because of it."""
    trackers: dict[str, str] = field(default_factory=dict)
    """Ids of the run in its trackers, by name of the tracker: a resume continues their curves."""
    base: dict[str, str] = field(default_factory=dict)
    """``folder`` and content ``hash`` of the base of an adapter, whose frozen weights the checkpoint does not contain;
    see :mod:`retemper.engine.weights.base_identity`."""
    router_load: dict[str, str] = field(default_factory=dict)
    """Tokens of each expert in the last step and in the window of some steps, by number of the layer; see
    :meth:`retemper.engine.parallel.router_losses.RouterLosses.state_dict`."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration of the run, including its seed."""
    world_size: int = 1
    layout: dict[str, int] = field(default_factory=dict)
    """Ranks along every axis of the mesh."""
    retemper_version: str = ""
    versions: dict[str, str] = field(default_factory=code_versions)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """``{"bytes", "xxh3_128"}`` of every other file, by its path in the folder. Empty in format 1."""
    format_version: int = FORMAT_VERSION

    @property
    def records(self) -> dict[str, FileRecord]:
        """:attr:`files` as records."""
        return {name: FileRecord(**record) for name, record in self.files.items()}


def write_manifest(folder: Path, manifest: Manifest, hashed: Mapping[str, FileRecord] | None = None) -> None:
    """Write ``manifest`` into ``folder``, with the records of all files there.

    Args:
        folder: a checkpoint that is complete except for its manifest.
        manifest: its description.
        hashed: files that were hashed while they were written. Others are read and hashed now.

    Raises:
        UserError: a file is missing, or has another size than was written.
    """
    records = dict(hashed or {})
    present = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for name, record in records.items():
        size = present[name].stat().st_size if name in present else None
        if size != record.bytes:
            raise UserError(
                f"{folder / name}: {'missing' if size is None else f'{size:,} bytes'} after {record.bytes:,} bytes "
                "were written; put run_folder on a file system that all nodes share, with space left"
            )
    records |= {name: record_file(path) for name, path in present.items() if name not in records}
    records.pop(MANIFEST_FILE, None)
    files = {name: dataclasses.asdict(records[name]) for name in sorted(records)}
    content = dataclasses.asdict(dataclasses.replace(manifest, files=files))
    content = {key: value for key, value in content.items() if value or key not in _OPTIONAL}
    (folder / MANIFEST_FILE).write_text(with_checksum(content), encoding="utf-8")


def with_checksum(content: dict[str, Any]) -> str:
    """Return the text of a manifest: ``content`` and its hash."""
    bare = json.dumps(content, indent=2, allow_nan=False)
    whole = {**content, _CHECKSUM: xxhash.xxh3_128_hexdigest(bare.encode())}
    return json.dumps(whole, indent=2, allow_nan=False) + "\n"


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of the checkpoint ``folder``.

    Raises:
        DamagedCheckpoint: it is missing or damaged.
        UserError: there is no such folder, or it has an unknown format.
    """
    path = Path(folder) / MANIFEST_FILE
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such checkpoint folder")
    try:
        text = read_regular(path).decode("utf-8")
        content = json.loads(text)
    except FileNotFoundError:
        raise DamagedCheckpoint(
            f"{folder}: not a complete checkpoint, {MANIFEST_FILE} is missing; {_what_to_name(Path(folder))}"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: cannot be read as JSON: {error}") from None
    return _checked(content, text, path)


def _checked(content: Any, text: str, path: Path) -> Manifest:
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise DamagedCheckpoint(f"{path}: damaged, format_version is {version!r}")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version is {version}, this program reads {WITHOUT_HASHES} to {FORMAT_VERSION}; use the "
            "release that wrote it, or a newer one"
        )
    if version == WITHOUT_HASHES:
        # A manifest of format 2 must not be accepted as one of format 1 after a change of one digit.
        unexpected = content.keys() - _names(_EMPTY) | content.keys() & {"files", "versions"}
        content = {"versions": {}, **content}
    else:
        if not _checksum_fits(content, text):
            raise DamagedCheckpoint(f"{path}: damaged, {_CHECKSUM} does not match the content; use another checkpoint")
        del content[_CHECKSUM]
        unexpected = content.keys() ^ _names(_EMPTY) - (_OPTIONAL - content.keys())
    if unexpected or "kind" not in content:
        raise DamagedCheckpoint(f"{path}: damaged, unexpected or missing keys {sorted(unexpected)}")
    for key, value in content.items():
        kind = type(getattr(_EMPTY, key))
        fits = type(value) is kind and (kind is not int or _is_count(value))
        if not fits or not _NESTED.get(key, _anything)(value):
            raise DamagedCheckpoint(f"{path}: damaged, {key} is {_short(value)}; use another checkpoint")
    return Manifest(**content)


def _checksum_fits(content: dict[str, Any], text: str) -> bool:
    try:
        return text == with_checksum({key: value for key, value in content.items() if key != _CHECKSUM})
    except (ValueError, RecursionError):  # such as NaN, which is never written
        return False


def _names(manifest: Manifest) -> set[str]:
    return {item.name for item in dataclasses.fields(manifest)}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def _what_to_name(folder: Path) -> str:
    """Return the remedy for a folder that is not a checkpoint."""
    if (folder / "config.json").is_file():
        return f"it is a Hugging Face folder: convert it with checkpoint_convert/hf_to_dcp.py --hf {folder}"
    below = sorted([*folder.glob("step-*/"), *folder.glob("checkpoints/step-*/")])
    if below:
        return f"name one of the checkpoints in it, such as {below[-1]}"
    return "name a folder that the trainer (step-...) or checkpoint_convert/hf_to_dcp.py has written"


# ----------------------------------------------------------------------------------------------------------------------
# The types of a manifest's fields, which the rest of the program relies on.

Check = Callable[[Any], bool]


def _anything(value: Any) -> bool:
    return True


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and (abs(value) < 2**63 or math.isinf(value))


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 2**63


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _table(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(check(item) for item in value.values())


def _list(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(check(item) for item in value)


def _record(required: dict[str, Check], optional: dict[str, Check] | None = None) -> Check:
    checks = {**required, **(optional or {})}

    def check(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and required.keys() <= value.keys()
            and all(checks.get(key, _anything)(item) for key, item in value.items())
        )

    return check


def _nothing_or(check: Check) -> Check:
    return lambda value: value == {} or check(value)


_SHARE = _record({"name": _is_text}, {"weight": _is_weight, "max_samples": _optional(_is_count)})
_STAGE = _record({"stop": _optional(_is_count), "shares": _list(lambda value: _SHARE(value) and len(value) <= 3)})
_PLACE: dict[str, Check] = {"start": _is_count, "cursors": _table(_is_count)}


def _is_sample_order(value: Any) -> bool:
    # Before there were stages, it held the weights of a single one.
    parts: dict[str, Check] = {"weights": _table(_is_weight)} if "weights" in value else {"stages": _list(_STAGE)}
    return _record({**_PLACE, **parts})(value)


_NESTED: dict[str, Check] = {
    "kind": lambda value: value in ("training", "converted"),
    "sample_order": _nothing_or(_is_sample_order),
    "datasets": _table(
        _record(
            {"tokens": _is_count, "hash": _optional(_is_text)},
            {"mask": _optional(_is_text), "bos": _optional(_list(_is_count))},
        ),
    ),
    "config": _record({}, {"training": _record({}, {"sequence_length": lambda value: _is_count(value) and value > 0})}),
    "evaluation": _table(_is_number),
    "best": _nothing_or(_record({"step": _is_count, "name": _is_text, "loss": _is_number})),
    "early_stopping": _nothing_or(
        _record({"step": _is_count, "name": _is_text, "loss": _is_number, "evaluations": _is_count})
    ),
    "health": _record(
        {},
        {
            "skipped_steps": _is_count,
            "in_a_row": _is_count,
            "losses": _list(_is_number),
            "loss_scaling": _record({"scale": _is_number, "steps": _is_count, "overflows": _is_count}),
            "rewinds": _list(_record({"step": _is_count, "to_step": _is_count, "samples": _is_count})),
        },
    ),
    "trackers": _table(_is_text),
    "base": _nothing_or(_record({"folder": _is_text, "hash": _is_text})),
    "router_load": _table(lambda value: _is_text(value) and re.fullmatch(r"\d{1,18}( \d{1,18})*", value) is not None),
    "layout": _table(_is_count),
    "versions": _table(_is_text),
    "files": _table(
        lambda value: (
            _record({"bytes": _is_count, "xxh3_128": _is_text})(value)
            and re.fullmatch("[0-9a-f]{32}", value["xxh3_128"]) is not None
            and len(value) == 2
        )
    ),
}
_EMPTY = Manifest(kind="training", versions={})
