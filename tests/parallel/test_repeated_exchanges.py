"""The backward pass repeats no exchange between ranks that recomputation does not need."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from unittest import mock

import parity_run
import pytest
from seen_operators import EXCHANGE, Operators

from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.parallel.process_group import Ranks
from retemper.kernels import grouped_linear as grouped_linear_module

PRODUCT = "aten::_grouped_mm"


def operators(ranks: Ranks, path: Path, options: list[str]) -> dict[str, Counter[str]]:
    """What the passes of one micro-batch call, with the grouped product of GPUs."""
    run = pretrain.build(parse_config(["--config", str(path), *options]), ranks)
    batches = run.data.micro_batches(0)[:1]
    with (
        mock.patch.object(grouped_linear_module, "_has_grouped_kernel", return_value=True),
        Operators() as seen,
    ):
        run.forward_backward.accumulate_gradients(batches, 1.0, seen.begin)
    return seen.counts


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_exchanges_of_tokens(family, two_ranks, tmp_path):
    """Of each layer: numbers of rows, rows and their weights to the experts, results back; gradients of the last three.

    Recomputation of everything needs the received rows again, but not the results, nor the product that makes them.
    """
    path = parity_run.write_run(tmp_path, parity_run.Model(family, tied=False, packed=True))
    layers = {"qwen3_moe": 4, "qwen2_moe": 3}[family]
    for mode, exchanges, products in (("none", 0, 0), ("selective", 0, 0), ("full", 3, 2)):
        found = two_ranks.run(operators, path, ["--parallel.expert", "2", "--parallel.recompute", mode])
        for counts in found:
            forward, backward = counts["forward"], counts["backward"]
            assert (forward[EXCHANGE], backward[EXCHANGE]) == (4 * layers, (3 + exchanges) * layers), mode
            assert (forward[PRODUCT], backward[PRODUCT]) == (3 * layers, (6 + products) * layers), mode


def test_exchanges_of_heads_are_told_from_those_of_tokens(two_ranks, tmp_path):
    """Those of queries, keys, values and their results are repeated: only what they exchange is stored."""
    path = parity_run.write_run(tmp_path, parity_run.Model("qwen3_moe", tied=False, packed=True))
    options = "--parallel.context 2 --parallel.context_kind heads --parallel.recompute selective --parallel.expert"
    for size, of_tokens in ((1, 0), (2, 3)):
        for counts in two_ranks.run(operators, path, [*options.split(), str(size)]):
            assert counts["backward"][EXCHANGE] == 4 * (4 + 4 + of_tokens)
