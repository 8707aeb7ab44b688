"""The exchange of heads and tokens around attention: values and gradients are those of one process."""

import pytest
import torch
import torch.distributed as dist
from oracles.packed_attention import explicit_attention
from torch import Tensor

from retemper.engine.parallel import context
from retemper.kernels.attention import attention

LENGTHS = [5, 1, 8, 2]
"""Documents that extend over ranks; 16 tokens, divided among 2 or 4 ranks."""
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "larger values": {"value_head_dim": 12},
    "all": {"softcap": 1.5, "sinks": True, "value_head_dim": 4, "window": 3},
}


def make_inputs(heads: int, kv_heads: int, value_head_dim: int = 8) -> list[Tensor]:
    """Queries, keys, values, sinks and an upstream gradient of all tokens, in float64."""
    generator = torch.Generator().manual_seed(3)
    tokens = sum(LENGTHS)
    shapes = [(tokens, heads, 8), (tokens, kv_heads, 8), (tokens, kv_heads, value_head_dim), (heads,)]
    shapes.append((tokens, heads, value_head_dim))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


class OneAttention:
    """All that ``context.apply`` needs of a model."""

    def __init__(self) -> None:
        self.attend = attention

    def wrap_attention(self, wrap) -> None:
        self.attend = wrap(self.attend)


def attend_on_ranks(ranks, heads, kv_heads, options):
    """This rank's output, gradients of its queries, keys and values, and its part of the gradient of the sinks."""
    options = dict(options)
    *inputs, upstream = make_inputs(heads, kv_heads, options.pop("value_head_dim", 8))
    q, k, v = (x.chunk(ranks.world_size)[ranks.rank].clone().requires_grad_() for x in inputs[:3])
    sinks = inputs[3].requires_grad_() if options.pop("sinks", False) else None
    model = OneAttention()
    context.apply(model, dist.group.WORLD, "heads")
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    output = model.attend(q, k, v, offsets, max(LENGTHS), sinks=sinks, **options)
    output.backward(upstream.chunk(ranks.world_size)[ranks.rank])
    return output.detach(), q.grad, k.grad, v.grad, None if sinks is None else sinks.grad


def check(results, heads, kv_heads, options):
    options = dict(options)
    *inputs, upstream = make_inputs(heads, kv_heads, options.pop("value_head_dim", 8))
    q, k, v, sinks = (x.requires_grad_() for x in inputs)
    with_sinks = sinks if options.pop("sinks", False) else None
    window, softcap = options.get("window"), options.get("softcap")
    expected = explicit_attention(q, k, v, LENGTHS, window, None, softcap, with_sinks)
    expected.backward(upstream)
    outputs, *gradients = zip(*results, strict=True)
    torch.testing.assert_close(torch.cat(outputs), expected.detach(), rtol=1e-12, atol=1e-12)
    for actual, wanted in zip(gradients[:3], (q, k, v), strict=True):
        torch.testing.assert_close(torch.cat(actual), wanted.grad, rtol=1e-12, atol=1e-12)
    if with_sinks is not None:
        torch.testing.assert_close(sum(gradients[3]), sinks.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_two_ranks_equal_one_process(two_ranks, heads, kv_heads, options):
    check(two_ranks.run(attend_on_ranks, heads, kv_heads, options), heads, kv_heads, options)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]])
def test_more_ranks_than_key_heads(four_ranks, options):
    check(four_ranks.run(attend_on_ranks, 8, 2, options), 8, 2, options)
