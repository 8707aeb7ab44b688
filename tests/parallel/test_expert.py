"""Experts shared by two ranks compute what each rank computes alone with all of them, whatever the load.

Whole runs are compared with one process in test_layout_parity.py.
"""

from __future__ import annotations

from pathlib import Path

import parity_run
import pytest
import torch
import torch.distributed as dist
from plan_runs import configure, spec_of, write_config
from torch import Tensor, nn

from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import ParallelConfig
from retemper.engine.errors import UserError
from retemper.engine.guards.replica_check import Owners, owners_of
from retemper.engine.model.expert_settings import ExpertSettings
from retemper.engine.model.experts import Experts, Routing
from retemper.engine.model.implementations import parse_architecture
from retemper.engine.parallel import expert
from retemper.engine.parallel.layout import Layout, plan_layout
from retemper.engine.parallel.mesh import build_mesh
from retemper.engine.parallel.process_group import Ranks
from retemper.tools.planning.pool import DryRunPool

NUM_EXPERTS, HIDDEN, INNER, TOKENS = 4, 16, 8, 10
LOADS = {
    "every expert": lambda rank: torch.arange(2 * TOKENS).view(TOKENS, 2) % NUM_EXPERTS,
    "only experts of the first rank": lambda rank: torch.tensor([[0, 1]]).repeat(TOKENS, 1),
    "only experts of the second rank": lambda rank: torch.tensor([[3, 2]]).repeat(TOKENS, 1),
    "only experts of the other rank": lambda rank: torch.tensor([[2, 3], [1, 0]])[rank].repeat(TOKENS, 1),
    "one expert without rows": lambda rank: torch.tensor([[0, 2], [2, 3], [3, 0]]).repeat(TOKENS, 1)[:TOKENS],
}


def whole_experts() -> Experts:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        experts = Experts(ExpertSettings((True,), NUM_EXPERTS, 2, INNER), HIDDEN, "silu").double()
        for parameter in experts.parameters():
            nn.init.normal_(parameter)
    return experts


def passes(experts: Experts, hidden_TH: Tensor, routing: Routing) -> list[Tensor]:
    """The result and the gradients of the inputs."""
    inputs = [hidden_TH.clone().requires_grad_(), routing.weights_TK.clone().requires_grad_()]
    result = experts(inputs[0], Routing(routing.experts_TK, inputs[1]))
    result.square().sum().backward()
    return [result.detach(), *(tensor.grad for tensor in inputs)]


def shared_and_alone(ranks: Ranks, load: str) -> list[tuple[str, Tensor, Tensor]]:
    """What this rank gets from shared experts and from whole ones, by name."""
    generator = torch.Generator().manual_seed(ranks.rank)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weights_TK = torch.rand(TOKENS, 2, generator=generator)
    routing = Routing(LOADS[load](ranks.rank), weights_TK)
    alone, shared = whole_experts(), whole_experts()
    expert.apply(shared, build_mesh(Layout(shard=2), "cpu", 2).experts)
    found = [("result", "hidden", "weights"), passes(shared, hidden_TH, routing), passes(alone, hidden_TH, routing)]
    pairs = list(zip(*found, strict=True))
    for (name, mine), whole in zip(shared.named_parameters(), alone.parameters(), strict=True):
        assert mine.to_local().shape[0] == NUM_EXPERTS // 2
        dist.all_reduce(whole.grad)  # of the tokens of both ranks
        pairs.append((name, mine.grad.to_local(), whole.grad.chunk(2)[ranks.rank]))
    return pairs


@pytest.mark.parametrize("load", LOADS)
def test_shared_experts_compute_what_whole_ones_do(load, two_ranks):
    for pairs in two_ranks.run(shared_and_alone, load):
        assert len(pairs) == 6
        for name, shared, alone in pairs:
            torch.testing.assert_close(shared, alone, msg=name)


@pytest.mark.parametrize(
    ("family", "parallel", "message"),
    [
        (
            "qwen3_moe",
            ParallelConfig(expert=3),
            "parallel.expert 3 does not divide the model's 8 experts; use a divisor of 8",
        ),
        (
            "qwen3",
            ParallelConfig(expert=2),
            "parallel.expert is 2, but model_type qwen3 has no experts; set it to 1",
        ),
    ],
)
def test_models_whose_experts_cannot_be_shared(family, parallel, message):
    with pytest.raises(UserError) as caught:
        expert.check(parse_architecture(parity_run.FAMILIES[family]), parallel)
    assert str(caught.value) == message


def test_a_model_of_transformers_is_refused():
    architecture = parse_architecture(parity_run.FAMILIES["qwen3_moe"], requested="transformers")
    with pytest.raises(UserError, match=r"parallel\.expert is 2, but model_type qwen3_moe is computed by"):
        expert.check(architecture, ParallelConfig(expert=2))


def test_ranks_that_cannot_be_divided():
    with pytest.raises(UserError) as caught:
        plan_layout(ParallelConfig(replicate=2, context=2, expert=4), 12)
    assert str(caught.value) == (
        "parallel.expert 4 does not divide parallel.shard 3 x parallel.context 2 = 6 ranks; use a divisor of 6"
    )


def placed(ranks: Ranks, path: Path, options: list[str]) -> dict[str, tuple[Owners, tuple[int, ...]]]:
    """The ranks that hold the same part of every parameter as this one, and the shape of that part."""
    run = pretrain.build(parse_config(["--config", str(path), *options]), ranks)
    return {name: (owners_of(p), tuple(p.to_local().shape)) for name, p in run.model.named_parameters()}


@pytest.mark.parametrize(
    ("options", "of_experts", "of_router"),
    [
        # Ranks 0 and 2 have the same inner features of other experts.
        ("expert=2 tensor=2", [((rank,), (4, 12, 32)) for rank in range(4)], [(0, 1), (0, 1), (2, 3), (2, 3)]),
        ("expert=2 replicate=2", [((rank % 2, rank % 2 + 2), (4, 24, 32)) for rank in range(4)], [(0, 2), (1, 3)] * 2),
        ("expert=2", [((rank,), (2, 24, 32)) for rank in range(4)], [(0,), (1,), (2,), (3,)]),
    ],
)
def test_which_ranks_hold_copies(options, of_experts, of_router, four_ranks, tmp_path):
    path = parity_run.write_run(tmp_path, parity_run.Model("qwen3_moe", tied=False, packed=True))
    words = [word for setting in options.split() for word in f"--parallel.{setting}".split("=")]
    found = four_ranks.run(placed, path, words)
    assert [one["model.layers.0.mlp.experts.gate_proj.weight"] for one in found] == of_experts
    assert [one["model.layers.0.mlp.gate.weight"][0] for one in found] == of_router


def test_a_dry_run_assumes_a_balanced_load(tmp_path):
    """Bytes of the exchanges in a step: rows to the experts and back in both passes, weights and their gradients, and
    the numbers of rows."""
    facts = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192}
    config = configure(write_config(tmp_path, **facts), "--parallel.expert 2")
    with DryRunPool(1) as pool:  # a process without the group of other tests
        (usage,) = pool.run([spec_of(config, 2)])
    (exchanges,) = (total for key, total in usage.collectives.items() if key.kind == "all-to-all")
    rows, hidden, layers, bf16, fp32 = 2 * 256 * 2, 128, 4, 2, 4
    of_a_layer = 4 * rows * hidden * bf16 + 2 * rows * fp32 + 8 * 4
    assert exchanges.size == layers * of_a_layer
