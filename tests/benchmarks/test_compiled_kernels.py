"""benchmarks/compiled_kernels.py: what the machine code of the Triton kernels needs, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

compiling = pytest.importorskip("retemper.benchmarks.kernel.compiling", exc_type=ImportError)
MOST_SHARED_BYTES = 227 * 1024
"""What a CTA can have on compute capability 9.0 (CUDA C++ Programming Guide)."""
FIRST = "persistent, qwen2.5-0.5b 896 x 151936, first"


def compiled(folder, *options):
    """The rows of the command. In a process of its own, because these tests run Triton's interpreter."""
    path = folder / "compiled.json"
    script = Path(__file__).parents[2] / "benchmarks" / "compiled_kernels.py"
    command = [sys.executable, str(script), "--json", str(path), *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=900).stdout
    rows = json.loads(path.read_text())["rows"]
    assert all(row["name"] in printed for row in rows)
    return {row["name"]: row for row in rows}


def require_sound(row):
    assert row["stack_bytes"] == 0
    assert row["shared_bytes"] <= MOST_SHARED_BYTES
    assert row["ctas_per_sm"] >= 1
    instructions = row["instructions"]
    if "persistent" in row["name"]:
        # Loads by descriptor only, products that run while the loop goes on, and 128 exponentials of each thread.
        assert instructions["UTMALDG"] > 0 and "LDGSTS" not in instructions and "HMMA" not in instructions
        assert instructions["HGMMA"] > 0 and row["pending_products"] > 0
        assert ("evaluation" in row["name"]) != ("UTMASTG" in instructions)


def test_a_large_and_a_small_kernel(tmp_path):
    rows = compiled(tmp_path, "--kernels", FIRST, "target products, 896")
    assert len(rows) == 2
    for row in rows.values():
        require_sound(row)
    exponentials, products = rows.values()
    assert exponentials["instructions"]["MUFU"] < 128 + 16
    assert products["ctas_per_sm"] == 16


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_every_variant_of_hopper(tmp_path):
    rows = compiled(tmp_path)
    assert len(rows) == 25
    for row in rows.values():
        require_sound(row)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "100", "120"])
def test_other_gpus(capability, tmp_path):
    most = {"80": 163, "100": 227, "120": 99}[capability] * 1024
    for row in compiled(tmp_path, "--capability", capability, "--kernels", "qwen2.5-7b").values():
        assert row["stack_bytes"] == 0 and row["shared_bytes"] <= most


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "num_warps", "expected"),
    [
        (216, 147_456, 8, 1),  # registers and shared memory both allow one
        (128, 100_000, 8, 2),
        (128, 120_000, 8, 1),
        (168, 115_224, 4, 2),
        (32, 16, 4, 16),  # 64 warps
    ],
)
def test_ctas_of_a_multiprocessor(registers, shared_bytes, num_warps, expected):
    assert compiling.ctas_per_sm(registers, shared_bytes, num_warps, 90) == expected


def test_unknown_kernels(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as failure:
        compiled(tmp_path, "--kernels", "softmax")
    assert "--kernels softmax" in failure.value.stderr
