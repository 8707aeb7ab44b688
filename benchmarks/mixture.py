"""Compare the native mixture of experts with the module of transformers: forward and backward pass of one layer.

    python benchmarks/mixture.py --dtype fp32,bf16 --json mixture.json

Both have the same shape, weights and input, and run in one process one after the other in each round. transformers has
two implementations of the experts: its default (grouped products) and eager (a loop over experts). Results are compared
before anything is measured. Times are of this process's CPU time on CPUs, so that other programs disturb them less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retemper.benchmarks.machine import describe_torch
from retemper.benchmarks.report import BenchmarkReport, command_line
from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError
from retemper.engine.files.outputs import require_report
from retemper.engine.model.decoder import MixtureOfExperts
from retemper.engine.model.experts import Routing
from retemper.engine.model.families import parse_decoder_architecture

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IMPLEMENTATIONS = ("grouped_mm", "eager")
"""Of the experts of transformers; the first one is its default."""
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
_LEAST_SAME = 0.9
"""Share of the tokens whose experts must be the same in all layers."""


class Shape(NamedTuple):
    """Sizes of the layer."""

    tokens: int
    hidden: int
    experts: int
    per_token: int
    width: int


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default that of this process."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    for name, default in zip(Shape._fields, (2048, 1024, 64, 8, 256), strict=True):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N", help="size")
    parser.add_argument("--dtype", default="fp32,bf16", metavar="NAMES", help="fp32, bf16, or both")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measured passes of each; the median counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = parse_arguments(arguments)
    names = options.dtype.split(",")
    if unknown := [name for name in names if name not in DTYPES]:
        raise UserError(f"--dtype {options.dtype}: {unknown[0]} is unknown; use {', '.join(DTYPES)}")
    if options.json is not None:
        require_report("--json", options.json)
    shape = Shape(*(getattr(options, name) for name in Shape._fields))
    _require_possible(shape, options.rounds)
    torch.set_num_threads(1)  # on a CPU, the time of a pass is that of all threads
    machine = describe_torch()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in names:
        rows += compare(shape, DTYPES[name], device, options.rounds)
        for row in rows[-1 - len(IMPLEMENTATIONS) :]:
            print(
                f"{name:>5} {row['layer']:<24} {row['tokens_per_second']:>10,.0f} tokens/s, "
                f"{row['peak_mb']:>8,.0f} MB, {row['relative_time']:.2f} x the time of native",
                flush=True,
            )
    if options.json is not None:
        settings = {**shape._asdict(), "dtype": options.dtype, "rounds": options.rounds}
        BenchmarkReport(command_line("benchmarks/mixture.py"), machine, settings, rows).write(options.json)


def _require_possible(shape: Shape, rounds: int) -> None:
    for name, value in {**shape._asdict(), "rounds": rounds}.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if shape.per_token > shape.experts:
        raise UserError(f"--per-token {shape.per_token}: there are {shape.experts} experts; use a smaller number")


def compare(shape: Shape, dtype: torch.dtype, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each layer, the native one first."""
    layers = make_layers(shape, dtype, device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape.tokens, shape.hidden, generator=generator).to(device, dtype)
    upstream = torch.randn(shape.tokens, shape.hidden, generator=generator).to(device, dtype)
    passes = {name: _pass(layer, x, upstream) for name, layer in layers.items()}
    require_equal(comparable(layers, x, {name: run() for name, run in passes.items()}), _TOLERANCES[dtype])
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(rounds):
        for name, run in passes.items():
            seconds[name].append(_timed(run, device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "layer": name,
            "seconds": round(medians[name], 4),
            "tokens_per_second": round(shape.tokens / medians[name], 1),
            "relative_time": round(medians[name] / medians["native"], 3),
            "peak_mb": round(peak_bytes(run, layers[name], device) / 1e6, 1),
        }
        for name, run in passes.items()
    ]


def make_layers(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Module]:
    """Return the native layer and those of transformers, with the same weights."""
    from transformers import AutoConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    layers: dict[str, nn.Module] = {}
    for implementation in IMPLEMENTATIONS:
        config: Any = AutoConfig.for_model(
            "qwen3_moe",
            hidden_size=shape.hidden,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=2,
            num_experts=shape.experts,
            num_experts_per_tok=shape.per_token,
            moe_intermediate_size=shape.width,
            norm_topk_prob=True,
        )
        config._experts_implementation = implementation
        layers[f"transformers {implementation}"] = Qwen3MoeSparseMoeBlock(config)
    architecture = parse_decoder_architecture(config.to_dict())
    assert architecture.experts is not None
    native = MixtureOfExperts(architecture, architecture.experts)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
        for layer in layers.values():
            theirs, ours = dict(layer.named_parameters()), dict(native.named_parameters())
            gate_up = torch.cat([ours["experts.gate_proj.weight"], ours["experts.up_proj.weight"]], 1)
            theirs["experts.gate_up_proj"].copy_(gate_up)
            theirs["experts.down_proj"].copy_(ours["experts.down_proj.weight"])
            theirs["gate.weight"].copy_(ours["gate.weight"])
    return {name: layer.to(device, dtype) for name, layer in {"native": native, **layers}.items()}


def _pass(layer: nn.Module, x_TH: Tensor, upstream_TH: Tensor) -> Callable[[], list[Tensor]]:
    """Return a function that computes the result and its gradients: of the input, the router and the last matrices."""

    def run() -> list[Tensor]:
        layer.zero_grad(set_to_none=True)
        leaf = x_TH.detach().requires_grad_()
        result = layer(leaf) if isinstance(layer, MixtureOfExperts) else layer(leaf[None])
        y_TH = (result[0] if isinstance(result, tuple) else result).view_as(x_TH)
        y_TH.backward(upstream_TH)
        parameters = dict(layer.named_parameters())
        down = parameters.get("experts.down_proj.weight", parameters.get("experts.down_proj"))
        assert leaf.grad is not None and down is not None
        gradients = [leaf.grad, parameters["gate.weight"].grad, down.grad]
        return [y_TH.detach(), *(gradient for gradient in gradients if gradient is not None)]

    return run


@torch.no_grad()
def comparable(layers: dict[str, nn.Module], x_TH: Tensor, results: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Return what must be equal of the ``results`` of :func:`_pass`: in fp32 all of it.

    transformers rounds the logits of its router to the dtype, so in bf16 some tokens have another expert. Of the other
    tokens, the result and the gradient are compared.
    """
    if x_TH.dtype == torch.float32:
        return results
    chosen = [layer.gate(x_TH) for layer in layers.values()]  # type: ignore[operator]
    experts = [routing[0] if isinstance(routing, Routing) else routing[2] for routing in chosen]
    same_T = torch.stack([(each.sort(-1).values == experts[0].sort(-1).values).all(-1) for each in experts]).all(0)
    if same_T.float().mean() < _LEAST_SAME:
        raise UserError(f"only {same_T.float().mean():.0%} of the tokens have the same experts in {', '.join(layers)}")
    return {name: [tensor[same_T] for tensor in tensors[:2]] for name, tensors in results.items()}


def require_equal(results: dict[str, list[Tensor]], tolerance: float) -> None:
    """Refuse to measure layers that compute something else than the native one.

    Raises:
        UserError: names the layer.
    """
    for name, tensors in results.items():
        for actual, expected in zip(tensors, results["native"], strict=True):
            error = (actual.float() - expected.float()).norm() / expected.float().norm()
            if not error <= tolerance:
                raise UserError(
                    f"{name} differs from native by {error:.1e} of the norm, at most {tolerance:g} expected"
                )


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Return seconds: of the GPU's stream, or CPU time of all threads."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    run()
    return time.process_time() - start


def peak_bytes(run: Callable[[], object], layer: nn.Module, device: torch.device) -> int:
    """Return the most bytes that a pass of a layer has allocated at one time, gradients included."""
    layer.zero_grad(set_to_none=True)  # otherwise the pass would free those of the pass before it
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    alive = most = 0
    events = profiled.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


if __name__ == "__main__":
    from retemper.engine.errors import run_command

    run_command(main)
