"""How layers are cut into stages, and which rank holds which."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import DataConfig, ParallelConfig, RunConfig, TrainingConfig
from retemper.engine.errors import UserError
from retemper.engine.model.architecture import Architecture, LayerRange
from retemper.engine.model.implementations import meta_model, parse_architecture
from retemper.engine.parallel.pipeline import check, cut_layers, stage_numbers

CONFIGS = Path(__file__).resolve().parents[2] / "megatron_configs"


def shape(layers: int, vocabulary: int, tied: bool) -> Architecture:
    return parse_architecture(
        {
            "model_type": "qwen2",
            "vocab_size": vocabulary,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
            "tie_word_embeddings": tied,
        }
    )


def worst_stage(architecture: Architecture, cuts: tuple[int, ...]) -> tuple[float, float]:
    """By counting a model's weights: those multiplied in the busiest stage, and the sum of the squares of all."""
    sizes = {name: parameter.numel() for name, parameter in meta_model(architecture).named_parameters()}
    layers = architecture.num_layers
    blocks = [sum(n for name, n in sizes.items() if name.startswith(f"model.layers.{i}.")) for i in range(layers)]
    vocabulary = sizes["model.embed_tokens.weight"]
    work, weights = [], []
    for start, stop in itertools.pairwise((0, *cuts, layers)):
        head = vocabulary if stop == layers else 0
        work.append(sum(blocks[start:stop]) + head)
        weights.append(work[-1] + (vocabulary if start == 0 else 0))
    return max(work), sum(weight**2 for weight in weights)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocabulary", [16, 300, 2000])
@pytest.mark.parametrize(("layers", "stages"), [(5, 2), (7, 3), (8, 4), (6, 6), (6, 1)])
def test_no_other_cut_is_better(layers, stages, vocabulary, tied):
    architecture = shape(layers, vocabulary, tied)
    found = cut_layers(architecture, stages)
    assert [r.start for r in found] == [0, *(r.stop for r in found[:-1])] and found[-1].stop == layers
    ours = worst_stage(architecture, tuple(r.start for r in found[1:]))
    every = [worst_stage(architecture, cuts) for cuts in itertools.combinations(range(1, layers), stages - 1)]
    assert ours[0] == pytest.approx(min(every)[0], rel=1e-3)
    assert ours[1] == pytest.approx(min(w for m, w in every if m == min(every)[0]), rel=1e-3)


def test_the_last_stage_of_qwen2_72b_has_fewer_layers_for_its_head():
    config = parse_config(["--config", str(CONFIGS / "qwen2_72b.yaml")])
    assert isinstance(config.model.architecture, dict)
    stages = cut_layers(parse_architecture(config.model.architecture), 8)
    lengths = [stop - start for start, stop in stages]
    assert sum(lengths) == 80 and max(lengths) == 11 and lengths[-1] < max(lengths)
    assert LayerRange(0, lengths[0]) == stages[0]


@pytest.mark.parametrize(
    ("schedule", "per_rank", "expected"),
    [
        ("1f1b", 1, [[0], [1], [2], [3]]),
        ("interleaved_1f1b", 2, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("interleaved_zero_bubble", 3, [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]),
        ("zbv_zero_bubble", 2, [[0, 7], [1, 6], [2, 5], [3, 4]]),
    ],
)
def test_which_rank_holds_which_stage(schedule, per_rank, expected):
    assert [stage_numbers(schedule, place, 4, per_rank) for place in range(4)] == expected


@pytest.mark.parametrize(
    ("version", "backend", "refused"),
    [
        ("2.11.0+cu130", "gloo", True),
        ("2.12.1", "gloo", True),
        ("2.13.0+cpu", "gloo", False),
        ("2.11.0+cu130", "nccl", False),
        ("2.11.0+cu130", "undefined", False),  # cpu:gloo,cuda:nccl, of runs on GPUs
        ("2.11.0+cu130", None, False),  # a plan
    ],
)
def test_zbv_needs_a_backend_that_sends_to_the_own_rank_before_torch_2_13(monkeypatch, version, backend, refused):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(dist, "is_initialized", lambda: backend is not None)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    parallel = ParallelConfig(
        pipeline=2, pipeline_schedule="zbv_zero_bubble", pipeline_stages_per_rank=2, reshard_after_forward=False
    )
    config = RunConfig("folder", DataConfig(), TrainingConfig(1), parallel=parallel)
    if not refused:
        check(shape(8, 50, tied=False), config, 4, compiled=False)
        return
    with pytest.raises(
        UserError, match=r"zbv_zero_bubble .* PyTorch 2\.1[12].*; use interleaved_zero_bubble"
    ) as caught:
        check(shape(8, 50, tied=False), config, 4, compiled=False)
    assert "\n" not in str(caught.value)
