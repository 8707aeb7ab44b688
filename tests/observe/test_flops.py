"""FLOPs per token against torch's own counter and against published model sizes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from retemper.engine.batch import Batch
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
