"""Run the steps of this repository's ``engine/pretrain.py``, with external timing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import RunConfig
from retemper.engine.data.loader import Prefetcher
from retemper.engine.model.decoder import Decoder
from retemper.engine.parallel.process_group import process_group
from retemper.engine.pretrain import build, next_batches, one_step

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
        "logging": {"log_interval": max(1, job.total_steps), "tensorboard": False},
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
    """Train and measure."""

    def initialize_(self: Decoder, seed: int, copy_: Any = Tensor.copy_) -> None:
        for name, parameter in self.named_parameters():
            copy_(parameter.detach(), draw(name, parameter.shape, job))

    Decoder.initialize_ = initialize_  # type: ignore[method-assign]
    config = configure(job)
    clock = Clock(job)
    with process_group(config.device, config.parallel.timeout_seconds) as ranks:
        run = build(config, ranks, check_room=False)
        first_samples = range(0, run.end_sample, run.plan.global_batch_size)
        clock.ready()
        prefetcher = Prefetcher(run.data.micro_batches, first_samples, config.data.prefetch_steps)
        with run.guards, prefetcher:
            for _ in first_samples:
                result = one_step(run, *next_batches(run, prefetcher))
                clock.step_done(result.loss)
        record = clock.record()
        del run, result
    return record
