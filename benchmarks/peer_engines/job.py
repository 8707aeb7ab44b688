"""Define the job of every engine, the timing of its steps, and the random weights that all engines start from."""

from __future__ import annotations

import dataclasses
import itertools
import json
import resource
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..timing import now, peak_bytes, reset_peak, seconds_between

BATCHES_FILE = "batches.npy"
"""[steps, B, S] int64 token ids, in the order in which every engine reads them."""
DATASET = "tokens"
"""Prefix of the same tokens as a dataset: each window of S tokens is one document."""


@dataclass(frozen=True)
class Job:
    """The settings of one run. Every engine gets the same, in a fresh process."""

    folder: str
    """Folder of the data and of the engine's output."""
    architecture: dict[str, Any]
    """Hugging Face ``config.json``."""
    batch_size: int
    sequence_length: int
    warmup_steps: int
    """Number of untimed steps at the start."""
    steps: int
    """Number of timed steps."""
    device: str
    """cpu or cuda."""
    precision: str
    """fp32; bf16: fp32 weights and states, bf16 arithmetic; bf16-states: weights, gradients and AdamW's moments too."""
    recompute: bool = False
    """Store only each block's input, and run the block again in the backward pass."""
    seed: int = 1234
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad_norm: float = 1.0
    ours: dict[str, Any] = field(default_factory=dict)
    """Further settings of this repository's engine, by dotted key of its config."""

    @property
    def total_steps(self) -> int:
        """Number of warm-up and timed steps."""
        return self.warmup_steps + self.steps

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens in one batch."""
        return self.batch_size * self.sequence_length

    def batches(self) -> npt.NDArray[np.int64]:
        """Return the [steps, B, S] token ids."""
        return np.load(Path(self.folder) / BATCHES_FILE)

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read the output of :meth:`write`."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class Clock:
    """Device and CPU time of every step, peak memory, and the losses.

    On a GPU the end of a step is an event on the current stream, and all events are read after the last step. So no
    engine is made to wait for its GPU in between, and an engine may run ahead. Peak memory covers all steps from the
    first one, without the building of the model: memory allocated by PyTorch on a GPU, resident memory of the process
    on a CPU.
    """

    def __init__(self, job: Job):
        self.job = job
        self.losses: list[Tensor | float] = []
        self._device = torch.device(job.device)
        self._moments: list[Any] = []
        self._cpu: list[float] = []

    def ready(self) -> None:
        """Start: model and data are built, and the first step follows."""
        self._memory_resets = reset_peak(self._device)
        self._built = now(self._device)

    def step_done(self, loss: Tensor | float) -> None:
        """Record that one optimizer step is done (or queued); ``loss`` is the mean over its targets before the
        update.
        """
        self.losses.append(loss)
        self._moments.append(now(self._device))
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self._cpu.append(usage.ru_utime + usage.ru_stime)
        if len(self.losses) == self.job.total_steps:
            self._peak = peak_bytes(self._device)

    def record(self) -> dict[str, Any]:
        """Return the measurements. Waits for the device."""
        first = self.job.warmup_steps - 1
        assert len(self._moments) == self.job.total_steps and first >= 0
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        steps = [seconds_between(*pair) for pair in itertools.pairwise(self._moments[first:])]
        tokens = self.job.steps * self.job.tokens_per_step
        return {
            "tokens_per_second": tokens / sum(steps),
            "tokens_per_second_median": self.job.tokens_per_step / statistics.median(steps),
            "tokens_per_cpu_second": tokens / (self._cpu[-1] - self._cpu[first]),
            "step_seconds": steps,
            "warmup_seconds": seconds_between(self._built, self._moments[first]),
            "peak_bytes": self._peak,
            "peak_is_of_steps": self._memory_resets,
            "losses": [float(loss) for loss in self.losses],
        }


def draw(name: str, shape: torch.Size, job: Job) -> Tensor:
    """Return initial fp32 values of the parameter with Hugging Face's name ``name``: the same in every engine.

    Drawn on the model's device, since the host would need a minute for 7 billion of them.
    """
    if name.endswith("bias"):
        return torch.zeros(shape, device=job.device)
    if name.endswith("norm.weight"):
        return torch.ones(shape, device=job.device)
    # An overlap of two names' streams is only a theoretical possibility: the seed is 63 bits of the name's bytes.
    seed = (int.from_bytes(name.encode(), "little") * 1_000_003 + job.seed) % (2**63 - 25)
    generator = torch.Generator(job.device).manual_seed(seed)
    std = job.architecture.get("initializer_range", 0.02)
    return torch.empty(shape, device=job.device).normal_(0.0, std, generator=generator)


def optimizer_groups(model: nn.Module, job: Job) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: matrices decay, vectors do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": job.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
