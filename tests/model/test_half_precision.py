"""In bf16 the decoder rounds where transformers does: the same bits of embeddings, norms and rotations."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from family_models import MODELS, hf_config, hf_model, our_model

from retemper.engine.batch import Batch
from retemper.engine.model.decoder import _rotation

FAMILIES = ("llama", "olmo2", "olmo3", "granite", "gemma2", "gemma3_text", "gpt_neox", "cohere2", "starcoder2", "glm4")


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    hf = hf_model(hf_config(request.param))
    rotary = copy.deepcopy(hf.base_model.rotary_emb)  # loaded models keep its frequencies in fp32
    hf.bfloat16()
    hf.base_model.rotary_emb = rotary
    return request.param, hf, our_model(hf).bfloat16()


def test_embeddings(models) -> None:
    family, hf, ours = models
    tokens = torch.arange(50)
    expected = hf.get_input_embeddings()(tokens)
    if family == "granite":
        expected = expected * hf.config.embedding_multiplier
    assert torch.equal(ours.model._embed(Batch.of_documents(tokens, [50])), expected)


def test_norms(models) -> None:
    _, hf, ours = models
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    theirs = dict(hf.base_model.named_modules())
    checked = 0
    for name, module in ours.model.named_modules():
        stored = {"norm": "final_layer_norm"}.get(name, name) if hf.config.model_type == "gpt_neox" else name
        if type(module).__name__ == "Norm" and not name.endswith(("q_norm", "k_norm")):
            assert torch.equal(module(x), theirs[stored](x)), name
            checked += 1
    assert checked > 3


def test_rotations(models) -> None:
    family, hf, ours = models
    if family == "cohere2":
        pytest.skip("transformers rounds its cosine, but not the products")
    module = importlib.import_module(type(hf).__module__)
    generator = torch.Generator().manual_seed(0)
    attention = ours.model.blocks[0].self_attn
    q, k = (torch.randn(30, heads, attention.head_dim, generator=generator).bfloat16() for heads in (4, 2))
    batch = Batch.of_documents(torch.arange(30), [30])
    actual = _rotation(attention.rope, batch).rotate(q, k, attention.rope)
    layer = () if not hasattr(hf.config, "layer_types") else (hf.config.layer_types[0],)
    layer = layer if isinstance(getattr(hf.base_model.rotary_emb, "rope_type", ""), dict) else ()
    cos, sin = hf.base_model.rotary_emb(q[None], batch.position_ids[None], *layer)
    expected = module.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    for ours_THD, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours_THD, theirs[0].transpose(0, 1))


def test_the_families_are_known() -> None:
    assert set(FAMILIES) <= MODELS.keys()
