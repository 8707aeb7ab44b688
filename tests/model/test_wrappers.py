"""The text model inside a vision-language model: its configuration, and the names of its tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from wrapped_models import TEXT, WRAPPERS, save_wrapped, wrapped_model

from retemper.engine.batch import Batch
from retemper.engine.errors import UserError
from retemper.engine.model.config_file import read_hf_config
from retemper.engine.model.implementations import meta_model, parse_architecture
from retemper.engine.model.wrappers import names_in_wrapper, text_config_of, with_vocab_size

TEXT_TYPES = {
    "gemma3": "gemma3_text",
    "llama4": "llama4_text",
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen3_5": "qwen3_5_text",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
}


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_the_text_model_has_its_own_configuration(model_type: str, tmp_path: Path) -> None:
    config = read_hf_config(save_wrapped(tmp_path / "hf", model_type))
    text, is_wrapper = text_config_of(config)
    assert is_wrapper and text["model_type"] == TEXT_TYPES[model_type]
    assert {key: text[key] for key in TEXT} == TEXT
    assert text["tie_word_embeddings"] is config["tie_word_embeddings"]
    assert text_config_of(text) == (text, False)


def test_other_configurations_are_unchanged() -> None:
    for config in ({"model_type": "llama"}, {"model_type": "unknown", "text_config": {}}, {"text_config": 1}):
        assert text_config_of(config) == (config, False)


def test_keys_that_a_file_leaves_out_have_the_defaults_of_transformers() -> None:
    """Gemma 3 4B's published config names 6 keys of its text model."""
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}}
    text, _ = text_config_of(config)
    assert (text["vocab_size"], text["head_dim"], text["tie_word_embeddings"]) == (262_208, 256, True)


def test_old_qwen2_vl_files_have_no_text_config() -> None:
    config = {"model_type": "qwen2_vl", **TEXT, "tie_word_embeddings": True, "vision_config": {"depth": 2}}
    text, is_wrapper = text_config_of({**config, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}})
    assert is_wrapper and {key: text[key] for key in TEXT} == TEXT and text["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("top", "inner", "tied"),
    [({}, {}, False), (True, False, True), (False, True, False), ({}, True, True), ({}, False, False)],
)
def test_the_outer_statement_about_tied_embeddings_counts(top: object, inner: object, tied: bool) -> None:
    config = {**WRAPPERS["mistral3"], "model_type": "mistral3"}
    if top != {}:
        config["tie_word_embeddings"] = top
    if inner != {}:
        config["text_config"] = {**config["text_config"], "tie_word_embeddings": inner}
    assert parse_architecture(config).tie_word_embeddings is tied


def test_errors_name_the_text_config() -> None:
    config = {**WRAPPERS["mistral3"], "model_type": "mistral3", "quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(UserError, match=r"^config\.json: text_config: quantization_config: quant_method"):
        parse_architecture(config, "config.json")


@pytest.mark.parametrize("model_type", [name for name in WRAPPERS if name != "qwen3_vl_moe"])
@pytest.mark.parametrize("tied", [True, False])
def test_names_in_files_are_those_of_the_text_models_tensors(model_type: str, tied: bool, tmp_path: Path) -> None:
    model = wrapped_model(model_type, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    files, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    decoder = model.get_decoder()
    text = {f"model.{name}": value for name, value in getattr(decoder, "model", decoder).state_dict().items()}
    text |= {} if tied else {"lm_head.weight": model.get_output_embeddings().weight}
    names = names_in_wrapper(config, files)
    assert names.keys() - {"lm_head.weight"} == text.keys() - {"lm_head.weight"}
    assert all(torch.equal(files[names[name]], value) for name, value in text.items())
    in_memory = names_in_wrapper(config, model.state_dict())
    assert all(torch.equal(model.state_dict()[in_memory[name]], value) for name, value in text.items())


def test_the_vocabulary_size_is_changed_where_it_is() -> None:
    wrapper = {"text_config": {"vocab_size": 5, "x": 1}, "vision_config": {}}
    changed = {"text_config": {"vocab_size": 7, "x": 1}, "vision_config": {}}
    assert with_vocab_size(wrapper, 7) == changed and wrapper["text_config"]["vocab_size"] == 5
    assert with_vocab_size({**wrapper, "vocab_size": 5}, 7) == {**changed, "vocab_size": 7}
    assert with_vocab_size({"vocab_size": 5}, 7) == {"vocab_size": 7}


@pytest.mark.parametrize("model_type", ["mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_text_model_computes_what_the_whole_one_does_on_text(model_type: str) -> None:
    """Their rotary positions of images do not matter. Every gradient, in float64."""
    whole = wrapped_model(model_type, tie_word_embeddings=False).double()
    architecture = parse_architecture({**json.loads(whole.config.to_json_string()), "architectures": None})
    model = meta_model(architecture).cast_parameters(torch.float64).materialize(torch.device("cpu"))
    places = {name: name.replace("model.", "model.language_model.", 1) for name, _ in model.named_parameters()}
    theirs = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(theirs[places[name]])
    tokens = torch.arange(24) * 7 % 90
    expected = whole(tokens[None]).logits[0]
    logits = model.logits(
        Batch.of_documents(tokens, [len(tokens)]).prepare(torch.device("cpu"), "sdpa", architecture.sliding_windows)
    )
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
    (expected * weights).sum().backward()
    (logits * weights).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[places[name]].grad, rtol=1e-5, atol=1e-6)
