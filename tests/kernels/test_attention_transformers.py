"""Attention with a soft cap and with sinks against the eager attention of transformers, for packed documents."""

import types
from importlib import import_module

import pytest
import torch
from torch import Tensor

from retemper.kernels.attention import attention

LENGTHS = [5, 1, 9, 2]
HEADS, KV_HEADS, HEAD_DIM, SCALE = 4, 2, 8, 0.4


def additive_mask(window: int | None) -> Tensor:
    """[T, T]: 0 where a token sees another one, else the lowest number, as transformers makes it."""
    document = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    place = torch.arange(len(document))
    distance = place[:, None] - place[None, :]
    visible = (document[:, None] == document[None, :]) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("family", "softcap"), [("gemma2", 1.5), ("gpt_oss", None)])
def test_equals_the_eager_attention_of_transformers(family, softcap, window):
    eager = import_module(f"transformers.models.{family}.modeling_{family}").eager_attention_forward
    generator = torch.Generator().manual_seed(3)
    shapes = [(sum(LENGTHS), heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    inputs = [torch.randn(shape, generator=generator) for shape in (*shapes, (HEADS,))]
    ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    sinks = ours[3] if family == "gpt_oss" else None
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    options = {"softmax_scale": SCALE, "window": window, "softcap": softcap, "sinks": sinks}
    actual = attention(*ours[:3], cu_seqlens, max(LENGTHS), **options)
    module = types.SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, training=True, sinks=theirs[3])
    q, k, v = (x.transpose(0, 1)[None] for x in theirs[:3])
    expected = eager(module, q, k, v, additive_mask(window), scaling=SCALE, softcap=softcap)[0][0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(actual.shape, generator=generator)
    actual.backward(upstream)
    expected.backward(upstream)
    for one, other in zip(ours[: 3 if sinks is None else 4], theirs, strict=False):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=2e-6)
