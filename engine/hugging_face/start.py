"""Where a run's first weights come from: ``model.initialize_from`` as a folder that every rank can read."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..checkpoint.assets import is_hf_folder, newest_of_run
from ..config import RunConfig
from ..errors import UserError
from ..parallel.patience import work_apart
from ..parallel.process_group import Ranks
from .hub_download import find_model_folder, is_on_hub
from .model import HfModel, open_hf_model

KEY = "model.initialize_from"


def with_local_weights(config: RunConfig, ranks: Ranks, require_sound: Callable[[str, str], object]) -> RunConfig:
    """``config`` whose ``model.initialize_from`` is a folder: a name on the Hub becomes that of its local copy, the
    folder of a run its newest checkpoint.

    Args:
        config: of the run.
        ranks: all call this.
        require_sound: verifies the checkpoint in a folder that a setting names, on all ranks together.

    Raises:
        UserError: on every rank, where there are no such weights, or the checkpoint is damaged.
    """
    name = config.model.initialize_from
    if name is None:
        return config
    if newest := ranks.share(ranks.on_main(lambda: newest_of_run(name))):
        require_sound(newest, KEY)
        return replace(config, model=replace(config.model, initialize_from=newest))
    # The main rank's view counts: ranks must not go different ways.
    kind = ranks.share(ranks.on_main(lambda: _kind(name)))
    if kind == "checkpoint":
        require_sound(name, KEY)
        return config
    if kind == "folder":
        return config
    folder = str(_download(name, ranks))
    return replace(config, model=replace(config.model, initialize_from=folder))


def open_start(folder: str | Path) -> HfModel:
    """The Hugging Face ``folder`` that a run starts from.

    Raises:
        UserError: naming the setting, where it cannot be used.
    """
    try:
        return open_hf_model(folder)
    except UserError as error:
        raise UserError(f"{KEY}: {error}") from None


def _kind(name: str) -> str:
    if is_on_hub(name):
        return "repository"
    return "folder" if os.path.lexists(name) and is_hf_folder(name) else "checkpoint"


def _download(name: str, ranks: Ranks) -> Path:
    """The local copy of a repository, of one commit on all ranks. Each node fetches it once, the main one first."""
    fetch = lambda revision: str(find_model_folder(name, KEY, revision))  # noqa: E731
    found = work_apart(ranks, (lambda: fetch(None)) if ranks.is_main else None)
    revision = ranks.share(found and Path(found).name)
    first_of_node = os.environ.get("LOCAL_RANK", "0") == "0" and not ranks.is_main
    work_apart(ranks, (lambda: fetch(revision)) if first_of_node else None)
    return Path(ranks.everywhere(lambda: fetch(revision)))
