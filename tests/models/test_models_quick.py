"""A dozen model types in one process: packed documents against transformers on each document alone, and conversion."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_check import IGNORED, TOLERANCE, convert_there_and_back
from model_table import TYPES, VOCAB_SIZE, tiny_config, tiny_model
from torch import Tensor

from retemper.engine.batch import Batch
from retemper.engine.model.implementations import checked, meta_model
from retemper.engine.model.language_model import LanguageModel
from retemper.engine.weights.hugging_face.initial import load_hf_tensors, open_weights
from retemper.kernels.attention import PER_DOCUMENT

QUICK = (
    *("llama", "gpt_neox", "gemma3_text", "phi3", "cohere2", "granite"),  # native
    *("gpt2", "deepseek_v3", "gpt_oss", "llama4_text", "mixtral", "phimoe", "qwen3_moe"),
    *("bloom", "falcon_h1", "glm_moe_dsa", "qwen3_next", "recurrent_gemma", "zaya"),  # not packed
)
LENGTHS = (20, 1, 31, 12)
"""Shorter and longer than the windows of 8 tokens."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=QUICK)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A tiny model of transformers, and the folder to which it has been saved."""
    model, folder = tiny_model(tiny_config(request.param)), tmp_path_factory.mktemp(request.param) / "model"
    model.save_pretrained(folder)
    return model, folder


def ours(folder: Path) -> LanguageModel:
    """Our model with the weights of ``folder``."""
    weights = open_weights(folder)
    model = meta_model(checked(weights.architecture)).materialize(CPU)
    load_hf_tensors(weights, _detached(model), distributed=False)
    return model


def sample() -> tuple[Tensor, Tensor]:
    """(tokens, targets); no target crosses a document's end."""
    tokens = torch.randint(3, VOCAB_SIZE, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1)
    targets[torch.tensor(list(itertools.accumulate(LENGTHS))) - 1] = IGNORED
    return tokens, targets


def test_packed_documents_equal_transformers_on_each_alone(saved: tuple[torch.nn.Module, Path], tmp_path: Path):
    """The loss, and every gradient."""
    theirs, folder = saved
    tokens, targets = sample()
    expected = torch.cat([theirs(input_ids=part[None], use_cache=False).logits[0] for part in tokens.split(LENGTHS)])
    expected_loss = F.cross_entropy(expected, targets, ignore_index=IGNORED, reduction="sum")
    expected_loss.backward()

    model = ours(folder)
    batch = Batch.of_documents(tokens, LENGTHS, targets).prepare(CPU, PER_DOCUMENT, model.architecture.sliding_windows)
    loss = model(batch)
    assert abs(loss / expected_loss - 1) <= TOLERANCE
    loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in trained.items()}
    compare_gradients(gradients, gradients_under_our_names(theirs, model, tmp_path))


def gradients_under_our_names(theirs: torch.nn.Module, model: LanguageModel, folder: Path) -> dict[str, Tensor]:
    """Gradients of a model of transformers, saved and loaded as its weights are: names and shapes may differ."""
    kept = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad) if parameter.grad is not None else parameter.zero_()
    theirs.save_pretrained(folder)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(kept[name])
            parameter.grad = None
    gradients = {name: torch.empty_like(tensor) for name, tensor in _detached(model).items()}
    load_hf_tensors(open_weights(folder), gradients, distributed=False)
    return gradients


def compare_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Relative error at most 1e-5 of every gradient.

    Of gradients that are rounding noise, as of key biases: of a hundredth of the norm of all.
    """
    total = torch.stack([expected[name].norm() for name in actual]).norm()
    assert actual.keys() <= expected.keys()
    for name, gradient in actual.items():
        error = (gradient - expected[name]).norm()
        assert error <= TOLERANCE * max(expected[name].norm(), 1e-2 * total), (
            f"{name}: {error / expected[name].norm():.2e}"
        )


def test_conversion_there_and_back_changes_no_tensor(saved: tuple[torch.nn.Module, Path], tmp_path: Path):
    convert_there_and_back(saved[1], tmp_path)


def test_the_table_has_every_type_of_transformers():
    from model_table import TABLE
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = {*TYPES, *itertools.chain(*TABLE["left_out"].values())}
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= known  # older versions have fewer
    assert set(QUICK) <= set(TYPES)


def _detached(model: LanguageModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
