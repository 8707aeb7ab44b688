"""Measure one provider on one case: correctness, time and memory."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..timing import held_bytes, peak_bytes, reset_peak, time_for
from .cases import Case, Tensors
from .providers import Function, Provider

_deterministic: Any = torch.utils.deterministic
FLUSH_BYTES = 256 * 1024**2
"""Bytes written between timed calls on a GPU: several times its L2, so that no call finds its inputs there."""


@dataclass
class KernelResult:
    """The measurements. ``problem`` gives the reason for missing or wrong results."""

    kernel: str
    case: str
    provider: str
    is_ours: bool
    milliseconds: float | None = None
    """Median of one forward and backward pass."""
    spread: tuple[float, float] | None = None
    """Fastest and slowest."""
    again_milliseconds: float | None = None
    """Median of the first provider of a case, measured again after the last one: shows the drift of the machine."""
    peak_bytes: int | None = None
    """Peak memory beyond the inputs and the references of this benchmark; None if unknown."""
    errors: dict[str, float] = field(default_factory=dict)
    """Norm of the difference from float64 over its norm; for ``loss`` the difference in nats."""
    same_bits: bool | None = None
    """True if a second call gave the same bits."""
    teraflops: float | None = None
    detail: str | None = None
    """Description of what the provider did, if its name does not tell."""
    problem: str | None = None
    wrong: bool = False
    """True if ours is outside its bounds, so that the benchmark fails."""


@dataclass(frozen=True)
class KernelBenchmarkOptions:
    """The place and duration of the measurement."""

    device: torch.device
    dtype: torch.dtype
    seconds: float = 1.0
    """Approximate duration of the timed calls of one provider."""
    least_calls: int = 3
    most_calls: int = 50


def measure_case(
    case: Case,
    settings: KernelBenchmarkOptions,
    say: Callable[[KernelResult], None] = lambda _: None,
    compiled: bool = True,
) -> list[KernelResult]:
    """Measure all providers of a case on the same inputs, and the first one again at the end.

    ``compiled`` False leaves out providers that use torch.compile.
    """
    inputs = case.make_inputs(settings.device, settings.dtype)
    gradients = _output_gradients(case, inputs)
    reference = case.reference(inputs, gradients)
    kept = {name: x.clone() for name, x in inputs.items()}
    results = []
    first: tuple[KernelResult, Provider] | None = None
    for name, provider in case.providers.items():
        result = KernelResult(case.kernel, case.name, name, provider.is_ours)
        if provider.is_compiled and not compiled:
            continue
        results.append(result)
        result.problem = provider.refusal(inputs)
        if result.problem is not None:
            say(result)
            continue
        try:
            call = _Call(provider.build(inputs), inputs, gradients, case.leaves, kept)
            _check(case, call, reference, settings, result)
            _time(case, call, settings, result)
            result.detail = provider.describe(inputs) if provider.describe else None
            first = first or (result, provider)
        except Exception as error:  # libraries fail in many ways; the others are still measured
            lines = str(error).strip().splitlines()
            result.problem = f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
            result.wrong = provider.is_ours
        for name_of_input, x in kept.items():
            inputs[name_of_input].copy_(x)
        say(result)
        gc.collect()
    if first and len(results) > 1:
        # Built again, because others may have changed process-wide settings, as attention backends do.
        again = _Call(first[1].build(inputs), inputs, gradients, case.leaves, kept)
        first[0].again_milliseconds = statistics.median(_milliseconds(again, settings))
    return results


def _output_gradients(case: Case, inputs: Tensors) -> tuple[Tensor | None, ...]:
    """Return random gradients of the outputs; None for a loss, whose gradient is one."""
    like = {"output": case.leaves[0], "sum": case.leaves[0], "q_out": "q", "k_out": "k"}
    return tuple(
        None
        if name == "loss"
        else torch.randn(inputs[like[name]].shape, device=inputs[like[name]].device).to(inputs[like[name]].dtype)
        for name in case.outputs
    )


def run_once(
    function: Function, inputs: Tensors, gradients: tuple[Tensor | None, ...], leaves: tuple[str, ...]
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Run one forward and backward pass; return the outputs, and gradients of the leaves."""
    fresh = {name: x.detach().requires_grad_() if name in leaves else x for name, x in inputs.items()}
    outputs = function(fresh)
    torch.autograd.backward(outputs, gradients)
    found = []
    for name in leaves:
        gradient = fresh[name].grad
        if gradient is None:
            raise RuntimeError(f"{name} got no gradient")
        found.append(gradient)
    return tuple(x.detach() for x in outputs), found


@dataclass
class _Call:
    """A function with its arguments."""

    function: Function
    inputs: Tensors
    gradients: tuple[Tensor | None, ...]
    leaves: tuple[str, ...]
    kept: Tensors
    """Copies of the inputs."""
    restores: bool = True
    """True to restore the inputs before each call, for functions that overwrite them (Liger's SwiGLU does). Not
    timed."""

    def prepare(self) -> None:
        """Restore the inputs."""
        if self.restores:
            for name, x in self.kept.items():
                self.inputs[name].copy_(x)

    def changed(self) -> list[str]:
        """Return the names of overwritten inputs."""
        return [name for name, x in self.kept.items() if not torch.equal(x, self.inputs[name])]

    def __call__(self) -> tuple[Tensor, ...]:
        outputs, gradients = run_once(self.function, self.inputs, self.gradients, self.leaves)
        return (*outputs, *gradients)


def _check(case: Case, call: _Call, reference: Tensors, settings: KernelBenchmarkOptions, result: KernelResult) -> None:
    """Measure errors and memory, and check that results repeat, in calls whose fresh memory held NaN."""
    call()  # compiles
    call.prepare()
    if reset_peak(settings.device):
        before = held_bytes(settings.device)
        call()
        result.peak_bytes = max(0, peak_bytes(settings.device) - before)
    call.prepare()
    with _Poisoned(settings.device, result.peak_bytes or 0):
        found = call()
    changed = call.changed()
    names = [*case.outputs, *(f"d{leaf}" for leaf in case.leaves)]
    for name, value in zip(names, found, strict=True):
        difference = (value.double() - reference[name]).norm().item()
        scale = 1.0 if name == "loss" else max(reference[name].norm().item(), 1e-300)
        result.errors[name] = difference / scale
    # A gradient may be a view of an overwritten input.
    found = tuple(x.clone() for x in found) if changed else found
    call.prepare()
    result.same_bits = all(torch.equal(a, b) for a, b in zip(found, call(), strict=True))
    call.prepare()
    call.restores = bool(changed)
    # Written so that NaN counts as wrong.
    outside = [name for name, error in result.errors.items() if not error <= case.bound(name, settings.dtype)]
    if any(math.isnan(error) for error in result.errors.values()):
        result.problem = "results hold NaN"
    elif changed:
        result.problem = f"overwrites its input {', '.join(changed)}"
    if result.is_ours and (outside or changed):
        result.wrong = True
        worst = ", ".join(f"{name} {result.errors[name]:.1e}" for name in outside)
        result.problem = result.problem or f"outside its bounds: {worst}"


def _time(case: Case, call: _Call, settings: KernelBenchmarkOptions, result: KernelResult) -> None:
    times = _milliseconds(call, settings)
    result.milliseconds = statistics.median(times)
    result.spread = (min(times), max(times))
    if case.flops:
        result.teraflops = case.flops / result.milliseconds / 1e9


def _milliseconds(call: _Call, settings: KernelBenchmarkOptions) -> list[float]:
    """Return the time of each timed call. Before it the inputs are restored, and on a GPU the L2 is overwritten."""
    cuda = settings.device.type == "cuda"
    flush = torch.empty(FLUSH_BYTES if cuda else 0, dtype=torch.int8, device=settings.device)

    def prepare() -> None:
        call.prepare()
        flush.zero_()

    calls = settings.least_calls, settings.most_calls
    return [1e3 * seconds for seconds in time_for(call, settings.device, settings.seconds, *calls, prepare)]


class _Poisoned:
    """Fills fresh memory with NaN, so that elements that are never written are detected.

    On a GPU the allocator's cache is filled; PyTorch's deterministic mode would choose other kernels than the timed
    ones. On a CPU PyTorch's own debugging option does it.
    """

    def __init__(self, device: torch.device, num_bytes: int):
        self.cuda = device.type == "cuda"
        self.num_bytes = num_bytes

    def __enter__(self) -> None:
        if not self.cuda:
            self.was = torch.are_deterministic_algorithms_enabled(), _deterministic.fill_uninitialized_memory
            torch.use_deterministic_algorithms(True, warn_only=True)
            _deterministic.fill_uninitialized_memory = True
            return
        torch.cuda.empty_cache()
        large = torch.full((self.num_bytes // 4 + 1,), math.nan, device="cuda")
        # Blocks of up to a megabyte come from a pool of their own.
        small = [torch.full((64 * 1024,), math.nan, device="cuda") for _ in range(32)]
        del large, small

    def __exit__(self, *_: object) -> None:
        if not self.cuda:
            torch.use_deterministic_algorithms(self.was[0])
            _deterministic.fill_uninitialized_memory = self.was[1]
