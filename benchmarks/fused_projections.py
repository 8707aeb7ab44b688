"""Time the projections of a block as separate matrix products, and as one product for those with the same input.

    python benchmarks/fused_projections.py

Queries, keys and values have the same input, and so have the gate and the up projection of the feed-forward layer. One
product reads that input once and fills a GPU better than a narrow one (128 columns for the keys of Qwen2.5 0.5B). Its
backward pass needs the gradients of the parts as one matrix. ``joining`` is the time of a copy that makes it, which a
compiled block may avoid.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from retemper.benchmarks.machine import describe_torch, one_line
from retemper.benchmarks.report import BenchmarkReport, command_line, table
from retemper.benchmarks.timing import time_for
from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import run_command
from retemper.engine.files.outputs import require_report

ROUNDS = 3
"""Rounds of separate and fused products in turn, so that a drift of the clock meets both."""
TINY = 64
"""Divisor of tokens on a CPU; widths are divided by its square root."""


@dataclass(frozen=True)
class Shape:
    """Projections with one input."""

    name: str
    tokens: int
    width: int
    """Columns of the input."""
    parts: tuple[int, ...]
    """Columns of each output."""

    def tiny(self) -> Shape:
        """Return the same shape, small enough for a CPU."""
        root = int(TINY**0.5)
        return Shape(self.name, self.tokens // TINY, self.width // root, tuple(part // root for part in self.parts))


SHAPES = (
    Shape("0.5B, queries, keys, values", 16_384, 896, (896, 128, 128)),
    Shape("0.5B, gate and up", 16_384, 896, (4864, 4864)),
    Shape("7B, queries, keys, values", 8192, 3584, (3584, 512, 512)),
    Shape("7B, gate and up", 8192, 3584, (18_944, 18_944)),
)
"""Qwen2.5, for the tokens of a micro-batch that is benchmarked."""


@dataclass(frozen=True)
class Comparison:
    """Seconds of one pass, medians."""

    shape: str
    what: str
    """``forward``, ``dX``, ``dW``, or ``joining``."""
    separate: float
    fused: float
    error: float
    """Norm of the difference of both results over the norm of the result."""


class Operands:
    """Random input, weights and gradients of one shape, each as parts and as one matrix."""

    def __init__(self, shape: Shape, device: torch.device):
        generator = torch.Generator(device).manual_seed(1)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device).to(torch.bfloat16)

        self.input, total = random(shape.tokens, shape.width), sum(shape.parts)
        self.weight, self.gradient = random(total, shape.width), random(shape.tokens, total)
        self.weights = [part.clone() for part in self.weight.split(shape.parts)]
        self.gradients = [part.contiguous() for part in self.gradient.split(shape.parts, dim=1)]


Product = Callable[[Operands], Tensor | list[Tensor]]


def _input_gradient(x: Operands) -> Tensor:
    """Return the sum of one product for each part, as autograd makes it."""
    first, *others = (gradient @ weight for gradient, weight in zip(x.gradients, x.weights, strict=True))
    for other in others:
        first += other
    return first


PASSES: dict[str, tuple[Product, Product]] = {
    "forward": (lambda x: [x.input @ weight.t() for weight in x.weights], lambda x: x.input @ x.weight.t()),
    "dX": (_input_gradient, lambda x: x.gradient @ x.weight),
    "dW": (lambda x: [gradient.t() @ x.input for gradient in x.gradients], lambda x: x.gradient.t() @ x.input),
    "joining": (lambda x: x.gradients, lambda x: torch.cat(x.gradients, dim=1)),
}
"""Separate and fused products of each pass."""


def compare(shape: Shape, device: torch.device, seconds: float) -> list[Comparison]:
    """Time all passes of one shape, about ``seconds`` for each."""
    operands, found = Operands(shape, device), []
    for what, products in PASSES.items():
        times: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            for own, product in zip(times, products, strict=True):
                own += time_for(functools.partial(product, operands), device, seconds / 2 / ROUNDS)
        separate, fused = (statistics.median(own) for own in times)
        results = [_joined(product(operands), dim=0 if what == "dW" else 1) for product in products]
        error = float((results[0] - results[1]).norm() / results[1].norm())
        found.append(Comparison(shape.name, what, separate, fused, error))
    return found


def _joined(result: Tensor | list[Tensor], dim: int) -> Tensor:
    return (result if isinstance(result, Tensor) else torch.cat(result, dim)).float()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of this command."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--seconds", type=float, default=0.3, help="time for each pass of a shape (default: %(default)g)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the command line of this process."""
    options = parse_arguments()
    if options.json is not None:
        require_report("--json", options.json)
    name = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device, machine = torch.device(name), describe_torch()
    print(one_line(machine))
    report = BenchmarkReport(command_line("benchmarks/fused_projections.py"), machine, {"seconds": options.seconds})
    for shape in SHAPES:
        found = compare(shape if name == "cuda" else shape.tiny(), device, options.seconds)
        report.rows += [asdict(comparison) for comparison in found]
    print("\n".join(table(("milliseconds", "separate", "fused", "error"), [_cells(row) for row in report.rows])))
    report.write(options.json)


def _cells(row: dict[str, float | str]) -> tuple[str, ...]:
    separate, fused = (f"{1e3 * float(row[name]):.3f}" for name in ("separate", "fused"))
    return f"{row['shape']}: {row['what']}", separate, fused, f"{float(row['error']):.1e}"


if __name__ == "__main__":
    run_command(main)
