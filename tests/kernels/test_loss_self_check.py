"""The check of the persistent kernel at the first loss on a GPU: it finds kernels that are wrong, and says so."""

from __future__ import annotations

import functools

import pytest
import torch

from retemper.kernels import linear_cross_entropy as kernel
from retemper.kernels.linear_cross_entropy import chunked, self_check

CPU = torch.device("cpu")
triton_loss = pytest.importorskip("retemper.kernels.linear_cross_entropy.triton_loss", exc_type=ImportError)
persistent = functools.partial(triton_loss.compute, persistent=True)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """For Triton's interpreter, whose tiles are small too."""
    monkeypatch.setattr(self_check, "_TOKENS", 37)
    monkeypatch.setattr(self_check, "_VOCABULARY", 70)
    self_check.persistent_problem.cache_clear()
    yield
    self_check.persistent_problem.cache_clear()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_right_kernels_have_no_problem():
    assert self_check.find_problem(persistent, CPU, 32) is None
    assert self_check.find_problem(chunked.compute, CPU, 32) is None


def changed(name: str, change):
    """A kernel with one wrong result."""

    def compute(*inputs, **settings):
        result = chunked.compute(*inputs, **settings)
        return result._replace(**{name: change(getattr(result, name).clone())})

    return compute


def last_row_lost(tensor):
    tensor[-1] = 0
    return tensor


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("losses_T", lambda x: x.roll(1), "the losses"),
        ("losses_T", lambda x: torch.cat([x[:1] * torch.nan, x[1:]]), "nan in the losses"),
        ("hidden_TH", last_row_lost, "dX"),
        ("weight_VH", lambda x: x * 1.05, "0.05 in dW"),
    ],
)
def test_wrong_kernels_are_found(name, change, said):
    problem = self_check.find_problem(changed(name, change), CPU, 32)
    assert problem is not None and said in problem


def test_a_kernel_that_fails_is_replaced_and_named(monkeypatch):
    """Once per process."""
    calls = []

    def fail(*_, **__):
        calls.append(1)
        raise RuntimeError("no descriptors\nhere")

    monkeypatch.setattr(triton_loss, "compute", fail)
    with pytest.warns(UserWarning, match="it raises no descriptors here"):
        assert self_check.persistent_problem(CPU, 32)
    assert self_check.persistent_problem(CPU, 32) and len(calls) == 1
    monkeypatch.setattr(kernel, "backend_refusal", lambda backend, hidden, weight: None)
    assert kernel.default_backend(FakeGpu(), FakeGpu()) == "triton"


class FakeGpu:
    """What ``default_backend`` asks of a matrix."""

    is_cuda, device, shape = True, CPU, (8, 32)
