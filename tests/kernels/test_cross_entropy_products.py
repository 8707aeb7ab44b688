"""The fp32 products of the linear cross-entropy."""

import pytest
import torch
from linear_cross_entropy_cases import relative_error

from retemper.kernels.linear_cross_entropy import rows


def factors(rows_of_a, dtype):
    generator = torch.Generator().manual_seed(rows_of_a)
    return (
        torch.randn(rows_of_a, 24, generator=generator).to(dtype).t(),  # transposed, as exponentials are
        torch.randn(rows_of_a, 16, generator=generator).to(dtype),
    )


@pytest.fixture
def baddbmm_on_a_cpu():
    """Give the operator of a GPU an implementation for CPUs, that rounds as the definition says: in fp32, once."""
    calls = []

    def compute(self, batch1, batch2, out_dtype, *, beta=1, alpha=1, out):
        assert out_dtype == torch.float32 and (beta, alpha) == (1, 1)
        assert batch1.dtype == batch2.dtype == torch.bfloat16
        calls.append((self.data_ptr(), out.data_ptr()))
        return out.copy_(self.double() + torch.bmm(batch1.double(), batch2.double()))

    library = torch.library.Library("aten", "IMPL")
    library.impl("baddbmm.dtype_out", compute, "CPU")
    yield calls
    library._destroy()


def test_a_gpu_adds_in_place(baddbmm_on_a_cpu):
    """By one operator that reads and writes the fp32 total, without another tensor of its size."""
    total = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    a, b = factors(7, torch.bfloat16)
    expected = total.double() + a.double() @ b.double()
    result = rows.add_product_in_place(total, a, b)
    assert result is total
    assert baddbmm_on_a_cpu == [(total.data_ptr(), total.data_ptr())]
    assert relative_error(total, expected) <= 1e-6


@pytest.mark.gpu
def test_a_gpu_adds_in_place_in_fp32():
    """In every version of PyTorch, and as exactly as a first product."""
    total = torch.zeros(24, 16, device="cuda")
    expected = torch.zeros(24, 16, dtype=torch.float64, device="cuda")
    for number in (2000, 333, 1):
        a, b = (x.to("cuda") for x in factors(number, torch.bfloat16))
        rows.add_product(total.clone(), a, b)  # cuBLAS allocates its workspace once
        before = torch.cuda.memory_allocated()
        assert rows.add_product(total, a, b) is total
        assert torch.cuda.memory_allocated() == before
        expected += a.double() @ b.double()
    assert relative_error(total, expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_add_up(dtype):
    total, expected = None, torch.zeros(24, 16, dtype=torch.float64)
    for number in (7, 3, 1):
        a, b = factors(number, dtype)
        total = rows.add_product(total, a, b)
        expected += a.double() @ b.double()
    assert total.dtype == torch.float32
    assert relative_error(total, expected) <= 1e-6
