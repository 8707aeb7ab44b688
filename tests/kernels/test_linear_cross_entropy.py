"""The chunked linear cross-entropy against float64 ``F.cross_entropy`` over whole logits."""

import pytest
import torch
import torch.nn.functional as F
from linear_cross_entropy_cases import GRADIENT_TOLERANCE, make_bias, make_inputs, peak_bytes, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.kernels import linear_cross_entropy as kernel
from retemper.kernels.linear_cross_entropy import IGNORE_INDEX, chunked, linear_cross_entropy
from retemper.kernels.linear_cross_entropy.rows import Needs, Options


def reference(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, upstream: float = 1.0):
    """(loss, hidden gradient, weight gradient) in float64, of the same (possibly bf16) values."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden_TH, weight_VH))
    loss = F.cross_entropy(hidden @ weight.t(), targets_T, ignore_index=IGNORE_INDEX, reduction="sum")
    (loss * upstream).backward()
    return loss.detach(), hidden.grad, weight.grad


def set_rows_per_chunk(monkeypatch: pytest.MonkeyPatch, rows: int, vocab: int) -> None:
    monkeypatch.setattr(kernel, "logit_budget", lambda device: rows * vocab * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_tokens", "hidden", "vocab"), [(37, 32, 97), (1, 16, 5), (64, 8, 2), (16, 64, 1031), (3, 1, 7)]
)
def test_loss_and_gradients_equal_float64(dtype, num_tokens, hidden, vocab):
    inputs = make_inputs(num_tokens, hidden, vocab, dtype)
    loss = linear_cross_entropy(*inputs).loss_sum
    loss.backward()
    expected_loss, expected_hidden, expected_weight = reference(*inputs)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert abs(loss.item() - expected_loss.item()) <= 1e-4
    for actual, expected in ((inputs[0].grad, expected_hidden), (inputs[1].grad, expected_weight)):
        assert actual.dtype == dtype
        assert relative_error(actual, expected) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 36, 37, 38])
def test_chunks_do_not_change_the_result(monkeypatch, dtype, rows):
    """37 tokens: one row a chunk, an uneven last chunk (5, 36), exactly one chunk, and a budget beyond the input."""
    inputs = make_inputs(37, 32, 97, dtype)
    set_rows_per_chunk(monkeypatch, rows, 97)
    loss = linear_cross_entropy(*inputs).loss_sum
    loss.backward()
    expected_loss, expected_hidden, expected_weight = reference(*inputs)
    assert abs(loss.item() - expected_loss.item()) <= 1e-4
    assert relative_error(inputs[0].grad, expected_hidden) <= GRADIENT_TOLERANCE[dtype]
    assert relative_error(inputs[1].grad, expected_weight) <= GRADIENT_TOLERANCE[dtype]


def test_a_budget_below_one_row_still_takes_one_row(monkeypatch):
    inputs = make_inputs(7, 8, 31, torch.float32)
    monkeypatch.setattr(kernel, "logit_budget", lambda device: 1)
    assert abs(linear_cross_entropy(*inputs).loss_sum.item() - reference(*inputs)[0].item()) <= 1e-4


def test_all_targets_ignored():
    hidden, weight, targets = make_inputs(9, 8, 31, torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE_INDEX)).loss_sum
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_ignored_tokens_have_no_gradient_of_their_own():
    hidden, weight, targets = make_inputs(9, 8, 31, torch.float32)
    linear_cross_entropy(hidden, weight, targets).loss_sum.backward()
    ignored = targets == IGNORE_INDEX
    assert ignored.any()
    assert torch.equal(hidden.grad[ignored], torch.zeros_like(hidden.grad[ignored]))
    assert (hidden.grad[~ignored].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("needs", ["hidden", "weight"])
def test_only_one_input_needs_a_gradient(needs):
    hidden, weight, targets = make_inputs(11, 8, 31, torch.float32)
    (weight if needs == "hidden" else hidden).requires_grad_(False)
    linear_cross_entropy(hidden, weight, targets).loss_sum.backward()
    _, expected_hidden, expected_weight = reference(hidden, weight, targets)
    if needs == "hidden":
        assert weight.grad is None
        assert relative_error(hidden.grad, expected_hidden) <= 1e-5
    else:
        assert hidden.grad is None
        assert relative_error(weight.grad, expected_weight) <= 1e-5


@pytest.mark.parametrize("upstream", [1 / 1639, -2.5, 1 + 2**-8, 0.0])
def test_upstream_gradient_scales_in_float32(upstream):
    _, expected_hidden, expected_weight = reference(*make_inputs(11, 8, 31, torch.float32), upstream=upstream)
    inputs = make_inputs(11, 8, 31, torch.float32)
    (linear_cross_entropy(*inputs).loss_sum * upstream).backward()
    for actual, expected in ((inputs[0].grad, expected_hidden), (inputs[1].grad, expected_weight)):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_upstream_gradient_is_not_rounded_to_the_inputs_dtype():
    """1.3008 lies between two bf16 numbers: rounded, it would scale every gradient of a step by the same 0.3 %."""
    upstream = 1.3008
    inputs = make_inputs(64, 64, 211, torch.bfloat16)
    (linear_cross_entropy(*inputs).loss_sum * upstream).backward()
    _, expected_hidden, expected_weight = reference(*inputs, upstream=upstream)
    for actual, expected in ((inputs[0].grad, expected_hidden), (inputs[1].grad, expected_weight)):
        # The least-squares factor between the two: rounding errors of single elements average out of it.
        factor = (actual.double() * expected).sum() / expected.square().sum()
        assert abs(factor - 1) <= 1e-3
        assert relative_error(actual, expected) <= 5e-3


@pytest.mark.parametrize("in_half", [False, True], ids=["products as here", "products as on a GPU"])
def test_the_scale_of_the_loss_multiplies_before_fp16_gradients_are_formed(monkeypatch, in_half):
    """Most gradients of the logits of a large vocabulary are below fp16's smallest number, and so are those of the
    hidden states until they are scaled."""
    if in_half:
        monkeypatch.setattr(chunked, "product_dtype", lambda weight: weight.dtype)
    upstream = 2.0**15 / 2**20
    inputs = make_inputs(24, 16, 4099, torch.float16)
    with torch.no_grad():
        inputs[1].mul_(6e-3)  # small gradients of the hidden states
    (linear_cross_entropy(*inputs).loss_sum * upstream).backward()
    _, expected_hidden, expected_weight = reference(*inputs, upstream=upstream)
    expected = expected_hidden, expected_weight
    for actual, wanted in zip((inputs[0].grad, inputs[1].grad), expected, strict=True):
        # Rounded to fp16 once, where even the wanted numbers are subnormal.
        assert (actual.double() - wanted).abs().max() <= 1e-3 * wanted.abs().max() + 2.0**-25
    # The rows of the weight that are no token's target have gradients of products that are far below fp16's numbers.
    others = torch.ones(4099, dtype=torch.bool).index_fill(0, inputs[2].clamp(min=0), False)
    direct = chunked.compute(
        *(x.detach() for x in inputs[:2]), None, inputs[2], Options(), 2**24, Needs(True, True, False)
    )
    _, direct_hidden, direct_weight = reference(*inputs)
    assert relative_error(direct.weight_VH[others], direct_weight[others]) <= 1e-3
    assert direct.hidden_TH.dtype == torch.float32
    assert relative_error(direct.hidden_TH, direct_hidden) <= 1e-3


def test_no_grad_gives_the_same_loss_and_no_graph():
    inputs = make_inputs(37, 32, 97, torch.float32)
    with torch.no_grad():
        loss = linear_cross_entropy(*inputs).loss_sum
    assert not loss.requires_grad
    assert torch.equal(loss, linear_cross_entropy(*inputs).loss_sum.detach())


class MatrixProducts(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("gradients", "needs_hidden", "needs_weight", "products"),
    [(False, True, True, 1), (True, True, False, 2), (True, False, True, 2), (True, True, True, 3)],
)
def test_only_the_gradients_that_are_needed_are_computed(gradients, needs_hidden, needs_weight, products):
    """One chunk: one product for the logits and one for each gradient, whether or not it is evaluation."""
    hidden, weight, targets = make_inputs(11, 8, 31, torch.float32)
    hidden.requires_grad_(needs_hidden)
    weight.requires_grad_(needs_weight)
    with torch.set_grad_enabled(gradients), MatrixProducts() as counter:
        loss = linear_cross_entropy(hidden, weight, targets).loss_sum
        if gradients:
            loss.backward()
    assert counter.count == products


def test_huge_logits_stay_finite():
    hidden, weight, targets = make_inputs(5, 4, 11, torch.float32)
    with torch.no_grad():
        hidden.mul_(1e4)
    loss = linear_cross_entropy(hidden, weight, targets).loss_sum
    loss.backward()
    expected_loss, expected_hidden, _ = reference(hidden, weight, targets)
    assert abs(loss.item() / expected_loss.item() - 1) <= 1e-5
    assert relative_error(hidden.grad, expected_hidden) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("options", [{}, {"logit_softcap": 5.0}, {"logit_scale": 0.3, "bias": 0.5}], ids=str)
def test_memory_promise(monkeypatch, dtype, gradients, options):
    """All allocations at once stay within the logit budget (and a tenth of it, for all that is not logits), while whole
    logits would be 32 times that."""
    num_tokens, hidden, vocab, rows = 1024, 2, 4096, 32
    inputs = make_inputs(num_tokens, hidden, vocab, dtype)
    set_rows_per_chunk(monkeypatch, rows, vocab)
    # Whole weights: an fp32 copy of bf16 weights, the gradient's sum in fp32, and both gradients as they are returned.
    weights = vocab * hidden * (4 + 4 + 4) if gradients else vocab * hidden * 4
    options = options | {"bias": make_bias(inputs[1], options.get("bias"))}
    with torch.set_grad_enabled(gradients), torch.profiler.profile(profile_memory=True) as profile:
        loss = linear_cross_entropy(*inputs, **options, backend="chunked").loss_sum
        if gradients:
            loss.backward()
    assert rows * vocab * 4 * 0.9 <= peak_bytes(profile) <= rows * vocab * 4 * 1.1 + weights


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 5, 37])
def test_blocks_that_fit_the_cache_do_not_change_a_bit(monkeypatch, rows, softcap):
    def outcome() -> list[torch.Tensor]:
        inputs = make_inputs(37, 32, 97, torch.float32)
        loss = linear_cross_entropy(*inputs, z_loss=0.1, logit_softcap=softcap).loss_sum
        return [loss.detach(), *torch.autograd.grad(loss, inputs[:2])]

    expected = outcome()
    monkeypatch.setattr(chunked, "CACHED_BYTES", rows * 97 * 4)
    assert len(chunked._blocks(torch.empty(37, 97))) == -(-37 // rows)
    assert all(torch.equal(one, other) for one, other in zip(outcome(), expected, strict=True))
