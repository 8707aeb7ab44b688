"""tools/plan.py against PyTorch's allocator, real ranks, closed formulas and written files."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import plan_runs
import pytest
import torch
import yaml

from retemper.engine.config.settings import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from retemper.engine.errors import run_command
from retemper.engine.model.decoder import Decoder
from retemper.engine.model.implementations import parse_architecture
from retemper.engine.optim import allocate_states, build_optimizer
from retemper.engine.parallel.layout import Layout
from retemper.engine.weights.checkpoint.destination import checkpoint_bytes
from retemper.engine.weights.checkpoint.tensors import model_tensors, optimizer_tensors
from retemper.engine.weights.saving import save_tensors
from retemper.tools import plan as command
from retemper.tools.planning import command as planning_command
from retemper.tools.planning.command import without_gpu_features
from retemper.tools.planning.extrapolation import dry_run_short, places
from retemper.tools.planning.gpus import GPUS, GiB, find_gpu
from retemper.tools.planning.layout_plan import LayoutPlan
from retemper.tools.planning.offload import offload_seconds
from retemper.tools.planning.options import Assumptions, PlanOptions, read_architecture
from retemper.tools.planning.pool import DryRunPool
from retemper.tools.planning.prediction import bandwidth, bytes_of, idle_share, predict
from retemper.tools.planning.report import format_needless_recomputation
from retemper.tools.planning.search import (
    narrower,
    plan_briefly,
    plan_in_full,
    require_possible,
    search,
    without_recomputation,
)
from retemper.tools.planning.work import Collective, CollectiveTotal

ROOT = Path(__file__).parents[3]
QWEN2_72B = ROOT / "megatron_configs" / "qwen2_72b.yaml"
MIXTURES = ("mixtral_8x7b", "qwen2_57b_a14b", "qwen3_30b_a3b")
SHIPPED = sorted(
    (path for path in QWEN2_72B.parent.glob("*.yaml") if not path.stem.startswith("demo")),
    key=lambda path: (path.stem in MIXTURES, path.name),
)
MACHINES = {
    "qwen2_72b": (4, 8, "a100-80gb"),
    "qwen2.5_72b": (4, 8, "h100-80gb"),
    "qwen2.5_0.5b": (1, 1, "h100-80gb"),
    "qwen2_57b_a14b": (2, 8, "h100-80gb"),
    "mixtral_8x7b": (2, 8, "h100-80gb"),
}
"""(nodes, GPUs in each, GPU) where it is not one node of 8 GPUs of 80 GB."""


@pytest.fixture(scope="module")
def pool():
    """Two processes for dry runs."""
    with DryRunPool(2) as processes:
        yield processes


@pytest.fixture
def run_file(tmp_path):
    """A tiny run."""
    return plan_runs.write_config(tmp_path)


def peak(usage) -> float:
    """Bytes at the highest moment."""
    return max(sum(kinds.values()) for kinds in usage.peaks.values())


# ---------------------------------------------------------------------------------------------------------------------
# Memory: the allocator's word


@pytest.mark.parametrize(
    "overrides",
    [
        "--training.precision fp32",
        pytest.param("--parallel.recompute full --training.micro_batch_size 1", marks=pytest.mark.slow),
        pytest.param("--parallel.recompute selective", marks=pytest.mark.slow),
        pytest.param("--training.weight_dtype bf16 --optimizer.state_dtype bf16", marks=pytest.mark.slow),
    ],
)
def test_memory_of_one_rank_is_what_the_allocator_gives(overrides, run_file, pool):
    spec = plan_runs.spec_of(plan_runs.configure(run_file, overrides), 1)
    (usage,) = pool.run([spec])
    before, most = pool._executor.submit(plan_runs.allocated_alone, spec).result()
    assert sum(usage.kept.values()) == pytest.approx(before, rel=0.02)
    assert peak(usage) == pytest.approx(most, rel=0.02)


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        pytest.param("--parallel.replicate 2 --parallel.recompute full", marks=pytest.mark.slow),
        pytest.param("--parallel.reshard_after_forward false --parallel.reduce_gradients step", marks=pytest.mark.slow),
        pytest.param("--parallel.tensor 2", marks=pytest.mark.slow),
        pytest.param("--parallel.context 2 --parallel.recompute selective", marks=pytest.mark.slow),
        pytest.param("--parallel.context 2 --parallel.context_kind ring", marks=pytest.mark.slow),
        pytest.param("--parallel.pipeline 2", marks=pytest.mark.slow),
    ],
)
def test_memory_of_two_ranks_is_what_real_tensors_take(overrides, run_file, pool, fresh_ranks):
    """Real ranks and real collectives. Counted by the life of storages, as the test above holds to be the allocator's:
    its own record misses what gloo's threads give back."""
    spec = plan_runs.spec_of(plan_runs.configure(run_file, overrides), 2)
    ranks = places(spec.layout)
    real = [fresh_ranks.run(plan_runs.counted, replace(spec, place=place))[place] for place in ranks]
    for one, usage in zip(real, pool.run([replace(spec, place=place) for place in ranks]), strict=True):
        assert sum(usage.kept.values()) == pytest.approx(sum(one.kept.values()), rel=0.02)
        assert peak(usage) == pytest.approx(peak(one), rel=0.05)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param("--parallel.tensor 2 --parallel.recompute full", marks=pytest.mark.slow),
        pytest.param("--parallel.context 2", marks=pytest.mark.slow),
        pytest.param("--parallel.context 2 --parallel.context_kind ring", marks=pytest.mark.slow),
        "",
    ],
)
def test_ranks_that_are_there_send_and_compute_the_same(overrides, run_file, pool, fresh_ranks):
    spec = plan_runs.spec_of(plan_runs.configure(run_file, overrides), 2)
    real = fresh_ranks.run(plan_runs.counted, spec)[0]
    (usage,) = pool.run([spec])
    assert usage.flops == real.flops > 0
    assert usage.collectives == real.collectives
    assert usage.collectives


@pytest.mark.gpu
@pytest.mark.parametrize("overrides", ["", "--parallel.recompute full", "--parallel.recompute selective"])
def test_memory_of_a_gpu_is_what_the_allocator_gives(overrides, tmp_path, pool):
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "vocab_size": 32000}
    path = plan_runs.write_config(tmp_path, **shape, num_attention_heads=16, num_key_value_heads=4, head_dim=64)
    config = plan_runs.configure(path, f"--training.sequence_length 4096 {overrides}")
    memory = torch.cuda.get_device_properties(0).total_memory
    spec = plan_runs.spec_of(config, 1, capability=torch.cuda.get_device_capability(), gpu_memory=memory)
    (usage,) = pool.run([spec])
    before, most = pool._executor.submit(plan_runs.allocated_on_a_gpu, spec).result()
    assert sum(usage.kept.values()) == pytest.approx(before, rel=0.1)
    assert peak(usage) == pytest.approx(most, rel=0.1)


def test_host_memory_is_not_the_gpus(run_file, pool):
    cluster = request(GPUS["a100-80gb"].name, 1, 2).cluster(read_architecture(plan_runs.configure(run_file).model))
    held = {}
    for offload in ("true", "false"):
        config = plan_runs.configure(run_file, f"--parallel.cpu_offload {offload}")
        (held[offload],) = plan_briefly([(config, require_possible(config, cluster))], cluster, pool)
    states = sum(held["false"].fullest.kept[kind] for kind in ("parameters", "optimizer states"))
    assert held["true"].peak_bytes < held["false"].peak_bytes - states + 1


def test_an_optimizer_on_the_host_leaves_a_copy_of_the_weights_on_the_gpu(run_file, pool):
    cluster = request(GPUS["a100-80gb"].name, 1, 1).cluster(read_architecture(plan_runs.configure(run_file).model))
    config = plan_runs.configure(run_file, "--parallel.cpu_offload optimizer --training.precision bf16")
    [plan] = plan_briefly([(config, require_possible(config, cluster))], cluster, pool)
    parameters = plan.cluster.architecture.num_parameters
    assert plan.fullest.kept["communication buffers"] == pytest.approx(2 * parameters, rel=0.01)
    assert plan.peak_bytes > 2 * parameters
    # fp32: weights, both moments, and gradients.
    assert plan.host_bytes == pytest.approx(16 * parameters, rel=0.01)


@pytest.mark.parametrize(("options", "size"), [("{betas: [0.8,0.9]}", 8), ("{momentum: 0.9}", 4)])
def test_states_of_an_imported_optimizer_are_counted(options, size, run_file, pool):
    """Its own step needs values, which a dry run does not have."""
    name = "NAdam" if size == 8 else "SGD"
    config = plan_runs.configure(run_file, f"--optimizer.name torch.optim.{name}")
    config = replace(config, optimizer=replace(config.optimizer, options=yaml.safe_load(options)))
    specs = [plan_runs.spec_of(config, 1), replace(plan_runs.spec_of(config, 1), whole_steps=False)]
    for usage in pool.run(specs):
        assert usage.kept["optimizer states"] == pytest.approx(size * usage.trained, rel=1e-2)


def test_activations_that_are_sent_to_the_host(run_file, pool):
    """The inputs of all blocks but the last, and not on the GPU at the peak."""
    plain = plan_runs.configure(run_file, "--parallel.recompute full --training.micro_batch_size 4")
    config = plan_runs.configure(
        run_file,
        "--parallel.recompute full --training.micro_batch_size 4 --parallel.offload_activations true",
    )
    cluster = request(GPUS["a100-80gb"].name, 1, 1).cluster(read_architecture(config.model))
    before, after = plan_briefly([(one, require_possible(one, cluster)) for one in (plain, config)], cluster, pool)
    a, tokens = cluster.architecture, config.training.global_batch_size * config.training.sequence_length
    expected = (a.num_layers - 1) * tokens * a.hidden_size * bytes_of(config.training.precision)
    assert before.fullest.sent_activations == 0
    assert after.fullest.sent_activations == pytest.approx(expected)
    assert after.peak_bytes <= before.peak_bytes


def test_time_of_transfers_by_hand():
    """A billion parameters over PCIe 4, two micro-batches, bf16 computing with fp32 weights and states."""
    gpu, assumptions = GPUS["rtx-4090-24gb"], Assumptions(1, host_bandwidth=100e9)
    times = {}
    for offload in ("optimizer", True, False):
        config = RunConfig(
            "x",
            data=DataConfig(),
            training=TrainingConfig(train_tokens=1, precision="bf16"),
            parallel=ParallelConfig(cpu_offload=offload),
        )
        times[offload] = offload_seconds(config, gpu, assumptions, 2, 1e9, 1e9, 10e9, 36)
    link, memory = 0.8 * 32e9, 0.8 * 100e9
    update = (36 + 2 * 10) * 1e9 / memory  # and for each micro-batch read bf16, read and write fp32
    assert times[False] == pytest.approx((10e9 / link, 0.0))
    assert times["optimizer"] == pytest.approx((14e9 / link, update + 6e9 / memory + 2e9 / link))
    assert times[True] == pytest.approx((26e9 / link, update))  # two gathers of fp32 shards in each micro-batch


# ---------------------------------------------------------------------------------------------------------------------
# Formulas


def test_states_traffic_and_operations_are_those_of_the_formulas(run_file, pool):
    """Shapes that divide evenly: 8 ranks, fp32 weights and states, nothing recomputed, one micro-batch."""
    config = plan_runs.configure(run_file, "--training.global_batch_size 16")
    spec = plan_runs.spec_of(config, 8, capability=(9, 0))
    (usage,) = pool.run([spec])
    a, tokens = spec.architecture, 2 * 256
    hidden, inner, layers, vocabulary = 128, 384, 4, 4096
    q, kv = 4 * 32, 2 * 32
    products = layers * (hidden * (q + 2 * kv) + q * hidden + 3 * hidden * inner)
    assert usage.parameters == a.num_parameters / 8
    assert usage.kept["parameters"] == pytest.approx(4 * a.num_parameters / 8, rel=0.01)
    assert usage.kept["optimizer states"] == pytest.approx(8 * a.num_parameters / 8, rel=0.03)
    assert usage.peaks["optimizer"]["gradients"] == pytest.approx(4 * a.num_parameters / 8, rel=0.01)
    # Two products for each parameter and token forward, four backward; attention sees half of all pairs: 2 products
    # forward, and backward these 2 again and 3 more.
    attention = layers * 7 * 2 * q * tokens * 256 / 2
    assert usage.flops == pytest.approx(6 * tokens * (products + hidden * vocabulary) + attention, rel=1e-9)
    # Blocks and the embedding are gathered in bf16 for either pass, head and norm once; all is reduced in fp32.
    rest = vocabulary * hidden + hidden
    gathered = 2 * (2 * (a.num_parameters - rest) + rest)
    gather, reduce = (
        usage.collectives[Collective(kind, ("shard",), 8, 8)] for kind in ("all-gather", "reduce-scatter")
    )
    assert gather.size == gathered and gather.sent == gathered * 7 / 8 and gather.count == 2 * (layers + 1) + 1
    assert reduce.size == 4 * a.num_parameters and reduce.count == layers + 2


@pytest.mark.parametrize(("gpu_memory", "rows"), [(20 * 2**30, 2048), (80 * 2**30, 4096)])
def test_a_gpus_loss_keeps_to_its_budget(gpu_memory, rows, tmp_path, pool):
    """152,064 logits of 4,096 tokens take 1.2 GB as bf16: two chunks on a GPU of 20 GiB, one on a GPU of 80."""
    path = plan_runs.write_config(tmp_path, vocab_size=152064, num_hidden_layers=1)
    config = plan_runs.configure(
        path, "--training.sequence_length 4096 --training.micro_batch_size 1 " + "--training.global_batch_size 8"
    )
    (usage,) = pool.run([plan_runs.spec_of(config, 8, capability=(8, 0), gpu_memory=gpu_memory)])
    logits = 2 * 152064 * rows
    weight_gradient = 4 * 152064 * 128
    found = usage.most["loss buffers"]
    assert logits + weight_gradient < found < 1.05 * (logits + weight_gradient)


@pytest.mark.slow
def test_triton_need_not_be_installed(run_file):
    """What a dry run finds is the same on a machine without it."""
    script = """
import importlib.util, sys
sys.path.insert(0, sys.argv[2])
if sys.argv[3] == "without":
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
    sys.modules["triton"] = None
import plan_runs
from retemper.tools.planning.dry_run import dry_run
found = dry_run(plan_runs.spec_of(plan_runs.configure(sys.argv[1]), 2, capability=(8, 0)))
print(found.peaks, found.flops)
"""
    arguments = [sys.executable, "-c", script, str(run_file), plan_runs.__file__.rpartition("/")[0]]
    outputs = [
        subprocess.run([*arguments, how], capture_output=True, text=True, check=True).stdout
        for how in ("with", "without")
    ]
    assert outputs[0] == outputs[1] and "loss buffers" in outputs[0]


# ---------------------------------------------------------------------------------------------------------------------
# A few blocks for all


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (8, "--training.global_batch_size 16"),
        (
            8,
            "--parallel.tensor 2 --parallel.recompute full --training.global_batch_size 24",
        ),
        (4, "--parallel.recompute selective --parallel.recompute_every 2 --training.global_batch_size 32"),
        (2, "--training.weight_dtype bf16 --optimizer.state_dtype bf16 --parallel.reduce_gradients step"),
        (4, "--parallel.pipeline 2 --training.micro_batch_size 1 --training.global_batch_size 10"),
    ],
)
def test_a_few_blocks_tell_the_whole_model(world_size, overrides, tmp_path, pool):
    path = plan_runs.write_config(tmp_path, num_hidden_layers=14)
    spec = plan_runs.spec_of(plan_runs.configure(path, overrides), world_size, capability=(8, 0))
    specs = [replace(spec, place=place, whole_steps=False) for place in places(spec.layout)]
    for whole, short in zip(pool.run(specs), dry_run_short(specs, pool.run), strict=True):
        assert short.blocks == whole.blocks
        assert short.parameters == pytest.approx(whole.parameters, rel=1e-9)
        assert sum(short.kept.values()) == pytest.approx(sum(whole.kept.values()), rel=0.005)
        assert peak(short) == pytest.approx(peak(whole), rel=0.01)
        assert short.most == pytest.approx(whole.most, rel=0.01, abs=0.001 * peak(whole))
        assert short.flops == pytest.approx(whole.flops, rel=0.01)
        assert short.collectives.keys() == whole.collectives.keys()
        for key, sent in whole.collectives.items():
            if sent.size > 1e6:
                assert short.collectives[key].size == pytest.approx(sent.size, rel=0.02), key


# ---------------------------------------------------------------------------------------------------------------------
# Time


def test_time_is_the_stated_roofline(run_file):
    config, gpu = plan_runs.configure(run_file), GPUS["h100-80gb"]
    layout, assumed = Layout(shard=16), Assumptions(8, efficiency=0.5, link_efficiency=0.8)
    gather = {Collective("all-gather", ("shard",), 16, 8): CollectiveTotal(1, 8e9, 320e9)}
    found = predict(config, layout, gpu, assumed, 1, 989e12, gather, 1e9)
    assert found.computing == pytest.approx(2.0)
    # Eight cards of 50 GB/s carry what passes between nodes, at 0.8 of that.
    assert found.weights == pytest.approx(1.0)
    assert found.exposed == found.waiting == found.idle == 0
    # 12 bytes of the gradient, and weight and two moments read and written: 36 for each parameter.
    assert found.optimizer == pytest.approx(36e9 / (3.35e12 * 0.8))
    assert found.step == pytest.approx(2.0 + found.optimizer)
    slow = predict(config, layout, gpu, assumed, 1, 989e11, gather, 0)
    assert slow.step == pytest.approx(1.0) and slow.exposed == pytest.approx(0.8)
    exchange = {Collective("all-gather", ("tensor",), 8, 8): CollectiveTotal(1, 8e9, 360e9)}
    assert predict(config, layout, gpu, assumed, 1, 989e12, exchange, 0).step == pytest.approx(3.0)


def test_rings_between_nodes_use_every_card_of_a_node():
    gpu = GPUS["a100-80gb"]
    assert bandwidth(Collective("all-gather", ("shard",), 8, 8), gpu) == 300e9
    assert bandwidth(Collective("all-gather", ("shard",), 32, 8), gpu) == 200e9
    assert bandwidth(Collective("all-gather", ("shard",), 4, 1), gpu) == 25e9
    # Sixteen cards would carry more than NVLink does.
    assert bandwidth(Collective("all-gather", ("shard",), 32, 16), gpu) == 300e9


def test_a_pipeline_is_idle_while_it_fills(run_file):
    config = plan_runs.configure(run_file, "--parallel.pipeline 4")
    assert idle_share(config, Layout(pipeline=4), 12) == pytest.approx(3 / 12)
    two = "--parallel.pipeline 4 --parallel.pipeline_stages_per_rank 2 --parallel.pipeline_schedule"
    interleaved = plan_runs.configure(run_file, f"{two} interleaved_1f1b")
    assert idle_share(interleaved, Layout(pipeline=4), 12) == pytest.approx(3 / 24)
    assert idle_share(plan_runs.configure(run_file, f"{two} zbv_zero_bubble"), Layout(pipeline=4), 12) < 3 / 24 / 2


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_checkpoint_size_is_that_of_a_written_one(run_file, tmp_path):
    config = plan_runs.configure(run_file)
    architecture = parse_architecture(config.model.architecture)
    model = Decoder(architecture)
    optimizer = build_optimizer(model.named_parameters(), config.optimizer)
    allocate_states(optimizer)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_tensors(folder, {**model_tensors(model), **optimizer_tensors(model, optimizer)}, distributed=False)
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert written == pytest.approx(checkpoint_bytes(config, architecture), rel=0.03)


# ---------------------------------------------------------------------------------------------------------------------
# Qwen2-72B on 4 nodes x 8 GPUs of 80 GB


def request(gpu: str | None, nodes: int, gpus_per_node: int, **changes) -> PlanOptions:
    """With the command's defaults."""
    return replace(PlanOptions(nodes, gpus_per_node, gpu, 0.55, 4.0, None), **changes)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if number % 8 == 0 else pytest.mark.extended) for number, path in enumerate(SHIPPED)],
    ids=lambda path: path.stem,
)
@pytest.mark.slow
def test_shipped_configs_are_within_5_percent_of_the_best_layout_that_is_found(path, pool):
    """On the machine that the first line of the file names."""
    config = plan_runs.configure(path)
    nodes, gpus, gpu = MACHINES.get(path.stem, (1, 8, "h100-80gb"))
    cluster = request(gpu, nodes, gpus).cluster(read_architecture(config.model))
    (shipped,) = plan_briefly([(config, require_possible(config, cluster))], cluster, pool)
    assert shipped.fits
    best = search(config, cluster, pool, lambda line: None, seconds=60.0, wanted=2).plans[0]
    assert shipped.tokens_per_second >= 0.95 * best.tokens_per_second, best.shown_layout


def test_gpus_are_found_by_what_people_call_them():
    names = {"h200": "h200-141gb", "RTX 4090": "rtx-4090-24gb", "a6000": "rtx-a6000-48gb", "l40s": "l40s-48gb"}
    assert {name: find_gpu(name).name for name in names} == names
    assert all(find_gpu(name) is gpu for name, gpu in GPUS.items())


@pytest.mark.parametrize(("gpu", "precision"), [("v100", "fp16"), ("t4", "fp16"), ("a100-80gb", "bf16")])
def test_auto_precision_is_that_of_the_planned_gpu(gpu, precision, run_file):
    config = plan_runs.configure(run_file, "--training.precision auto")
    cluster = request(gpu, 1, 1).cluster(read_architecture(config.model))
    planned_config, _ = without_gpu_features(config, cluster)
    assert planned_config.training.precision == precision


def test_a_gpu_is_described_by_memory_and_speed():
    """The A100's own numbers give the A100, but for the links, which the datasheet of another server would say."""
    a100 = GPUS["a100-80gb"]
    found = request(None, 1, 8, gpu_memory=a100.memory / GiB, gpu_tflops=312.0, gpu_link=300.0).chosen_gpu()
    assert found.memory_bandwidth == pytest.approx(a100.memory_bandwidth)
    others = {"name": a100.name, "inter_node": a100.inter_node, "memory_bandwidth": a100.memory_bandwidth}
    assert replace(found, **others) == a100


def test_mfu_is_at_most_the_assumed_efficiency(run_file, pool):
    """With causal pairs, which the prediction counts; long samples make the difference large."""
    options = "--training.sequence_length 4096 --training.global_batch_size 8 --training.micro_batch_size 1"
    config = plan_runs.configure(run_file, options)
    cluster = request("h100", 1, 1).cluster(read_architecture(config.model))
    (layout_plan,) = plan_briefly([(config, require_possible(config, cluster))], cluster, pool)
    assert 0 < layout_plan.mfu(causal_halved=True) <= 0.55 < layout_plan.mfu(causal_halved=False)


def test_needless_recomputation_is_named(run_file, pool):
    cluster = request("h100", 1, 1).cluster(read_architecture(plan_runs.configure(run_file).model))
    found = {}
    for mode in ("full", "none"):
        config = plan_runs.configure(run_file, f"--parallel.recompute {mode}")
        (found[mode],) = plan_briefly([(config, require_possible(config, cluster))], cluster, pool)
    faster = without_recomputation(found["full"], pool)
    assert faster is not None and faster.config == found["none"].config
    assert "note: parallel.recompute full is not needed: with none" in format_needless_recomputation(
        found["full"], faster
    )
    assert without_recomputation(found["none"], pool) is None


def test_of_a_model_on_the_hub_only_the_config_is_fetched(tmp_path, monkeypatch):
    fetched = []

    def download(name, *, allow_patterns, **_):
        fetched.append((name, allow_patterns))
        (tmp_path / "config.json").write_text(json.dumps(plan_runs.ARCHITECTURE), encoding="utf-8")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    architecture = read_architecture(ModelConfig(initialize_from="some/model"))
    assert fetched == [("some/model", ["config.json"])]
    assert architecture == parse_architecture(plan_runs.ARCHITECTURE)


def planned(pool, gpu: str, whole: bool = False) -> LayoutPlan:
    """The shipped configuration on 32 GPUs."""
    config = plan_runs.configure(QWEN2_72B)
    cluster = request(gpu, 4, 8).cluster(read_architecture(config.model))
    layout = require_possible(config, cluster)
    (short,) = plan_briefly([(config, layout)], cluster, pool)
    return plan_in_full(config, layout, cluster, pool, lambda done, total: None) if whole else short


def test_the_shipped_qwen2_72b_fits_its_cluster(pool):
    layout_plan = planned(pool, "a100-80gb")
    assert layout_plan.layout.world_size == 32
    assert layout_plan.fits and layout_plan.headroom > 4 * GiB
    # The maximum of each kind is at least its bytes at the peak. Few blocks store less than the embedding's backward.
    for kind, size in layout_plan.peak_of(layout_plan.fullest).items():
        assert layout_plan.fullest.most[kind] >= size
    # 72.7 billion parameters in fp32 with two moments, over 32 GPUs.
    assert sum(layout_plan.fullest.kept.values()) == pytest.approx(12 * 72.7e9 / 32, rel=0.01)
    assert layout_plan.checkpoint_bytes == pytest.approx(12 * 72.7e9, rel=0.01)
    assert not replace(layout_plan, cluster=replace(layout_plan.cluster, gpu=GPUS["a100-40gb"])).fits


@pytest.mark.slow
def test_the_whole_qwen2_72b_is_what_a_few_blocks_say(pool):
    short, whole = planned(pool, "a100-80gb"), planned(pool, "a100-80gb", whole=True)
    assert whole.peak_bytes == pytest.approx(short.peak_bytes, rel=0.005)
    # In proportion to all memory: one kind is less than a megabyte, of which a few kilobytes are a percent.
    assert whole.fullest.most == pytest.approx(short.fullest.most, rel=0.005, abs=1e-3 * short.peak_bytes)
    assert whole.fullest.flops == pytest.approx(short.fullest.flops, rel=1e-6)
    assert whole.tokens_per_second == pytest.approx(short.tokens_per_second, rel=0.005)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def run(monkeypatch, pool):
    """The command line, from a configuration with room for options, with these tests' processes."""
    monkeypatch.setattr(planning_command, "DryRunPool", lambda: contextlib.nullcontext(pool))
    return lambda *arguments: command.main([str(argument) for argument in arguments])


def test_the_command_prints_and_writes_what_it_found(run, run_file, tmp_path, capsys):
    path = tmp_path / "plan.json"
    cluster = ("--nodes", 2, "--gpus-per-node", 2, "--gpu", "h100", "--training.global_batch_size", 8)
    run("--config", run_file, *cluster, "--json", path, "--quick")
    text, record = capsys.readouterr().out, json.loads(path.read_text())
    for word in ("mesh", "shard 4", "parameters", "reserve", "reduce-scatter", "FLOPs/token", "MFU", "GPU-hours"):
        assert word in text
    assert "checkpoint" in text and "--efficiency" in text
    assert record["fits"] and record["layout"]["shard"] == 4
    assert record["peak_bytes"] == pytest.approx(sum(record["ranks"][0]["peak_bytes"].values()))
    steps = -(-100_000 // (8 * 256))
    assert record["gpu_hours"] == pytest.approx(4 * steps * record["step_seconds"]["step"] / 3600)


@pytest.mark.slow
def test_a_search_ranks_what_fits_and_runs_the_fastest_in_full(run, run_file, tmp_path, capsys):
    path = tmp_path / "plan.json"
    run("--config", run_file, "--gpus-per-node", 4, "--gpu", "a100-40gb", "--search", "--json", path)
    text, record = capsys.readouterr().out, json.loads(path.read_text())
    configured = [one for one in record["search"] if one["state_dtype"] == "fp32"]
    assert 0 < len(configured) < len(record["search"])  # bf16 states are tried as well
    rates = [one["tokens_per_second_per_gpu"] for one in configured if one["fits"]]
    assert len(rates) >= 2 and rates == sorted(rates, reverse=True)
    assert record["layout"] == record["search"][0]["layout"] and not record["extrapolated"]
    assert record["tokens_per_second_per_gpu"] == pytest.approx(rates[0], rel=0.02)
    assert "To use it:" in text and "recompute:" in text


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("states", ["fp32", "bf16"])
def test_narrower_dtypes_are_each_tried_once(run_file, weights, states):
    config = plan_runs.configure(run_file, f"--training.weight_dtype {weights} --optimizer.state_dtype {states}")
    tried = [(one.training.weight_dtype, one.optimizer.state_dtype) for one in narrower(config)]
    assert tried == [kind for kind in dict.fromkeys([(weights, "bf16"), ("bf16", "bf16")]) if kind != (weights, states)]


@pytest.mark.slow
def test_narrower_dtypes_are_proposed_where_the_configured_ones_fit_nowhere(run, run_file, tmp_path, capsys):
    path = tmp_path / "plan.json"
    small = ("--gpus-per-node", 1, "--gpu-memory", 0.034, "--gpu-tflops", 100, "--reserve", 0)
    run("--config", run_file, *small, "--search", "--quick", "--json", path)
    text, record = capsys.readouterr().out, json.loads(path.read_text())
    assert {one["state_dtype"] for one in record["search"] if one["fits"]} == {"bf16"}
    assert (record["weight_dtype"], record["state_dtype"], record["fits"]) == ("fp32", "bf16", True)
    assert "      state_dtype: bf16" in text and "weight_dtype:" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--gpu p100", "--gpu p100: unknown; use one of a100-40gb, "),
        ("--gpu a100", "--gpu a100 is one of a100-40gb, a100-80gb; name one"),
        ("--gpu h100 --gpu-tflops 100", "--gpu h100 and --gpu-tflops both define the GPU"),
        ("--gpu-tflops 100", "--gpu-memory GIB and --gpu-tflops N"),
        ("", "name a GPU with --gpu"),
        ("--gpu-tflops 100 --gpu-memory -1", "--gpu-memory -1: must be above 0"),
        ("--gpu-tflops nan --gpu-memory 24", "--gpu-tflops nan: must be above 0"),
        ("--gpu h100 --nodes 0", "--nodes 0: must be at least 1"),
        ("--gpu h100 --efficiency 2", "--efficiency 2: must be above 0"),
        ("--gpu h100 --reserve 100", "--reserve 100: must be from 0 to less than"),
        ("--gpu h100 --network -1", "--network -1: must be positive"),
        ("--gpu h100 --parallel.tensor 8", "parallel.tensor 8 does not divide the model's 4 attention heads"),
        ("--gpu h100 --parallel.shard 3", "= 3 ranks, but the run has 8"),
        (
            "--gpu h100 --training.global_batch_size 7",
            "is not a multiple of micro_batch_size 2 x data-parallel",
        ),
        ("--gpu h100 --json /nowhere/plan.json", "/nowhere/plan.json: the folder /nowhere does not exist"),
    ],
)
def test_impossible_wishes_are_refused_in_one_line(arguments, words, run, run_file, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: run("--config", run_file, *arguments.split()))
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 1 and words in line


def test_what_fits_nowhere_is_said(run, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_command(
            lambda: run("--config", QWEN2_72B, "--nodes", 1, "--gpus-per-node", 2, "--gpu", "a100-40gb", "--search")
        )
    line = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 1 and "no layout fits" in line
