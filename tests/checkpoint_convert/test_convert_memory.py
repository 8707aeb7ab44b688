"""Memory does not grow with the model. The input is sparse, its values are zeros."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from converting import Start

from retemper.engine.model.implementations import meta_model, parse_architecture
from retemper.engine.weights.hugging_face.shards import ShardPlan
from retemper.engine.weights.tensor_source import StoredTensor

# Prints resident bytes after the imports, and the most of them until the end of each direction.
SCRIPT = """
import json
from retemper.engine.weights.conversion import dcp_to_hf, hf_to_dcp

def resident(key):
    [line] = [line for line in open("/proc/self/status") if line.startswith(key + ":")]
    return int(line.split()[1]) * 1024

seen = [resident("VmRSS")]
hf_to_dcp.convert("hf", "checkpoint", workers=2, say=lambda line: None)
seen.append(resident("VmHWM"))
dcp_to_hf.convert("checkpoint", "back", workers=2, say=lambda line: None)
seen.append(resident("VmHWM"))
print(json.dumps(seen))
"""


def sparse_model(
    folder: Path, num_layers: int, hidden_size: int, vocab_size: int, **mixture: int | str
) -> tuple[int, int]:
    """Bytes of a bf16 model of zeros with tied embeddings, and of its largest parameter."""
    config = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "tie_word_embeddings": True,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 16,
        "torch_dtype": "bfloat16",
        **mixture,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    architecture = parse_architecture(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in meta_model(architecture).named_parameters()}
    pieces = architecture.stored_pieces(shapes)
    stored = {name: shape for name, shape in shapes.items() if name not in pieces}
    stored |= {piece.tensor: piece.sizes for parts in pieces.values() for piece in parts}
    tensors = {name: StoredTensor(shape, torch.bfloat16) for name, shape in stored.items()}
    plan = ShardPlan(tensors, 5 * 10**9)
    for file in plan.files:
        file.begin(folder / file.name)
    plan.write_index(folder)
    sizes = [2 * math.prod(shape) for shape in shapes.values()]
    return sum(sizes), max(sizes)


def resident_bytes(folder: Path, start: Start) -> tuple[int, int, int]:
    """Before ``hf`` in ``folder`` is converted in a process of its own, at the peak there, and at the peak there and
    back."""
    program = start(SCRIPT, folder=folder)
    assert program.wait() == 0, program.err
    before, there, back = json.loads(program.out)
    return before, there, back


def test_memory_is_that_of_some_blocks(tmp_path: Path, start: Start) -> None:
    """Nor with its largest tensor: one has 134 MB, which is most of the model."""
    whole, largest = sparse_model(tmp_path / "hf", num_layers=2, hidden_size=256, vocab_size=2**18)
    assert 128e6 < largest < whole < 146e6
    before, there, back = resident_bytes(tmp_path, start)
    # Two blocks of 8 MB, two to read files back, and what is imported late. Measured: 27 MB.
    assert there - before < 80e6, (before, there)
    assert back - before < 80e6, (before, there, back)


def test_memory_is_less_than_the_experts_of_a_layer(tmp_path: Path, start: Start) -> None:
    """Files have a tensor for each expert, and a checkpoint one of all: 34 MB, three times in each layer."""
    experts = {"num_experts": 32, "num_experts_per_tok": 2, "moe_intermediate_size": 1024, "head_dim": 32}
    whole, largest = sparse_model(
        tmp_path / "hf", num_layers=4, hidden_size=512, vocab_size=8192, model_type="qwen3_moe", **experts
    )
    layer = 3 * largest
    assert largest == 32 * 1024 * 512 * 2 and whole > 4 * layer
    before, there, back = resident_bytes(tmp_path, start)
    # Measured: 51 MB. With blocks of any size: 453 MB.
    assert max(there, back) - before < layer, (before, there, back)


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path, start: Start) -> None:
    """3.3 GB in one file, read and written: at most twice the largest tensor and 1 GB."""
    whole, largest = sparse_model(tmp_path / "hf", num_layers=24, hidden_size=2048, vocab_size=8192)
    assert whole > 3.2e9 and largest < 35e6
    _, there, back = resident_bytes(tmp_path, start)
    assert max(there, back) < 2 * largest + 1e9, (there, back)
