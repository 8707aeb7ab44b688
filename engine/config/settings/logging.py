"""Settings of the reports of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from .marks import Switch


@dataclass(frozen=True)
class LoggingConfig:
    """Reports of the run."""

    log_interval: int = 1
    """Number of steps between console lines and metric records."""
    stragglers: bool = True
    """With several ranks: record the slowest rank's times for data, blocks and waiting, and report ranks that delay the
    others."""
    tensorboard: bool = True
    """Write TensorBoard events under ``{run_folder}/tensorboard``."""
    trackers: list[Literal["wandb", "mlflow", "swanlab", "trackio", "comet", "csv"]] = field(default_factory=list)
    """Experiment trackers that receive the records as well; see docs/tracking.md. Each but csv needs its package."""
    project: str = "retemper"
    """Name of the project in the trackers (MLflow: of the experiment)."""
    run_name: str | None = None
    """Name of the run in the trackers. Null: the name of ``run_folder``."""
    group: str | None = None
    """Group of runs in the trackers."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run in the trackers."""
    offline: bool = False
    """Trackers write only files, under ``{run_folder}/trackers``, and use no network."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts that the model continues greedily at every evaluation. They begin as documents do in training. The texts
    go to the console, to ``samples.jsonl`` and to the trackers. Every token costs the forward pass of a micro-batch,
    with a pipeline that of a step."""
    sample_tokens: int = 64
    """Maximum number of new tokens for each of ``sample_prompts``. A text also ends with the end of a document, or at
    ``training.sequence_length`` tokens."""
    progress_bar: Annotated[Literal["auto", "on", "off"], Switch("on", "off")] = "auto"
    """Show one live line instead of a line for each step: a bar, the loss, the time left, tokens/s and MFU. auto: if
    standard output is a terminal, unless TERM is dumb. ``log.txt`` always has the line of each reported step."""
    profile_steps: list[int] | None = None
    """First and last step, such as [10, 13]. Every rank writes a trace of these steps with the PyTorch profiler, and a
    table, under ``{run_folder}/profile``; see docs/profiling.md. These steps and the one before are slower, and do not
    count in the speed of the run. Null: none."""
    memory_snapshot: Literal["never", "on_oom"] = "never"
    """on_oom: record allocations on a GPU with their Python stacks, and when its memory runs out write
    ``{run_folder}/memory_snapshot_rank0.pickle`` (of that rank) for https://pytorch.org/memory_viz. Recording takes
    about 2 µs for each allocation, and some hundred MB of host memory for each rank."""
    metrics_port: int | None = None
    """Port on which rank 0 serves the newest numbers for Prometheus, at ``http://HOST:PORT/metrics`` on all interfaces.
    A port that is in use is refused. Null: none."""
