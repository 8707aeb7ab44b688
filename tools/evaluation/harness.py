"""Run tasks of lm-evaluation-harness on a model, through its Python API and transformers.

The harness reads Hugging Face folders, so a checkpoint is first written as one to a temporary folder.
"""

from __future__ import annotations

import difflib
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...engine.config.settings import RunConfig
from ...engine.errors import UserError, install_command
from ...engine.observe.waiting import Say
from ...engine.parallel.memory_check import device_memory
from ...engine.tokenizer.backends import one_line
from ...engine.weights.checkpoint.assets import is_hf_folder
from ...engine.weights.conversion.dcp_to_hf import convert
from ...engine.weights.hugging_face.folder import HfWeights
from ...engine.weights.hugging_face.weight_dtypes import WEIGHT_DTYPES
from .options import HarnessOptions
from .scores import ModelScore, TaskScore

_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}


def require_harness() -> None:
    """Refuse ``--lm-eval`` if a package is missing.

    Raises:
        UserError: with the command that installs it.
    """
    for module in ("lm_eval", "accelerate"):
        if find_spec(module) is None:
            raise UserError(f"--lm-eval needs the package {module}, which is not installed: {install_command(module)}")


def require_tasks(options: HarnessOptions) -> None:
    """Refuse names that are no tasks, which needs no model.

    Raises:
        UserError: names the first, and similar ones that exist.
    """
    _find_tasks(options)


def run_harness(score: ModelScore, config: RunConfig, options: HarnessOptions, say: Say) -> ModelScore:
    """Return ``score`` with the results of the tasks.

    Args:
        score: names the folder of the model.
        config: device and precision.
        options: tasks and their settings.
        say: prints a line.

    Raises:
        UserError: a task is unknown, or the harness fails.
    """
    from lm_eval import simple_evaluate

    manager, tasks = _find_tasks(options)
    with _hugging_face_folder(Path(score.folder), say) as folder:
        _require_memory(folder, _DTYPES[config.training.precision], torch.device(_device(config.device)))
        say(f"lm-eval     {score.model}: {', '.join(options.tasks)}")
        arguments = {
            "pretrained": str(folder),
            "dtype": _DTYPES[config.training.precision],
            "trust_remote_code": config.model.trust_remote_code,
        }
        try:
            found = simple_evaluate(
                model="hf",
                model_args=arguments,
                tasks=list(tasks),
                num_fewshot=options.num_fewshot,
                batch_size=options.batch_size,
                device=_device(config.device),
                limit=options.limit,
                log_samples=False,
                task_manager=manager,
            )
        except Exception as error:  # of tasks, data sets on the Hub, and the model's own code
            raise UserError(
                f"--lm-eval {','.join(options.tasks)}: lm-evaluation-harness failed on {score.model}: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
    assert found is not None  # this is the only process
    return replace(score, tasks=list(task_scores(found)))


def task_scores(found: Any) -> Iterator[TaskScore]:
    """Yield the metrics in the result of ``simple_evaluate``, those of groups last."""
    samples, better = found.get("n-samples", {}), found.get("higher_is_better", {})
    everything = {**found["results"], **found.get("groups", {})}
    for task, metrics in everything.items():
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filtered}")
            yield TaskScore(
                task,
                metric if filtered == "none" else key,
                float(value),
                float(stderr) if isinstance(stderr, (int, float)) else None,
                samples.get(task, {}).get("effective"),
                better.get(task, {}).get(metric),
            )


@cache
def _find_tasks(options: HarnessOptions) -> tuple[Any, tuple[str, ...]]:
    """Return the harness's manager of tasks, and what to give it for the tasks of ``options``.

    The manager reads 14,000 definitions of tasks, which takes seconds, so it is made once.
    """
    from lm_eval.tasks import TaskManager

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    manager = TaskManager(include_path=options.include_path)
    return manager, tuple(spec for name in options.tasks for spec in _specs(name, manager))


def _require_memory(folder: Path, dtype: str, device: torch.device) -> None:
    """Refuse a Hugging Face folder whose weights alone are larger than the memory of ``device``."""
    itemsize = None if dtype == "auto" else WEIGHT_DTYPES[dtype].itemsize
    tensors = HfWeights(folder).tensors.values()
    needed = sum(math.prod(tensor.shape) * (itemsize or tensor.dtype.itemsize) for tensor in tensors)
    available = device_memory(device)
    if needed > available:
        raise UserError(
            f"--lm-eval: the weights of {folder} are {needed / 1e9:,.1f} GB, and {device} has {available / 1e9:,.1f} "
            "GB; set --training.precision bf16, or use a larger device or a smaller model"
        )


def _specs(name: str, manager: Any) -> list[str]:
    """Return the tasks that ``name`` means: a name or pattern of the harness, a YAML file, or a folder of them."""
    if known := manager.match_tasks([name]):
        return list(known)
    path = Path(name)
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        similar = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.7)
        meant = f"did you mean {', '.join(similar)}? " if similar else ""
        raise UserError(
            f"--lm-eval {name}: no task of this name, and no YAML file or folder with one; {meant}`lm-eval ls tasks` "
            "lists names, and --lm-eval-include-path adds a folder of tasks"
        )
    return [str(file.resolve()) for file in files]


@contextmanager
def _hugging_face_folder(folder: Path, say: Say) -> Iterator[Path]:
    """Yield ``folder``, or a temporary Hugging Face folder if it is a checkpoint."""
    if is_hf_folder(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="retemper-evaluate-") as temporary:
        output = Path(temporary, "hf")
        say(f"export      {folder} as a temporary Hugging Face folder")
        convert(folder, output, say=lambda line: None)
        yield output


def _device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
