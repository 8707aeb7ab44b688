"""Run the steps of this repository's ``engine/pretrain.py`` with the reports that users get, with external timing.

Evaluations and checkpoints are left out: the run has no validation set, and the last checkpoint is not written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from retemper.engine import pretrain
from retemper.engine.batch import Batch
from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import RunConfig
from retemper.engine.model.decoder import Decoder
from retemper.engine.parallel import data_parallel
from retemper.engine.parallel.process_group import process_group
from retemper.engine.run import Run
from retemper.engine.run_folder import open_run_folder
from retemper.engine.step import StepResult

from .job import DATASET, Clock, Job, draw


def configure(job: Job) -> RunConfig:
    """Return the run's configuration, read from a YAML file like a user's."""
    folder = Path(job.folder)
    config: dict[str, Any] = {
        "run_folder": str(folder / "run"),
        "device": job.device,
        "seed": job.seed,
        "resume": "none",
        "model": {"architecture": job.architecture},
        "data": {"train": [{"path": str(folder / DATASET)}]},
        "training": {
            "train_tokens": job.total_steps * job.tokens_per_step,
            "sequence_length": job.sequence_length,
            "global_batch_size": job.batch_size,
            "micro_batch_size": job.batch_size,
            "precision": "fp32" if job.precision == "fp32" else "bf16",
        },
        "optimizer": {
            "learning_rate": job.learning_rate,
            "min_learning_rate": 0.0,
            "schedule": "constant",
            "weight_decay": job.weight_decay,
            "beta1": job.beta1,
            "beta2": job.beta2,
            "eps": job.eps,
            "clip_grad_norm": job.clip_grad_norm,
        },
        "parallel": {"recompute": "full" if job.recompute else "none"},
        "checkpoint": {"save_interval": 10**9, "keep_best": False, "asynchronous": False},
    }
    settings = dict(job.ours)
    if job.precision == "bf16-states":
        settings = {"training.weight_dtype": "bf16", "optimizer.state_dtype": "bf16"} | settings
    for key, value in settings.items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    path = folder / "ours.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return parse_config(["--config", str(path)])


def run(job: Job, engine: str) -> dict[str, Any]:
    """Train and measure. ``engine``: retemper, or retemper+fsdp with FSDP2 on its only rank, too."""

    def initialize_(self: Decoder, seed: int, copy_: Any = Tensor.copy_) -> None:
        for name, parameter in self.named_parameters():
            copy_(parameter.detach(), draw(name, parameter.shape, job))

    Decoder.initialize_ = initialize_  # type: ignore[method-assign]
    if engine.endswith("+fsdp"):
        data_parallel.is_alone = lambda mesh, config: False
    config = configure(job)
    clock = Clock(job)
    with process_group(config.device, config.parallel.timeout_seconds) as ranks:
        run = pretrain.build(config, ranks, check_room=False)
        with open_run_folder(run, None), run.stop, run.guards, run.saver, _timed_steps(clock):
            clock.ready()
            pretrain.make_steps(run)
        record = clock.record()
        del run
    return record


@contextmanager
def _timed_steps(clock: Clock) -> Iterator[None]:
    """Let ``clock`` record each step of the run, and leave out what follows the report of a step."""
    one_step, evaluate_and_save = pretrain.one_step, pretrain.evaluate_and_save

    def timed_step(run: Run, batches: list[Batch], num_targets: float) -> StepResult:
        result = one_step(run, batches, num_targets)
        clock.step_done(result.loss)
        return result

    def report_only(run: Run, result: StepResult, last: bool, stopping: bool) -> bool:
        if last:
            pretrain.report_pending(run)
        return stopping

    pretrain.one_step, pretrain.evaluate_and_save = timed_step, report_only
    try:
        yield
    finally:
        pretrain.one_step, pretrain.evaluate_and_save = one_step, evaluate_and_save
