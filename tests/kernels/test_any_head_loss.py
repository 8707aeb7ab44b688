"""The chunked cross-entropy of any head against float64 logits of all tokens at once."""

import functools

import pytest
import torch
import torch.nn.functional as F
from linear_cross_entropy_cases import GRADIENT_TOLERANCE, make_inputs, peak_bytes, relative_error
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from retemper.kernels.linear_cross_entropy import IGNORE_INDEX
from retemper.kernels.linear_cross_entropy.any_head import BYTES_PER_LOGIT, chunked_cross_entropy

TOKENS, HIDDEN, VOCAB = 37, 16, 97


class TwoLayerHead(nn.Module):
    """A head that is not linear in the hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN)
        self.decoder = nn.Linear(HIDDEN, VOCAB)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.dense(hidden_TH))))


def make_head(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(5)
    return TwoLayerHead().to(dtype)


def expected_loss(head: nn.Module, hidden: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    logits = head(hidden)
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss + z_loss * (torch.logsumexp(logits, 1).square() * (targets != IGNORE_INDEX)).sum()


@pytest.mark.parametrize("rows", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_all_gradients_equal_whole_logits(dtype, z_loss, rows):
    hidden, _, targets = make_inputs(TOKENS, HIDDEN, VOCAB, dtype, size=3.0)
    head, doubled = make_head(dtype), make_head(dtype).double()
    expected_hidden = hidden.detach().double().requires_grad_()
    expected = expected_loss(doubled, expected_hidden, targets, z_loss)
    (expected * 1.3008).backward()
    budget = rows * VOCAB * BYTES_PER_LOGIT
    result = chunked_cross_entropy(head, hidden, targets, VOCAB, z_loss=z_loss, budget=budget)
    (result.loss_sum * 1.3008).backward()
    assert result.loss_sum.dtype == torch.float32
    assert result.count == (targets != IGNORE_INDEX).sum()
    assert abs(result.loss_sum.item() - expected.item()) <= 1e-6 * expected.item()
    assert relative_error(hidden.grad, expected_hidden.grad) <= 1e-5
    for (name, actual), wanted in zip(head.named_parameters(), doubled.parameters(), strict=True):
        assert relative_error(actual.grad, wanted.grad) <= 1e-5, name


def test_bf16_logits_are_not_summed_in_bf16():
    hidden, weight, targets = make_inputs(TOKENS, 64, 1031, torch.bfloat16, size=2.0)
    chunked_cross_entropy(lambda x: x @ weight.t(), hidden, targets, 1031).loss_sum.backward()
    doubles = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = doubles[0] @ doubles[1].t()
    F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum").backward()
    # The logits themselves are bf16 here, which is up to the head.
    assert relative_error(hidden.grad, doubles[0].grad) <= 2 * GRADIENT_TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_promise(dtype):
    """Never more than a chunk of logits exists, in the forward and in the backward pass."""
    num_tokens, hidden_size, vocab, rows = 1024, 2, 4096, 32
    hidden, weight, targets = make_inputs(num_tokens, hidden_size, vocab, dtype)
    budget = rows * vocab * BYTES_PER_LOGIT
    with torch.profiler.profile(profile_memory=True) as profile:
        head = functools.partial(F.linear, weight=weight)
        chunked_cross_entropy(head, hidden, targets, vocab, budget=budget).loss_sum.backward()
    weights = vocab * hidden_size * 4 * 4
    assert budget * 0.9 <= peak_bytes(profile) <= budget * 1.05 + weights


def test_no_grad_gives_the_same_loss():
    hidden, weight, targets = make_inputs(TOKENS, HIDDEN, VOCAB, torch.float32)
    head = functools.partial(F.linear, weight=weight)
    with torch.no_grad():
        loss = chunked_cross_entropy(head, hidden, targets, VOCAB).loss_sum
    assert not loss.requires_grad
    assert torch.equal(loss, chunked_cross_entropy(head, hidden, targets, VOCAB).loss_sum.detach())


@pytest.mark.parametrize("wrong", [VOCAB, -1])
def test_a_wrong_target_is_not_a_plausible_loss(wrong):
    hidden, weight, targets = make_inputs(TOKENS, HIDDEN, VOCAB, torch.float32)
    targets[0] = wrong
    assert chunked_cross_entropy(functools.partial(F.linear, weight=weight), hidden, targets, VOCAB).loss_sum.isnan()


def test_no_tokens():
    hidden, weight, targets = make_inputs(0, HIDDEN, VOCAB, torch.float32)
    result = chunked_cross_entropy(functools.partial(F.linear, weight=weight), hidden, targets, VOCAB)
    result.loss_sum.backward()
    assert result.loss_sum == 0
    assert torch.equal(weight.grad, torch.zeros_like(weight))


class Whole(nn.Module):
    """A model whose head is not a module of its own for FSDP: its parameters are gathered with all others."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(HIDDEN, HIDDEN), make_head(torch.float32)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        budget = 5 * VOCAB * BYTES_PER_LOGIT
        return chunked_cross_entropy(self.head, self.body(hidden), targets, VOCAB, budget=budget).loss_sum


def sharded_gradients(ranks) -> dict[str, Tensor]:
    torch.manual_seed(5)
    model = Whole()
    fully_shard(model.body)
    fully_shard(model, reshard_after_forward=True)
    hidden, _, targets = make_inputs(TOKENS, HIDDEN, VOCAB, torch.float32, seed=ranks.rank)
    model(hidden.detach(), targets).backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def test_gradients_of_a_sharded_head(two_ranks):
    """Each rank has its own tokens, and FSDP averages: the gradients are half of those of all tokens in one process."""
    torch.manual_seed(5)
    model = Whole().double()
    for rank in range(2):
        hidden, _, targets = make_inputs(TOKENS, HIDDEN, VOCAB, torch.float32, seed=rank)
        expected_loss(model.head, model.body(hidden.detach().double()), targets, 0.0).backward()
    for gradients in two_ranks.run(sharded_gradients):
        for name, parameter in model.named_parameters():
            assert relative_error(2 * gradients[name], parameter.grad) <= 1e-5, name
