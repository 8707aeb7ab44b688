"""The Triton linear cross-entropy on a GPU, or through Triton's interpreter with tiles of 16 x 32 (see conftest.py).

Where there is a GPU, all tests have the mark ``gpu``: pytest.mark.gpu selects them.
"""

import itertools

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

pytestmark = [pytest.mark.filterwarnings("ignore:overflow encountered in exp")]  # the pass that is done again
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)

triton_kernels = pytest.importorskip("retemper.kernels.linear_cross_entropy.triton_kernels", exc_type=ImportError)
triton_loss = pytest.importorskip("retemper.kernels.linear_cross_entropy.triton_loss", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = GRADIENT_TOLERANCE[torch.bfloat16]
PERSISTENT = triton_kernels.has_descriptors(torch.device(DEVICE))
BACKENDS = ("triton", *(["triton-persistent"] if PERSISTENT else []))
TILES = triton_kernels.tiles_for(torch.device(DEVICE), PERSISTENT)


def inputs_of(num_tokens: int, hidden: int, vocab: int, **settings):
    return make_inputs(num_tokens, hidden, vocab, torch.bfloat16, device=DEVICE, **settings)


# One tile, several tiles, a vocabulary and tokens that are no multiple of a tile, hidden sizes that are none either.
SIZES = [(16, 16, 32), (1, 16, 70), (37, 32, 97), (33, 24, 129), (50, 72, 200)]
if DEVICE == "cuda":
    # Tiles are larger there, and there are more of them than multiprocessors. Each size compiles four kernels.
    SIZES = [(1, 16, 70), (37, 32, 97), (50, 72, 200), (300, 200, 1000), (1000, 904, 50_003)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_tokens", "hidden", "vocab"), SIZES)
def test_equals_float64(num_tokens, hidden, vocab, backend):
    check(inputs_of(num_tokens, hidden, vocab, size=2.0), 1.3008, backend=backend)


def test_rows_that_descriptors_cannot_read():
    """40 bytes are no multiple of 16: the kernel that reads through pointers computes them."""
    inputs = inputs_of(33, 20, 129, size=2.0)
    with pytest.raises(ValueError, match="'triton-persistent' cannot be used"):
        linear_cross_entropy(*inputs, backend="triton-persistent")
    check(inputs, 1.3008, backend="triton")


def test_a_matrix_that_begins_between_two_multiples_of_16_bytes():
    hidden, weight, targets = inputs_of(33, 24, 129)
    with torch.no_grad():
        moved = torch.empty(hidden.numel() + 1, dtype=hidden.dtype, device=DEVICE)[1:].view_as(hidden).copy_(hidden)
    assert kernel.backend_refusal("triton-persistent", moved, weight) is not None
    check((moved.requires_grad_(), weight, targets), backend="triton")


WITH_OPTIONS = list(itertools.product(OPTIONS, BACKENDS))
if DEVICE == "cuda":
    # Two kernels are compiled for each, and the time on a GPU is short.
    WITH_OPTIONS = [one for one in WITH_OPTIONS if one[1] == BACKENDS[-1] or one[0] == "all"]


@pytest.mark.parametrize(("name", "backend"), WITH_OPTIONS)
def test_options_equal_float64(name, backend):
    check(inputs_of(37, 32, 97, size=4.0), backend=backend, **OPTIONS[name])


def test_chunks(monkeypatch):
    """One block of rows at a time, the last chunk smaller."""
    monkeypatch.setattr(kernel, "device_budget", lambda device: 1)
    check(inputs_of(2 * TILES.rows + 5, 32, 97), backend="triton", bias=0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_row_blocks(monkeypatch, backend):
    """More blocks of rows than go through all columns together."""
    monkeypatch.setattr(triton_kernels, "GROUP_BYTES", 0)
    check(inputs_of(9 * TILES.rows + 1, 16, 97), backend=backend)


@pytest.mark.skipif(DEVICE == "cuda", reason="all tests on a GPU have its tiles")
@pytest.mark.parametrize("name", ["DESCRIPTOR_TILES", "POINTER_TILES", "SMALL_TILES"])
def test_the_tiles_of_gpus(monkeypatch, name):
    """Interpreted: several blocks of rows, one of them far, and more tiles than programs."""
    monkeypatch.setattr(triton_kernels, "INTERPRETER_TILES", getattr(triton_kernels, name))
    hidden, weight, targets = inputs_of(300, 136, 600)
    with torch.no_grad():
        weight[:, 0] = 1.0
        hidden[130, 0] = 250.0
    check((hidden, weight, targets), backend="triton-persistent" if name == "DESCRIPTOR_TILES" else "triton")


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
    vocab = 4 * TILES.columns
    budget = TILES.rows * (2 * vocab + 2 * 4 * 4)
    monkeypatch.setattr(kernel, "device_budget", lambda device: budget)
    with LargestMatrix() as largest:
        check(inputs_of(2 * TILES.rows + 5, 16, vocab), backend="triton")
    assert TILES.rows * vocab * 2 <= largest.bytes <= budget


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits_take_the_second_pass(sign, backend):
    """Some rows with all logits near +-250, where exp(z) is inf or 0, in one block of rows."""
    hidden, weight, targets = inputs_of(3 * TILES.rows, 32, 97)
    with torch.no_grad():
        weight[:, 0] = 1.0
        hidden[TILES.rows + 3 : TILES.rows + 6, 0] = sign * 250.0
    check((hidden, weight, targets), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"bias": 0.5, "logit_scale": -1.7, "z_loss": 0.01}], ids=["plain", "options"])
def test_sharp_rows(backend, options):
    """Logits of standard deviation 20: the largest is far from the rest, on either side of the safe range."""
    inputs = inputs_of(40, 32, 97, size=20.0)
    largest = (inputs[0] @ inputs[1].t()).amax(1).abs()
    assert 0 < (largest > 60).sum() < 40
    check(inputs, backend=backend, **options)


@pytest.mark.parametrize("far_rows", [{}, {0: 61.0}, {5: -70.0, 6: 90.0, 40: -61.0}, dict.fromkeys(range(41), 99.0)])
def test_the_list_of_far_blocks(far_rows):
    """Blocks of 16 rows, the last one not full."""
    largest = torch.tensor([far_rows.get(row, 3.0) for row in range(41)], device=DEVICE)
    far = triton_loss.far_blocks(largest, 16)
    expected = sorted({row // 16 for row in far_rows})
    assert far.num_blocks.tolist() == [len(expected)]
    assert far.blocks[: len(expected)].tolist() == expected
    shifted = [row // 16 in expected for row in range(41)]
    assert far.shift_T.tolist() == [x if is_far else 0.0 for x, is_far in zip(largest.tolist(), shifted, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_second_launch_writes_far_blocks_only(backend):
    """All other results keep the value that they had, and few programs are started."""
    hidden, weight, _ = (x.detach() for x in inputs_of(3 * TILES.rows, 32, 2 * TILES.columns))
    persistent = backend == "triton-persistent"
    tiles = triton_kernels.tiles_for(hidden.device, persistent)
    largest = torch.zeros(len(hidden), device=DEVICE)
    for far_row in (None, tiles.rows + 1):
        if far_row is not None:
            largest[far_row] = 61.0
        far = triton_loss.far_blocks(largest, tiles.rows)
        shape = -(-weight.shape[0] // tiles.columns), len(hidden)
        exponentials = torch.full((len(hidden), weight.shape[0]), -1.0, dtype=torch.bfloat16, device=DEVICE)
        buffers = triton_kernels.Buffers(exponentials, *(torch.full(shape, -1.0, device=DEVICE) for _ in range(2)))
        triton_kernels.launch_exponentials(
            hidden, triton_kernels.Head(weight, None), buffers, kernel.Options(), tiles, persistent, far
        )
        written = torch.zeros(len(hidden), dtype=torch.bool, device=DEVICE)
        if far_row is not None:
            written[tiles.rows : 2 * tiles.rows] = True
        assert torch.equal((exponentials != -1.0).all(1), written)
        assert torch.equal((exponentials == -1.0).all(1), ~written)
        assert torch.equal((buffers.sums_CT != -1.0).all(0), written)
        assert (buffers.maxima_CT == -1.0).all()


def test_all_targets_ignored():
    hidden, weight, targets = inputs_of(9, 16, 31)
    result = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE_INDEX), backend="triton")
    result.loss_sum.backward()
    assert result.loss_sum == 0
    assert result.count == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", ["hidden", "weight", "neither"])
def test_partial_gradients(needs, backend):
    hidden, weight, targets = inputs_of(20, 16, 50)
    expected, expected_hidden, expected_weight, _ = oracle((hidden, weight, targets))
    hidden.requires_grad_(needs == "hidden")
    weight.requires_grad_(needs == "weight")
    loss = linear_cross_entropy(hidden, weight, targets, backend=backend).loss_sum
    assert abs(loss.item() - expected.loss_sum.item()) <= 1e-4
    assert loss.requires_grad == (needs != "neither")
    if loss.requires_grad:
        loss.backward()
        value, wanted = (hidden, expected_hidden) if needs == "hidden" else (weight, expected_weight)
        assert relative_error(value.grad, wanted) <= TOLERANCE
        assert (weight if needs == "hidden" else hidden).grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    runs = []
    for _ in range(2):
        hidden, weight, targets = inputs_of(3 * TILES.rows + 5, 32, 97, size=12.0)
        loss = linear_cross_entropy(hidden, weight, targets, backend=backend).loss_sum
        loss.backward()
        runs.append((loss.detach(), hidden.grad, weight.grad))
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_fp32_inputs_are_refused():
    inputs = make_inputs(3, 16, 31, torch.float32, device=DEVICE)
    for backend in ("triton", "triton-persistent"):
        with pytest.raises(ValueError, match=f"backend '{backend}' cannot be used"):
            linear_cross_entropy(*inputs, backend=backend)
    check(inputs, backend="auto")
