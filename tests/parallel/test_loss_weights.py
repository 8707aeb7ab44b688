"""``data.train[].loss_weight``: gradients and losses of a run against float64, in every layout; resumes; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_run
import torch
import torch.nn.functional as F
import yaml

from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.errors import UserError
from retemper.engine.evaluation import count_targets
from retemper.engine.parallel.process_group import Ranks
from retemper.kernels.linear_cross_entropy import IGNORE_INDEX

STEPS = 6
BUDGET = ["--training.train_tokens", str(STEPS * 8 * 32)]
WEIGHTS = (1.0, 4.0)


class Found(NamedTuple):
    """The mean loss of the first global batch on all ranks, and its gradients."""

    loss: float
    gradients: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def run_files(tmp_path_factory) -> dict[tuple[float, ...], Path]:
    """The tiny run with a vocabulary that two ranks can share, by the loss weights of its two sources."""
    folder = tmp_path_factory.mktemp("data")
    config = yaml.safe_load(tiny_run.write_config(folder).read_text())
    config["model"]["architecture"] |= {"vocab_size": tiny_run.VOCAB_SIZE + 1}
    files = {}
    for weights in ((1.0, 1.0), WEIGHTS, (0.5, 2.0), (3.0, 3.0)):
        for source, weight in zip(config["data"]["train"], weights, strict=True):
            source["loss_weight"] = weight
        files[weights] = folder / f"{weights}.yaml"
        files[weights].write_text(yaml.safe_dump(config), encoding="utf-8")
    return files


def first_step(ranks: Ranks, path: Path, overrides: list[str]) -> Found:
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
    batches = run.data.micro_batches(0)
    num_targets = ranks.all_reduce(count_targets(batches, run.mesh))
    loss = run.forward_backward.accumulate_gradients(batches, num_targets, lambda phase: None)
    return Found(ranks.all_reduce(loss.item()), tiny_run.gradients(run))


def expected_step(ranks: Ranks, path: Path, overrides: list[str]) -> Found:
    """By autograd over whole logits in float64, with the weight of the source of each sample."""
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
    (decoder,) = run.model.decoders
    decoder.double()
    numerator, denominator = torch.zeros((), dtype=torch.float64), 0.0
    sources = set()
    for first, batch in zip((0, 4), run.data.micro_batches(0), strict=True):
        source_of = torch.tensor([run.data.order.sample(first + place).source for place in range(4)])
        weights = torch.tensor(WEIGHTS, dtype=torch.float64)[source_of].repeat_interleave(32)
        sources.update(source_of.tolist())
        valid = batch.targets != IGNORE_INDEX
        losses = F.cross_entropy(decoder.logits(batch)[valid], batch.targets[valid], reduction="none")
        numerator = numerator + (losses * weights[valid]).sum()
        denominator += weights[valid].sum().item()
    assert sources == {0, 1}
    (numerator / denominator).backward()
    found = {name: parameter.grad for name, parameter in decoder.named_parameters() if parameter.grad is not None}
    return Found(numerator.item() / denominator, found)


@pytest.fixture(scope="module")
def expected(one_rank, run_files, tmp_path_factory) -> Found:
    return expected_step(one_rank, run_files[WEIGHTS], ["--run_folder", str(tmp_path_factory.mktemp("one") / "run")])


def compare(found: Found, expected: Found) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.gradients.keys() <= expected.gradients.keys()  # a stage of a pipeline has some
    for name, gradient in found.gradients.items():
        torch.testing.assert_close(gradient.double(), expected.gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro_batch_size", ["4", "8"])
def test_one_rank_equals_float64(one_rank, run_files, expected, tmp_path, micro_batch_size):
    options = ["--run_folder", str(tmp_path / "run"), "--training.micro_batch_size", micro_batch_size]
    compare(first_step(one_rank, run_files[WEIGHTS], options), expected)


def test_transformers_implementation_equals_float64(one_rank, run_files, tmp_path):
    options = ["--run_folder", str(tmp_path / "run"), "--model.implementation", "transformers"]
    found = first_step(one_rank, run_files[WEIGHTS], options)
    compare(found, expected_step(one_rank, run_files[WEIGHTS], options))


@pytest.mark.parametrize("axis", ["shard", "tensor", "context", "pipeline"])
def test_two_ranks_equal_float64(two_ranks, run_files, expected, tmp_path, axis):
    options = ["--run_folder", str(tmp_path / "run"), f"--parallel.{axis}", "2"]
    for found in two_ranks.run(first_step, run_files[WEIGHTS], options):
        compare(found, expected)


def test_only_ratios_matter(one_rank, run_files, tmp_path):
    """Weights that agree change no bit, and neither does a common factor."""

    def found(weights: tuple[float, ...]) -> Found:
        return first_step(one_rank, run_files[weights], ["--run_folder", str(tmp_path / str(weights))])

    for one, other in (((1.0, 1.0), (3.0, 3.0)), (WEIGHTS, (0.5, 2.0))):
        first, second = found(one), found(other)
        assert first.loss == second.loss
        assert all(torch.equal(first.gradients[name], second.gradients[name]) for name in first.gradients)
    assert found(WEIGHTS).loss != found((1.0, 1.0)).loss
    run = pretrain.build(tiny_run.configure(run_files[3.0, 3.0], "--run_folder", str(tmp_path / "b")), one_rank)
    assert all(batch.loss_weights is None for batch in run.data.micro_batches(0))


def test_resumed_bitwise_and_not_in_evaluations(one_rank, run_files, tmp_path):
    options = [*BUDGET, "--training.eval_at_start", "true"]
    folders = [tmp_path / name for name in ("whole", "resumed", "plain")]
    tiny_run.train(one_rank, run_files[WEIGHTS], ["--run_folder", str(folders[0]), *options])
    tiny_run.train_until(one_rank, run_files[WEIGHTS], ["--run_folder", str(folders[1]), *options], 5)
    tiny_run.train(one_rank, run_files[WEIGHTS], ["--run_folder", str(folders[1]), *options])
    assert tiny_run.curve(folders[0]) == tiny_run.curve(folders[1])
    last = f"checkpoints/step-{STEPS:08d}"
    mine, theirs = (tiny_run.tensors_of(folder / last) for folder in folders[:2])
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    tiny_run.train(one_rank, run_files[1.0, 1.0], ["--run_folder", str(folders[2]), *options])
    first = [next(r for r in tiny_run.records(folder) if "validation" in str(r)) for folder in (folders[0], folders[2])]
    losses = [{key: value for key, value in record.items() if "loss" in key} for record in first]
    assert losses[0] and losses[0] == losses[1]
    assert tiny_run.curve(folders[0]) != tiny_run.curve(folders[2])


@pytest.mark.parametrize(
    ("weights", "line"),
    [
        ((1.0, 0.0), "data.train[1].loss_weight is 0.0; it must be positive and finite"),
        ((1.0, float("inf")), "data.train[1].loss_weight is inf; it must be positive and finite"),
    ],
)
def test_refused(run_files, tmp_path, weights, line):
    config: dict[str, Any] = yaml.safe_load(run_files[WEIGHTS].read_text())
    for source, weight in zip(config["data"]["train"], weights, strict=True):
        source["loss_weight"] = weight
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(UserError) as refusal:
        parse_config(["--config", str(path)])
    assert line in str(refusal.value)


def test_stages_must_agree(run_files, tmp_path):
    config: dict[str, Any] = yaml.safe_load(run_files[WEIGHTS].read_text())
    first, second = config["data"].pop("train")
    config["data"]["stages"] = [
        {"train": [first, second], "train_tokens": 8 * 32},
        {"train": [{**second, "loss_weight": 2.0}]},
    ]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"data.stages\[1\].train gives 'second' the loss_weight 2, but an earlier stage 4"
    ):
        parse_config(["--config", str(path)])
