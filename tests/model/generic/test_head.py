"""The function around the output matrix is measured, and compared with the configuration and with transformers."""

from __future__ import annotations

import pytest
import torch

from retemper.engine.model.generic.head import HeadForm, LibraryHead
from retemper.engine.model.generic.library import find_parts, library_config, library_model

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
FORMS = {
    "llama": ({"tie_word_embeddings": True}, HeadForm()),
    "granite": ({"logits_scaling": 8.0}, HeadForm(0.125)),
    "cohere": ({"logit_scale": 0.25, "tie_word_embeddings": True}, HeadForm(0.25)),
    "gemma2": ({"final_logit_softcapping": 5.0}, HeadForm(1.0, 5.0)),
    "phi": ({}, HeadForm()),
    "recurrent_gemma": ({"logits_soft_cap": 7.0}, HeadForm(1.0, 7.0)),
}


def tiny_library_model(model_type: str, settings: dict):
    config = library_config({"model_type": model_type, **SIZES, **settings}, "test")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = library_model(config, "eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.mark.parametrize("model_type", FORMS)
def test_the_form_of_a_head_gives_the_logits_of_transformers(model_type: str):
    settings, expected = FORMS[model_type]
    model = tiny_library_model(model_type, settings)
    parts = find_parts(model)
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        theirs = model(input_ids=tokens, use_cache=False).logits[0]
        hidden = parts.backbone(input_ids=tokens, use_cache=False).last_hidden_state[0]
        head = LibraryHead(parts)
        assert head.form() == expected
        torch.testing.assert_close(head(hidden, parts.head.weight), theirs)
        logits = expected.logit_scale * parts.head(hidden)
    if expected.softcap is not None:
        logits = expected.softcap * torch.tanh(logits / expected.softcap)
    torch.testing.assert_close(logits, theirs)


def test_a_head_with_a_layer_of_its_own_has_no_form():
    model = tiny_library_model("modernbert-decoder", {"global_attn_every_n_layers": 1})
    parts = find_parts(model)
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        theirs = model(input_ids=tokens).logits[0]
        hidden = parts.backbone(input_ids=tokens).last_hidden_state[0]
        head = LibraryHead(parts)
        assert head.form() is None
        torch.testing.assert_close(head(hidden, parts.head.weight), theirs)
