"""Measure the generation of text: prompts and tokens, with the cache, without it, and by ``transformers.generate``.

All ways generate tokens greedily from the same random prompts, in turn, so that changes of the machine affect all of
them. The moment of each token is recorded: the first one ends the time of the prompt.

On one CPU thread the times are processor time, which other programs on the machine disturb little. Elsewhere they are
wall time.
"""

from __future__ import annotations

import io
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...benchmarks.machine import describe_torch
from ...benchmarks.report import BenchmarkReport, table
from ...benchmarks.timing import now, seconds_between
from ...engine.files.outputs import GENERATOR, write_report
from ...engine.model.architecture import Architecture
from ...engine.model.implementations import parse_architecture
from ...engine.weights.checkpoint.tensors import model_tensors
from ...engine.weights.hugging_face.weight_dtypes import dtype_named
from .backend import Backend, RecomputingSession, Session
from .decoder_backend import DecoderBackend
from .library_backend import LibraryBackend
from .model_loading import empty_decoder, find_device, find_model, load_backend, read_architecture
from .sampling import Sampling
from .token_choice import TokenChoice, random_numbers

OURS, LIBRARY_CACHE, RECOMPUTED = "own cache", "cache of transformers", "without a cache"
PEER = "transformers.generate"
Way = Callable[[list[list[int]], int, Callable[[], None]], object]
"""Generates so many tokens after each prompt. The last argument is called after each of them."""


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured."""

    model: Path | None
    """A folder; None for random weights."""
    hidden_size: int
    """Of random weights; so are the next two."""
    layers: int
    vocab_size: int
    batch_sizes: tuple[int, ...]
    lengths: tuple[int, ...]
    """Tokens of a prompt."""
    new_tokens: int
    """Number of timed tokens after the first one."""
    repeats: int
    dtype: str
    device: str


def measure(options: MeasureOptions, command: str) -> BenchmarkReport:
    """Measure all batch sizes and lengths.

    Raises:
        UserError: the model cannot be used.
    """
    device = find_device(options.device)
    machine = describe_torch()
    ways, architecture = _ways(options, device)
    name = "random weights" if options.model is None else options.model.name
    settings = {**asdict(options), "model": name, "parameters": architecture.num_parameters}
    settings["clock"] = clock_name(device)
    report = BenchmarkReport(command, machine, settings)
    for length in options.lengths:
        for batch_size in options.batch_sizes:
            report.rows += _rows(ways, architecture, batch_size, length, options, device)
    return report


def format_report(report: BenchmarkReport) -> str:
    """Return the results as a Markdown table."""
    header = ("way", "batch", "prompt", "prompt, ms", "token, ms", "tokens/s", f"times {PEER}")
    rows = [
        (
            row["way"],
            str(row["batch_size"]),
            str(row["length"]),
            f"{row['prompt_ms']:,.1f}",
            f"{row['token_ms']:,.2f}",
            f"{row['tokens_per_second']:,.0f}",
            "" if row["speed_ratio"] is None else f"{row['speed_ratio']:.2f}",
        )
        for row in report.rows
    ]
    return "\n".join(table(header, rows))


def plot(report: BenchmarkReport, path: Path) -> None:
    """Draw the time per token by the length of the prompt, at the smallest batch.

    Raises:
        UserError: the file cannot be written.
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    smallest = min(row["batch_size"] for row in report.rows)
    rows = [row for row in report.rows if row["batch_size"] == smallest]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for way in dict.fromkeys(row["way"] for row in rows):
        points = [(row["length"], row["token_ms"]) for row in rows if row["way"] == way]
        axes.plot(*zip(*points, strict=True), marker="o", label=way)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="ms per token")
    lengths = sorted({row["length"] for row in rows})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_title(f"Time per token, batch of {smallest}")
    axes.legend()
    axes.grid(visible=True, alpha=0.3)
    buffer, kind = io.BytesIO(), path.suffix[1:].lower() or "png"
    metadata = {"Software" if kind == "png" else "Creator": GENERATOR} if kind in ("png", "svg", "pdf") else None
    figure.savefig(buffer, format=kind, dpi=120, metadata=metadata)
    pyplot.close(figure)
    write_report("--plot", path, buffer.getvalue())


def _ways(options: MeasureOptions, device: torch.device) -> tuple[dict[str, Way], Architecture]:
    """Return everything that is measured, by name, and the architecture of the model."""
    if options.model is not None:
        folder = find_model(options.model)
        backend = load_backend(folder, read_architecture(folder), options.dtype, device)
        backends = [backend]
    else:
        backends = _random_backends(options, device)
    ways: dict[str, Way] = {}
    for backend in backends:
        if backend.obstacle is None:
            name = OURS if isinstance(backend, DecoderBackend) else LIBRARY_CACHE
            ways[name] = _with_session(backend, backend.open)
        if isinstance(backend, LibraryBackend):
            ways[PEER] = _library_way(backend)
    first = backends[0]
    ways[RECOMPUTED] = _with_session(first, lambda length: RecomputingSession(first.compute))
    return ways, first.architecture


def _random_backends(options: MeasureOptions, device: torch.device) -> list[Backend]:
    """Return a Qwen2 with random weights in our own module and in that of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config: dict[str, Any] = {
        "model_type": "qwen2",
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "intermediate_size": 4 * options.hidden_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": max(1, options.hidden_size // 64),
        "num_key_value_heads": max(1, options.hidden_size // 256),
        "max_position_embeddings": max(options.lengths) + options.new_tokens + 1,
        "tie_word_embeddings": True,
        "eos_token_id": None,
    }
    dtype = dtype_named(options.dtype) or torch.float32
    architecture = parse_architecture(config)
    torch.manual_seed(0)
    made = AutoConfig.for_model(**config)
    library = AutoModelForCausalLM.from_config(made, dtype=dtype).to(device).eval()
    decoder = empty_decoder(architecture, dtype, device)
    state = library.state_dict()
    with torch.no_grad():
        for name, parameter in model_tensors(decoder).items():
            parameter.copy_(state[name])
    return [DecoderBackend(decoder, device), LibraryBackend(library, architecture)]


def _with_session(backend: Backend, open_session: Callable[[int], Session]) -> Way:
    choice, random = TokenChoice(Sampling()), random_numbers(0, 0)

    @torch.inference_mode()
    def generate(prompts: list[list[int]], count: int, after_token: Callable[[], None]) -> None:
        session = open_session(len(prompts[0]) + count)
        texts, new = [list(prompt) for prompt in prompts], prompts
        for _ in range(count):
            tokens = choice.choose(session.append(new), texts, [random] * len(texts))
            new = [[token] for token in tokens]
            after_token()

    return generate


def _library_way(backend: LibraryBackend) -> Way:
    module: Any = backend.module

    @torch.inference_mode()
    def generate(prompts: list[list[int]], count: int, after_token: Callable[[], None]) -> None:
        ids = torch.tensor(prompts, device=backend.device)
        fixed = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}

        def mark(input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            after_token()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        module.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[mark], **fixed)

    return generate


def _rows(
    ways: dict[str, Way],
    architecture: Architecture,
    batch_size: int,
    length: int,
    options: MeasureOptions,
    device: torch.device,
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(length)
    prompts = torch.randint(architecture.vocab_size, (batch_size, length), generator=generator).tolist()
    # Without a cache each token takes as long as a prompt, so few are enough.
    counted = {way: min(2, options.new_tokens) if way == RECOMPUTED else options.new_tokens for way in ways}
    found: dict[str, list[list[float]]] = {way: [] for way in ways}
    for repeat in range(options.repeats + 1):
        for name, way in ways.items():
            seconds = _token_seconds(way, prompts, 1 + counted[name], device)
            if repeat:  # the first one prepares
                found[name].append(seconds)
    rows = [_row(name, batch_size, length, seconds) for name, seconds in found.items()]
    peer = next((row["token_ms"] for row in rows if row["way"] == PEER), None)
    return [{**row, "speed_ratio": None if peer is None else peer / row["token_ms"]} for row in rows]


def _token_seconds(way: Way, prompts: list[list[int]], count: int, device: torch.device) -> list[float]:
    """Return the seconds from the start to the first token, and from each token to the next one."""
    moments = [_moment(device)]
    way(prompts, count, lambda: moments.append(_moment(device)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    assert len(moments) == count + 1
    return [seconds_between(begin, end) for begin, end in itertools.pairwise(moments)]


def clock_name(device: torch.device) -> str:
    """Return which time is measured."""
    return "processor time" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall time"


def _moment(device: torch.device) -> Any:
    return time.process_time() if clock_name(device) == "processor time" else now(device)


def _row(way: str, batch_size: int, length: int, seconds: Sequence[Sequence[float]]) -> dict[str, Any]:
    token = statistics.median(second for tokens in seconds for second in tokens[1:])
    return {
        "way": way,
        "batch_size": batch_size,
        "length": length,
        "prompt_ms": 1e3 * statistics.median(tokens[0] for tokens in seconds),
        "token_ms": 1e3 * token,
        "tokens_per_second": batch_size / token,
        "seconds": [list(tokens) for tokens in seconds],
    }
