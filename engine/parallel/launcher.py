"""Read and check the launcher's environment variables of this process.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Only some of them is a mistake. So are several
processes that srun or mpirun has started without torchrun: each would train the whole model by itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UserError

_REMEDY = "start it with torchrun (launch/one_node.sh, launch/many_nodes.sh)"
_TASKS = (
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpirun"),
    ("PMI_SIZE", "PMI_RANK", "mpirun or srun"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "mpirun"),
    ("MPI_LOCALNRANKS", "MPI_LOCALRANKID", "mpirun"),
    ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "jsrun"),
    ("PALS_LOCAL_SIZE", "PALS_RANKID", "mpiexec"),
    ("FLUX_JOB_SIZE", "FLUX_TASK_RANK", "flux run"),
    ("HOROVOD_SIZE", "HOROVOD_RANK", "horovodrun"),
    ("", "PMIX_RANK", "mpirun or srun"),
)
"""(number of tasks, this task, launcher). A batch script and an interactive allocation of Slurm have SLURM_NTASKS and
may have SLURM_PROCID=0; only a task of srun has SLURM_STEP_NUM_TASKS above 1, or a number above 0."""


_ACCELERATE = (
    ("ACCELERATE_MIXED_PRECISION", "no"),
    ("ACCELERATE_DYNAMO_BACKEND", "no"),
    ("ACCELERATE_USE_FSDP", "false"),
    ("ACCELERATE_USE_DEEPSPEED", "false"),
    ("ACCELERATE_USE_MEGATRON_LM", "false"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "false"),
)
"""(variable that accelerate launch sets for its own library, value that asks for nothing)."""


@dataclass(frozen=True)
class Launcher:
    """The place of this process as numbered by its launcher; a single rank without a launcher."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    node: int | None = None
    """Number of the torchrun agent that has started this process; None without torchrun."""
    launched: bool = False
    """True if a launcher has set the variables."""


def read_launcher(environment: Mapping[str, str] | None = None) -> Launcher:
    """Read the variables of the launcher.

    Raises:
        UserError: they are incomplete, are not numbers or contradict each other; or this is one of several processes
            that were started without torchrun.
    """
    env = os.environ if environment is None else environment
    given = {name: env[name] for name in ("RANK", "WORLD_SIZE") if env.get(name)}
    local_rank = _number(env, "LOCAL_RANK", 0)
    if not given or (given.keys() == {"WORLD_SIZE"} and _number(env, "WORLD_SIZE", 1) == 1):
        _refuse_tasks(env)
        if local_rank:
            raise UserError(f"LOCAL_RANK is {local_rank}, but RANK and WORLD_SIZE are not set; {_REMEDY}, or unset it")
        return Launcher()
    world_size = _number(env, "WORLD_SIZE", 1, least=1)
    rank = _number(env, "RANK", 0)
    needed = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *["LOCAL_RANK"] * (world_size > 1)]
    if missing := [name for name in needed if not env.get(name)]:
        are = "is" if len(missing) == 1 else "are"
        there = " and ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(
            f"{' and '.join(missing)} {are} not set, but {there}: for several ranks {_REMEDY}, which sets all of them; "
            "for one rank unset RANK and WORLD_SIZE"
        )
    if rank >= world_size:
        raise UserError(
            f"RANK is {rank}, but WORLD_SIZE is {world_size} (ranks are 0 to {world_size - 1}); {_REMEDY} to set both"
        )
    if not 0 < (port := _number(env, "MASTER_PORT", 0)) < 2**16:
        raise UserError(f"MASTER_PORT is {port}: ports are 1 to 65535; set it to a free one, or {_REMEDY}")
    local_size = _number(env, "LOCAL_WORLD_SIZE", world_size, least=1)
    if local_rank >= local_size:
        raise UserError(
            f"LOCAL_RANK is {local_rank}, but {'LOCAL_' if 'LOCAL_WORLD_SIZE' in env else ''}WORLD_SIZE is "
            f"{local_size}; {_REMEDY}, which sets both"
        )
    node = _number(env, "GROUP_RANK", 0) if env.get("GROUP_RANK") else None
    return Launcher(rank, world_size, local_rank, node, launched=True)


def _number(env: Mapping[str, str], name: str, default: int, least: int = 0) -> int:
    text = env.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise UserError(f"{name} is {text!r}, not a number of at least {least}; {_REMEDY}, which sets it")
    return int(text)


def _refuse_tasks(env: Mapping[str, str]) -> None:
    for size, number, what in _TASKS:
        tasks, task = env.get(size, ""), env.get(number, "")
        several = tasks.isdecimal() and int(tasks) > 1
        if several or (task.isdecimal() and int(task) > 0):
            which = " ".join(f"{name}={env[name]}" for name in (size, number) if env.get(name))
            raise UserError(
                f"{what} has started several tasks ({which}), but without torchrun each would train alone: start one "
                "torchrun on each node (launch/slurm.sh, launch/many_nodes.sh), or a single task"
            )


def launcher_notes(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return warnings about settings of Slurm and of accelerate that have probably another effect than intended."""
    env = os.environ if environment is None else environment
    return _slurm_notes(env) + _accelerate_notes(env)


def _accelerate_notes(env: Mapping[str, str]) -> list[str]:
    """Return notes on settings of ``accelerate launch``, which sets ACCELERATE_MIXED_PRECISION in any case."""
    if not env.get("ACCELERATE_MIXED_PRECISION"):
        return []
    notes = []
    set_there = [f"{name}={env[name]}" for name, unset in _ACCELERATE if env.get(name, unset).lower() != unset]
    if set_there:
        notes.append(
            f"note: {', '.join(set_there)} of accelerate launch has no effect; set training.precision, "
            "training.compile and parallel.* in the configuration of the run"
        )
    if not env.get("RANK") and env.get("MASTER_ADDR"):
        notes.append(
            "note: accelerate launch has started a single process, although it was asked for several: it does so on "
            "CPUs; start several ranks with torchrun (launch/one_node.sh)"
        )
    return notes


def _slurm_notes(env: Mapping[str, str]) -> list[str]:
    if not env.get("RANK"):
        name = next((name for name in ("SLURM_NTASKS", "SLURM_NPROCS") if _above_one(env.get(name, ""))), None)
        if name and not env.get("SLURM_STEP_NUM_TASKS"):
            return [
                f"note: {name} is {env[name]}, but this run is one process; for one process on each GPU use torchrun "
                "(launch/slurm.sh)"
            ]
        return []
    tasks, nodes = env.get("SLURM_STEP_NUM_TASKS", ""), env.get("GROUP_WORLD_SIZE", "")
    if _above_one(tasks) and nodes.isdecimal() and int(nodes) < int(tasks):
        return [
            f"note: srun has started {tasks} tasks (SLURM_STEP_NUM_TASKS), but this run joins the torchrun of {nodes}; "
            "for one run over all nodes use launch/slurm.sh"
        ]
    return []


def _above_one(text: str) -> bool:
    return text.isdecimal() and int(text) > 1
