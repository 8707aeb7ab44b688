"""What happens to a run folder at rest: damaged files, forged ones, strays, and times that have jumped.

Every function takes the run folder, parameters and a folder for the canary; it returns a :class:`Done`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from retemper.engine.files.hashing import record_file
from retemper.engine.weights.checkpoint.manifest import with_checksum

FILES = ("rank-00000.safetensors", "rank-00001.safetensors", "tensors.json", "hf/config.json", "manifest.json")
"""Every file of a checkpoint of two ranks whose model has no tokenizer."""
FORMS = ("flip", "truncate", "delete", "empty", "append", "zero", "older", "folder")
"""Kinds of damage to a file: see :func:`damage_file`."""


@dataclass
class Done:
    """What was done."""

    what: str
    touched: set[str] = field(default_factory=set)
    """Names in ``checkpoints/`` that do not count any more."""
    named: str = ""
    """What the log must name; empty where nothing is to be said."""


def checkpoints(run_folder: Path) -> list[Path]:
    """Complete ones, oldest first."""
    return sorted(path for path in (run_folder / "checkpoints").glob("step-????????") if path.is_dir())


def damage_file(path: Path, form: str, place: float, older: Path | None = None) -> str:
    """Damage one file; returns what was done.

    Forms: flip (one bit), truncate, delete, empty, append (a byte), zero (a block of up to 512 bytes), older (the same
    file of another checkpoint), folder (a folder in its place).

    Args:
        path: the file.
        form: what is done.
        place: where in the file, in [0, 1).
        older: the same file of another checkpoint.
    """
    data = path.read_bytes()
    position = int(place * len(data))
    if form == "flip":
        bit = 1 << int(place * 8e6) % 8
        path.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
    elif form == "truncate":
        path.write_bytes(data[:position])
    elif form == "append":
        path.write_bytes(data + b"\0")
    elif form == "zero":
        zeros = b"\0" * 512
        changed = data[:position] + zeros[: len(data) - position] + data[position + 512 :]
        # Where there were zeros already, nothing would be damaged.
        path.write_bytes(changed if changed != data else bytes([data[0] ^ 1]) + data[1:])
    elif form == "older":
        assert older is not None
        same = older.read_bytes() == data
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:] if same else older.read_bytes())
    else:
        path.unlink()
        if form == "folder":
            path.mkdir()
        elif form == "empty":
            path.touch()
    return f"{form} at {position} of {len(data)}"


def damage(run_folder: Path, name: str, form: str, place: float, which: str = "newest", **_: Any) -> Done:
    """Damage the file ``name`` of the newest checkpoint, or of all of them."""
    folders = checkpoints(run_folder)
    chosen = folders if which == "all" else folders[-1:]
    said = [damage_file(path / name, form, place, folders[0] / name if path != folders[0] else None) for path in chosen]
    newest = chosen[-1].name
    return Done(f"{newest}/{name}: {said[-1]}", {path.name for path in chosen}, f"{newest}/{name}")


class _Evil:
    """Makes the canary file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"echo unpickled >> '{self.canary}'",)


def pickle_in(run_folder: Path, where: str, canary: Path, **_: Any) -> Done:
    """A pickle that makes the file ``canary``: in place of a file, with or without a manifest that fits, or beside.

    ``where``: table, manifest, config; sealed table, sealed tensors (hashes in the manifest fit); stray.
    """
    evil = pickle.dumps(_Evil(canary))
    newest = checkpoints(run_folder)[-1]
    if where == "stray":
        names = ("latest", "latest.pkl", "step-00000099.pt", ".metadata")
        for name in names:
            (newest.parent / name).write_bytes(evil)
        return Done("pickles beside the checkpoints", set(names))
    kind = where.removeprefix("sealed ")
    names = {"table": "tensors.json", "manifest": "manifest.json", "config": "hf/config.json"}
    file = newest / names.get(kind, "rank-00000.safetensors")
    if kind == "tensors":
        torch.save(_Evil(canary), file)
    else:
        file.write_bytes(evil)
    if where.startswith("sealed"):
        seal(newest)
    return Done(f"{where} of {newest.name} is a malicious pickle", {newest.name}, newest.name)


def seal(checkpoint: Path) -> None:
    """Make the manifest fit the files as they are now, as a forger would."""
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text())
    content.pop("manifest_xxh3_128")
    content["files"] = {name: dataclasses.asdict(record_file(checkpoint / name)) for name in content["files"]}
    path.write_text(with_checksum(content))


def stray(run_folder: Path, what: str, seed: int, **_: Any) -> Done:
    """Something in ``checkpoints/`` that the program has not put there."""
    folder, noise = run_folder / "checkpoints", random.Random(seed).randbytes(200)
    name = _STRAYS[what](folder, noise)
    temporary = name.startswith(".step-") and (folder / name).is_dir() and not (folder / name).is_symlink()
    return Done(f"stray: {what}", set() if temporary else {name})


def _file(name: str) -> Callable[[Path, bytes], str]:
    def put(folder: Path, noise: bytes) -> str:
        (folder / name).write_bytes(noise)
        return name

    return put


def _link(name: str, target: str) -> Callable[[Path, bytes], str]:
    def put(folder: Path, noise: bytes) -> str:
        (folder / name).symlink_to(target)
        return name

    return put


def _folder(name: str) -> Callable[[Path, bytes], str]:
    def put(folder: Path, noise: bytes) -> str:
        (folder / name).mkdir()
        (folder / name / "rank-00000.safetensors").write_bytes(noise)
        return name

    return put


def _copy(name: str) -> Callable[[Path, bytes], str]:
    def put(folder: Path, noise: bytes) -> str:
        shutil.copytree(sorted(folder.glob("step-????????"))[-1], folder / name)
        return name

    return put


_STRAYS: dict[str, Callable[[Path, bytes], str]] = {
    "garbage in latest": _file("latest"),
    "latest -> itself": _link("latest", "latest"),
    "latest -> /": _link("latest", "/"),
    "a file with a checkpoint's name": _file("step-00000099"),
    "a broken link with a checkpoint's name": _link("step-00000098", "nowhere"),
    "a folder with a word for a step": _folder("step-newest"),
    "a copy that somebody has made": _copy("step-00000097 (copy)"),
    "a copy called damaged": _copy("step-00000096.damaged"),
    "a folder that a killed run has left": _folder(f".step-00000095.{'0' * 32}.tmp"),
    "lost+found": _folder("lost+found"),
}
STRAYS = tuple(_STRAYS)


def empty_newer(run_folder: Path, **_: Any) -> Done:
    """A folder with the name of a newer checkpoint and nothing in it."""
    folder = run_folder / "checkpoints" / "step-00000094"
    folder.mkdir()
    return Done("an empty step-00000094", {folder.name}, folder.name)


def times(run_folder: Path, days: float, shuffle: int, **_: Any) -> Done:
    """Modification times of everything, as clocks that jumped would have left them, in no order."""
    noise = random.Random(shuffle)
    for path in [*run_folder.rglob("*"), run_folder]:
        moment = time.time() + days * 86400 * noise.random()
        os.utime(path, (moment, moment), follow_symlinks=False)
    return Done(f"modification times up to {days:+.0f} days off")


def metrics(run_folder: Path, form: str, place: float, **_: Any) -> Done:
    """A torn line at the end of ``metrics.jsonl``, zeros, or noise, as after a power cut."""
    path = run_folder / "metrics.jsonl"
    line = path.read_bytes().splitlines()[-1]
    ending = {"torn": line[: int(place * len(line))], "zeros": b"\0" * 300, "noise": b"\xff\xfe{]\n"}[form]
    with path.open("ab") as file:
        file.write(ending)
    return Done(f"metrics.jsonl ends with {form}")


def vanish(run_folder: Path, form: str, **_: Any) -> Done:
    """All checkpoints are gone, as when their disk is not mounted: moved, a link to nowhere, or an empty folder."""
    folder = run_folder / "checkpoints"
    folder.rename(run_folder / "elsewhere")
    if form == "link":
        folder.symlink_to("/unmounted/checkpoints")
    elif form == "empty":
        folder.mkdir()
    return Done(f"checkpoints/ has vanished: {form}", named="has written checkpoints up to step")


def archive(run_folder: Path, **_: Any) -> Done:
    """The oldest checkpoint is moved to an archive, and a link is left in its place."""
    oldest, target = checkpoints(run_folder)[0], run_folder / "archive"
    target.mkdir(exist_ok=True)
    oldest.rename(target / oldest.name)
    oldest.symlink_to(target / oldest.name)
    return Done(f"{oldest.name} is a link to an archive")


DAMAGES: dict[str, Callable[..., Done]] = {
    "file": damage,
    "pickle": pickle_in,
    "stray": stray,
    "empty_newer": empty_newer,
    "times": times,
    "metrics": metrics,
    "vanish": vanish,
    "archive": archive,
}
