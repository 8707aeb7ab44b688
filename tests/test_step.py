"""What a step may not do: wait for the device, let garbage be collected anywhere, depend on the order of gathering."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import tiny_run
import torch
import torch.multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.engine import pretrain
from retemper.engine.optim.adamw import CompactAdamW
from retemper.engine.parallel import data_parallel
from retemper.engine.parallel.process_group import process_group

# Operators whose result is a host value, or whose output's shape is: on a GPU each of them waits for it.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave.Tensor",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
}


class Waits(TorchDispatchMode):
    """Counts operators that would wait for a GPU. Reading ``host_tensors``, which are never on one, does not count."""

    def __init__(self, host_tensors=()):
        super().__init__()
        self.counts: Counter = Counter()
        self.host_addresses = {tensor.data_ptr() for tensor in host_tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.name() == "aten::index.Tensor" and _by_mask(args[1])
        if (func.name() in WAITING or by_mask) and args[0].data_ptr() not in self.host_addresses:
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def _by_mask(indices) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def test_the_counter_sees_what_waits():
    x = torch.arange(4.0)
    with Waits() as waits:
        x.sum().item()
        bool(x[0] > 0)
        x[x > 1]
        x.nonzero()
    assert waits.counts["aten::_local_scalar_dense"] == 2
    assert waits.counts["aten::nonzero"] + waits.counts["aten::index.Tensor"] >= 2


@pytest.mark.parametrize(
    "overrides",
    [[], ["--parallel.recompute", "selective"], ["--optimizer.state_dtype", "bf16"], ["--training.precision", "fp16"]],
)
def test_a_step_reads_nothing_back(overrides, one_rank, run_file, tmp_path):
    run = pretrain.build(tiny_run.configure(run_file, "--run_folder", str(tmp_path), *overrides), one_rank)
    steps = [run.data.micro_batches(first) for first in (0, 8)]
    assert len(steps[0]) == 2
    pretrain.one_step(run, steps[0], 200.0)  # states and constants are made in the first one
    # PyTorch's fused AdamW counts steps on the device; CompactAdamW counts them on the host, where it reads them.
    compact = isinstance(run.optimizer, CompactAdamW)
    steps_on_host = [state["step"] for state in run.optimizer.state.values()] if compact else []
    with Waits(steps_on_host) as waits:
        result = pretrain.one_step(run, steps[1], 200.0)
    assert not waits.counts
    assert result.loss.item() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("overrides", [[], ["--parallel.recompute", "selective"]])
def test_a_step_on_a_gpu_does_not_wait(overrides, run_file, tmp_path):
    arguments = (run_file, ["--run_folder", str(tmp_path), "--training.precision", "bf16", *overrides])
    torch.multiprocessing.spawn(_steps_on_a_gpu, arguments)


def _steps_on_a_gpu(_, run_file, overrides):
    """Steps of uploading, forward, backward, clipping and update, in which PyTorch refuses to wait for the GPU."""
    with process_group("cuda", 60) as ranks:
        run = pretrain.build(tiny_run.configure(run_file, "--device", "cuda", *overrides), ranks)
        steps = [run.data.micro_batches(first) for first in range(0, 48, 8)]
        for batches in steps[:4]:  # compiling and first allocations wait
            pretrain.one_step(run, batches, 200.0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = [pretrain.one_step(run, batches, 200.0) for batches in steps[4:]]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(result.loss.isfinite() for result in results)
        del run, results


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_compiled_run_has_the_same_losses(world_size, one_rank, run_file, reference, tmp_path, request):
    """Through FSDP, evaluation and checkpoints; the attention stays outside of the graphs on a CPU."""
    overrides = ["--run_folder", str(tmp_path), "--training.compile", "on"]
    if world_size == 1:
        tiny_run.train(one_rank, run_file, overrides)
    else:
        request.getfixturevalue("two_ranks").run(tiny_run.train, run_file, overrides)
    expected, actual = tiny_run.curve(reference), tiny_run.curve(tmp_path)
    assert len(actual) == len(expected) > 20
    for one, other in zip(actual, expected, strict=True):
        assert one[:2] == other[:2]
        assert one[2:] == pytest.approx(other[2:], rel=1e-4)


def test_compiling_what_cannot_be_compiled_is_refused(one_rank, run_file, tmp_path):
    overrides = ["--run_folder", str(tmp_path), "--training.compile", "on", "--parallel.recompute", "selective"]
    assert "training.compile is on with parallel.recompute selective" in tiny_run.refusal(one_rank, run_file, overrides)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [["--parallel.prefetch_blocks", "0"], ["--parallel.prefetch_blocks", "2"]])
def test_prefetching_changes_no_bit(settings, two_ranks, run_file, tmp_path):
    base = ["--run_folder", str(tmp_path)]
    expected = two_ranks.run(tiny_run.first_gradients, run_file, base)[0]
    actual = two_ranks.run(tiny_run.first_gradients, run_file, [*base, *settings])[0]
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


@pytest.mark.parametrize("count", [0, 1, 2])
def test_which_blocks_are_gathered_ahead(count, one_rank, run_file, tmp_path, monkeypatch):
    """FSDP is told the next blocks in the order of each pass."""
    monkeypatch.setattr(data_parallel, "is_alone", lambda mesh, config: False)
    overrides = ["--run_folder", str(tmp_path), "--parallel.prefetch_blocks", str(count)]
    model = pretrain.build(tiny_run.configure(run_file, *overrides), one_rank).model.decoders[0]
    first, second = (layer._get_fsdp_state() for layer in model.model.blocks)
    root = model._get_fsdp_state()
    forward = {state: state._states_to_forward_prefetch for state in (root, first, second)}
    backward = {state: state._states_to_backward_prefetch for state in (root, first, second)}
    assert forward == {root: [first, second][:count], first: [second][:count], second: []}
    assert backward == {root: [second, first][:count], second: [first][:count], first: []}
