"""A model beyond the memory of its ranks is refused before anything is allocated."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from retemper.engine.config.settings import (
    AdapterConfig,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from retemper.engine.errors import UserError
from retemper.engine.model.implementations import parse_architecture
from retemper.engine.parallel import memory_check as memory_bound
from retemper.engine.parallel.memory_check import device_memory, require_memory, require_memory_for_weights

CPU = torch.device("cpu")
SMALL = parse_architecture(
    {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
)


def a_run(**training: object) -> RunConfig:
    return RunConfig(
        run_folder="run",
        data=DataConfig(train=[SourceConfig("x")]),
        training=TrainingConfig(train_tokens=64, sequence_length=64, **training),
    )


def refused(config: RunConfig, memory: int, monkeypatch: pytest.MonkeyPatch, world_size: int = 1) -> bool:
    monkeypatch.setattr(memory_bound, "device_memory", lambda device: memory)
    try:
        require_memory(config, SMALL, CPU, world_size)
    except UserError as error:
        assert "\n" not in str(error) and f"{SMALL.num_parameters:,} parameters" in str(error)
        return True
    return False


def test_counts_what_training_keeps_for_each_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that the documentation of training.weight_dtype adds up."""
    number = SMALL.num_parameters
    for config, each in (
        (a_run(), 16),
        (a_run(weight_dtype="bf16"), 12),
        (replace(a_run(), optimizer=OptimizerConfig(state_dtype="bf16")), 12),
    ):
        assert not refused(config, each * number, monkeypatch)
        assert refused(config, each * number - 1, monkeypatch)
    for selection, trained in (
        ("embeddings", SMALL.vocab_size * SMALL.hidden_size * (1 if SMALL.tie_word_embeddings else 2)),
        (["model.layers.0.input_layernorm.weight", "model.norm.weight"], 2 * SMALL.hidden_size),
    ):
        assert not refused(a_run(trainable=selection), 4 * number + 12 * trained, monkeypatch)
        assert refused(a_run(trainable=selection), 4 * number + 12 * trained - 1, monkeypatch)


def test_a_quantized_base_counts_with_its_codes_and_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: of every matrix of the blocks 4 bits, a byte per 64 elements, and 4 bytes per 64 x 256."""
    quantized = AdapterConfig(kind="lora", rank=4, quantize_base="nf4")
    run = replace(a_run(precision="bf16"), adapter=quantized)
    layer = [*[(64, 64)] * 4, *[(64, 128)] * 3]
    elements = 2 * sum(a * b for a, b in layer)
    codes = 2 * sum(a * b // 2 + a * b // 64 + 4 * 1 + 4 + 4 * (16 + 256) for a, b in layer)
    adapter = 16 * 2 * sum(4 * (a + b) for a, b in layer)
    needed = 2 * (SMALL.num_parameters - elements) + codes + adapter
    assert not refused(run, needed, monkeypatch)
    assert refused(run, needed - 2, monkeypatch)


def test_weights_without_training_count_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    number = SMALL.num_parameters
    for config, ranks, needed in ((a_run(), 1, 4 * number), (a_run(weight_dtype="bf16"), 2, 2 * number // 2 * 2)):
        monkeypatch.setattr(memory_bound, "device_memory", lambda device, needed=needed: needed)
        require_memory_for_weights(config, SMALL, CPU, ranks)
        monkeypatch.setattr(memory_bound, "device_memory", lambda device, needed=needed: needed - 1)
        with pytest.raises(UserError, match=rf"^model.initialize_from: {number:,} parameters x [^\n]*use more ranks"):
            require_memory_for_weights(config, SMALL, CPU, ranks)


def test_ranks_share_what_is_sharded_and_the_memory_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    total = 16 * SMALL.num_parameters
    assert not refused(a_run(), total // 4 * 2, monkeypatch, world_size=4)
    assert refused(a_run(), total // 4 * 2 - 2, monkeypatch, world_size=4)
    copies = replace(a_run(), parallel=ParallelConfig(replicate=4, shard=1))
    assert not refused(copies, total * 2, monkeypatch, world_size=4)
    assert refused(copies, total * 2 - 2, monkeypatch, world_size=4)


def test_the_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    monkeypatch.setattr(memory_bound, "_CGROUP_LIMITS", (str(tmp_path / "absent"),))
    assert device_memory(CPU) == int(line.split()[1]) * 1024
    for text, expected in (("12345\n", 12345), ("max\n", int(line.split()[1]) * 1024)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(memory_bound, "_CGROUP_LIMITS", (str(tmp_path / "memory.max"),))
        assert device_memory(CPU) == expected
