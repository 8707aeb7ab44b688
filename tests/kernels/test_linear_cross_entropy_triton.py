"""The Triton linear cross-entropy on a GPU, or through Triton's interpreter with tiles of 16 x 32 (see conftest.py)."""

import subprocess
import sys

import pytest
import torch
from linear_cross_entropy_cases import (
    GRADIENT_TOLERANCE,
    OPTIONS,
    check,
    make_inputs,
    oracle,
    relative_error,
)
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.kernels import linear_cross_entropy as kernel
from retemper.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the pass that is done again

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = GRADIENT_TOLERANCE[torch.bfloat16]


def inputs_of(num_tokens: int, hidden: int, vocab: int, **settings):
    return make_inputs(num_tokens, hidden, vocab, torch.bfloat16, device=DEVICE, **settings)


# One tile, several tiles, a vocabulary and tokens that are no multiple of a tile, hidden sizes that are none either.
@pytest.mark.parametrize(("num_tokens", "hidden", "vocab"), [(16, 16, 32), (1, 16, 70), (37, 32, 97), (33, 20, 129)])
def test_equals_float64(num_tokens, hidden, vocab):
    check(inputs_of(num_tokens, hidden, vocab, size=2.0), 1.3008, backend="triton")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_equal_float64(options):
    check(inputs_of(37, 32, 97, size=4.0), backend="triton", **options)


def test_chunks(monkeypatch):
    """16 rows at a time, the last chunk smaller."""
    monkeypatch.setattr(kernel, "TRITON_LOGIT_BYTES", 1)
    check(inputs_of(37, 32, 97), backend="triton")


class LargestMatrix(TorchDispatchMode):
    """Remembers the bytes of the largest bf16 storage that any operator returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.bfloat16:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def test_memory_promise(monkeypatch):
    """Two blocks of rows and a bit, with a budget for one."""
    from retemper.kernels.linear_cross_entropy.triton_kernels import _tiles_for

    tiles = _tiles_for(torch.device(DEVICE))
    vocab = 4 * tiles.columns
    budget = tiles.rows * (2 * vocab + 2 * 4 * 4)
    monkeypatch.setattr(kernel, "TRITON_LOGIT_BYTES", budget)
    with LargestMatrix() as largest:
        check(inputs_of(2 * tiles.rows + 5, 16, vocab), backend="triton")
    assert tiles.rows * vocab * 2 <= largest.bytes <= budget


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits_take_the_second_pass(sign):
    """Some rows with all logits near +-250, where exp(z) is inf or 0, in one block of rows."""
    hidden, weight, targets = inputs_of(40, 32, 97)
    with torch.no_grad():
        weight[:, 0] = 1.0
        hidden[3:6, 0] = sign * 250.0
    check((hidden, weight, targets), backend="triton")


def test_sharp_rows():
    """Logits of standard deviation 20: the largest is far from the rest, on either side of the safe range."""
    inputs = inputs_of(40, 32, 97, size=20.0)
    largest = (inputs[0] @ inputs[1].t()).amax(1).abs()
    assert 0 < (largest > 60).sum() < 40
    check(inputs, backend="triton")


def test_all_targets_ignored():
    hidden, weight, targets = inputs_of(9, 16, 31)
    result = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE_INDEX), backend="triton")
    result.loss_sum.backward()
    assert result.loss_sum == 0
    assert result.count == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("needs", ["hidden", "weight", "neither"])
def test_partial_gradients(needs):
    hidden, weight, targets = inputs_of(20, 16, 50)
    expected, expected_hidden, expected_weight, _ = oracle((hidden, weight, targets))
    hidden.requires_grad_(needs == "hidden")
    weight.requires_grad_(needs == "weight")
    loss = linear_cross_entropy(hidden, weight, targets, backend="triton").loss_sum
    assert abs(loss.item() - expected.loss_sum.item()) <= 1e-4
    assert loss.requires_grad == (needs != "neither")
    if loss.requires_grad:
        loss.backward()
        value, wanted = (hidden, expected_hidden) if needs == "hidden" else (weight, expected_weight)
        assert relative_error(value.grad, wanted) <= TOLERANCE
        assert (weight if needs == "hidden" else hidden).grad is None


def test_same_bits_every_time():
    runs = []
    for _ in range(2):
        hidden, weight, targets = inputs_of(37, 32, 97)
        loss = linear_cross_entropy(hidden, weight, targets, backend="triton").loss_sum
        loss.backward()
        runs.append((loss.detach(), hidden.grad, weight.grad))
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_fp32_inputs_are_refused():
    inputs = make_inputs(3, 16, 31, torch.float32, device=DEVICE)
    with pytest.raises(ValueError, match="backend 'triton' cannot be used"):
        linear_cross_entropy(*inputs, backend="triton")
    check(inputs, backend="auto")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from retemper.kernels.linear_cross_entropy.triton_kernels import _exponentials_kernel

types = dict(zip(_exponentials_kernel.arg_names, "bf16 bf16 fp32 i64 fp32 i32 bf16 fp32 fp32 fp32".split()))
types = {name: "*" + kind for name, kind in types.items()}
types |= {"num_tokens": "i32", "num_rows": "i32", "exponentials_stride": "i32", "cap": "fp32", "logit_scale": "fp32"}
constants = dict.fromkeys(("BIAS", "SCALE", "SOFTCAP", "STORE", "SECOND"), True)
constants |= dict(WIDTH=72, INTERPRETED=False, ROWS=64, COLUMNS=64, DEPTH=32)
source = ASTSource(_exponentials_kernel, types | dict.fromkeys(constants, "constexpr"), constexprs=constants)
assert "wgmma" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
"""


def test_compiles_for_hopper(monkeypatch, tmp_path):
    """The interpreter accepts what the compiler does not."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    subprocess.run([sys.executable, "-c", COMPILE], check=True, timeout=200)
