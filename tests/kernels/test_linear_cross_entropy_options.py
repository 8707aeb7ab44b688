"""Options of the linear cross-entropy, each alone and all together, and the vocabulary shared between ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from linear_cross_entropy_cases import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    OPTIONS,
    check,
    make_bias,
    make_inputs,
    oracle,
    relative_error,
)

from retemper.kernels import linear_cross_entropy as kernel
from retemper.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy, reference

TOKENS, HIDDEN, VOCAB = 37, 32, 98


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("budget", [1, 7 * VOCAB * 4, 2**20])
def test_option_equals_float64(monkeypatch, dtype, options, budget):
    monkeypatch.setattr(kernel, "logit_budget", lambda device: budget)
    check(make_inputs(TOKENS, HIDDEN, VOCAB, dtype, size=4.0), 1.3008, **options)


def test_reference_by_hand():
    """One token, logits (1, 2, 3) before scale, bias and cap, target 0: every option written out."""
    hidden, weight = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    options = {"z_loss": 0.5, "logit_softcap": 2.0, "logit_scale": 0.5, "bias": torch.tensor([1.0, -1.0, 0.0])}
    result = reference.linear_cross_entropy(hidden, weight, torch.tensor([0]), **options)
    logits = 2.0 * torch.tanh(torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64))
    log_sum = logits.exp().sum().log()
    torch.testing.assert_close(result.loss_sum, log_sum - logits[0] + 0.5 * log_sum**2)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_only_the_bias_needs_a_gradient(backend):
    """An fp32 bias of a bf16 head keeps its dtype."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make_inputs(TOKENS, HIDDEN, VOCAB, torch.bfloat16, device=device)
    _, _, _, expected = oracle(inputs, bias=0.5)
    bias = make_bias(inputs[1], 0.5).detach().float().requires_grad_()
    linear_cross_entropy(*(x.detach() for x in inputs), bias=bias, backend=backend).loss_sum.backward()
    assert bias.grad.dtype == torch.float32
    assert relative_error(bias.grad, expected) <= GRADIENT_TOLERANCE[torch.bfloat16]


def test_the_scale_is_not_a_scale_of_bf16_hidden_states():
    """Rounded to bf16, the hidden states times 0.3 would change the loss of each token by about 0.001."""
    hidden, weight, targets = make_inputs(TOKENS, HIDDEN, VOCAB, torch.bfloat16, size=4.0)
    loss = linear_cross_entropy(hidden, weight, targets, logit_scale=0.3).loss_sum
    expected = oracle((hidden, weight, targets), logit_scale=0.3)[0].loss_sum
    rounded = linear_cross_entropy(hidden * 0.3, weight, targets).loss_sum
    assert abs(loss - expected) <= 1e-6 * expected
    assert abs(rounded - expected) > 1e-5 * expected


@pytest.mark.parametrize("budget", [7 * VOCAB * 4, 2**20])
def test_z_loss_is_returned_apart(monkeypatch, budget):
    """The cross-entropy alone is the value, and both together give the gradient."""
    monkeypatch.setattr(kernel, "logit_budget", lambda device: budget)
    hidden, weight, targets = make_inputs(TOKENS, HIDDEN, VOCAB, torch.float32, size=4.0)
    result = linear_cross_entropy(hidden, weight, targets, z_loss=0.3)
    logits = hidden.detach().double() @ weight.detach().double().t()
    expected = 0.3 * (logits.logsumexp(1).square() * (targets != IGNORE_INDEX)).sum()
    assert not result.z_loss_sum.requires_grad and abs(result.z_loss_sum - expected) <= 1e-6 * expected
    cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
    assert abs(result.cross_entropy_sum - cross_entropy) <= 1e-6 * expected
    result.cross_entropy_sum.backward()
    _, of_hidden, of_weight, _ = oracle((hidden, weight, targets), z_loss=0.3)
    assert relative_error(hidden.grad, of_hidden) <= 1e-5 and relative_error(weight.grad, of_weight) <= 1e-5


def test_gradients_accumulate_over_calls():
    hidden, weight, targets = make_inputs(22, 8, 31, torch.float32)
    for part in (slice(0, 4), slice(4, 22)):
        (linear_cross_entropy(hidden[part], weight, targets[part]).loss_sum * 0.25).backward()
    _, expected_hidden, expected_weight, _ = oracle((hidden, weight, targets), 0.25)
    assert relative_error(hidden.grad, expected_hidden) <= 1e-5
    assert relative_error(weight.grad, expected_weight) <= 1e-5


def test_a_graph_that_is_kept_gives_its_gradients_again():
    """Zero-bubble pipelines compute gradients of inputs and of weights in two passes."""
    hidden, weight, targets = make_inputs(11, 8, 31, torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets).loss_sum
    first = torch.autograd.grad(loss * 0.5, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss * 0.25, (hidden, weight))
    assert all(torch.equal(one, 2 * other) for one, other in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (hidden, weight))


def test_no_tokens():
    hidden, weight, targets = make_inputs(0, 8, 31, torch.bfloat16)
    result = linear_cross_entropy(hidden, weight, targets)
    result.loss_sum.backward()
    assert result.loss_sum == 0
    assert result.count == 0
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_unknown_backend():
    with pytest.raises(ValueError, match="'fast' is not one of auto, chunked, triton, triton-persistent"):
        linear_cross_entropy(*make_inputs(3, 8, 31, torch.float32), backend="fast")


def shared_vocabulary(ranks, dtype, backend, size, options, budget):
    """This rank's (loss, number of targets, gradients of the hidden states, the weight and the bias)."""
    hidden, weight, targets = make_inputs(TOKENS, HIDDEN, VOCAB, dtype, size=size)
    rows = VOCAB // ranks.world_size
    part = slice(ranks.rank * rows, (ranks.rank + 1) * rows)
    mine = weight.detach()[part].clone().requires_grad_()
    bias = make_bias(weight, options.get("bias"))
    options = options | {"bias": None if bias is None else bias.detach()[part].clone().requires_grad_()}
    with pytest.MonkeyPatch.context() as patch:  # these processes run other tests as well
        for name in ("logit_budget", "device_budget"):
            patch.setattr(kernel, name, lambda device: budget)
        result = linear_cross_entropy(hidden, mine, targets, vocab_group=dist.group.WORLD, backend=backend, **options)
    (result.loss_sum * 1.3008).backward()
    bias_grad = mine.grad[:0, 0] if bias is None else options["bias"].grad
    return result.loss_sum.detach(), result.count, hidden.grad, mine.grad, bias_grad


CASES = [
    *(("chunked", dtype, options, 4.0) for dtype in GRADIENT_TOLERANCE for options in ({}, OPTIONS["all"])),
    ("chunked", torch.float32, {}, 100.0),
    *(("triton", torch.bfloat16, options, 4.0) for options in ({}, OPTIONS["all"])),
    ("triton", torch.bfloat16, {}, 100.0),
]


@pytest.mark.parametrize(("backend", "dtype", "options", "size"), CASES)
@pytest.mark.parametrize("budget", [16 * 64 * 2 + 400, 2**20])
def test_vocabulary_shared_between_two_ranks(two_ranks, backend, dtype, options, size, budget):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("two ranks on the CPU need Triton's interpreter")
    results = two_ranks.run(shared_vocabulary, dtype, backend, size, options, budget)
    inputs = make_inputs(TOKENS, HIDDEN, VOCAB, dtype, size=size)
    expected, expected_hidden, expected_weight, expected_bias = oracle(inputs, 1.3008, **options)
    tolerance = GRADIENT_TOLERANCE[dtype]
    for loss, count, grad_hidden, *_ in results:
        assert abs(loss - expected.loss_sum) <= LOSS_TOLERANCE * expected.count
        assert count == expected.count
        assert relative_error(grad_hidden, expected_hidden) <= tolerance
    assert torch.equal(results[0][2], results[1][2])
    assert relative_error(torch.cat([result[3] for result in results]), expected_weight) <= tolerance
    if expected_bias is not None:
        assert relative_error(torch.cat([result[4] for result in results]), expected_bias) <= tolerance


def one_rank_has_a_wrong_target(ranks):
    hidden, weight, targets = make_inputs(6, 8, 16, torch.float32)
    targets[0] = 32
    return linear_cross_entropy(hidden, weight, targets, vocab_group=dist.group.WORLD).loss_sum.detach()


def test_target_beyond_the_shared_vocabulary_is_not_a_plausible_loss(two_ranks):
    for loss in two_ranks.run(one_rank_has_a_wrong_target):
        assert loss.isnan()
