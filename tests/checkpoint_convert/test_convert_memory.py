"""Memory does not grow with the model. The input is sparse, its values are zeros."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retemper.engine.checkpoint.tensors import StoredTensor
from retemper.engine.hugging_face.shards import ShardPlan
from retemper.engine.model.architecture import parse_architecture
from retemper.engine.model.decoder import meta_decoder

# Prints resident bytes after the imports, the most of them at any time, and whether the number is of this program only.
SCRIPT = """
import json, sys
from retemper.checkpoint_convert import {module}

def resident(key):
    [line] = [line for line in open("/proc/self/status") if line.startswith(key + ":")]
    return int(line.split()[1]) * 1024

before = resident("VmRSS")
{module}.convert(*sys.argv[1:3], workers=2, say=lambda line: None)
print(json.dumps([before, resident("VmHWM")]))
"""


def sparse_model(folder: Path, num_layers: int, hidden_size: int) -> tuple[int, int]:
    """Bytes of a bf16 model of zeros, and of its largest tensor."""
    config = {
        "model_type": "llama",
        "vocab_size": 4 * hidden_size,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 16,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    parameters = meta_decoder(parse_architecture(config)).named_parameters()
    tensors = {name: StoredTensor(tuple(parameter.shape), torch.bfloat16) for name, parameter in parameters}
    plan = ShardPlan(tensors, 5 * 10**9)
    for file in plan.files:
        file.begin(folder / file.name)
    plan.write_index(folder)
    sizes = [tensor.num_bytes for tensor in tensors.values()]
    return sum(sizes), max(sizes)


def resident_bytes(module: str, source: Path, output: Path) -> tuple[int, int]:
    """Before a conversion in a process of its own, and at its peak."""
    command = [sys.executable, "-c", SCRIPT.format(module=module), str(source), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, peak = json.loads(done.stdout)
    return before, peak


def test_memory_is_that_of_some_blocks(tmp_path: Path) -> None:
    whole, largest = sparse_model(tmp_path / "hf", num_layers=3, hidden_size=1024)
    assert whole > 115e6 and largest < 9e6
    for module, source, output in (("hf_to_dcp", "hf", "checkpoint"), ("dcp_to_hf", "checkpoint", "back")):
        before, peak = resident_bytes(module, tmp_path / source, tmp_path / output)
        # Two blocks of 8 MB, two to read files back, and what is imported late.
        assert peak - before < 80e6, (module, before, peak)


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """3.3 GB in one file, read and written: at most twice the largest tensor and 1 GB."""
    whole, largest = sparse_model(tmp_path / "hf", num_layers=24, hidden_size=2048)
    assert whole > 3.2e9 and largest < 35e6
    for module, source, output in (("hf_to_dcp", "hf", "checkpoint"), ("dcp_to_hf", "checkpoint", "back")):
        _, peak = resident_bytes(module, tmp_path / source, tmp_path / output)
        assert peak < 2 * largest + 1e9, (module, peak)
