"""Tensors to and from a checkpoint folder, through PyTorch's distributed checkpoint (DCP).

Model tensors are stored under their Hugging Face names, optimizer states as ``optimizer.{state}.{parameter}``. Every
rank writes its shards; a reader with any other layout gets its own slices.
"""

from __future__ import annotations

import math
import pickle
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from ..errors import UserError
from .hashing import FileRecord
from .hashing_writer import HashingWriter
from .safety import SafeReader, read_metadata

OPTIMIZER_PREFIX = "optimizer."


class ParameterOwner(Protocol):
    """A module, or the parts of one that this rank has."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name."""


@dataclass(frozen=True)
class StoredTensor:
    """What a checkpoint says about one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def model_tensors(model: ParameterOwner) -> dict[str, Tensor]:
    """The parameters of ``model`` by name, each once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def optimizer_tensors(model: ParameterOwner, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state tensors of ``optimizer``, named by state and parameter; frozen parameters have none."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # FSDP shows gathered copies under a parameter's name while its group is gathered; those have no state.
        assert parameter in optimizer.state, f"{name} is not a parameter that the optimizer steps"
        for state, value in optimizer.state[parameter].items():
            tensors[f"{OPTIMIZER_PREFIX}{state}.{name}"] = value
    return tensors


def training_tensors(model: ParameterOwner, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a training checkpoint holds, by name; the optimizer has its states after the first step."""
    return {**model_tensors(model), **optimizer_tensors(model, optimizer)}


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Names, shapes and dtypes of the tensors in ``folder``, without reading them.

    Raises:
        UserError: there is no readable DCP metadata.
    """
    return {
        name: StoredTensor(tuple(item.size), item.properties.dtype)
        for name, item in read_metadata(folder).state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }


def save_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    staged: Mapping[str, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    distributed: bool = True,
) -> dict[str, FileRecord]:
    """Write ``tensors`` into ``folder``; with ``distributed`` every rank calls this and writes its shards.

    Args:
        folder: where to.
        tensors: by name; each may be sharded in any way.
        staged: this rank's part of each, where it has been copied; ``tensors`` then only say how they are laid out.
        group: of the ranks, for their messages; None: the default one.
        distributed: whether there are other ranks.

    Returns:
        the files that this rank has written, hashed on their way to the disk.

    Raises:
        UserError: on every rank, when any of them cannot write.
    """
    writer = HashingWriter(folder, from_host=staged is not None)
    try:
        # Not where there are others: filters of warnings are the whole process's, and this may be a thread.
        with nullcontext() if distributed else _without_single_process_warning():
            dcp.save(
                dict(tensors),
                storage_writer=writer,
                planner=DefaultSavePlanner() if staged is None else _StagedPlanner(staged),
                process_group=group,
                no_dist=not distributed,
            )
    except CheckpointException as error:
        raise UserError(f"{folder}: cannot be written: {_reasons(error)}") from None
    return writer.records


def _os_error_behind(error: BaseException | None) -> OSError | None:
    """The OSError that led to ``error``, if one did."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class _StagedPlanner(DefaultSavePlanner):
    """Plans with tensors; the values that are written are those that have been copied."""

    def __init__(self, staged: Mapping[str, Tensor]):
        super().__init__()
        self._staged = staged

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._staged[index.fqn]


def load_tensors(
    folder: str | Path,
    tensors: dict[str, Tensor],
    distributed: bool = True,
    stored: Mapping[str, StoredTensor] | None = None,
) -> None:
    """Read into ``tensors`` in place, casting to their dtypes; each may be sharded in any way.

    Args:
        folder: of the checkpoint.
        tensors: by name.
        distributed: whether there are other ranks, which then call this as well.
        stored: what :func:`stored_tensors` returned for ``folder``, where it has been called already.

    Raises:
        UserError: a tensor is missing, has another shape, or its file cannot be read.
    """
    problem = "damaged checkpoint, use another one"
    stored = stored_tensors(folder) if stored is None else stored
    load_through(SafeReader(str(folder)), stored, tensors, str(folder), problem, distributed)


def load_through(
    reader: dcp.StorageReader,
    stored: Mapping[str, StoredTensor],
    tensors: dict[str, Tensor],
    where: str,
    problem: str,
    distributed: bool,
) -> None:
    """As :func:`load_tensors`, from whatever ``reader`` reads.

    Args:
        reader: reads values for DCP.
        stored: what it can read.
        tensors: to read into.
        where: the folder, for errors.
        problem: said in front of the reason, where ``reader`` fails.
        distributed: whether there are other ranks, which then call this as well.

    Raises:
        UserError: a tensor is missing, has another shape, or cannot be read.
    """
    missing = [name for name in tensors if name not in stored]
    if missing:
        raise UserError(f"{where}: {len(missing)} tensors are missing, such as {missing[0]}; is it the same model?")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != stored[name].shape:
            raise UserError(
                f"{where}: {name} has shape {list(stored[name].shape)}, the model wants {list(tensor.shape)}"
            )
    try:
        with _without_single_process_warning():
            dcp.load(tensors, storage_reader=reader, no_dist=not distributed)
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, KeyboardInterrupt):  # DCP wraps whatever is raised
                raise cause from None
        raise UserError(f"{where}: {problem}: {_reasons(error)}") from None


def describe_casts(
    folder: str | Path, stored: Mapping[str, StoredTensor], tensors: Mapping[str, Tensor], resuming: bool
) -> list[str]:
    """Lines about the casts of :func:`load_tensors`: values widened to go on with a run (``resuming``), or rounded to
    begin one. Values widened to begin one are the usual case and not spoken of.

    Raises:
        UserError: the run would not go on as it was: values of the checkpoint would be rounded.
    """
    pairs = {name: (stored[name].dtype, tensor.dtype) for name, tensor in tensors.items() if name in stored}
    lines = []
    for (there, here), count in Counter(pairs.values()).items():
        exact = torch.promote_types(there, here) == here
        names, cast = (str(dtype).removeprefix("torch.") for dtype in (there, here))
        if resuming and not exact:
            name = next(name for name, pair in pairs.items() if pair == (there, here))
            key = "optimizer.state_dtype" if name.startswith(OPTIMIZER_PREFIX) else "training.weight_dtype"
            raise UserError(
                f"{key} asks for {cast}, but {folder} holds {name} in {names}, which would be rounded; set {key} back, "
                "or start a new run_folder with model.initialize_from"
            )
        if there != here and exact == resuming:
            lines.append(f"dtypes      {count} tensors of {folder} cast from {names} to {cast}")
    return lines


def _reasons(error: CheckpointException) -> str:
    """The distinct causes, of all ranks."""
    causes = [_os_error_behind(cause) or cause for cause, _ in error.failures.values()]
    return "; ".join(sorted({_said_of(cause) for cause in causes}))


def _said_of(cause: BaseException) -> str:
    if isinstance(cause, UserError):
        return str(cause)
    if isinstance(cause, pickle.UnpicklingError):  # whose own words advise to load it without care
        return "a file holds something else than tensors"
    return f"{type(cause).__name__}: {cause}"


@contextmanager
def _without_single_process_warning() -> Iterator[None]:
    """DCP warns whenever it runs without a process group, which converters do on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def check_model_tensors(folder: str | Path, model: ParameterOwner) -> None:
    """Refuse a checkpoint whose model tensors are not exactly those of ``model``; see :func:`require_model_tensors`."""
    require_model_tensors(folder, stored_tensors(folder), model)


def require_model_tensors(folder: str | Path, stored: Mapping[str, StoredTensor], model: ParameterOwner) -> None:
    """Refuse a checkpoint of ``stored`` whose model tensors are not exactly those of ``model``, and name some.

    Raises:
        UserError: missing, unexpected or differently shaped tensors.
    """
    weights = {name: tensor for name, tensor in stored.items() if not name.startswith(OPTIMIZER_PREFIX)}
    difference = describe_difference(weights, model)
    if difference:
        raise UserError(f"{folder}: the checkpoint is of another model: {difference}")


def describe_difference(stored: Mapping[str, StoredTensor], model: ParameterOwner) -> str:
    """How names and shapes of ``stored`` differ from the parameters of ``model``, in a line; empty when they do not.

    It names some of what is missing, of what is there instead, and of what has another shape.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    missing = [name for name in wanted if name not in stored]
    unexpected = [name for name in stored if name not in wanted]
    shapes = [
        f"{name} is {list(stored[name].shape)}, the model wants {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != shape
    ]
    groups = (("missing ", missing), ("unexpected ", unexpected), ("", shapes))
    return "; ".join(prefix + _some_of(problems) for prefix, problems in groups if problems)


def _some_of(problems: list[str]) -> str:
    return ", ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
