"""All ranks of a group call the same collectives in the same order, in passes and updates.

A rank that calls them in another order waits for the others forever. Autograd runs what was computed last first, so
ranks may have different graphs, such as those that do not count the load of experts, if they compute the rest in the
same order.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import parity_run
import pytest
from seen_operators import Collective, Operators

from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.evaluation import count_targets
from retemper.engine.parallel.process_group import Ranks

RING = "context=2 context_kind=ring"
CASES = [
    (2, "tensor=2", "qwen3_moe"),
    (2, "tensor=2 recompute=selective", "qwen2_moe"),
    (4, "tensor=2 expert=2", "qwen2_moe"),
    (4, "pipeline=2 expert=2", "qwen3_moe"),
    pytest.param(2, "tensor=2", "qwen2_moe", marks=pytest.mark.slow),
    pytest.param(2, "tensor=2 recompute=full", "qwen3_moe", marks=pytest.mark.slow),
    pytest.param(2, RING, "qwen3_moe", marks=pytest.mark.slow),
    pytest.param(4, f"{RING} expert=4", "qwen3_moe", marks=pytest.mark.slow),
    pytest.param(4, "tensor=2 shard=2", "qwen2_moe", marks=pytest.mark.slow),
    pytest.param(2, "expert=2 recompute=full", "qwen2_moe", marks=pytest.mark.slow),
]


def collectives(ranks: Ranks, path: Path, options: list[str]) -> list[Collective]:
    """What this rank calls in a step."""
    run = pretrain.build(parse_config(["--config", str(path), *options]), ranks)
    with Operators() as seen:
        batches = run.data.micro_batches(0)
        num_targets = ranks.all_reduce(count_targets(batches, run.mesh))
        pretrain.one_step(run, batches, num_targets)
    return seen.collectives


@pytest.mark.parametrize(("world_size", "settings", "family"), CASES)
def test_the_order_is_the_same_on_all_ranks(world_size, settings, family, request, tmp_path):
    cluster = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world_size])
    path = parity_run.write_run(tmp_path, parity_run.Model(family, tied=False, packed=True))
    options = [word for setting in settings.split() for word in f"--parallel.{setting}".split("=")]
    options += ["--training.global_batch_size", "4"]
    by_group: dict[tuple[int, ...], list[list[Collective]]] = defaultdict(list)
    for rank, called in enumerate(cluster.run(collectives, path, options)):
        groups = {one.ranks for one in called}
        assert all(rank in group for group in groups)
        for group in groups:
            by_group[group].append([one for one in called if one.ranks == group])
    assert any(len(group) > 1 and len(of_ranks[0]) > 20 for group, of_ranks in by_group.items())
    for group, of_ranks in by_group.items():
        assert len(of_ranks) == len(group)
        for others in of_ranks[1:]:
            assert others == of_ranks[0]
