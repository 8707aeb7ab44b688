"""Small runs with checkpoints, made without training; and what ranks are asked to do with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import old_format
import torch
from torch import Tensor

from retemper.engine.errors import UserError
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.weights.checkpoint import manifest as manifests
from retemper.engine.weights.checkpoint import verify_ranks
from retemper.engine.weights.checkpoint.assets import HfAssets
from retemper.engine.weights.checkpoint.manifest import Manifest
from retemper.engine.weights.checkpoint.store import CheckpointStore
from retemper.engine.weights.checkpoint.tensors import load_tensors, stored_tensors
from retemper.engine.weights.checkpoint.verify import Damage
from retemper.engine.weights.damage import TABLE_FILE

ASSETS = HfAssets({"config.json": b'{"model_type": "llama"}\n', "tokenizer.json": b'{"version": "1.0"}\n' * 50})
SAMPLE_ORDER = {
    "start": 0,
    "cursors": {},
    "stages": [{"stop": None, "shares": [{"name": "books", "weight": 1.0, "max_samples": None}]}],
}


def tensors_at(step: int) -> dict[str, Tensor]:
    """What the checkpoint of ``step`` holds: several names, shapes and dtypes."""
    return {
        "model.embed_tokens.weight": torch.arange(48.0).reshape(12, 4) + step,
        "model.norm.weight": torch.full((7,), float(step), dtype=torch.bfloat16),
        "optimizer.step.model.norm.weight": torch.tensor(float(step)),
    }


def manifest_at(step: int) -> Manifest:
    """A manifest with something in every part."""
    return Manifest(
        kind="training",
        step=step,
        consumed_samples=8 * step,
        consumed_tokens=256 * step,
        sample_order=SAMPLE_ORDER,
        datasets={"books": {"path": "books", "tokens": 9000, "hash": "ab", "mask": None}},
        evaluation={"validation": 5.0 - step / 100},
        best={"step": 4, "name": "validation", "loss": 4.96},
        config={
            "seed": 7,
            "checkpoint": {"keep_last": 2, "keep_every": 8, "keep_best": True},
            "data": {"shuffle": "windows"},
        },
        health={"skipped_steps": 1, "in_a_row": 0, "losses": [1.0]},
        layout={"shard": 1},
    )


def save(ranks: Ranks, run_folder: Path, *steps: int) -> None:
    """One checkpoint after another, all of which stay."""
    store = CheckpointStore(run_folder, ranks, keep_last=100, keep_best=False)
    for step in steps:
        store.save(tensors_at(step), ASSETS, manifest_at(step))


def resolve(ranks: Ranks, run_folder: Path, resume: str = "auto") -> tuple[str, list[str]]:
    """(name of the checkpoint, or what is refused; lines for the log)."""
    store = CheckpointStore(run_folder, ranks, keep_last=3, keep_best=False)
    try:
        found = store.resolve(resume)
    except UserError as error:
        return str(error), []
    return found[0].name if found else "fresh", store.quarantine()


def resolve_where_rank_1_sees_damage(ranks: Ranks, run_folder: Path) -> tuple[str, list[str]]:
    """As :func:`resolve`, with a node whose view of the file system is stale."""
    find = verify_ranks.find_damage

    def find_damage(folder, share=(0, 1), only=None, on_bytes=None):
        manifest, damage = find(folder, share, only)
        return manifest, damage + ([Damage("tensors.json", f"{folder}/tensors.json: missing")] if ranks.rank else [])

    verify_ranks.find_damage = find_damage
    try:
        return resolve(ranks, run_folder)
    finally:
        verify_ranks.find_damage = find


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All that ``folder`` holds."""
    tensors = {name: torch.empty(item.shape, dtype=item.dtype) for name, item in stored_tensors(folder).items()}
    load_tensors(folder, tensors, distributed=False)
    return tensors


def rewrite_manifest(folder: Path, change, version: int = manifests.FORMAT_VERSION) -> None:
    """Let ``change`` edit the manifest's content, and seal it again; or make it one of format 1."""
    path = folder / "manifest.json"
    if version == 1 and (folder / TABLE_FILE).exists():
        old_format.rewrite(folder)
    content = json.loads(path.read_text())
    content.pop("manifest_xxh3_128")
    if version == 1:
        for key in ("files", "versions", "layout", "final", "health"):
            content.pop(key, None)
        content["format_version"] = 1
    change(content)
    path.write_text(json.dumps(content, indent=2) if version == 1 else manifests.with_checksum(content))


def copy_of(run_folder: Path, target: Path) -> Path:
    """A copy that may be damaged."""
    shutil.copytree(run_folder, target)
    return target
