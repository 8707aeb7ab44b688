"""The run: all sections of its settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ..yaml_loader import dump_yaml
from .adapter import AdapterConfig
from .checkpoint import CheckpointConfig
from .data import DataConfig
from .logging import LoggingConfig
from .marks import FilePath, Switch
from .model import ModelConfig
from .optimizer import OptimizerConfig
from .parallel import ParallelConfig
from .training import TrainingConfig


@dataclass(frozen=True)
class RunConfig:
    """The run."""

    run_folder: FilePath
    """Folder of the run's checkpoints, metrics, TensorBoard events, log and resolved configuration."""
    data: DataConfig
    training: TrainingConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    callbacks: list[str] = field(default_factory=list)
    """Import paths of classes, such as ``my_module.MyCallback``, that receive the events of the run on rank 0; see
    docs/tracking.md. Modules are also found in the folder of the ``--config`` file and in the working directory."""
    seed: int = 1234
    """Seed of the sample order and of random initialization."""
    allow_changes: list[str] = field(default_factory=list)
    """Settings that may differ from the checkpoint that the run continues from: seed, training.sequence_length,
    data.validation_fraction, data.shuffle, data.packing, and data_files (other tokens or masks in a dataset of the same
    name). Such changes are refused unless listed here. Each source continues from its number of used samples, so some
    samples may repeat before others are seen. All other changes are allowed, and listed at the start."""
    resume: Annotated[FilePath, Switch("auto", "none")] = "auto"
    """auto (or true, yes, on): continue from the newest undamaged checkpoint in ``run_folder``, or start fresh if the
    run never had one. none (or false, no, off): start fresh; refused if checkpoints exist. Any other value: path of the
    checkpoint to continue from. If that run is interrupted, the same command continues from the newest checkpoint
    written since."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Compute device. auto: CUDA if there is a GPU, else the CPU."""


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested plain dictionaries, for YAML, JSON and manifests."""
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML text that ``--config`` reads back unchanged."""
    return dump_yaml(to_dict(config))
