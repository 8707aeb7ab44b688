"""A GPU's code paths on tensors without values."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from retemper.kernels.attention import AttentionPlan, attention
from retemper.tools.planning.gpu_paths import attention_options, read_no_values
from retemper.tools.planning.memory import MemoryCounter


def test_attention_with_options_is_as_small_as_a_kernels():
    """A soft cap and sinks, of kernels that do not store scores, which would be 64 MiB here."""
    with FakeTensorMode(), attention_options():
        q, k, v = (torch.empty(2048, heads, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
        sinks = torch.empty(4, requires_grad=True)
        offsets = torch.empty(2, dtype=torch.int32)
        counter = MemoryCounter()
        with counter:
            output = attention(q, k, v, offsets, 2048, softcap=50.0, sinks=sinks, plan=AttentionPlan("varlen"))
            output.sum().backward()
        assert output.shape == (2048, 4, 16)
        assert sinks.grad.shape == (4,)
        assert sum(max(kinds.values()) for kinds in counter.most.values()) < 4 * 2**20
    with pytest.raises(ValueError, match="varlen has no softcap"):
        attention(*(torch.empty(4, 2, 8) for _ in range(3)), offsets, 4, softcap=1.0, plan=AttentionPlan("varlen"))


@pytest.mark.parametrize("votes", [True, False], ids=["torch 2.13", "torch 2.11"])
def test_stages_without_values_need_no_vote(votes):
    """Since PyTorch 2.13 they vote whether their shapes are fixed."""
    schedule = SimpleNamespace(_warmup_p2p=None) if votes else SimpleNamespace()
    pipelined = SimpleNamespace(_schedule=schedule, _batches=["first", "second"])
    read_no_values(pipelined)
    assert pipelined.batch_of(1) == "first"
    assert hasattr(schedule, "_warmup_p2p") is votes
