"""Plans of mixtures of experts, against PyTorch's allocator, closed formulas and dry runs of all blocks."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import plan_runs
import pytest
import torch
from torch import Tensor

from retemper.engine.errors import UserError
from retemper.engine.model.experts import Router
from retemper.engine.parallel.process_group import Ranks
from retemper.tools.planning.dry_run import RankSpec
from retemper.tools.planning.experts import describe_missing, sizes_of
from retemper.tools.planning.extrapolation import dry_run_short
from retemper.tools.planning.formulas import Calibration, _collectives
from retemper.tools.planning.gpus import GPUS
from retemper.tools.planning.options import Assumptions, PlanOptions, read_architecture
from retemper.tools.planning.pool import DryRunPool
from retemper.tools.planning.prediction import bandwidth, expert_seconds
from retemper.tools.planning.report import format_plan
from retemper.tools.planning.search import candidates, plan_briefly, require_possible
from retemper.tools.planning.work import Collective, ExpertWork

EXPERTS = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}


@pytest.fixture(scope="module")
def pool():
    """A process for dry runs."""
    with DryRunPool(1) as processes:
        yield processes


def peak(usage) -> float:
    """Bytes at the highest moment."""
    return max(sum(kinds.values()) for kinds in usage.peaks.values())


@pytest.mark.parametrize(
    "overrides",
    [
        "--training.precision fp32",
        pytest.param("--parallel.recompute full", marks=pytest.mark.slow),
        pytest.param("--parallel.recompute selective", marks=pytest.mark.slow),
    ],
)
def test_memory_of_a_mixture_is_what_the_allocator_gives(overrides, tmp_path, pool):
    spec = plan_runs.spec_of(plan_runs.configure(plan_runs.write_config(tmp_path, **EXPERTS), overrides), 1)
    (usage,) = pool.run([spec])
    before, most = pool._executor.submit(plan_runs.allocated_alone, spec).result()
    assert sum(usage.kept.values()) == pytest.approx(before, rel=0.02)
    assert peak(usage) == pytest.approx(most, rel=0.02)


@pytest.mark.parametrize(
    "overrides",
    [
        "--parallel.expert 2",
        pytest.param("--parallel.recompute full", marks=pytest.mark.slow),
        pytest.param("--parallel.tensor 2", marks=pytest.mark.slow),
        pytest.param("--parallel.expert 2 --parallel.recompute selective", marks=pytest.mark.slow),
    ],
)
def test_memory_of_two_ranks_is_what_real_tensors_take(overrides, tmp_path, pool, fresh_ranks):
    """Real ranks and real collectives, as in the test of this name in test_plan.py. A dry run gives all ranks equally
    many rows. Real routers do not, but the mean over the ranks is the same."""
    path = plan_runs.write_config(tmp_path, **EXPERTS, num_hidden_layers=2)
    spec = plan_runs.spec_of(plan_runs.configure(path, overrides), 2)
    real = fresh_ranks.run(plan_runs.counted, spec)
    (usage,) = pool.run([spec])
    assert sum(usage.kept.values()) == pytest.approx(sum(real[0].kept.values()), rel=0.02)
    assert peak(usage) == pytest.approx(sum(map(peak, real)) / len(real), rel=0.05)


def counted_with_balanced_experts(ranks: Ranks, spec: RankSpec):
    """A step of a real rank whose experts get equally many tokens, as a dry run assumes."""

    def choose(router: Router, scores_TE: Tensor) -> Tensor:
        tokens, experts = torch.arange(len(scores_TE))[:, None], scores_TE.shape[1]
        per_token = router.settings.per_token
        return (tokens * per_token + torch.arange(per_token)) % experts

    with mock.patch.object(Router, "_choose", choose):
        return plan_runs.counted(ranks, spec)


@pytest.mark.slow
def test_recomputation_of_received_rows_takes_what_real_tensors_take(tmp_path, pool, fresh_ranks):
    """To a fiftieth of the rows that a layer receives: a result that is not waited for is a wrapper of another tensor,
    and may not be counted twice. Later, real collectives of CPUs hold gradients longer."""
    path = plan_runs.write_config(tmp_path, **EXPERTS, num_hidden_layers=2)
    config = plan_runs.configure(path, "--parallel.expert 2 --parallel.recompute full")
    spec = plan_runs.spec_of(config, 2)
    real = fresh_ranks.run(counted_with_balanced_experts, spec)
    (usage,) = pool.run([spec])
    rows = config.training.micro_batch_size * config.training.sequence_length * EXPERTS["num_experts_per_tok"]
    received = rows * plan_runs.ARCHITECTURE["hidden_size"] * 2
    for phase in ("forward", "backward"):
        for one in real:
            assert abs(sum(one.peaks[phase].values()) - sum(usage.peaks[phase].values())) < received / 50, phase


def test_operations_are_those_of_the_chosen_experts(tmp_path, pool):
    """Three products of each matrix that a token uses, and seven of attention with half of the pairs."""
    config = plan_runs.configure(plan_runs.write_config(tmp_path, **EXPERTS, num_hidden_layers=2))
    (usage,) = pool.run([plan_runs.spec_of(config, 1, (9, 0))])
    hidden, inner, q, kv, tokens = 128, 96, 4 * 32, 2 * 32, 4 * 256
    attention, experts, router = hidden * (q + 2 * kv) + q * hidden, 2 * 3 * hidden * inner, 8 * hidden
    matrices = 2 * (attention + experts + router) + 4096 * hidden
    pairs = 2 * 7 * 2 * q * 256 / 2
    assert usage.flops == pytest.approx(tokens * (6 * matrices + pairs), rel=1e-9)
    # The products of experts, each of which reads or writes all experts, and rows of both sides. In bf16.
    rows, count = 2 * tokens, 2 * 3 * 3 * usage_micro_batches(config)
    found = usage.experts
    assert found.flops == pytest.approx(2 * tokens * 6 * experts)
    assert found.bytes == pytest.approx(
        2 * (count * 8 * hidden * inner + 2 * 3 * 3 * rows * (hidden + inner)), rel=1e-9
    )
    assert found.moved > 0


def usage_micro_batches(config) -> int:
    return config.training.global_batch_size // config.training.micro_batch_size


def test_grouped_products_of_few_rows_take_as_long_as_reading_the_experts():
    """989 TFLOP/s x 0.5 and 3.35 TB/s x 0.8."""
    gpu, assumed = GPUS["h100-80gb"], Assumptions(8, efficiency=0.5, link_efficiency=0.8)
    second = 989e12 * 0.5
    assert expert_seconds(ExpertWork(second, 3.35e12 * 0.8 * 1.5, 0.0), gpu, assumed) == pytest.approx(0.5)
    assert expert_seconds(ExpertWork(second, 3.35e12 * 0.8 * 0.5, 3.35e12 * 0.8), gpu, assumed) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("world_size", "blocks", "overrides"),
    [
        (2, {"mlp_only_layers": [0]}, "--parallel.recompute full"),
        pytest.param(2, {"mlp_only_layers": [0, 1, 2]}, "--training.global_batch_size 16", marks=pytest.mark.slow),
        pytest.param(2, {"decoder_sparse_step": 2, "num_hidden_layers": 20}, "", marks=pytest.mark.slow),
        pytest.param(
            2,
            {"mlp_only_layers": [0]},
            "--parallel.pipeline 2 --training.micro_batch_size 1 --training.global_batch_size 5",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_few_blocks_tell_the_whole_mixture(world_size, blocks, overrides, tmp_path, pool):
    """Also if the first blocks have no experts, or every other one."""
    path = plan_runs.write_config(tmp_path, **{"num_hidden_layers": 14, **EXPERTS, **blocks})
    spec = plan_runs.spec_of(plan_runs.configure(path, overrides), world_size, capability=(9, 0))
    specs = [replace(spec, place=place, whole_steps=False) for place in range(spec.layout.pipeline)]
    for whole, short in zip(pool.run(specs), dry_run_short(specs, pool.run), strict=True):
        assert short.blocks == whole.blocks
        assert short.parameters == pytest.approx(whole.parameters, rel=1e-9)
        assert sum(short.kept.values()) == pytest.approx(sum(whole.kept.values()), rel=0.005)
        assert peak(short) == pytest.approx(peak(whole), rel=0.01)
        assert short.flops == pytest.approx(whole.flops, rel=0.01)
        for key, sent in whole.collectives.items():
            if sent.size > 1e6:
                assert short.collectives[key].size == pytest.approx(sent.size, rel=0.02), key


# ---------------------------------------------------------------------------------------------------------------------
# Experts over ranks


def test_experts_over_ranks_exchange_rows_and_gather_their_own_experts(tmp_path, pool):
    """Four ranks in pairs that share the experts. Bytes by hand, by the formulas of a search, and by the dry run."""
    path = plan_runs.write_config(tmp_path, **EXPERTS, num_hidden_layers=2)
    options = "--training.global_batch_size 16 --parallel.expert"
    plain, shared = (plan_runs.configure(path, f"{options} {size}") for size in (1, 2))
    alone, usage = pool.run([plan_runs.spec_of(config, 4, (9, 0)) for config in (plain, shared)])
    layers, hidden, inner, tokens, micro_batches = 2, 128, 96, 2 * 256, 2
    assert usage.parameters == alone.parameters and usage.flops == alone.flops
    assert usage.most["communication buffers"] < alone.most["communication buffers"]
    rows, expert = tokens * 2, 3 * hidden * inner
    found = {(key.kind, key.axes): total for key, total in usage.collectives.items()}
    # In each layer rows go to the experts and back, forward and backward; their weights and numbers go too.
    exchange = layers * micro_batches * (4 * rows * hidden * 2 + 2 * rows * 4 + 8 * 4)
    assert found["all-to-all", ("expert",)].size == exchange
    assert found["all-to-all", ("expert",)].sent == exchange / 2
    # A rank's half of the experts is gathered in bf16 for each pass, and reduced in fp32.
    gathered = layers * micro_batches * 2 * 2 * 4 * expert
    assert found["all-gather", ("expert_shard",)].size == gathered
    assert found["reduce-scatter", ("expert_shard",)].size == layers * micro_batches * 4 * 4 * expert
    assert ("all-gather", ("expert_shard",)) not in {(key.kind, key.axes) for key in alone.collectives}
    cluster = PlanOptions(1, 4, "h100-80gb", 0.55, 4.0, None).cluster(read_architecture(shared.model))
    rough = _collectives(shared, require_possible(shared, cluster), cluster, micro_batches)
    for key in (key for key in usage.collectives if key.axes in (("expert",), ("expert_shard",))):
        assert rough[key].sent == pytest.approx(usage.collectives[key].sent, rel=0.01), key


@pytest.mark.parametrize(("mode", "again"), [("selective", 0), ("full", 1), ("full --parallel.recompute_every 2", 0.5)])
def test_recomputation_sends_rows_to_their_experts_again_but_no_results(mode, again, tmp_path, pool):
    path = plan_runs.write_config(tmp_path, **EXPERTS, num_hidden_layers=2)
    config = plan_runs.configure(path, f"--parallel.expert 2 --parallel.recompute {mode}")
    (usage,) = pool.run([plan_runs.spec_of(config, 2, (9, 0))])
    (found,) = (total for key, total in usage.collectives.items() if key.kind == "all-to-all")
    layers, rows, hidden = 2, 2 * 256 * 2, 128
    there, back = rows * (2 * hidden + 4) + 8 * 4, rows * 2 * hidden
    gradients = rows * (2 * hidden + 4) + back
    assert found.size == layers * (there + back + gradients + again * there)
    cluster = PlanOptions(1, 2, "h100-80gb", 0.55, 4.0, None).cluster(read_architecture(config.model))
    rough = _collectives(config, require_possible(config, cluster), cluster, 1)
    (estimate,) = (total for key, total in rough.items() if key.kind == "all-to-all")
    assert estimate.sent == pytest.approx(found.sent, rel=0.02)


def counted_forward(ranks: Ranks, spec: RankSpec) -> dict[str, float]:
    """Bytes by kind at the peak of a forward pass on real ranks, whose tokens choose all experts equally."""
    choose = Router._choose

    def balanced(router: Router, scores_TE: Tensor) -> Tensor:
        tokens, experts = scores_TE.shape
        first_T1 = torch.arange(tokens)[:, None] * router.settings.per_token
        return choose(router, -(torch.arange(experts) - first_T1).remainder(experts).float())

    with mock.patch.object(Router, "_choose", balanced):
        return plan_runs.counted(ranks, spec).peaks["forward"]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_dry_run_keeps_what_ranks_with_shared_experts_keep(mode, two_ranks, tmp_path, pool):
    """To the byte: real ranks have unfinished exchanges, a dry run has none."""
    path = plan_runs.write_config(tmp_path, **EXPERTS, num_hidden_layers=2)
    spec = plan_runs.spec_of(plan_runs.configure(path, f"--parallel.expert 2 --parallel.recompute {mode}"), 2)
    (usage,) = pool.run([spec])
    assert two_ranks.run(counted_forward, spec) == [usage.peaks["forward"]] * 2


def test_an_all_to_all_between_nodes_uses_the_card_of_each_rank():
    """Of 16 ranks in 2 nodes, each rank sends to 15, and 8 of them are in the other node: at 50 GB/s."""
    gpu = GPUS["h100-80gb"]
    assert bandwidth(Collective("all-to-all", ("expert",), 8, 8), gpu) == 450e9
    assert bandwidth(Collective("all-to-all", ("expert",), 16, 8), gpu) == pytest.approx(50e9 * 15 / 8)
    assert bandwidth(Collective("all-to-all", ("expert",), 4, 1), gpu) == 50e9


def test_a_mixture_that_does_not_fit_says_what_helps(tmp_path, pool):
    config = plan_runs.configure(plan_runs.write_config(tmp_path, **EXPERTS, num_hidden_layers=2))
    small = PlanOptions(1, 2, None, 0.55, 0.0, None, gpu_memory=0.001, gpu_tflops=100.0)
    cluster = small.cluster(read_architecture(config.model))
    (plan,) = plan_briefly([(config, require_possible(config, cluster))], cluster, pool)
    line = describe_missing(plan)
    assert line is not None and "\n" not in line and "parallel.expert 2 (gathers 0.00 GiB less)" in line
    assert line in format_plan(plan).splitlines()
    assert describe_missing(replace(plan, cluster=replace(cluster, gpu=GPUS["h100-80gb"]))) is None


def test_sizes_of_expert_parallelism_divide_ranks_and_experts(tmp_path):
    architecture = read_architecture(plan_runs.configure(plan_runs.write_config(tmp_path, **EXPERTS)).model)
    assert sizes_of(architecture, 16) == [1, 2, 4, 8]
    assert sizes_of(architecture, 12) == [1, 2, 4]
    assert sizes_of(replace(architecture, experts=None), 16) == [1]


def test_layouts_whose_ranks_cannot_share_experts_are_impossible(tmp_path):
    config = plan_runs.configure(plan_runs.write_config(tmp_path, **EXPERTS), "--training.global_batch_size 8")
    cluster = PlanOptions(1, 8, "h100-80gb", 0.55, 0.0, None).cluster(read_architecture(config.model))
    tried = candidates(config, cluster, Calibration(dict.fromkeys(("none", "selective", "full"), 1.0)))
    sizes = {(one.layout.shard * one.layout.context, one.config.parallel.expert) for one in tried}
    assert {expert for _, expert in sizes} == {1, 2, 4, 8}
    assert all(ranks % expert == 0 for ranks, expert in sizes)
    three = replace(config, parallel=replace(config.parallel, expert=3))
    refusal = r"parallel\.expert 3 does not divide parallel\.shard 8 x parallel\.context 1 = 8 ranks"
    with pytest.raises(UserError, match=refusal):
        require_possible(three, cluster)
