"""FLOPs per token against torch's own counter and against published model sizes."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from retemper.engine.batch import Batch
from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import TrainingConfig
from retemper.engine.model.decoder import Decoder
from retemper.engine.model.implementations import parse_architecture
from retemper.engine.observe.flops import flops_per_token, peak_flops
from retemper.engine.parallel import trainable


def architecture(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, **more):
    return parse_architecture(
        {
            "model_type": "qwen2",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": inner,
            "vocab_size": vocab,
            **more,
        }
    )


@pytest.mark.parametrize(
    ("shape", "all_pairs", "causal_pairs"),
    [
        ((896, 24, 14, 2, 4864, 151936), 4.02, 3.49),
        ((3584, 28, 28, 4, 18944, 152064), 47.35, 44.89),
    ],
    ids=["Qwen2.5-0.5B", "Qwen2.5-7B"],
)
def test_published_models(shape, all_pairs, causal_pairs):
    model = architecture(*shape)
    assert flops_per_token(model, 4096, causal_halved=False) / 1e9 == pytest.approx(all_pairs, abs=0.005)
    assert flops_per_token(model, 4096, causal_halved=True) / 1e9 == pytest.approx(causal_pairs, abs=0.005)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("qwen3_30b_a3b", 30.5, 3.3), ("mixtral_8x7b", 46.7, 12.9), ("qwen2_57b_a14b", 57.4, 14.2)],
)
def test_total_and_active_parameters_are_the_published_billions(name, total, active):
    """Those of the models' cards, which also count the embedding and the head as active."""
    model = shipped_architecture(name)
    assert model.num_parameters / 1e9 == pytest.approx(total, rel=0.002)
    assert model.num_active_parameters / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize(("name", "billions"), [("qwen3_30b_a3b", 3.04), ("mixtral_8x7b", 12.75)])
def test_operations_of_a_mixture_follow_its_active_parameters(name, billions):
    """6 for each active parameter except the embedding, which is looked up; and attention by hand."""
    model, length = shipped_architecture(name), 4096
    q = model.num_attention_heads * model.head_dim
    attention = 12 * model.num_layers * q * length
    per_token = flops_per_token(model, length, causal_halved=False)
    assert per_token - attention == pytest.approx(6e9 * billions, rel=0.003)


def shipped_architecture(name):
    path = Path(__file__).parents[2] / "megatron_configs" / f"{name}.yaml"
    return parse_architecture(parse_config(["--config", str(path)]).model.architecture)


MIXTURES = {
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
}


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "learning",
    ["all", [EMBEDDING, "*.experts.*"], [EMBEDDING, "*.mlp.gate.weight"], ["model.layers.[12].*"]],
    ids=str,
)
@pytest.mark.parametrize("model_type", MIXTURES)
def test_torch_counts_the_same_for_mixtures(model_type, learning):
    """All parameters learn, or experts, or routers, or blocks. Attention is added by hand, as in the next test."""
    length, layers, hidden, heads = 24, 3, 32, 4
    shape = architecture(hidden, layers, heads, 2, 48, 101, model_type=model_type, head_dim=8, **MIXTURES[model_type])
    model = Decoder(shape)
    model.initialize_(0)
    trainable.apply(model, TrainingConfig(train_tokens=1, trainable=learning))
    tokens = torch.randint(0, 101, (length,))
    with FlopCounterMode(display=False) as counter:
        model(Batch.of_documents(tokens, [length], tokens)).backward()
    counts = counter.get_flop_counts()["Global"]
    matrices = sum(count for operator, count in counts.items() if "attention" not in str(operator))
    backward = 2 if learning == ["model.layers.[12].*"] else layers
    attention = (4 * layers + 8 * backward) * hidden * length * length
    learns = trainable.learning(shape, TrainingConfig(train_tokens=1, trainable=learning))
    assert length * flops_per_token(shape, length, False, learns) == pytest.approx(matrices + attention, rel=1e-12)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("hidden", "heads", "kv_heads", "head_dim"), [(32, 4, 2, 8), (32, 4, 4, 16), (48, 2, 1, 8)])
@pytest.mark.parametrize(
    ("learning", "backward"),
    [
        ("all", 3),
        ("embeddings", 3),
        (["model.layers.[12].*"], 2),
        (["model.layers.2.*", "model.norm.weight"], 1),
        (["*norm*"], 3),
        (["model.layers.0.mlp.*"], 3),
        (["model.norm.weight"], 0),
    ],
    ids=str,
)
def test_torch_counts_the_same(tied, hidden, heads, kv_heads, head_dim, learning, backward):
    """One document of T tokens, forward and backward; all parameters learn, or some; gradients flow through
    ``backward`` blocks.

    The attention is left out of torch's count and added by hand, because on a CPU its fused operator has no formula:
    scores and their product with the values are two products of 2 x T x T x q forward and twice that backward, 12 q T
    per token over all pairs (the recomputation of the scores inside the backward is no model FLOP).
    """
    length, layers = 24, 3
    shape = architecture(
        hidden, layers, heads, kv_heads, 80, 101, head_dim=head_dim, model_type="qwen3", tie_word_embeddings=tied
    )
    model = Decoder(shape)
    trainable.apply(model, TrainingConfig(train_tokens=1, trainable=learning))
    tokens = torch.randint(0, 101, (length,))
    with FlopCounterMode(display=False) as counter:
        model(Batch.of_documents(tokens, [length], tokens)).backward()
    counts = counter.get_flop_counts()["Global"]
    matrices = sum(count for operator, count in counts.items() if "attention" not in str(operator))
    attention = (4 * layers + 8 * backward) * heads * head_dim * length * length
    learns = trainable.learning(shape, TrainingConfig(train_tokens=1, trainable=learning))
    if learning == ["model.layers.0.mlp.*"]:  # block 0 counts as a whole, but its attention has no gradients
        q, k = heads * head_dim, kv_heads * head_dim
        matrices += 2 * length * hidden * (2 * q + 2 * k) + 2 * length * 2 * hidden * 80
    every, causal = (length * flops_per_token(shape, length, halved, learns) for halved in (False, True))
    assert every == pytest.approx(matrices + attention, rel=1e-12)
    assert causal == pytest.approx(matrices + attention / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("", None),
    ],
)
def test_peaks(name, peak):
    assert peak_flops(name) == peak
