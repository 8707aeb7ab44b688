"""Which backend of the linear cross-entropy a GPU gets, its memory, and that its host side does not wait."""

from types import SimpleNamespace

import pytest
import torch
from linear_cross_entropy_cases import make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.kernels import linear_cross_entropy as kernel
from retemper.kernels.linear_cross_entropy import LARGEST_TRITON_BUDGET, chunked, rows, self_check, triton_budget

triton_kernels = pytest.importorskip("retemper.kernels.linear_cross_entropy.triton_kernels", exc_type=ImportError)
triton_loss = pytest.importorskip("retemper.kernels.linear_cross_entropy.triton_loss", exc_type=ImportError)

GiB = 2**30


class Gpu:
    """Matrices on a GPU that does not exist."""

    def __init__(self, monkeypatch, capability=(9, 0), memory=139.7, hip=None):
        properties = SimpleNamespace(total_memory=int(memory * GiB), multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.version, "hip", hip)

    def matrix(self, width=896, dtype=torch.bfloat16, address=4096):
        cuda = torch.device("cuda")
        return SimpleNamespace(is_cuda=True, device=cuda, dtype=dtype, shape=(64, width), data_ptr=lambda: address)


@pytest.mark.parametrize(
    ("gpu", "matrix", "expected"),
    [
        ({}, {}, "persistent"),
        ({"capability": (10, 0)}, {}, "persistent"),
        ({"capability": (8, 0)}, {}, "pointers"),
        ({"capability": (12, 0)}, {}, "pointers"),  # too little shared memory
        ({"capability": (9, 4), "hip": "6.4"}, {}, "pointers"),  # AMD
        ({"capability": (9, 0), "hip": "6.4"}, {}, "pointers"),
        ({}, {"width": 900}, "pointers"),
        ({}, {"address": 4098}, "pointers"),
        ({}, {"dtype": torch.float32}, "pytorch"),
    ],
)
def test_the_default_of_a_gpu(monkeypatch, gpu, matrix, expected):
    hidden = Gpu(monkeypatch, **gpu).matrix(**matrix)
    monkeypatch.setattr(self_check, "persistent_problem", lambda device, width: None)
    chosen = kernel._choose("auto", hidden, hidden)
    if expected == "pytorch":
        assert chosen.func is chunked.compute
    else:
        assert chosen.func is triton_loss.compute
        assert chosen.keywords == {"budget": LARGEST_TRITON_BUDGET, "persistent": expected == "persistent"}


def test_a_forced_backend_names_the_one_that_can(monkeypatch):
    gpu = Gpu(monkeypatch, capability=(8, 0))
    with pytest.raises(ValueError, match=r"'triton-persistent' cannot be used: .*use 'triton'"):
        kernel._choose("triton-persistent", gpu.matrix(), gpu.matrix())
    with pytest.raises(ValueError, match=r"'triton' cannot be used: .*use 'chunked'"):
        kernel._choose("triton", gpu.matrix(dtype=torch.float32), gpu.matrix(dtype=torch.float32))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
def test_tiles_fit_the_shared_memory(monkeypatch, capability):
    """A tile's operands, once for each stage, in what a CTA can have (CUDA C++ Programming Guide)."""
    gpu = Gpu(monkeypatch, capability)
    most = {(8, 0): 163, (8, 6): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}[capability] * 1024
    for persistent in (False, True) if triton_kernels.has_descriptors(gpu.matrix().device) else (False,):
        tiles = triton_kernels.tiles_for(gpu.matrix().device, persistent)
        operands = 2 * (tiles.rows + tiles.columns) * tiles.depth * tiles.num_stages
        staged = 2 * tiles.rows * tiles.columns // tiles.parts if persistent else 0
        assert operands + staged + 1024 <= most


def test_the_budget_of_a_gpus_memory():
    assert triton_budget(int(139.7 * GiB)) == LARGEST_TRITON_BUDGET == 5 * GiB
    assert 3.9 * GiB < triton_budget(int(79.1 * GiB)) < 4 * GiB
    assert 1.1 * GiB < triton_budget(int(23.6 * GiB)) < 1.2 * GiB
    budgets = [triton_budget(memory * GiB) for memory in range(1, 300)]
    assert budgets == sorted(budgets)


@pytest.mark.parametrize(
    ("memory", "num_tokens", "vocab", "expected"),
    [
        (139.7, 8192, 151936, 1),
        (139.7, 16384, 151936, 1),
        (139.7, 16384, 152064, 1),
        (79.1, 8192, 152064, 1),
        (79.1, 16384, 151936, 2),
        (23.6, 8192, 151936, 2),
    ],
)
def test_chunks_of_real_models(memory, num_tokens, vocab, expected):
    tiles = triton_kernels.DESCRIPTOR_TILES
    size = triton_loss.rows_per_chunk(triton_budget(int(memory * GiB)), vocab, tiles, True)
    assert len(rows.chunks(num_tokens, size, tiles.rows)) == expected


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_host_does_not_wait(monkeypatch):
    """No operator whose result or shape depends on values; and few of them, because each is a launch."""
    hidden, weight, targets = make_inputs(48, 32, 97, torch.bfloat16, size=20.0)
    for name in ("launch_exponentials", "target_products"):
        # The interpreter copies its arguments; a GPU's launch is no operator.
        monkeypatch.setattr(triton_loss, name, lambda *_: torch.ones(48))
    with Operators() as operators:
        kernel.linear_cross_entropy(hidden, weight, targets, backend="triton").loss_sum.backward()
    waiting = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique", "index"}
    assert not waiting & set(operators.names)
    assert len(operators.names) < 110
