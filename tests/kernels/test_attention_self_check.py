"""The check of kernels at a run's start, with kernels that are right, wrong, or raise an error; on the CPU."""

import pytest
import torch

from retemper.kernels.attention import flash, per_document, per_document_attention, self_check

CPU = torch.device("cpu")
LENGTHS = [70, 3, 20]


def right(q, k, v):
    return per_document_attention(q, k, v, LENGTHS)


class WrongGradient(torch.autograd.Function):
    """The identity with a gradient that is not the upstream one."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def as_one_document(q, k, v):
    return per_document_attention(q, k, v, [sum(LENGTHS)])


def with_nan_in_dq(q, k, v):
    return right(WrongGradient.apply(q, float("nan")), k, v)


def with_unsummed_dk(q, k, v):
    return right(q, WrongGradient.apply(k, 1 / 3), v)


def with_heads_in_another_order(q, k, v):
    return per_document_attention(q, *(x.repeat(1, 3, 1) for x in (k, v)), LENGTHS)


def missing(q, k, v):
    raise RuntimeError("No available kernel.\nAborting execution.")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_right_kernel_has_no_problem(dtype, head_dim):
    assert self_check.find_problem(right, LENGTHS, CPU, dtype, head_dim) is None


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (as_one_document, "in output"),
        (with_nan_in_dq, "wrong by nan in dQ"),
        (with_unsummed_dk, "wrong by 0.67 in dK"),
        (with_heads_in_another_order, "in output"),
        (missing, "it raises No available kernel. Aborting execution."),
    ],
)
def test_another_has(kernel, expected):
    problem = self_check.find_problem(kernel, LENGTHS, CPU, torch.bfloat16, 64)
    assert expected in problem
    assert "\n" not in problem


def test_random_numbers_of_the_run_are_not_used():
    state = torch.get_rng_state()
    self_check.find_problem(right, LENGTHS, CPU, torch.bfloat16, 64)
    assert torch.equal(state, torch.get_rng_state())


@pytest.fixture
def fresh():
    checks = (self_check.cudnn_problem, self_check.shared_heads_problem)
    for check in checks:
        check.cache_clear()
    yield
    for check in checks:
        check.cache_clear()


def test_each_check_runs_once_and_uses_only_the_kernel_in_question(fresh, monkeypatch):
    kernels = CPU, torch.bfloat16, 64
    assert self_check.cudnn_problem(*kernels) is None  # a CPU has only one kernel
    monkeypatch.setattr(per_document, "on_gpu", lambda x: True)
    assert self_check.cudnn_problem(*kernels) is None
    self_check.cudnn_problem.cache_clear()
    # The CPU's kernel is not in the list.
    assert "it raises" in self_check.cudnn_problem(*kernels)


def varlen_of_2_11(shares):
    """The kernel takes fewer heads or not."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        if not shares and q.shape[1] != k.shape[1]:
            raise RuntimeError("Expected k to have the heads of q")
        assert cu_q is cu_k
        assert max_q == max_k == max(cu_q.diff().tolist())
        assert window_size == (-1, 0)
        return per_document_attention(q, k, v, cu_q.diff().tolist())

    return varlen_attn


@pytest.mark.parametrize("shares", [True, False])
def test_varlen_attn_of_2_11_gets_the_heads_as_they_are_where_it_takes_them(fresh, monkeypatch, shares):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_of_2_11(shares))
    monkeypatch.setattr(flash, "VARLEN_HAS_ENABLE_GQA", False)
    problem = self_check.shared_heads_problem(None, CPU, torch.bfloat16, 64)
    assert problem == (None if shares else "it raises Expected k to have the heads of q")


def test_the_kernels_of_another_implementation_are_checked(fresh, monkeypatch):
    used = []
    monkeypatch.setattr(flash, "use_implementation", used.append)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_of_2_11(True))
    monkeypatch.setattr(flash, "VARLEN_HAS_ENABLE_GQA", False)
    self_check.shared_heads_problem("FA3", CPU, torch.bfloat16, 64)
    assert used == ["FA3"]
