"""Save the tensors of a run to a checkpoint, and load them.

Model tensors have their Hugging Face names, optimizer states the names ``optimizer.{state}.{parameter}``, and averages
of weights the names ``ema.{parameter}``. Every rank writes its shards; a reader with any other layout reads its own
slices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...errors import UserError
from ...optim import TrainingOptimizer, average_of
from ..damage import METADATA_FILE, TABLE_FILE
from ..parts import TensorParts, all_ranks, load_parts
from ..table import read_table
from ..tensor_source import StoredTensor

OPTIMIZER_PREFIX = "optimizer."
AVERAGE_PREFIX = "ema."
STATE_PREFIXES = (OPTIMIZER_PREFIX, AVERAGE_PREFIX)
"""Of the names of all tensors that are not the model's."""


class ParameterOwner(Protocol):
    """A module, or the parts of a module on this rank."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Return every parameter by name."""


def model_tensors(model: ParameterOwner) -> dict[str, Tensor]:
    """Return the parameters of ``model`` by name, each once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def optimizer_tensors(model: ParameterOwner, optimizer: TrainingOptimizer) -> dict[str, Tensor]:
    """Return the state tensors of ``optimizer``, named by state and parameter; frozen parameters have no states."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # While FSDP has gathered a group, its parameters are other tensors, without states.
        assert parameter in optimizer.state, f"{name} is not a parameter that the optimizer steps"
        for state, value in optimizer.state[parameter].items():
            tensors[f"{OPTIMIZER_PREFIX}{state}.{name}"] = value
    return tensors


def training_tensors(model: ParameterOwner, optimizer: TrainingOptimizer) -> dict[str, Tensor]:
    """Return all tensors of training by name. The optimizer has its states after the first step."""
    return {**model_tensors(model), **optimizer_tensors(model, optimizer)}


class AdaptedParameters(ParameterOwner, Protocol):
    """Parameters, some of which may be those of the base of an adapter."""

    @property
    def base_names(self) -> frozenset[str]:
        """Names of the parameters that checkpoints do not contain."""


def average_tensors(optimizer: TrainingOptimizer) -> dict[str, Tensor]:
    """Return the moving averages of the weights by name; empty without ``training.ema_decay``."""
    average = average_of(optimizer)
    tensors = {} if average is None else average.tensors()
    return {f"{AVERAGE_PREFIX}{name}": tensor for name, tensor in tensors.items()}


def checkpoint_tensors(model: AdaptedParameters, optimizer: TrainingOptimizer) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint of training contains: those of training, and averages of the weights.

    Those of the base of an adapter are left out.
    """
    tensors = {**training_tensors(model, optimizer), **average_tensors(optimizer)}
    return {name: tensor for name, tensor in tensors.items() if name not in model.base_names}


def open_tensors(folder: str | Path) -> TensorParts:
    """Return the tensors of the checkpoint ``folder``, readable in any parts.

    Raises:
        DamagedCheckpoint: their description is missing or damaged.
        UserError: it cannot be read.
    """
    folder = Path(folder)
    if (folder / METADATA_FILE).exists() and not (folder / TABLE_FILE).exists():
        from ..dcp_files import read_dcp_parts  # of manifest formats 1 and 2

        return read_dcp_parts(folder)
    return read_table(folder)


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Return names, shapes and dtypes of the tensors in ``folder``, without reading their values.

    Raises:
        UserError: their description cannot be read.
    """
    return dict(open_tensors(folder).tensors)


def load_tensors(
    folder: str | Path, tensors: Mapping[str, Tensor], distributed: bool = True, opened: TensorParts | None = None
) -> None:
    """Read into ``tensors`` in place, casting to their dtypes; each may be sharded in any way.

    Args:
        folder: of the checkpoint.
        tensors: by name.
        distributed: whether there are other ranks, which then call this as well.
        opened: what :func:`open_tensors` returned for ``folder``, if it has been called already on every rank.

    Raises:
        UserError: on every rank, if on any of them a tensor is missing, has another shape, or cannot be read.
    """
    ranks = all_ranks(None, distributed)
    parts = ranks.fail_together(lambda: open_tensors(folder)) if opened is None else opened
    load_parts(parts, tensors, folder, ranks)


def check_casts(
    folder: str | Path, stored: Mapping[str, StoredTensor], tensors: Mapping[str, Tensor], resuming: bool
) -> list[str]:
    """Check the casts of :func:`load_tensors`, and return lines about them.

    A resumed run reports exact casts, and refuses others. A new run reports only casts that round: exact ones are the
    usual case.

    Raises:
        UserError: a resumed run would round values of the checkpoint.
    """
    pairs = {name: (stored[name].dtype, tensor.dtype) for name, tensor in tensors.items() if name in stored}
    lines = []
    for (there, here), count in Counter(pairs.values()).items():
        exact = torch.promote_types(there, here) == here
        names, cast = (str(dtype).removeprefix("torch.") for dtype in (there, here))
        if resuming and not exact:
            name = next(name for name, pair in pairs.items() if pair == (there, here))
            keys = {OPTIMIZER_PREFIX: "optimizer.state_dtype", AVERAGE_PREFIX: "training.ema_dtype"}
            key = next((keys[prefix] for prefix in keys if name.startswith(prefix)), "training.weight_dtype")
            raise UserError(
                f"{key} asks for {cast}, but {folder} holds {name} in {names}, which would be rounded; set {key} back, "
                "or start a new run_folder with model.initialize_from"
            )
        if there != here and exact == resuming:
            lines.append(f"dtypes      {count} tensors of {folder} cast from {names} to {cast}")
    return lines


def require_model_tensors(folder: str | Path, stored: Mapping[str, StoredTensor], model: ParameterOwner) -> None:
    """Refuse a checkpoint of ``stored`` whose model tensors are not exactly those of ``model``, and name some.

    Raises:
        UserError: missing, unexpected or differently shaped tensors.
    """
    require_tensors(folder, stored, {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()})


def require_tensors(
    folder: str | Path, stored: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a checkpoint of ``stored`` whose model tensors do not have exactly the ``wanted`` names and shapes.

    Raises:
        UserError: missing, unexpected or differently shaped tensors.
    """
    weights = {name: tensor for name, tensor in stored.items() if not name.startswith(STATE_PREFIXES)}
    difference = describe_difference(weights, wanted)
    if difference:
        raise UserError(f"{folder}: the checkpoint belongs to another model: {difference}")


def describe_difference(stored: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """Return a line about how names and shapes of ``stored`` differ from those that are ``wanted``; empty if they do
    not.
    """
    missing = [name for name in wanted if name not in stored]
    unexpected = [name for name in stored if name not in wanted]
    shapes = [
        f"{name} is {list(stored[name].shape)}, the model needs {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != shape
    ]
    groups = (("missing ", missing), ("unexpected ", unexpected), ("", shapes))
    return "; ".join(prefix + _some_of(problems) for prefix, problems in groups if problems)


def _some_of(problems: list[str]) -> str:
    return ", ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
