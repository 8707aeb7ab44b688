"""A GPU without memory: what the report says, what is written, and that ranks and saved states end as they should."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import plan_runs
import pytest
import tiny_run
import torch
import torch.distributed as dist

from retemper.engine import out_of_memory, pretrain
from retemper.engine.errors import UserError
from retemper.engine.out_of_memory import MemoryGuard, MemoryUse, OutOfMemory, find_savings, is_out_of_memory
from retemper.engine.parallel.layout import plan_layout
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.weights.checkpoint.manifest import read_manifest
from retemper.tools.planning.pool import DryRunPool
from retemper.tools.planning.savings import changes

GiB = 2**30
OF_PYTORCH = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
PLAN = {
    "peak_bytes": 70 * GiB,
    "ranks": [{"peak_bytes": {"parameters": 30 * GiB, "activations": 40 * GiB}}],
    "savings": [
        {"settings": {key: value}, "shown": f"{key}: {value}", "drawback": drawback, "saved_bytes": size * GiB,
         "peak_bytes": (70 - size) * GiB}
        for key, value, drawback, size in (
            ("parallel.recompute", "full", "", 22),
            ("parallel.recompute", "selective", "", 12),
            ("training.micro_batch_size", "1", "", 9),
            ("parallel.cpu_offload", "true", "slow", 25),
            ("optimizer.state_dtype", "bf16", "another result", 3),
        )
    ],
}  # fmt: skip
"""The record of a planner."""


@pytest.fixture
def planned(monkeypatch):
    """The planner takes no time; its calls."""
    calls = []
    monkeypatch.setattr(out_of_memory, "find_savings", lambda *arguments: calls.append(arguments) or PLAN)
    return calls


@pytest.fixture
def gpu(monkeypatch):
    """A GPU without memory; what PyTorch was asked for."""
    asked = []
    use = {"memory_allocated": 60 * GiB, "memory_reserved": 75 * GiB, "mem_get_info": (1 * GiB, 80 * GiB)}
    for name, value in use.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda **named: asked.append(named))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: asked.append(path) or Path(path).write_bytes(b"traces"))
    return asked


def guard_of(folder: Path, run_file: Path, device: str = "cpu", store=None, rank: int = 0, world_size: int = 1):
    """The guard of a run whose other ranks are not there."""
    config = tiny_run.configure(run_file, "--run_folder", str(folder), "--logging.memory_snapshot", "on_oom")
    config = replace(config, parallel=replace(config.parallel, timeout_seconds=20))
    return MemoryGuard(config, Ranks(rank, world_size, torch.device(device), store=store))


def failed(guard: MemoryGuard, error: Exception | None = None) -> OutOfMemory:
    """What the run is ended with."""
    with pytest.raises(OutOfMemory) as caught, guard.explained(lambda: "step 7, backward"):
        raise error or torch.OutOfMemoryError(OF_PYTORCH)
    return caught.value


def test_the_report_of_a_gpu(gpu, planned, run_file, tmp_path):
    error = str(failed(guard_of(tmp_path, run_file, "cuda")))
    [options, written] = gpu
    assert options["stacks"] == "python" and 1000 <= options["max_entries"] <= 10**6
    snapshot = tmp_path / "memory_snapshot_rank0.pickle"
    assert snapshot.read_bytes() == b"traces" and Path(written).parent == tmp_path and str(snapshot) in error
    for fact in ("rank 0", "step 7, backward", "2.00 GiB", "60.00 GiB", "15.00", "4.00", "1.00 free = 80.00 GiB"):
        assert fact in error
    assert "expandable_segments" in error  # 15 GiB are cached and of no use
    for setting in ("parallel.recompute: full (saves 22.00", "micro_batch_size: 1 (saves 9.00", "cpu_offload: true"):
        assert setting in error
    assert "selective" not in error and "bf16" not in error  # three different settings
    page = (tmp_path / "out_of_memory_rank0.md").read_text()
    for row in (
        "| allocated | 60.00 |",
        "| activations | 40.00 |",
        "| parallel.recompute: selective | 12.00 | 58.00 |",
    ):
        assert row in page
    assert "raise error or torch.OutOfMemoryError" in page  # the stack
    assert sorted(path.name for path in tmp_path.iterdir()) == [snapshot.name, "out_of_memory_rank0.md"]


def test_without_the_setting_nothing_is_recorded(gpu, planned, run_file, tmp_path):
    config = tiny_run.configure(run_file, "--run_folder", str(tmp_path))
    failed(MemoryGuard(config, Ranks(0, 1, torch.device("cuda"))))
    assert gpu == [] and not list(tmp_path.glob("*.pickle"))


def test_a_snapshot_that_cannot_be_written_is_a_note(gpu, planned, run_file, tmp_path, monkeypatch, capsys):
    def full(path: str) -> None:
        Path(path).write_bytes(b"tra")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    assert "pickle" not in str(failed(guard_of(tmp_path, run_file, "cuda")))
    assert "No space left" in capsys.readouterr().out and [path.suffix for path in tmp_path.iterdir()] == [".md"]


def test_without_a_planner_there_is_general_advice(monkeypatch, run_file, tmp_path):
    def fails(*arguments):
        raise UserError("it needed more than 180 s")

    monkeypatch.setattr(out_of_memory, "find_savings", fails)
    error = str(failed(guard_of(tmp_path, run_file)))
    assert "training.micro_batch_size" in error and "it needed more than 180 s" in error
    assert "step 7, backward" in (tmp_path / "out_of_memory_rank0.md").read_text()


def test_other_errors_pass(run_file, tmp_path):
    with pytest.raises(KeyError), guard_of(tmp_path, run_file).explained(str):
        raise KeyError("a bug")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (UserError("CUDA error: out of memory"), False),
        (MemoryError(), False),
    ],
)
def test_errors_that_mean_it(error, expected):
    assert is_out_of_memory(error) == expected


def test_tensors_of_the_failed_step_are_released(run_file, tmp_path):
    """They would leave no memory for saving the state."""
    held = []

    def step():
        activation = torch.ones(3)
        held.append(weakref.ref(activation))
        raise torch.OutOfMemoryError("x")

    guard = guard_of(tmp_path, run_file)
    try:
        step()
    except torch.OutOfMemoryError as error:
        assert held[0]() is not None
        guard.note(error, "step 1, forward")
        assert held[0]() is None


def test_one_rank_plans_and_the_others_wait_for_it(planned, monkeypatch, run_file, tmp_path):
    """A launcher ends all ranks when the first one exits, and so would end the planner."""
    store, order, may_plan = dist.HashStore(), [], threading.Event()
    guards = [guard_of(tmp_path, run_file, store=store, rank=rank, world_size=2) for rank in (0, 1)]

    def find(*arguments):
        may_plan.wait(10)
        return PLAN

    monkeypatch.setattr(out_of_memory, "find_savings", find)
    reports: dict[int, OutOfMemory] = {}

    def fail(rank: int) -> None:
        reports[rank] = failed(guards[rank])
        order.append(rank)

    first = threading.Thread(target=fail, args=(1,))
    first.start()
    while not store.check(["out_of_memory/ranks"]):
        pass
    second = threading.Thread(target=fail, args=(0,))
    second.start()
    second.join(0.5)
    assert order == []
    may_plan.set()
    first.join()
    second.join()
    assert sorted(order) == [0, 1] and "recompute" in str(reports[1]) and not reports[1].printed_elsewhere
    assert "recompute" not in str(reports[0]) and reports[0].printed_elsewhere
    assert [path.name for path in tmp_path.iterdir()] == ["out_of_memory_rank1.md"]


def test_a_run_reports_saves_and_continues(one_rank, run_file, planned, tmp_path, capsys):
    options = ["--run_folder", str(tmp_path), "--training.train_tokens", str(8 * 8 * 32)]
    run = pretrain.build(tiny_run.configure(run_file, *options), one_rank)
    block = next(iter(run.model.blocks()))

    def fail(*arguments):
        if run.progress.step == 5:
            raise torch.OutOfMemoryError(OF_PYTORCH)

    block.register_full_backward_hook(fail)
    with pytest.raises(OutOfMemory, match="step 6, backward"):
        pretrain.train(run)
    assert len(planned) == 1
    assert "after step 5 the run failed (OutOfMemoryError" in capsys.readouterr().out
    newest = tmp_path / "checkpoints" / "step-00000005"
    assert read_manifest(newest).emergency.startswith("OutOfMemoryError")
    tiny_run.train(one_rank, run_file, options)
    assert tiny_run.curve(tmp_path)[-1][0] == 8


def test_evaluations_report_too(one_rank, run_file, planned, tmp_path):
    options = ["--run_folder", str(tmp_path), "--training.eval_at_start", "true"]
    run = pretrain.build(tiny_run.configure(run_file, *options), one_rank)

    def fail(*arguments):
        raise torch.OutOfMemoryError(OF_PYTORCH)

    run.forward_backward.evaluate = fail
    with pytest.raises(OutOfMemory, match="step 0, evaluate"):
        pretrain.train(run)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_savings_are_those_of_the_planner(tmp_path, monkeypatch):
    """The oracle is a dry run of all blocks, with the changed setting."""
    path = plan_runs.write_config(tmp_path, num_hidden_layers=8)
    overrides = "--training.global_batch_size 8 --parallel.reduce_gradients step"
    monkeypatch.setattr(out_of_memory, "device_memory", lambda device: 64 * GiB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    record = find_savings(plan_runs.configure(path, overrides), Ranks(0, 2, torch.device("cpu")), 600)
    savings = {one["shown"]: one["saved_bytes"] for one in record["savings"]}
    changes = ["parallel.recompute: full", "training.micro_batch_size: 1", "optimizer.state_dtype: bf16"]
    words = ["", *(f" --{change.replace(': ', ' ')}" for change in changes)]
    configs = [plan_runs.configure(path, overrides + more) for more in words]
    with DryRunPool(2) as pool:
        usages = pool.run([plan_runs.spec_of(one, 2, (8, 0), 2, 64 * GiB) for one in configs])
    configured, *changed = (max(sum(kinds.values()) for kinds in usage.peaks.values()) for usage in usages)
    assert record["peak_bytes"] == pytest.approx(configured, rel=0.01)
    for change, peak in zip(changes, changed, strict=True):
        assert savings[change] == pytest.approx(configured - peak, rel=0.02), change


def test_changes_that_a_run_with_checkpoints_refuses_say_so(one_rank, run_file, tmp_path):
    options = ["--run_folder", str(tmp_path), "--training.train_tokens", "1024"]
    tiny_run.train(one_rank, run_file, options)
    config = tiny_run.configure(run_file, *options[:2], "--training.train_tokens", "2048")
    refused = {}
    without_experts = SimpleNamespace(experts=None)
    cluster = SimpleNamespace(assumptions=SimpleNamespace(gpus_per_node=1), architecture=without_experts)
    for change in changes(config, plan_layout(config.parallel, 1), cluster):
        try:
            pretrain.build(change.applied_to(config), one_rank)
        except UserError:
            refused[str(change)] = change.drawback
        else:
            assert "checkpoints" not in change.drawback
    assert len(refused) == 3 and all("checkpoints" in drawback for drawback in refused.values())


FAILING_RUN = """
import sys
import tiny_run, torch
from retemper.engine import out_of_memory, pretrain
from retemper.engine.errors import run_command

build, failing = pretrain.build, [int(rank) for rank in sys.argv[1].split(",")]
out_of_memory.find_savings = lambda *arguments: {"savings": []}

def build_failing(*arguments):
    run = build(*arguments)

    def fail():
        if run.progress.step == 5 and run.ranks.rank in failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    tiny_run.before_step(run, fail)
    return run

pretrain.build = build_failing
run_command(lambda: pretrain.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("failing", "saved"), [("0,1", "step-00000005"), ("1", "step-00000004")])
def test_ranks_of_a_launcher_end_with_an_error(failing, saved, run_file, tmp_path):
    """Those that fail together save together; a rank that fails alone does not wait for the others for ever."""
    program, folder = tmp_path / "failing_run.py", tmp_path / "run"
    program.write_text(FAILING_RUN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(program), failing, "--config", str(run_file), "--run_folder", str(folder)]
    path = os.pathsep.join([str(Path(tiny_run.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [*torchrun, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert done.stderr.count("[rank 1] error: ") + done.stderr.count("[rank 0] error: ") >= 1
    assert "out of memory on rank" in done.stderr and "step 6" in done.stderr
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*"))[-1] == saved


def test_memory_use_adds_up():
    use = MemoryUse(3 * GiB, 5 * GiB, 1 * GiB, 8 * GiB)
    assert str(use).count("2.00") == 2 and use.is_fragmented and not use._replace(allocated=5 * GiB).is_fragmented
