"""Every file of a checkpoint, damaged in every way at many places: found without training, in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from fault_damage import FILES, FORMS, checkpoints, damage_file

from retemper.engine.errors import UserError
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.weights.checkpoint.store import CheckpointStore

_PLACES = {"flip": 40, "truncate": 10, "zero": 10}


def damages(seed: int) -> list[tuple[str, str, float]]:
    """(file, form, place): every file in every form, those that have a place at several, first and last byte too."""
    random, found = Random(f"{seed} sweep"), []
    for name in FILES:
        for form in FORMS:
            count = _PLACES.get(form, 1)
            places = [0.0, 1 - 1e-9, *(random.random() for _ in range(count - 2))] if count > 1 else [0.5]
            found += [(name, form, place) for place in places]
    return found


def sweep(
    run_folder: Path, scratch: Path, seed: int, on_damage: Callable[[], object] = lambda: None
) -> tuple[int, list[str]]:
    """Damage the newest checkpoint of a copy of ``run_folder`` in all of these ways, one after another.

    Returns:
        how many, and those that were not found, or after which another one than that before would have been resumed.
    """
    shutil.copytree(run_folder, scratch)
    newest, wrong = checkpoints(scratch)[-1], []
    sound = scratch / "sound"
    newest.rename(sound)
    *_, before = checkpoints(scratch)
    chosen = damages(seed)
    for name, form, place in chosen:
        shutil.copytree(sound, newest)
        what = damage_file(newest / name, form, place, before / name)
        found = find(scratch)
        if found[0] != before or (name.partition("/")[2] and name not in found[1]) or newest.name not in found[1]:
            wrong.append(f"{name}, {what}: would go on from {found[0]}, saying {found[1] or 'nothing'}")
        for path in (scratch / "checkpoints").glob(f"{newest.name}*"):
            shutil.rmtree(path)
        on_damage()
    shutil.rmtree(scratch)
    return len(chosen), wrong


def find(run_folder: Path) -> tuple[Path | None, str]:
    """From which checkpoint a run would go on, and what it would say of others."""
    store = CheckpointStore(run_folder, Ranks(0, 1, torch.device("cpu")), keep_last=1, keep_best=False)
    try:
        found = store.resolve("auto")
        return found and found[0], "; ".join(store.quarantine())
    except UserError as error:
        return None, str(error)
