"""benchmarks/fused_projections.py: both kinds of products are the same numbers."""

import json
import sys

import pytest
import torch

from retemper.benchmarks import fused_projections as fused
from retemper.engine.model.implementations import parse_architecture

CPU = torch.device("cpu")


@pytest.mark.parametrize("what", fused.PASSES)
def test_separate_and_fused_products_are_those_of_autograd(what):
    x = fused.Operands(fused.Shape("test", 12, 16, (8, 4, 4)), CPU)
    leaf, weight = (each.float().requires_grad_() for each in (x.input, x.weight))
    output = leaf @ weight.t()
    output.backward(x.gradient.float())
    expected = {"forward": output, "dX": leaf.grad, "dW": weight.grad, "joining": x.gradient.float()}[what]
    for product in fused.PASSES[what]:
        result = product(x)
        actual = torch.cat(result, 0 if what == "dW" else 1) if isinstance(result, list) else result
        assert (actual.float() - expected).norm() <= 1e-2 * expected.norm()


def test_the_shapes_are_those_of_the_models():
    sizes = {"0.5B": (896, 14, 2, 4864), "7B": (3584, 28, 4, 18_944)}
    for shape in fused.SHAPES:
        model, _, what = shape.name.partition(", ")
        width, heads, kv_heads, intermediate = sizes[model]
        config = {
            "model_type": "qwen2",
            "hidden_size": width,
            "num_hidden_layers": 1,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": intermediate,
            "vocab_size": 8,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 64,
        }
        head_dim = parse_architecture(config).head_dim
        parts = (
            (intermediate,) * 2 if what == "gate and up" else tuple(head_dim * n for n in (heads, kv_heads, kv_heads))
        )
        assert (shape.width, shape.parts) == (width, parts)


def test_the_command_compares_every_pass(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fused, "SHAPES", fused.SHAPES[:1])
    monkeypatch.setattr(
        sys, "argv", ["x", "--device", "cpu", "--seconds", "0", "--json", str(tmp_path / "report.json")]
    )
    fused.main()
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["what"] for row in rows] == list(fused.PASSES)
    assert all(row["separate"] > 0 and row["fused"] > 0 and row["error"] < 1e-2 for row in rows)
    assert capsys.readouterr().out.count("queries, keys, values") == len(rows)
