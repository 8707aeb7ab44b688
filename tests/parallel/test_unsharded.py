"""One data-parallel rank without FSDP: bit for bit what FSDP computes there."""

from __future__ import annotations

import itertools
from pathlib import Path

import parity_run
import pytest
import tiny_run
import torch
from parity_run import Model
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.parallel import data_parallel

DTYPES = {
    "fp32": "--training.precision fp32",
    "bf16": "--training.precision bf16",
    "bf16 weights": "--training.precision bf16 --training.weight_dtype bf16",
    "bf16 weights in fp32": "--training.precision fp32 --training.weight_dtype bf16",
}
BATCHES = {"one micro-batch": "8", "several": "2"}
MODELS = [Model("qwen3", tied=True, packed=True), Model("llama", tied=False, packed=True)]


@pytest.fixture(scope="module")
def run_files(tmp_path_factory) -> dict[Model, Path]:
    """Tiny runs of a model with a tied head and of one without."""
    return {model: parity_run.write_run(tmp_path_factory.mktemp("unsharded"), model) for model in MODELS}


@pytest.fixture
def use_fsdp(monkeypatch):
    """Wraps models in FSDP from now on, as on several ranks."""
    return lambda: monkeypatch.setattr(data_parallel, "is_alone", lambda mesh, config: False)


def steps(ranks, path: Path, options: str) -> list[Tensor]:
    """Losses, gradients before clipping, weights and an evaluation of three steps."""
    run = pretrain.build(parse_config(["--config", str(path), *options.split()]), ranks)
    seen: list[Tensor] = []
    accumulate = run.forward_backward.accumulate_gradients

    def recorded(*arguments):
        loss = accumulate(*arguments)
        seen.extend(tiny_run.whole(parameter.grad) for parameter in run.model.parameters())
        return loss

    run.forward_backward.accumulate_gradients = recorded
    for step in range(3):
        batches = run.data.micro_batches(step * parity_run.GLOBAL_BATCH)
        result = pretrain.one_step(run, batches, float(sum(batch.num_targets for batch in batches)))
        seen += [result.loss, result.grad_norm, run.forward_backward.evaluate(batches)]
    seen.extend(tiny_run.whole(parameter) for parameter in run.model.parameters())
    assert isinstance(run.model.decoders[0], FSDPModule) == (
        not data_parallel.is_alone(run.mesh.fsdp, run.config.parallel)
    )
    return seen


@pytest.mark.parametrize(
    ("dtypes", "batches", "model", "recompute"),
    [
        *((*case, "none") for case in itertools.product(DTYPES, BATCHES, MODELS)),
        ("bf16", "several", MODELS[1], "full"),
        ("bf16", "several", MODELS[1], "selective"),
    ],
    ids=str,
)
def test_every_bit_is_that_of_fsdp(dtypes, batches, model, recompute, one_rank, run_files, use_fsdp):
    options = f"{DTYPES[dtypes]} --training.micro_batch_size {BATCHES[batches]} --parallel.recompute {recompute}"
    actual = steps(one_rank, run_files[model], options)
    use_fsdp()
    expected = steps(one_rank, run_files[model], options)
    assert len(actual) == len(expected) > 60
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
