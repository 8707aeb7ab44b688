"""What a run folder must be, whatever has happened to the run: compared with an undisturbed run, bit for bit.

Tensors are read by the safetensors library and files hashed here, so that the program does not judge itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file

COMPLETE = re.compile(r"^step-(\d{8})$")
TEMPORARY = re.compile(r"^\.step-\d{8,}\.[0-9a-f]{32}\.tmp$")
_RECORDED = ("step", "tokens", "evaluation", "loss", "perplexity", "learning_rate", "grad_norm", "skipped_steps")
"""What does not depend on the machine's speed."""
_PLACE = ("step", "consumed_samples", "consumed_tokens", "sample_order", "datasets", "evaluation", "best", "final")
"""Of a manifest: what a checkpoint of some step must say, whenever it was made."""


@dataclass(frozen=True)
class Reference:
    """The undisturbed run."""

    curve: list[dict[str, Any]]
    fingerprints: dict[int, dict[str, str]]
    """Of the checkpoint of every step: a hash of every tensor, by name."""
    places: dict[int, dict[str, Any]]
    samples_per_step: int

    @property
    def last_step(self) -> int:
        """At which the budget is used up."""
        return max(self.fingerprints)


@dataclass
class Rest:
    """A run folder at rest."""

    complete: list[int] = field(default_factory=list)
    """Steps of the complete checkpoints that nobody has damaged."""
    best: int | None = None
    """Step of the best evaluation, as the newest of them says."""
    problems: list[str] = field(default_factory=list)

    @property
    def newest(self) -> int | None:
        """The step from which a run goes on."""
        return self.complete[-1] if self.complete else None


def read_reference(run_folder: Path, samples_per_step: int) -> Reference:
    """An undisturbed run that has kept the checkpoints of all steps."""
    folders = {_step_of(path): path for path in _checkpoints(run_folder)}
    return Reference(
        curve=curve(run_folder)[0],
        fingerprints={step: fingerprints(path) for step, path in folders.items()},
        places={step: _place(path) for step, path in folders.items()},
        samples_per_step=samples_per_step,
    )


def curve(run_folder: Path) -> tuple[list[dict[str, Any]], bool]:
    """The records of ``metrics.jsonl`` without what depends on the machine, and whether the last line is torn."""
    path = run_folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    torn = lines.pop() != ""
    return [{key: value for key, value in json.loads(line).items() if key in _RECORDED} for line in lines], torn


def fingerprints(checkpoint: Path) -> dict[str, str]:
    """A hash of dtype, shape and bytes of every tensor, by name, read by the safetensors library."""
    table = json.loads((checkpoint / "tensors.json").read_text())
    files = [load_file(checkpoint / name) for name in table["files"]]
    tensors = {}
    for name, item in table["tensors"].items():
        tensors[name] = torch.empty(item["shape"], dtype=files[item["parts"][0][0]][name].dtype)
        for file, offsets, sizes in item["parts"]:
            place = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
            tensors[name][place] = files[file][name]
    return {
        name: hashlib.sha256(
            f"{tensor.dtype} {list(tensor.shape)}".encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in tensors.items()
    }


def at_rest(run_folder: Path, reference: Reference, touched: set[str]) -> Rest:
    """Look at a run folder that no process writes to.

    Args:
        run_folder: the folder.
        reference: what it must agree with, as far as it has come.
        touched: names in ``checkpoints/`` that the harness has put there or damaged, and that do not count.
    """
    rest = Rest()
    for path in _checkpoints(run_folder):
        if path.name in touched:
            continue
        rest.complete.append(_step_of(path))
        rest.problems += wrong_checkpoint(path, reference)
        with contextlib.suppress(OSError, ValueError):  # said by the line above
            rest.best = json.loads((path / "manifest.json").read_text())["best"].get("step")
    for path in (run_folder / "checkpoints").iterdir() if (run_folder / "checkpoints").is_dir() else []:
        known = COMPLETE.match(path.name) or TEMPORARY.match(path.name) or path.name in touched
        if not known:
            rest.problems.append(f"{path.name} in checkpoints/: nobody knows why")
    try:
        records, _ = curve(run_folder)
    except ValueError as error:
        rest.problems.append(f"metrics.jsonl: a line that is no JSON: {error}")
        return rest
    if records != reference.curve[: len(records)]:
        rest.problems.append(f"metrics.jsonl: {_first_difference(records, reference.curve)}")
    return rest


def wrong_checkpoint(path: Path, reference: Reference) -> list[str]:
    """What is wrong with a checkpoint that calls itself complete."""
    step = _step_of(path)
    manifest = path / "manifest.json"
    if not manifest.is_file():
        return [f"{path.name} has no manifest"]
    try:
        content = json.loads(manifest.read_text())
    except ValueError as error:
        return [f"{path.name}/manifest.json: {error}"]
    problems = []
    for name, record in content["files"].items():
        data = (path / name).read_bytes() if (path / name).is_file() else None
        if data is None or len(data) != record["bytes"] or xxhash.xxh3_128_hexdigest(data) != record["xxh3_128"]:
            problems.append(f"{path.name}/{name} is not what its manifest says")
    if problems:
        return problems
    if step not in reference.fingerprints:
        return [f"{path.name}: the undisturbed run has no such step"]
    if content["consumed_samples"] != step * reference.samples_per_step:
        problems.append(f"{path.name}: {content['consumed_samples']} samples consumed in {step} steps")
    place = _place(path)
    expected = reference.places[step]
    if not place["evaluation"]:
        # A run that is asked to stop saves without an evaluation that is due, and with the best of the step before.
        expected = expected | {"evaluation": {}, "best": reference.places.get(step - 1, {}).get("best", {})}
    for key, value in place.items():
        if value != expected.get(key):
            problems.append(f"{path.name}: {key} is {value}, undisturbed {expected.get(key)}")
    theirs = fingerprints(path)
    if theirs.keys() != reference.fingerprints[step].keys():
        problems.append(f"{path.name}: has other tensors than undisturbed")
    different = [name for name, value in theirs.items() if value != reference.fingerprints[step].get(name)]
    if different:
        problems.append(f"{path.name}: {len(different)} tensors differ from undisturbed, such as {different[0]}")
    return problems


def finished(run_folder: Path, reference: Reference, touched: set[str]) -> list[str]:
    """What is wrong with the folder of a run that has come to its end."""
    problems = list(at_rest(run_folder, reference, touched).problems)
    records, torn = curve(run_folder)
    if torn or records != reference.curve:
        problems.append(f"metrics.jsonl of the finished run: {_first_difference(records, reference.curve)}")
    last = run_folder / "checkpoints" / f"step-{reference.last_step:08d}"
    if not last.is_dir():
        problems.append(f"{last.name} is missing in the finished run")
    leftovers = [path.name for path in (run_folder / "checkpoints").iterdir() if TEMPORARY.match(path.name)]
    if leftovers:
        problems.append(f"leftovers in the finished run: {leftovers}")
    return problems


def lost(before: Rest, after: Rest, keep_last: int) -> list[str]:
    """Checkpoints that were sound before, and that retention must not have removed."""
    newest = sorted({*before.complete, *after.complete})[-keep_last:]
    wanted = {*newest, *({after.best} & set(before.complete) if after.best is not None else ())}
    return [f"step-{step:08d} is gone, and was to be kept" for step in sorted(wanted - set(after.complete))]


def tree(folder: Path) -> dict[str, str]:
    """Everything below ``folder`` by path, with content or target: to see that nothing was touched."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file() and name != ".lock":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir():
            found[name] = "folder"
    return found


def _checkpoints(run_folder: Path) -> list[Path]:
    folder = run_folder / "checkpoints"
    found = [path for path in folder.iterdir() if COMPLETE.match(path.name)] if folder.is_dir() else []
    return sorted(path for path in found if path.is_dir())


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _place(checkpoint: Path) -> dict[str, Any]:
    content = json.loads((checkpoint / "manifest.json").read_text())
    return {key: content[key] for key in _PLACE if key in content}


def _first_difference(records: list[dict[str, Any]], expected: list[dict[str, Any]]) -> str:
    for number, record in enumerate(records):
        if number >= len(expected):
            return f"line {number + 1} of {len(expected)}: {record}"
        if record != expected[number]:
            return f"line {number + 1} is {record}, undisturbed {expected[number]}"
    return f"{len(records)} of {len(expected)} records"
