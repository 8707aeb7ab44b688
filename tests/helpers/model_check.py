"""The proof that a model type trains exactly: see :func:`check`."""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiny_run
import torch
import torch.nn.functional as F
from forked_ranks import die, run_process, run_ranks
from model_table import VOCAB_SIZE, tiny_config, tiny_model
from safetensors import safe_open
from torch import Tensor

from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import RunConfig
from retemper.engine.config.yaml_loader import dump_yaml
from retemper.engine.errors import UserError
from retemper.engine.evaluation import count_targets
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.schedule import learning_rate
from retemper.engine.weights.conversion import dcp_to_hf, hf_to_dcp
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter

SERVER_MODULES = (
    "model_check",
    *(f"retemper.engine.{name}" for name in ("evaluation", "run", "run_folder", "start", "guards.rollback")),
    *(f"retemper.engine.observe.{name}" for name in ("end_summary", "start_summary")),
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)
"""What the fork server imports, so that processes start in milliseconds."""
STEPS = 5
SAVED = 3
"""The step of the checkpoint that the killed run leaves behind."""
LENGTH, GLOBAL_BATCH = 48, 4
TOKENS_PER_STEP = LENGTH * GLOBAL_BATCH
EPS = 1e-5
"""Of AdamW. With its usual 1e-8, gradients that are nothing but rounding would change weights by whole steps."""
AXES = ("replicate", "context", "tensor", "pipeline")
"""Of a layout, besides shard."""
TOLERANCE = 1e-5
"""Of losses, relative; and of logits, relative to their norm."""
IGNORED = -100
REFUSED = "refused.txt"


class Checked(NamedTuple):
    """What a check has found."""

    model_type: str
    problem: str = ""
    """The first thing that was wrong; empty: all was right."""
    refusal: str = ""
    """The error with which the run ended before it began; empty: it began."""
    implementation: str = ""
    documents: str = ""
    """How the documents of a batch are kept apart: see ``TransformersArchitecture.documents``."""
    axes: tuple[str, ...] = ()
    """Axes of a layout on which two ranks compute the same losses."""
    loss_error: float = 0.0
    """Largest relative difference of the losses of five steps from those of transformers."""
    logits_error: float = 0.0
    """Relative difference of the exported model's logits from those of the model that transformers trained."""
    seconds: float = 0.0


def check(context: ForkServerContext, model_type: str, folder: Path, implementation: str = "auto") -> Checked:
    """Check that a type trains exactly, on its tiny model.

    - A run of five steps on two ranks and packed documents has the losses of a loop with transformers alone, in which
      every document is a batch of its own (fp32, 1e-5 relative).
    - The same run, killed after its checkpoint and started again, gives the same bits: losses, weights, states, export.
    - The export has the names and shapes of the original files. transformers loads it, and its logits are those of
      the model that the loop trained.
    - The original files are converted to a checkpoint and back without a difference.
    - The other axes of a layout have the same losses, or are refused.
    """
    began = time.monotonic()
    folder.mkdir(parents=True)
    try:
        _make_all(context, model_type, folder, implementation)
        problem = ""
    except AssertionError as error:
        problem = str(error)
    refused, facts = folder / REFUSED, {}
    if refused.exists():
        facts, problem = {"refusal": refused.read_text().replace(f"{folder}/", "")}, ""
    for file in sorted(folder.glob("facts*.json")):
        facts |= json.loads(file.read_text())
    return Checked(model_type, problem, seconds=time.monotonic() - began, **facts)


def _make_all(context: ForkServerContext, model_type: str, folder: Path, implementation: str) -> None:
    """Make all runs of :func:`check` and compare them.

    Raises:
        AssertionError: something is wrong, or the run is refused.
    """
    run_process(context, folder / "model.log", write_model, model_type, folder)
    path = write_run(folder, implementation)
    run_ranks(context, 2, folder / "run.log", train, path, folder / "run")
    run_process(context, folder / "reference.log", train_reference, path, folder)
    compare_losses(folder)
    run_ranks(context, 2, folder / "killed.log", train_and_die, path, folder / "resumed", code=-signal.SIGKILL)
    run_ranks(context, 2, folder / "resumed.log", train, path, folder / "resumed")
    compare_resumed(folder)
    run_process(context, folder / "export.log", examine_export, folder)
    run_ranks(context, 2, folder / "axes.log", train_along_axes, path, folder)


# --------------------------------------------------------------------------------------------------------------------
# The model, its data, and its run


def write_model(model_type: str, folder: Path) -> None:
    """Save the tiny model with transformers."""
    tiny_model(tiny_config(model_type)).save_pretrained(folder / "model")


def write_run(folder: Path, implementation: str) -> Path:
    """Write a dataset of documents of 1 to 30 tokens, and the YAML file of a run on it."""
    generator = np.random.default_rng(5)
    lengths = generator.integers(1, 31, size=120)
    (folder / "starts.json").write_text(json.dumps([0, *lengths.cumsum().tolist()]))
    with IndexedDatasetWriter(str(folder / "data"), np.uint16) as writer:
        for length in lengths:
            writer.add_document(generator.integers(3, VOCAB_SIZE, size=length))
    chosen = {} if implementation == "auto" else {"implementation": implementation}
    config = {
        "run_folder": str(folder / "run"),
        "model": {"initialize_from": str(folder / "model")} | chosen,
        "data": {"train": [{"path": str(folder / "data")}]},
        "training": {
            "train_tokens": STEPS * TOKENS_PER_STEP,
            "warmup_tokens": 2 * TOKENS_PER_STEP,
            "sequence_length": LENGTH,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": GLOBAL_BATCH // 2,
            "precision": "fp32",
            # The loop of transformers has no losses of routers, and moves no biases.
            "router_aux_loss_coef": 0,
            "router_bias_update_rate": 0,
        },
        "optimizer": {"learning_rate": 1e-3, "min_learning_rate": 1e-4, "eps": EPS},
        "parallel": {"shard": 2},
        "checkpoint": {"save_interval": SAVED, "export_hf": True},
        "logging": {"tensorboard": False},
    }
    path = folder / "run.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    return path


def train(ranks: Ranks, path: Path, run_folder: Path) -> None:
    """Make the run, or continue it; note what only a run knows."""
    try:
        run = pretrain.build(_configuration(path, run_folder), ranks)
    except UserError as error:
        if ranks.is_main:
            (path.parent / REFUSED).write_text(str(error))
        raise
    pretrain.train(run)
    if ranks.is_main:
        chunks = [run.order.sample(index).chunk for index in range(STEPS * GLOBAL_BATCH)]
        (path.parent / "chunks.json").write_text(json.dumps(chunks))
        architecture = run.start.architecture
        documents = getattr(architecture, "documents", "packed")
        _note(path.parent, implementation=architecture.implementation, documents=documents)


def train_along_axes(ranks: Ranks, path: Path, folder: Path) -> None:
    """Make two steps on every other axis of a layout, and compare their losses."""
    expected, axes = json.loads((folder / "reference.json").read_text())[:2], ["shard"]
    for axis in AXES:
        layout = ["--parallel.shard", "1", f"--parallel.{axis}", "2"]
        try:
            run = pretrain.build(_configuration(path, folder / axis, *layout), ranks)
        except UserError as error:
            print(f"{axis}: {error}")
            continue
        for step, loss in enumerate(expected):
            batches = run.data.micro_batches(step * GLOBAL_BATCH)
            result = pretrain.one_step(run, batches, ranks.all_reduce(count_targets(batches, run.mesh)))
            actual = ranks.all_reduce(result.loss.item())
            assert abs(actual / loss - 1) <= TOLERANCE, f"parallel.{axis} 2: loss {actual}, of transformers {loss}"
        axes.append(axis)
    if ranks.is_main:
        _note(folder, axes=axes)


def _note(folder: Path, **facts: Any) -> None:
    """Save some of the fields of :class:`Checked`."""
    (folder / f"facts_{min(facts)}.json").write_text(json.dumps(facts))


def train_and_die(ranks: Ranks, path: Path, run_folder: Path) -> None:
    """Make the run until it begins a step after its checkpoint, and die there."""
    run = pretrain.build(_configuration(path, run_folder), ranks)

    def die_in_time() -> None:
        if run.progress.step == SAVED + 1:
            run.saver.wait()
            die()

    tiny_run.before_step(run, die_in_time)
    pretrain.train(run)


def _configuration(path: Path, run_folder: Path, *overrides: str) -> RunConfig:
    return parse_config(["--config", str(path), "--run_folder", str(run_folder), *overrides])


# --------------------------------------------------------------------------------------------------------------------
# The reference: a loop with transformers alone


def load(folder: Path, attention: str = "eager", **options: Any) -> Any:
    """Load a folder with transformers, in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention, **options)


def train_reference(path: Path, folder: Path) -> None:
    """Train the model with transformers; save its losses, and the logits of the trained model."""
    losses, logits = trained_by_transformers(path, folder, "eager")
    (folder / "reference.json").write_text(json.dumps(losses))
    torch.save(logits, folder / "logits.pt")


def trained_by_transformers(path: Path, folder: Path, attention: str) -> tuple[list[float], Tensor]:
    """Train the model with transformers on the same documents, each alone; its losses, and logits of the result."""
    config = parse_config(["--config", str(path)])
    model = load(folder / "model", attention).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _adamw(parameters, config)
    chunks, losses = json.loads((folder / "chunks.json").read_text()), []
    for step in range(STEPS):
        tokens_done = (step + 1) * TOKENS_PER_STEP
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(tokens_done, config.training, config.optimizer)
        wanted = chunks[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]
        losses.append(_accumulate(model, list(documents_of(folder, wanted))))
        torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses, logits_of(model)


def _adamw(parameters: list[Tensor], config: RunConfig) -> torch.optim.Optimizer:
    settings = config.optimizer
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)


def _accumulate(model: torch.nn.Module, documents: list[tuple[Tensor, Tensor]]) -> float:
    """Add the gradients of the mean loss over all targets of ``documents``; the loss."""
    num_targets = sum(int((targets != IGNORED).sum()) for _, targets in documents)
    total = 0.0
    for tokens, targets in documents:
        if (targets == IGNORED).all():
            continue
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum") / num_targets
        loss.backward()
        total += loss.item()
    return total


def documents_of(folder: Path, chunks: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (tokens, targets) of the documents, or parts of documents, in chunks of the dataset."""
    tokens = np.fromfile(folder / "data.bin", dtype=np.uint16).astype(np.int64)
    starts = json.loads((folder / "starts.json").read_text())
    for chunk in chunks:
        first, last = chunk * LENGTH, (chunk + 1) * LENGTH
        bounds = [first, *(start for start in starts if first < start < last), last]
        for begin, end in itertools.pairwise(bounds):
            targets = tokens[begin + 1 : end + 1].copy()
            if end in starts:
                targets[-1] = IGNORED
            yield torch.from_numpy(tokens[begin:end]), torch.from_numpy(targets)


def logits_of(model: torch.nn.Module) -> Tensor:
    """Return the logits of two documents, each alone."""
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(3, VOCAB_SIZE, (1, length), generator=generator) for length in (7, 30)]
    with torch.no_grad():
        return torch.cat([model.eval()(input_ids=tokens, use_cache=False).logits[0] for tokens in documents])


# --------------------------------------------------------------------------------------------------------------------
# Comparisons


def compare_losses(folder: Path) -> None:
    """Compare the losses with the reference's."""
    expected = json.loads((folder / "reference.json").read_text())
    actual = [record["loss"] for record in tiny_run.records(folder / "run")]
    assert len(actual) == len(expected) == STEPS
    errors = [abs(ours / theirs - 1) for ours, theirs in zip(actual, expected, strict=True)]
    _note(folder, loss_error=max(errors))
    assert max(errors) <= TOLERANCE, f"losses {actual}, of transformers {expected}: {max(errors):.1e}"


def compare_resumed(folder: Path) -> None:
    """Refuse any difference between the run and the one that was killed and resumed."""
    whole, resumed = folder / "run", folder / "resumed"
    assert tiny_run.curve(whole) == tiny_run.curve(resumed), "the resumed run has other losses"
    last = f"checkpoints/step-{STEPS:08d}"
    expected, actual = tiny_run.tensors_of(whole / last), tiny_run.tensors_of(resumed / last)
    assert expected.keys() == actual.keys(), "the resumed run has other tensors"
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, actual[name])]
    assert not different, f"the resumed run differs in {different}"
    exports = [tensors_in(run / "hf" / f"step-{STEPS:08d}") for run in (whole, resumed)]
    _require_equal("the export of the resumed run", exports[1], exports[0])


def examine_export(folder: Path) -> None:
    """Compare the export with the original files and with the reference's model; convert there and back."""
    original, export = folder / "model", folder / "run" / "hf" / f"step-{STEPS:08d}"
    names, exported = ({name: t.shape for name, t in tensors_in(place).items()} for place in (original, export))
    assert exported == names, f"the export differs in {sorted(exported.items() ^ names.items())}"
    model, problems = load(export, output_loading_info=True)
    assert not any(problems.values()), problems
    expected, actual = torch.load(folder / "logits.pt"), logits_of(model)
    error = _relative(actual, expected)
    _note(folder, logits_error=error)
    if error > TOLERANCE:
        _require_rounding(folder, error, expected)
    convert_there_and_back(original, folder)


def _require_rounding(folder: Path, error: float, expected: Tensor) -> None:
    """Refuse an error of logits that is larger than what rounding causes.

    Where gradients are small, the updates of AdamW magnify rounding. So the loop of transformers with another attention
    of its own gives other logits, too: for gemma4_unified_text they differ by 4e-4, and as much from those of a loop in
    float64.
    """
    _, other = trained_by_transformers(folder / "run.yaml", folder, "sdpa")
    rounding = _relative(other, expected)
    assert error <= 2 * rounding, f"logits of the export differ from those of transformers' model by {error:.1e}"


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def convert_there_and_back(original: Path, folder: Path) -> None:
    """Convert a Hugging Face folder to a checkpoint and back, and refuse any difference."""
    hf_to_dcp.convert(str(original), folder / "converted")
    dcp_to_hf.convert(folder / "converted", folder / "back")
    _require_equal("the folder converted there and back", tensors_in(folder / "back"), tensors_in(original))


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a Hugging Face folder, read by the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert tensors, f"{folder} has no tensors"
    return tensors


def _require_equal(what: str, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys(), f"{what} differs in {sorted(actual.keys() ^ expected.keys())}"
    different = [
        name for name, t in expected.items() if t.dtype != actual[name].dtype or not torch.equal(t, actual[name])
    ]
    assert not different, f"{what} differs in {different}"
