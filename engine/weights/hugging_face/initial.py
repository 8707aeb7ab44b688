"""Where a run's first weights are: ``model.initialize_from`` as a folder that every rank can read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from ...errors import UserError
from ...guards.background import run_in_background
from ...parallel.process_group import Ranks
from ..checkpoint.assets import is_hf_folder, newest_of_run
from .hub_download import find_model_folder, is_on_hub
from .model import HfModel, open_hf_model

KEY = "model.initialize_from"


def local_weights(name: str, ranks: Ranks) -> tuple[Literal["folder", "checkpoint"], str]:
    """Find the weights that ``model.initialize_from`` names.

    Args:
        name: a Hugging Face folder, a checkpoint, the folder of a run, or a model on the Hub, which is downloaded.
        ranks: all call this.

    Returns:
        what it is and where: of a run the newest checkpoint, of a model on the Hub the local copy.

    Raises:
        UserError: on every rank, where there are no such weights.
    """
    # The main rank's view counts: ranks must not go different ways.
    kind, folder = ranks.broadcast(ranks.run_on_rank0(lambda: _kind(name)))
    if kind == "repository":
        return "folder", str(_download(name, ranks))
    return kind, folder


def open_weights(folder: str | Path, config: dict[str, Any] | None = None) -> HfModel:
    """The Hugging Face ``folder`` that a run starts from.

    Args:
        folder: with weights.
        config: content of its config.json, where that has been read already.

    Raises:
        UserError: naming the setting, where it cannot be used.
    """
    try:
        return open_hf_model(folder, config=config)
    except UserError as error:
        raise UserError(f"{KEY}: {error}") from None


def _kind(name: str) -> tuple[str, str]:
    """What ``name`` is, and the folder where it has one."""
    if newest := newest_of_run(name):
        return "checkpoint", newest
    if is_on_hub(name):
        return "repository", name
    return ("folder" if os.path.lexists(name) and is_hf_folder(name) else "checkpoint"), name


def _download(name: str, ranks: Ranks) -> Path:
    """The local copy of a repository, of one commit on all ranks. Each node fetches it once, the main one first."""
    fetch = lambda revision: str(find_model_folder(name, KEY, revision))  # noqa: E731
    found = run_in_background(ranks, (lambda: fetch(None)) if ranks.is_main else None)
    revision = ranks.broadcast(found and Path(found).name)
    first_of_node = os.environ.get("LOCAL_RANK", "0") == "0" and not ranks.is_main
    run_in_background(ranks, (lambda: fetch(revision)) if first_of_node else None)
    return Path(ranks.run_on_all(lambda: fetch(revision)))
