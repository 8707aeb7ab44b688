"""Check a configuration, and what it needs on this machine, without starting the run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...engine.config.parser import parse_config
from ...engine.config.settings import RunConfig
from ...engine.errors import UserError
from ...engine.files.disk_space import format_bytes, free_bytes
from ...engine.parallel.launcher import Launcher
from .finding import Finding, checked, note, ok, problem

if TYPE_CHECKING:
    from ...engine.model.architecture import Architecture

GROUP = "Configuration"


def check_configuration(arguments: Sequence[str], launcher: Launcher, network: bool) -> list[Finding]:
    """Return findings on the run that ``arguments`` of engine/pretrain.py describe.

    Args:
        arguments: ``--config`` options, and others.
        launcher: of this process. Without one, the run is expected to have a rank for each GPU of this machine.
        network: whether a model may be looked up on the Hub.

    Raises:
        UserError: the configuration itself is wrong.
    """
    config = parse_config(arguments)
    world_size = launcher.world_size if launcher.launched else _gpus() or 1
    layout = _layout(config, world_size, launcher.launched)
    return [
        ok(GROUP, "settings", "valid"),
        layout,
        *checked(GROUP, "model", lambda: _model(config, world_size if layout.status == "ok" else None, network)),
        *_data(config),
    ]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _layout(config: RunConfig, world_size: int, launched: bool) -> Finding:
    from ...engine.parallel.layout import check_layout

    try:
        check_layout(config, world_size)
    except UserError as error:
        if launched:
            return problem(GROUP, "ranks", str(error), "")
        return note(GROUP, "ranks", f"not for this machine alone: {error}", "run doctor under the launcher of the run")
    return ok(GROUP, "ranks", f"the layout and the batch fit {_ranks(world_size)}")


def _model(config: RunConfig, world_size: int | None, network: bool) -> list[Finding]:
    """Return findings on the model, its memory on this machine, and the disk space of its checkpoints."""
    from ...engine.model.config_file import CONFIG_FILE
    from ...engine.weights.hugging_face.config_source import configured_architecture
    from ...engine.weights.hugging_face.hub_download import find_files, is_on_hub

    source = config.model.initialize_from
    findings = []
    if source is not None and is_on_hub(source):
        if network:
            find_files(source, "model.initialize_from", [CONFIG_FILE])
            findings.append(ok(GROUP, "model", f"{source} is on the Hub"))
        else:
            text = f"{source} is no folder here, so it is a name on the Hub"
            findings.append(note(GROUP, "model", text, "--network looks it up"))
            if config.model.architecture is None:
                return findings
    elif source is not None and not os.path.exists(source):
        text = f"model.initialize_from {source} does not exist"
        findings.append(problem(GROUP, "model", text, "name a checkpoint, a Hugging Face folder or a name on the Hub"))
    architecture = configured_architecture(config.model)
    findings.append(ok(GROUP, "model", f"{architecture.num_parameters:,} parameters"))
    if world_size is not None:
        findings += checked(GROUP, "memory", lambda: _memory(config, architecture, world_size))
    return [*findings, _checkpoints(config, architecture)]


def _memory(config: RunConfig, architecture: Architecture, world_size: int) -> list[Finding]:
    import torch

    from ...engine.parallel.memory_check import require_memory
    from ...engine.parallel.precision import with_precision_of

    on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if on_gpu else "cpu")
    require_memory(with_precision_of(config, device), architecture, device, world_size)
    text = f"weights, gradients and optimizer states fit {_ranks(world_size)}"
    return [note(GROUP, "memory", text, "`retemper plan` estimates activations as well")]


def _checkpoints(config: RunConfig, architecture: Architecture) -> Finding:
    from ...engine.weights.checkpoint.destination import checkpoint_bytes

    size, kept = checkpoint_bytes(config, architecture), config.checkpoint.keep_last
    free = free_bytes(Path(config.run_folder))
    text = f"{format_bytes(free)} free for {kept} checkpoints of up to {format_bytes(size)} in {config.run_folder}"
    if free < size:
        return problem(GROUP, "disk", text, "free some space, or choose another run_folder")
    if free < (kept + 1) * size:  # a new one is complete before an old one is removed
        return note(GROUP, "disk", text, "lower checkpoint.keep_last, or free some space")
    return ok(GROUP, "disk", text)


def _data(config: RunConfig) -> list[Finding]:
    """Return a finding for each dataset of training and validation."""
    sources = [source for stage in config.data.stages for source in stage.train] or config.data.train
    paths = {f"data source {source.identity}": source.path for source in sources}
    paths |= {f"validation set {name}": path for name, path in config.data.validation_paths.items()}
    findings = []
    for name, path in paths.items():
        findings += checked(GROUP, "data", partial(_dataset, name, path))
    return findings


def _dataset(name: str, path: str) -> list[Finding]:
    from ...engine.data.indexed_dataset import IndexedDataset
    from ...engine.data.text_sources import is_text

    if is_text(path):
        return [note(GROUP, "data", f"{name}: {path} is text, which the run tokenizes at its start")]
    dataset = IndexedDataset(path)
    return [ok(GROUP, "data", f"{name}: {dataset.num_tokens:,} tokens in {path}")]


def _ranks(count: int) -> str:
    return f"{count} ranks" if count > 1 else "one rank"
