"""Read the shipped configurations: the model of each, and what it needs."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.config.files import SHIPPED, read_config
from ...engine.model.implementations import parse_architecture

_HEADER = re.compile(
    r"# (?P<model>[^\s,]+).*? on (?:one GPU|one node of (?P<gpus>\d+) GPUs of (?P<gb>\d+) GB|"
    r"(?P<nodes>\d+) nodes x (?P<gpus_each>\d+) GPUs of (?P<gb_each>\d+) GB):"
)
"""First line of a preset: its model, and the GPUs for which its layout was chosen."""
_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Preset:
    """A shipped configuration."""

    name: str
    file: str
    model: str
    """Name on the Hub; of the demo's presets, what they are."""
    model_type: str | None
    parameters: int | None
    """None if they depend on the checkpoint that it starts from."""
    nodes: int
    gpus_per_node: int
    """0: the preset trains on a CPU."""
    gpu_memory_gb: int | None
    """Of each GPU; None if the file names none."""
    states_gb: float | None
    """Weights, gradients and optimizer states, over all GPUs together. Activations are not included."""
    checkpoint_gb: float | None
    sequence_length: int
    train_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return dataclasses.asdict(self)

    @property
    def hardware(self) -> str:
        """The machines, in words."""
        if not self.gpus_per_node:
            return "a CPU (make demo)"
        if self.nodes * self.gpus_per_node == 1:
            return "1 GPU"
        nodes = f"{self.nodes} x " if self.nodes > 1 else ""
        return f"{nodes}{self.gpus_per_node} GPUs of {self.gpu_memory_gb} GB"

    @property
    def plan_command(self) -> str:
        """The command that predicts memory and time of the preset on these machines."""
        gpu = "h100-80gb" if self.gpu_memory_gb in (80, None) else "NAME"
        cluster = f"--nodes {self.nodes} --gpus-per-node {self.gpus_per_node} --gpu {gpu}"
        return f"retemper plan --config {self.name} {cluster}"


def read_presets() -> list[Preset]:
    """Return the shipped configurations, the demo's last, the others by the number of their parameters."""
    presets = [read_preset(path) for path in SHIPPED.glob("*.yaml")]
    return sorted(presets, key=lambda preset: (not preset.gpus_per_node, preset.parameters or 0, preset.name))


def find_preset(name: str) -> Preset | None:
    """Return the shipped configuration ``name``, with or without ``.yaml``."""
    path = SHIPPED / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    return read_preset(path) if path.is_file() else None


def read_preset(path: Path) -> Preset:
    """Return the preset in a file of ``megatron_configs``.

    Raises:
        UserError: its model cannot be read.
    """
    config, first_line = read_config(path), path.read_text(encoding="utf-8").partition("\n")[0]
    found = _HEADER.match(first_line)
    gpus = found["gpus"] or found["gpus_each"] or "1" if found else "0"
    memory = found and (found["gb"] or found["gb_each"])
    config_json = config["model"].get("architecture")
    parameters = None if config_json is None else parse_architecture(config_json).num_parameters
    states_gb, checkpoint_gb = _sizes_gb(config, parameters)
    return Preset(
        name=path.stem,
        file=str(path),
        model=found["model"] if found else "a small model of the demo",
        model_type=config_json and config_json["model_type"],
        parameters=parameters,
        nodes=int((found and found["nodes"]) or 1),
        gpus_per_node=int(gpus),
        gpu_memory_gb=int(memory) if memory else None,
        states_gb=states_gb,
        checkpoint_gb=checkpoint_gb,
        sequence_length=config["training"]["sequence_length"],
        train_tokens=config["training"]["train_tokens"],
    )


def _sizes_gb(config: dict[str, Any], parameters: int | None) -> tuple[float | None, float | None]:
    """Return the size of weights, gradients and moments together, and the size of a checkpoint, without gradients."""
    if parameters is None:
        return None, None
    weight = _BYTES[config["training"].get("weight_dtype", "fp32")]
    moment = _BYTES[config["optimizer"].get("state_dtype", "fp32")]
    return parameters * (2 * weight + 2 * moment) / 1e9, parameters * (weight + 2 * moment) / 1e9
