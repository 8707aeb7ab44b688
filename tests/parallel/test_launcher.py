"""What launchers set in the environment: complete and consistent, or one line; lone tasks of several: refused."""

from __future__ import annotations

import pytest

from retemper.engine.errors import UserError
from retemper.engine.parallel.launcher import Launcher, launcher_notes, read_launcher

PLACE = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
TORCHRUN = {**PLACE, "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "8",
    "SLURM_NPROCS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
SALLOC = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}
INTERACTIVE_STEP = {**SALLOC, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
SRUN = {**SALLOC, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Launcher()),
        (PLACE, Launcher()),  # harmless in a shell's profile
        ({"WORLD_SIZE": "1"}, Launcher()),
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}, Launcher()),
        (TORCHRUN, Launcher(3, 8, 1, 1, launched=True)),
        ({**PLACE, "RANK": "0", "WORLD_SIZE": "1"}, Launcher(launched=True)),
        ({**TORCHRUN, **SRUN}, Launcher(3, 8, 1, 1, launched=True)),
        ({**TORCHRUN, **BATCH_SCRIPT}, Launcher(3, 8, 1, 1, launched=True)),
        (BATCH_SCRIPT, Launcher()),
        (SALLOC, Launcher()),
        (INTERACTIVE_STEP, Launcher()),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}, Launcher()),
    ],
)
def test_what_is_read(env, expected):
    assert read_launcher(env) == expected


def _without(*names, **other):
    return {key: value for key, value in TORCHRUN.items() if key not in names} | other


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            _without("MASTER_ADDR", "MASTER_PORT"),
            "MASTER_ADDR and MASTER_PORT are not set, but RANK=3 and WORLD_SIZE=8",
        ),
        (_without("MASTER_PORT"), "MASTER_PORT is not set"),
        (_without("MASTER_ADDR"), "MASTER_ADDR is not set"),
        (_without("RANK"), "RANK is not set, but WORLD_SIZE=8"),
        (_without("WORLD_SIZE", "LOCAL_RANK"), "WORLD_SIZE is not set, but RANK=3"),
        (_without("LOCAL_RANK"), "LOCAL_RANK is not set"),
        ({"RANK": "0"}, "WORLD_SIZE and MASTER_ADDR and MASTER_PORT are not set, but RANK=0"),
        ({"WORLD_SIZE": "8"}, "RANK and MASTER_ADDR and MASTER_PORT and LOCAL_RANK are not set, but WORLD_SIZE=8"),
        (_without(WORLD_SIZE="two"), "WORLD_SIZE is 'two', not a number of at least 1"),
        (_without(WORLD_SIZE="0"), "WORLD_SIZE is '0'"),
        (_without(WORLD_SIZE="9" * 5000), "WORLD_SIZE is '999"),
        (_without(RANK="-1"), "RANK is '-1', not a number of at least 0"),
        (_without(RANK="²"), "RANK is '²'"),
        (_without(RANK="8"), "RANK is 8, but WORLD_SIZE is 8 (ranks are 0 to 7)"),
        (_without(LOCAL_RANK="x"), "LOCAL_RANK is 'x'"),
        (_without(LOCAL_RANK="2"), "LOCAL_RANK is 2, but LOCAL_WORLD_SIZE is 2"),
        (_without(MASTER_PORT="http"), "MASTER_PORT is 'http'"),
        (_without(MASTER_PORT="65536"), "MASTER_PORT is 65536: ports are 1 to 65535"),
        (_without(GROUP_RANK="node1"), "GROUP_RANK is 'node1'"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is 1, but RANK and WORLD_SIZE are not set"),
        (SRUN, "srun has started several tasks (SLURM_STEP_NUM_TASKS=8 SLURM_PROCID=0)"),
        ({**SALLOC, "SLURM_PROCID": "3"}, "srun has started several tasks (SLURM_PROCID=3)"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun has started several tasks"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "(PMI_SIZE=4 PMI_RANK=0)"),
        ({"MV2_COMM_WORLD_SIZE": "4"}, "(MV2_COMM_WORLD_SIZE=4)"),
        ({"FLUX_JOB_SIZE": "2", "FLUX_TASK_RANK": "0"}, "flux run has started several tasks"),
        ({"HOROVOD_SIZE": "2", "HOROVOD_RANK": "1"}, "(HOROVOD_SIZE=2 HOROVOD_RANK=1)"),
        ({"PMIX_RANK": "1"}, "(PMIX_RANK=1)"),
        ({"WORLD_SIZE": "1", "PMI_SIZE": "4"}, "(PMI_SIZE=4)"),
    ],
)
def test_what_is_refused(env, message):
    with pytest.raises(UserError) as refused:
        read_launcher(env)
    assert message in str(refused.value) and "torchrun" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({}, None),
        (SALLOC, "SLURM_NTASKS is 8, but this run is one process"),
        (BATCH_SCRIPT, "SLURM_NTASKS is 8"),
        (INTERACTIVE_STEP, None),
        ({**TORCHRUN, **SALLOC, "SLURM_STEP_NUM_TASKS": "4", "GROUP_WORLD_SIZE": "4"}, None),
        ({**TORCHRUN, **SALLOC, "SLURM_STEP_NUM_TASKS": "4", "GROUP_WORLD_SIZE": "1"}, "srun has started 4 tasks"),
    ],
)
def test_what_is_noted_about_slurm(env, named):
    notes = launcher_notes(env)
    assert len(notes) == (named is not None)
    assert all(note.startswith("note: ") and named in note and "torchrun" in note for note in notes)


# What accelerate 1.15 sets: `accelerate launch --num_processes 2`, with --cpu, and with --multi_gpu.
ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
}


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({**ACCELERATE, **TORCHRUN}, []),
        ({**ACCELERATE, "ACCELERATE_USE_CPU": "True"}, []),
        ({**ACCELERATE, "ACCELERATE_USE_CPU": "True", **PLACE}, ["a single process"]),
        ({**ACCELERATE, **TORCHRUN, "ACCELERATE_MIXED_PRECISION": "bf16"}, ["ACCELERATE_MIXED_PRECISION=bf16 of"]),
        (
            {**ACCELERATE, **TORCHRUN, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            ["ACCELERATE_USE_FSDP=true of"],
        ),
        (PLACE, []),
    ],
)
def test_what_is_noted_about_accelerate(env, named):
    notes = launcher_notes(env)
    assert len(notes) == len(named) and all(part in note for part, note in zip(named, notes, strict=True))
