"""Find, open and load the weights that a run starts from (``model.initialize_from``)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ...errors import UserError
from ...guards.background import run_in_background
from ...model.implementations import Requested
from ...parallel.process_group import Ranks
from ..checkpoint.assets import is_hf_folder, newest_of_run
from ..finite import OPTION, require_finite
from ..parts import all_ranks, load_parts
from .hub_download import find_model_folder, is_on_hub, require_supported
from .model import HfModel, open_hf_model

INITIALIZE_FROM = "model.initialize_from"
_NONFINITE_REMEDY = (
    "get another copy of the weights; to start from them nonetheless, convert the folder with "
    f"checkpoint_convert/hf_to_dcp.py {OPTION}"
)


def local_weights(
    name: str, ranks: Ranks, check: Callable[[Path], object] = require_supported
) -> tuple[Literal["folder", "checkpoint"], str]:
    """Find the weights that ``model.initialize_from`` names.

    Args:
        name: a Hugging Face folder, a checkpoint, the folder of a run, or a model on the Hub, which is downloaded.
        ranks: all call this.
        check: of the config of a model on the Hub, before its weights are downloaded.

    Returns:
        What it is, and its folder: the newest checkpoint of a run, the local copy of a model on the Hub.

    Raises:
        UserError: on every rank, if there are no such weights.
    """
    # The main rank decides, because all ranks must do the same.
    kind, folder = ranks.broadcast(ranks.run_on_rank0(lambda: _kind(name)))
    if kind == "repository":
        return "folder", str(_download(name, ranks, check))
    return kind, folder


def open_weights(folder: str | Path, config: dict[str, Any] | None = None, requested: Requested = "auto") -> HfModel:
    """Open the Hugging Face ``folder`` that a run starts from.

    Args:
        folder: with weights.
        config: content of its config.json, if it has been read already.
        requested: the implementation.

    Raises:
        UserError: it cannot be used; names the setting.
    """
    try:
        return open_hf_model(folder, config=config, requested=requested)
    except UserError as error:
        raise UserError(f"{INITIALIZE_FROM}: {error}") from None


def load_hf_tensors(model: HfModel, tensors: dict[str, Tensor], distributed: bool = True) -> None:
    """Read parameters of ``model`` into ``tensors`` in place, casting to their dtypes; each may be sharded in any way.

    Each rank reads its own parts, and no more.

    Args:
        model: the folder.
        tensors: by name.
        distributed: whether there are other ranks, which then call this as well.

    Raises:
        UserError: on every rank, when on any of them a file cannot be read, or holds values that are not finite.
    """
    check = lambda name, values: require_finite(name, values, _NONFINITE_REMEDY)  # noqa: E731
    load_parts(model.parameters, tensors, model.weights.folder, all_ranks(None, distributed), check)


def _kind(name: str) -> tuple[str, str]:
    """Return what ``name`` is, and its folder, if it has one."""
    if newest := newest_of_run(name):
        return "checkpoint", newest
    if is_on_hub(name):
        return "repository", name
    if not os.path.lexists(name):
        raise UserError(
            f"{INITIALIZE_FROM} is {name}, which does not exist; name a Hugging Face folder, a checkpoint, a run "
            "folder, or a model on the Hub as namespace/name"
        )
    return ("folder" if os.path.lexists(name) and is_hf_folder(name) else "checkpoint"), name


def _download(name: str, ranks: Ranks, check: Callable[[Path], object]) -> Path:
    """Return the local copy of a repository, of the same commit on all ranks. Each node fetches it once."""
    fetch = lambda revision: str(find_model_folder(name, INITIALIZE_FROM, revision, check))  # noqa: E731
    found = run_in_background(ranks, (lambda: fetch(None)) if ranks.is_main else None)
    revision = ranks.broadcast(found and Path(found).name)
    first_of_node = os.environ.get("LOCAL_RANK", "0") == "0" and not ranks.is_main
    run_in_background(ranks, (lambda: fetch(revision)) if first_of_node else None)
    return Path(ranks.fail_together(lambda: fetch(revision)))
