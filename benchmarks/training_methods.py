"""Continue the pretraining of one small model with full training, Muon and LoRA, and plot the three curves.

    make demo
    python benchmarks/training_methods.py --output build/methods --json methods.json --plot methods.png

The base model and the two corpora are those of `make demo`. All runs see the same samples in the same order. Full
training has the learning rate of the demo, Muon the same, LoRA three times as much; they are not tuned.
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retemper.benchmarks.machine import describe_machine
from retemper.benchmarks.report import BenchmarkReport, command_line
from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, install_command, run_command
from retemper.engine.files.atomic import require_absent
from retemper.engine.files.outputs import GENERATOR, require_report, write_report
from retemper.engine.observe.curves import read_metrics

PRETRAIN = Path(__file__).resolve().parents[1] / "engine" / "pretrain.py"
TITLES = {"domain": "new domain (source code)", "general": "former data (prose)"}
"""Validation sets of the demo, and what they show."""


@dataclass(frozen=True)
class Method:
    """One way to train."""

    name: str
    options: tuple[str, ...]
    learning_rate: float


METHODS = (
    Method("full, AdamW", (), 4e-3),
    Method("full, Muon", ("--optimizer.name", "muon"), 4e-3),
    Method("LoRA (rank 16), AdamW", ("--adapter.kind", "lora"), 1.2e-2),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo_run"), metavar="DIR", help="folder of make demo")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the runs; must not exist")
    parser.add_argument("--train-tokens", type=int, default=98_304, metavar="N", help="budget of each run")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot (.png, .svg, .pdf); needs matplotlib")
    options = parser.parse_args(arguments)
    if not (options.demo / "base_hf" / "config.json").is_file():
        raise UserError(f"--demo {options.demo}: holds no base_hf; run make demo first, or name its folder")
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None:
            require_report(option, path)
    output, machine = Path(require_absent(options.output)).absolute(), describe_machine()
    with ThreadPoolExecutor(len(METHODS)) as pool:  # together: losses are compared, and not times
        runs = list(pool.map(lambda method: train(options.demo, output, method, options.train_tokens), METHODS))
    settings = {"train_tokens": options.train_tokens}
    BenchmarkReport(command_line("benchmarks/training_methods.py"), machine, settings, runs).write(options.json)
    for run in runs:
        changes = (f"{name} {points[0][1]:.3f} -> {points[-1][1]:.3f}" for name, points in run["losses"].items())
        print(f"{run['method']}, {run['learning_rate']:g}: {', '.join(changes)}; {run['model']}")
    if options.plot is not None:
        try:
            plot(runs, options.plot)
        except ImportError as error:
            raise UserError(f"--plot {options.plot}: {error}; {install_command('matplotlib')}") from None


def train(demo: Path, output: Path, method: Method, tokens: int) -> dict[str, Any]:
    """Train in the folder of the demo, and return settings, validation losses and the summary of the model."""
    folder, rate = output / str(METHODS.index(method)), method.learning_rate
    settings = ["--optimizer.learning_rate", str(rate), "--optimizer.min_learning_rate", str(rate / 10)]
    settings += ["--training.train_tokens", str(tokens), "--training.warmup_tokens", str(tokens // 20)]
    settings += ["--training.eval_tokens", "8192", "--training.eval_interval", "8", "--logging.tensorboard", "false"]
    settings += ["--training.micro_batch_size", "8"]
    command = ["--config", "demo", "--run_folder", str(folder), "--data.cache_folder", "cache"]
    print(f"{method.name} at {rate:g}", flush=True)
    words = [sys.executable, str(PRETRAIN), *command, *method.options, *settings]
    done = subprocess.run(words, cwd=demo, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{method.name} at {rate:g} failed: {done.stderr.strip().splitlines()[-1]}")
    model = next(line for line in done.stdout.splitlines() if line.startswith("model "))
    losses: dict[str, list[tuple[int, float]]] = {name: [] for name in TITLES}
    for record in read_metrics(folder, sys.maxsize):
        if record.get("evaluation") in losses:
            losses[record["evaluation"]].append((record["tokens"], record["loss"]))
    summary = " ".join(model.partition(", weights")[0].split()[1:])
    return {
        "method": method.name,
        "options": [*method.options, *settings],
        "learning_rate": rate,
        "model": summary,
        "losses": losses,
    }


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the validation losses of all runs, of the new domain and of the former data.

    Raises:
        UserError: the file cannot be written.
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, (name, title) in zip(panels, TITLES.items(), strict=True):
        for run in runs:
            label = f"{run['method']}, {run['learning_rate']:g}"
            axes.plot(*zip(*run["losses"][name], strict=True), marker="o", markersize=3, label=label)
        axes.set(title=title, xlabel="tokens", ylabel="validation loss")
        axes.grid(visible=True, alpha=0.3)
    panels[0].legend(fontsize="small")
    buffer, kind = io.BytesIO(), path.suffix[1:].lower() or "png"
    metadata = {"Software" if kind == "png" else "Creator": GENERATOR} if kind in ("png", "svg", "pdf") else None
    figure.savefig(buffer, format=kind, dpi=120, metadata=metadata)
    pyplot.close(figure)
    write_report("--plot", path, buffer.getvalue())


if __name__ == "__main__":
    run_command(main)
