"""Random adapters: as PEFT makes them, and as a checkpoint holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from retemper.engine.config.settings import AdapterConfig
from retemper.engine.model.adapters import adapter_parameters
from retemper.engine.model.architecture import Architecture
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.weights.adapters.base import BaseRecord
from retemper.engine.weights.adapters.merged import merged_parameters
from retemper.engine.weights.adapters.opening import open_parameters
from retemper.engine.weights.adapters.peft import PEFT_WEIGHTS, PeftExport
from retemper.engine.weights.adapters.peft_config import PeftConfig
from retemper.engine.weights.adapters.stored import StoredAdapter
from retemper.engine.weights.checkpoint.assets import HfAssets
from retemper.engine.weights.checkpoint.manifest import Manifest, read_manifest
from retemper.engine.weights.checkpoint.store import CheckpointStore
from retemper.engine.weights.hugging_face.model import HfModel, open_hf_model
from retemper.engine.weights.saving import save_tensors
from retemper.engine.weights.table import read_table

PREFIX = "base_model.model."
CONFIG = AdapterConfig(kind="lora", rank=4, alpha=8, modules_to_save=["model.norm.weight"])


def peft_model(base: torch.nn.Module, config: AdapterConfig, targets: list[str], saved: list[str]) -> PeftModel:
    """``base`` with a random adapter of PEFT; all of its matrices are nonzero."""
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.rslora,
        use_dora=config.dora,
        target_modules=targets,
        modules_to_save=saved or None,
        task_type="CAUSAL_LM",
        ensure_weight_tying=bool(saved) and bool(base.config.tie_word_embeddings),
    )
    model = get_peft_model(base, lora)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.1 if "lora_magnitude" in name else 0.05))
    return model.eval()


def tensors_of(model: PeftModel, value: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Tensor]:
    """The trained tensors under the names of a checkpoint; ``value`` may take their gradients."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = name.removeprefix(PREFIX).replace(".modules_to_save.default", "").replace(".default", "")
            found[plain.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = value(parameter)
    return found


def random_adapter(architecture: Architecture, config: AdapterConfig) -> dict[str, Tensor]:
    """The tensors of an adapter, all of them nonzero."""
    generator = torch.Generator().manual_seed(5)
    shapes = adapter_parameters(architecture, config).trained
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    return {name: tensor.abs() + 0.5 if tensor.ndim == 1 else tensor for name, tensor in tensors.items()}


def stored_adapter(
    folder: Path, architecture: Architecture, config: AdapterConfig, tensors: dict[str, Tensor]
) -> StoredAdapter:
    """``tensors`` written to the disk, and opened."""
    folder.mkdir()
    save_tensors(folder, tensors, distributed=False)
    settings: dict[str, Any] = vars(config)
    return StoredAdapter.of_checkpoint(folder, settings, architecture, read_table(folder))


def export(base: HfModel, adapter: StoredAdapter, folder: Path) -> tuple[PeftExport, Path]:
    """The adapter as a folder of PEFT."""
    merged = merged_parameters(base.parameters, adapter, base.layout)
    config = PeftConfig(adapter.parameters, base.architecture, base.layout)
    peft = PeftExport(config, adapter, base.parameters, merged)
    folder.mkdir()
    save_file({name: peft.tensors.read(name) for name in peft.tensors.tensors}, folder / PEFT_WEIGHTS)
    for name, content in peft.config.files(str(base.weights.folder)).items():
        (folder / name).write_bytes(content)
    return peft, folder


def save_adapter(base: Path, run_folder: Path, ranks: Ranks, start: Path | None = None) -> Path:
    """A training checkpoint of a random adapter; ``start`` is its base, if that is not the folder ``base``."""
    model = open_hf_model(base)
    tensors = random_adapter(model.architecture, CONFIG)
    states = {f"optimizer.exp_avg.{name}": torch.zeros_like(tensor) for name, tensor in tensors.items()}
    opened = open_parameters(start, read_manifest(start), model.config) if start else model.weights
    manifest = Manifest(
        kind="training",
        step=3,
        base=BaseRecord.of(start or base, opened).to_dict(),
        config={"model": {"initialize_from": str(base)}, "adapter": dataclasses.asdict(CONFIG)},
    )
    store = CheckpointStore(run_folder, ranks, keep_last=1, keep_best=False)
    return store.save({**tensors, **states}, HfAssets.read(base), manifest)
