"""Tiny runs for the tests of tools/plan.py, and what the allocator says they take."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch.profiler import ProfilerActivity, profile, record_function

from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import RunConfig
from retemper.engine.model.implementations import parse_architecture
from retemper.engine.parallel.layout import plan_layout
from retemper.engine.parallel.process_group import Ranks
from retemper.tools.planning.dry_run import RankSpec, RankUsage, SimulatedRank, count_step, fresh_constants
from retemper.tools.planning.memory import MemoryCounter

CPU = torch.device("cpu")
ARCHITECTURE = {
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def write_config(folder: Path, **architecture: object) -> Path:
    """The run's YAML file. Its data do not exist: a dry run reads none."""
    config = {
        "run_folder": str(folder / "run"),
        "model": {"architecture": {**ARCHITECTURE, **architecture}},
        "data": {"train": [{"path": str(folder / "nowhere")}]},
        "training": {
            "train_tokens": 100_000,
            "sequence_length": 256,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "precision": "bf16",
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def configure(path: Path, overrides: str = "") -> RunConfig:
    """The configuration with command-line overrides."""
    return parse_config(["--config", str(path), *overrides.split()])


def spec_of(
    config: RunConfig,
    world_size: int,
    capability: tuple[int, int] | None = None,
    gpus_per_node: int = 8,
    gpu_memory: int | None = None,
) -> RankSpec:
    """The rank to dry run of a run on ``world_size`` ranks; on CPUs unless there is a ``capability``."""
    architecture = parse_architecture(config.model.architecture)
    layout = plan_layout(config.parallel, world_size)
    return RankSpec(config, architecture, layout, gpus_per_node, capability, gpu_memory)


def allocated(ranks: Ranks, spec: RankSpec) -> tuple[int, int]:
    """Bytes that PyTorch's CPU allocator has given out: before a second step, and most during it. Real tensors and real
    collectives; nothing of the dry run counts."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, fresh_constants():
        run = SimulatedRank(spec, ranks, MemoryCounter())  # a counter that is never active
        run.one_step()
        gc.collect()
        with record_function("second step"):
            run.one_step()
        del run
        gc.collect()
    events = profiler.profiler.kineto_results.events()
    (start, end) = next((e.start_ns(), e.end_ns()) for e in events if e.name() == "second step")
    before = peak = total = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        if event.start_ns() < start:
            before = peak = total
        elif event.start_ns() <= end:
            peak = max(peak, total)
    return before, peak


def allocated_alone(spec: RankSpec) -> tuple[int, int]:
    """:func:`allocated` in a process group of one, made for it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return allocated(Ranks(0, 1, CPU), spec)
    finally:
        gc.collect()
        dist.destroy_process_group()


def allocated_on_a_gpu(spec: RankSpec) -> tuple[int, int]:
    """Bytes that PyTorch's CUDA allocator has given out: before a second step, and most during it."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with fresh_constants():
            run = SimulatedRank(spec, Ranks(0, 1, torch.device("cuda", 0)), MemoryCounter())
            run.one_step()
            gc.collect()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run.one_step()
            return before, torch.cuda.max_memory_allocated()
    finally:
        dist.destroy_process_group()


def counted(ranks: Ranks, spec: RankSpec) -> RankUsage:
    """A step with values, counted as a dry run is."""
    result = count_step(spec, ranks)
    gc.collect()
    return result
