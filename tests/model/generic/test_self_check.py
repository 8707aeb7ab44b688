"""The check at the start of a run finds an exact way to keep documents apart, or says why there is none."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from retemper.engine.errors import UserError
from retemper.engine.model.generic import documents, self_check
from retemper.engine.model.generic.architecture import parse_transformers_architecture
from retemper.engine.model.generic.self_check import MODES, check_documents, with_exact_documents
from retemper.engine.model.implementations import architecture_of

LARGE = {
    "qwen3_moe": {"num_hidden_layers": 48, "hidden_size": 2048, "num_experts": 128, "num_experts_per_tok": 8},
    "qwen3_next": {"num_hidden_layers": 48},
    "bloom": {"hidden_size": 4096, "n_layer": 30, "n_head": 32, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "gpt_oss": {},
}
EXPECTED = {"qwen3_moe": "packed", "gpt_oss": "packed", "qwen3_next": "one_by_one", "bloom": "library_attention"}


def architecture(model_type: str):
    return parse_transformers_architecture({"model_type": model_type, **LARGE[model_type]}, "config.json", "test")


@pytest.mark.parametrize("model_type", EXPECTED)
def test_the_fastest_exact_way_is_found_for_models_of_published_size(model_type: str):
    finding = check_documents(architecture(model_type))
    assert finding.documents == EXPECTED[model_type]
    assert len(finding.problems) == MODES.index(finding.documents)


def test_a_leak_between_documents_is_seen(monkeypatch):
    """Without the loop over documents, packed state-space layers see the documents before theirs."""
    monkeypatch.setattr(documents, "document_edges", lambda batch: [(0, len(batch.position_ids))])
    self_check._find.cache_clear()
    finding = check_documents(architecture("qwen3_next"))
    assert finding.documents is None and len(finding.problems) == len(MODES)
    with pytest.raises(UserError, match=r"model_type qwen3_next cannot be trained: .*differ") as refusal:
        with_exact_documents(architecture("qwen3_next"))
    assert "\n" not in str(refusal.value)
    self_check._find.cache_clear()


def test_a_missing_bias_of_the_head_is_seen(monkeypatch):
    """Biases begin as zero: a check that only looked at new weights would not notice that one is left out."""
    config = {"model_type": "phi", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    phi = parse_transformers_architecture({**config, "intermediate_size": 64, "vocab_size": 64}, "config.json", "test")
    assert check_documents(phi).documents == "packed"

    def loss(model, hidden, weight, targets):
        return torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")

    monkeypatch.setattr(self_check.TransformersModel, "_loss_sum", loss)
    assert check_documents(phi).documents is None


def test_the_start_says_why_documents_are_not_packed():
    found = with_exact_documents(architecture("qwen3_next"))
    assert not found.packs_documents
    described = found.describe_implementation()
    assert "one document at a time" in described and "pip install causal-conv1d flash-linear-attention" in described
    assert dataclasses.replace(found, documents="packed").packs_documents


def test_types_are_refused_in_one_line_that_names_them():
    cases = {
        "bert": {"model_type": "bert"},  # its attention looks ahead
        "zamba": {"model_type": "zamba"},  # blocks share parameters
        "unheard_of": {"model_type": "unheard_of"},
    }
    for name, config in cases.items():
        with pytest.raises(UserError) as refusal:
            self_check.with_exact_documents(architecture_of({**config, **without_dropout(config)}))
        assert name in str(refusal.value) and "\n" not in str(refusal.value)


def without_dropout(config: dict) -> dict:
    return {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if config["model_type"] == "bert" else {}
