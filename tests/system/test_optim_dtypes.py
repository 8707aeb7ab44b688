"""Whole runs whose weights or optimizer states are bf16: what they learn, save, resume and refuse."""

from __future__ import annotations

import shutil

import pytest
import tiny_run
import torch

from retemper.engine import pretrain
from retemper.engine.errors import UserError

BF16_WEIGHTS = ["--training.weight_dtype", "bf16"]
BF16_STATES = ["--optimizer.state_dtype", "bf16"]
LAST = "checkpoints/step-00000020"


def _tensors(run_folder, checkpoint=LAST):
    return tiny_run.tensors_of(run_folder / checkpoint)


def _dtypes(tensors):
    """(dtype of weights, of moments, of step counts)."""
    kinds = [
        {t.dtype for name, t in tensors.items() if not name.startswith("optimizer.")},
        {t.dtype for name, t in tensors.items() if name.startswith("optimizer.exp_avg")},
        {t.dtype for name, t in tensors.items() if name.startswith("optimizer.step.")},
    ]
    assert all(len(kind) == 1 for kind in kinds)
    return tuple(kind.pop() for kind in kinds)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(BF16_WEIGHTS, marks=pytest.mark.slow),
        pytest.param(BF16_STATES, marks=pytest.mark.slow),
        BF16_WEIGHTS + BF16_STATES,
    ],
)
def test_an_interrupted_run_is_bitwise_the_undisturbed_run(options, two_ranks, run_file, reference, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    two_ranks.run(tiny_run.train, run_file, [*options, "--run_folder", str(whole)])
    # The same run, as one that was killed before its checkpoint of step 16.
    shutil.copytree(whole, broken)
    for step in (16, 20):
        shutil.rmtree(broken / "checkpoints" / f"step-{step:08d}")
    two_ranks.run(tiny_run.train, run_file, [*options, "--run_folder", str(broken)])
    assert {path.name[-2:] for path in (broken / "checkpoints").iterdir()} == {"12", "16", "20"}
    assert tiny_run.curve(broken) == tiny_run.curve(whole)
    expected, actual = _tensors(whole), _tensors(broken)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    weights = torch.bfloat16 if BF16_WEIGHTS[0] in options else torch.float32
    states = torch.bfloat16 if BF16_STATES[0] in options else torch.float32
    assert _dtypes(actual) == (weights, states, torch.float32)
    # It learns as fp32 does: after twenty large steps the losses differ by less than one in a hundred.
    for one, other in zip(tiny_run.curve(whole), tiny_run.curve(reference), strict=True):
        assert one[:2] == other[:2] and one[2] == pytest.approx(other[2], rel=1e-2)


@pytest.fixture(scope="module")
def narrow(one_rank, run_file, tmp_path_factory):
    """Run folder of a bf16 run left at step 6, with a checkpoint at step 4."""
    folder = tmp_path_factory.mktemp("narrow") / "run"
    tiny_run.train_until(one_rank, run_file, [*BF16_WEIGHTS, *BF16_STATES, "--run_folder", str(folder)], 6)
    return folder


def test_a_resume_with_wider_dtypes_goes_on_from_the_same_values_and_says_so(
    narrow, one_rank, run_file, tmp_path, capsys
):
    shutil.copytree(narrow, tmp_path / "run")
    run = pretrain.build(tiny_run.configure(run_file, "--run_folder", str(tmp_path / "run")), one_rank)
    assert isinstance(run.optimizer, torch.optim.AdamW)
    stored = _tensors(narrow, "checkpoints/step-00000004")
    for name, parameter in run.model.named_parameters():
        state = run.optimizer.state[parameter]
        for key, value in [("", parameter), *((f"optimizer.{key}.", state[key]) for key in state)]:
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            assert value.dtype == torch.float32 and torch.equal(value, stored[key + name].float())
    pretrain.train(run)
    num_weights = sum(not name.startswith("optimizer.") for name in stored)
    assert f"{3 * num_weights} tensors of" in capsys.readouterr().out
    assert _dtypes(_tensors(tmp_path / "run")) == (torch.float32,) * 3


@pytest.mark.parametrize(
    ("options", "key"), [(BF16_WEIGHTS, "training.weight_dtype"), (BF16_STATES, "optimizer.state_dtype")]
)
def test_a_resume_with_narrower_dtypes_is_refused(options, key, one_rank, run_file, reference):
    with pytest.raises(UserError, match=rf"{key} asks for bfloat16, but .*step-00000020 .* set {key} back"):
        pretrain.build(tiny_run.configure(run_file, *options, "--run_folder", str(reference)), one_rank)


def test_starting_from_fp32_weights_in_bf16_is_said(one_rank, run_file, reference, tmp_path, capsys):
    start = ["--model.initialize_from", str(reference / LAST), "--run_folder", str(tmp_path)]
    run = pretrain.build(tiny_run.configure(run_file, *BF16_WEIGHTS, *start), one_rank)
    stored = _tensors(reference)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, stored[name].bfloat16())
    pretrain.train(run)
    assert "cast from float32 to bfloat16" in capsys.readouterr().out


def accumulated(ranks, run_file, overrides):
    """Per parameter: dtype of the gradient of four micro-batches, its whole, and the float64 sum of the four's own."""
    run = pretrain.build(tiny_run.configure(run_file, *overrides), ranks)
    batches = run.data.micro_batches(0)
    parameters = dict(run.model.named_parameters())
    sums = {name: torch.zeros(parameter.shape, dtype=torch.float64) for name, parameter in parameters.items()}
    for batch in batches:
        run.forward_backward.loss_sum(batch).backward()
        for name, parameter in parameters.items():
            sums[name] += parameter.grad.full_tensor().double()
            parameter.grad = None
    for batch in batches:
        run.forward_backward.loss_sum(batch).backward()
    return {
        name: (parameter.grad.dtype, parameter.grad.full_tensor(), sums[name]) for name, parameter in parameters.items()
    }


def test_gradients_of_bf16_weights_are_added_up_in_fp32(two_ranks, run_file, tmp_path):
    options = ["--run_folder", str(tmp_path), *BF16_WEIGHTS, "--training.micro_batch_size"]
    for result in two_ranks.run(accumulated, run_file, [*options, "1"]):
        for name, (dtype, gradient, expected) in result.items():
            assert dtype == torch.float32, name
            assert (gradient.double() - expected).norm() < 1e-6 * expected.norm(), name
    # One micro-batch needs no wider gradient.
    assert {dtype for dtype, _, _ in two_ranks.run(accumulated, run_file, [*options, "4"])[0].values()} == {
        torch.bfloat16
    }
