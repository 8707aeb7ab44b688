"""Tools with models that transformers computes: plans, benchmarks and vocabularies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import plan_runs
import pytest
import tiny_run
import yaml
from model_table import tiny_config, tiny_model

from retemper.benchmarks.step.measure import measure_step
from retemper.benchmarks.step.options import StepBenchmarkOptions
from retemper.engine.errors import UserError
from retemper.engine.model.implementations import parse_architecture
from retemper.engine.observe.progress import human
from retemper.tools.planning.options import PlanOptions, read_architecture
from retemper.tools.planning.pool import DryRunPool
from retemper.tools.planning.search import require_possible
from retemper.tools.vocabulary.weights import open_model, require_known_tables

EXPERTS = {"model_type": "granitemoe", "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96}


@pytest.mark.parametrize("recompute", ["full", pytest.param("none", marks=pytest.mark.slow)])
def test_planned_memory_is_that_of_real_tensors(recompute, one_rank, tmp_path):
    path = plan_runs.write_config(tmp_path, **EXPERTS)
    spec = plan_runs.spec_of(plan_runs.configure(path, f"--parallel.recompute {recompute}"), 1)
    assert spec.architecture.implementation == "transformers"
    planned, real = dry_run_alone(spec), plan_runs.counted(one_rank, spec)
    assert planned.kept == real.kept and planned.parameters == spec.architecture.num_parameters
    for kind, size in real.most.items():
        assert planned.most[kind] == pytest.approx(size, rel=0.02, abs=2**16), kind


def dry_run_alone(spec):
    """In a process without a process group."""
    with DryRunPool(1) as pool:
        return pool.run([spec])[0]


@pytest.mark.slow
def test_operations_of_routed_experts_are_those_of_the_chosen_ones(tmp_path):
    """Three products of each matrix, without those of attention."""
    config = plan_runs.configure(plan_runs.write_config(tmp_path, **EXPERTS))
    architecture, tokens = read_architecture(config.model), 4 * 256
    spec = replace(plan_runs.spec_of(config, 1, (9, 0)), architecture=architecture)
    matrices = architecture.block_matrices + architecture.hidden_size * architecture.vocab_size
    heads = architecture.num_attention_heads * architecture.head_dim * architecture.num_layers
    attention = 7 * 2 * heads * 256 / 2
    assert dry_run_alone(spec).flops == pytest.approx(tokens * (6 * matrices + attention), rel=0.01)


@pytest.mark.parametrize(("axis", "model_type"), [("tensor", "granitemoe"), ("pipeline", "granitemoe")])
def test_plans_refuse_what_a_run_refuses(axis, model_type, tmp_path):
    config = plan_runs.configure(
        plan_runs.write_config(tmp_path, **EXPERTS), f"--parallel.{axis} 2 --training.global_batch_size 64"
    )
    cluster = PlanOptions(1, 8, "h100-80gb", 0.55, 4.0, None).cluster(read_architecture(config.model))
    with pytest.raises(UserError, match=rf"parallel.{axis} is 2, but model_type {model_type}"):
        require_possible(config, cluster)


def test_benchmark_counts_the_chosen_experts(one_rank, tmp_path):
    path = tiny_run.write_config(tmp_path)
    content = yaml.safe_load(path.read_text())
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    content["model"] = {"architecture": str(tmp_path)}
    path.write_text(yaml.safe_dump(content))
    options = StepBenchmarkOptions(steps=1, warmup_steps=0, matmul_seconds=0.0)
    found = measure_step(tiny_run.configure(path), options, one_rank)
    architecture = parse_architecture(tiny_config("qwen3_moe").to_dict(), "x")
    expert, hidden = 3 * 64 * 32, 64
    attention = 2 * hidden * (64 + 32)
    dense, routed = 3 * 64 * 128, 2 * expert + 4 * hidden
    assert architecture.block_matrices == 4 * attention + dense + 3 * routed
    per_token = 6 * (architecture.block_matrices + 64 * 202) + 12 * 64 * 4 * 32
    assert found.flops_per_step["all pairs of positions"] == found.tokens_per_step * per_token
    idle = 3 * (4 - 2) * expert
    assert architecture.num_active_parameters == architecture.num_parameters - idle
    [model] = [line for line in found.plan if line.startswith("model ")]
    assert f"({human(architecture.num_active_parameters)} active for each token)" in model


@pytest.mark.parametrize(
    ("model_type", "tensor"), [("phi", "lm_head.bias"), ("gemma4_text", "model.embed_tokens_per_layer.weight")]
)
def test_other_tables_are_refused_by_name(model_type, tensor, tmp_path):
    tiny_model(tiny_config(model_type)).save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    with pytest.raises(UserError, match=rf"{tensor} also has a row for each of the 202 tokens") as caught:
        require_known_tables(open_model(name), name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2", "qwen3_moe"])
def test_embedding_and_head_have_any_name(model_type, tmp_path: Path):
    tiny_model(tiny_config(model_type)).save_pretrained(tmp_path / "model")
    require_known_tables(open_model(str(tmp_path / "model")), "model")
