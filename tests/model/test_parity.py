"""Our decoder against ``transformers`` on tiny random models of every family, and packing against running alone."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from family_models import (
    FULL,
    LLAMA3_ROPE,
    MODELS,
    SHAPE,
    SLIDING,
    VOCAB,
    hf_config,
    hf_model,
    our_model,
    parts_of,
    renamed_as_stored,
)
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import LlamaConfig, Qwen2Config

from retemper.engine.batch import Batch
from retemper.engine.errors import UserError
from retemper.engine.model.config_file import read_hf_config
from retemper.engine.model.decoder import Decoder
from retemper.engine.model.families import parse_decoder_architecture
from retemper.engine.model.family_table import FAMILIES
from retemper.engine.model.rope_settings import inverse_frequencies
from retemper.kernels.linear_cross_entropy import IGNORE_INDEX

LENGTHS = [20, 1, 43]
every_family = pytest.mark.parametrize("family", MODELS)


def sample(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, targets); no target crosses a document's end."""
    tokens = torch.randint(0, VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1)
    targets[torch.tensor(list(itertools.accumulate(lengths))) - 1] = IGNORE_INDEX
    return tokens, targets


def check_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Relative error at most 1e-5 in every parameter's norm.

    Where the true gradient vanishes there is only rounding noise and no relative error: a key bias that no rotation
    separates adds the same score to all keys and cancels in the softmax, so slow rotary pairs leave almost nothing.
    Such tensors are measured against a hundredth of the whole gradient's norm.
    """
    assert actual.keys() == expected.keys()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm()
        assert error <= 1e-5 * max(gradient.norm(), 1e-2 * total), f"{name}: {error / gradient.norm():.2e}"


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@every_family
def test_logits_and_gradients_equal_transformers(family):
    hf = hf_model(hf_config(family))
    model = our_model(hf)
    tokens, targets = sample(LENGTHS)
    expected = torch.cat([hf(part[None]).logits[0] for part in tokens.split(LENGTHS)])
    with torch.no_grad():
        logits = model.logits(Batch.of_documents(tokens, LENGTHS))
    assert logits.shape == (sum(LENGTHS), VOCAB)
    for ours, theirs in zip(logits.split(LENGTHS), expected.split(LENGTHS), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()

    expected_loss = F.cross_entropy(expected, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    loss = model(Batch.of_documents(tokens, LENGTHS, targets))
    assert abs(loss / expected_loss - 1) <= 1e-5
    loss.backward()
    expected_loss.backward()
    theirs = renamed_as_stored(hf, gradients(hf))
    check_gradients(gradients(model), parts_of(model, theirs))


@every_family
def test_packed_documents_equal_the_same_documents_alone(family):
    model = our_model(hf_model(hf_config(family)))
    tokens, targets = sample(LENGTHS)
    with torch.no_grad():
        together = model.logits(Batch.of_documents(tokens, LENGTHS))
        alone = torch.cat([model.logits(Batch.of_documents(part, [len(part)])) for part in tokens.split(LENGTHS)])
    assert (together - alone).norm() <= 1e-5 * alone.norm()

    model(Batch.of_documents(tokens, LENGTHS, targets)).backward()
    actual = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    for part, part_targets in zip(tokens.split(LENGTHS), targets.split(LENGTHS), strict=True):
        model(Batch.of_documents(part, [len(part)], part_targets)).backward()
    check_gradients(actual, gradients(model))


@every_family
def test_number_of_parameters(family):
    hf = hf_model(hf_config(family))
    architecture = parse_decoder_architecture(hf.config.to_dict())
    assert architecture.num_parameters == hf.num_parameters()
    assert sum(p.numel() for p in Decoder(architecture).parameters() if p.requires_grad) == architecture.num_parameters


@every_family
def test_inverse_frequencies(family):
    config = hf_config(family)
    embedding = hf_model(config).base_model.rotary_emb
    architecture = parse_decoder_architecture(config.to_dict())
    for rope, window in zip(architecture.ropes, architecture.sliding_windows, strict=True):
        if rope is None:
            continue
        layer = "" if hasattr(embedding, "inv_freq") else f"{SLIDING if window else FULL}_"
        expected = getattr(embedding, f"{layer}inv_freq")
        actual = torch.tensor(inverse_frequencies(rope), dtype=torch.float64)
        torch.testing.assert_close(actual, expected.double(), rtol=2e-6, atol=0)
        assert rope.attention_factor == pytest.approx(getattr(embedding, f"{layer}attention_scaling"), rel=1e-12)


# --------------------------------------------------------------------------------------------------------------------
# Both spellings of config.json


def older_spelling(config: dict, type_key: str) -> dict:
    """The same content as transformers 4 wrote it: ``rope_theta`` and ``rope_scaling`` at the top, ``torch_dtype``."""
    rope = config["rope_parameters"]
    drop = {"rope_parameters", "dtype"} if FULL in rope else {"rope_parameters", "dtype", "layer_types"}
    older = {key: value for key, value in config.items() if key not in drop}
    if config["model_type"] == "gemma3_text":
        older["rope_local_base_freq"] = rope[SLIDING]["rope_theta"]
    rope = dict(rope.get(FULL, rope))
    is_neox = config["model_type"] == "gpt_neox"
    older["rotary_emb_base" if is_neox else "rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        older["rotary_pct" if is_neox else "partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    older["torch_dtype"] = config.get("dtype")
    kind = rope.pop("rope_type")
    older["rope_scaling"] = None if kind == "default" else {type_key: kind, **rope}
    return older


@every_family
@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_older_spelling_means_the_same(family, type_key):
    newer = hf_config(family).to_dict()
    assert "rope_parameters" in newer
    older = older_spelling(newer, type_key)
    assert parse_decoder_architecture(older) == parse_decoder_architecture(newer)


@every_family
def test_written_config_is_read_from_file_folder_and_dictionary(family, tmp_path):
    config = hf_config(family)
    config.save_pretrained(tmp_path)
    expected = parse_decoder_architecture(config.to_dict())
    assert parse_decoder_architecture(read_hf_config(tmp_path)) == expected
    assert parse_decoder_architecture(read_hf_config(tmp_path / "config.json")) == expected
    assert parse_decoder_architecture(read_hf_config(json.loads((tmp_path / "config.json").read_text()))) == expected


ARCHITECTURE_KEYS = (
    *SHAPE,
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "initializer_range",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    "hidden_act",
    "attention_dropout",
)


@every_family
def test_absent_keys_mean_what_transformers_takes_for_them(family):
    """Keys are left out one at a time. Those that every published config.json has may be refused instead."""
    config = hf_config(family)
    whole = config.to_dict()
    for key in sorted({*ARCHITECTURE_KEYS, *FAMILIES[config.model_type].read_keys}):
        partial = {name: value for name, value in whole.items() if name != key}
        # transformers derives layer_types from the other keys; they are no choice of their own.
        try:
            theirs = type(config)(**{name: value for name, value in partial.items() if name != "layer_types"}).to_dict()
            expected = parse_decoder_architecture(theirs)
        except (UserError, IndexError, StrictDataclassClassValidationError):  # transformers' default does not fit
            with pytest.raises(UserError):
                parse_decoder_architecture(partial)
            continue
        if key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            with pytest.raises(UserError, match=f"{key} is None"):
                parse_decoder_architecture(partial)
        else:
            assert parse_decoder_architecture({**partial, "layer_types": theirs.get("layer_types")}) == expected, key


def test_published_qwen2_config():
    """Qwen2.5-0.5B's config.json as published: head_dim, rope_scaling and layer_types are absent."""
    architecture = parse_decoder_architecture(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151643,
            "hidden_act": "silu",
            "hidden_size": 896,
            "initializer_range": 0.02,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        }
    )
    assert architecture.num_parameters == 494_032_768
    assert architecture.head_dim == 64
    assert architecture.sliding_windows == (None,) * 24
    assert {rope.theta for rope in architecture.ropes} == {1e6}


LLAMA = LlamaConfig(**SHAPE).to_dict()
REFUSALS = {
    "unknown model type": ({"model_type": "bloom"}, "model_type", "'bloom'"),
    "no model type": ({"model_type": None}, "model_type", "None"),
    "unknown rope": ({"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}, "rope_type", "'axial'"),
    "older unknown rope": ({"rope_parameters": None, "rope_scaling": {"type": "su"}}, "rope_type", "'su'"),
    "linear rope without factor": ({"rope_parameters": {"rope_type": "linear"}}, "factor", "None"),
    "llama3 rope without its fields": (
        {"rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": None}},
        "original_max_position_embeddings",
        "None",
    ),
    "activation": ({"hidden_act": "tanh"}, "hidden_act", "'tanh'"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout", "0.1"),
    "kv heads": ({"num_key_value_heads": 3}, "num_attention_heads", "4"),
    "hidden size": ({"hidden_size": 66, "head_dim": None}, "hidden_size", "66"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers", "0"),
    "text for a number": ({"vocab_size": "211"}, "vocab_size", "'211'"),
    "missing": ({"intermediate_size": None}, "intermediate_size", "None"),
    "true for a number": ({"hidden_size": True}, "hidden_size", "True"),
    "negative eps": ({"rms_norm_eps": -1e-5}, "rms_norm_eps", "-1e-05"),
    "odd head": ({"head_dim": 15}, "head_dim", "15"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5"),
    "zero theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope_theta", "0.0"),
    "a width beyond all": ({"hidden_size": 2**40}, "hidden_size", "1099511627776"),
    "a vocabulary beyond all": ({"vocab_size": 2**62}, "vocab_size", "4611686018427387904"),
    "layers beyond all": ({"num_hidden_layers": 10_001}, "num_hidden_layers", "10001"),
    "sizes that overflow together": ({"hidden_size": 2**24, "head_dim": 2**24}, "hidden_size", "16777216"),
    "a number beyond floats": ({"rms_norm_eps": 10**400}, "rms_norm_eps", f"1{'0' * 17}...{'0' * 19}"),
    "quantized": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method", "'gptq'"),
    "quantized in some way": ({"quantization_config": {"bits": 4}}, "quantization_config", "{'bits': 4}"),
    "text theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e6"}}, "rope_theta", "'1e6'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_architectures(case):
    change, key, value = REFUSALS[case]
    with pytest.raises(UserError) as caught:
        parse_decoder_architecture({**LLAMA, **change}, "some/config.json")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("some/config.json")
    assert f"{key} is {value};" in message


def test_layer_types_must_name_every_layer():
    config = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=7, max_window_layers=1).to_dict()
    with pytest.raises(UserError, match=r"layer_types is \['full_attention', 'sliding_attention'\]; .* = 3 layers$"):
        parse_decoder_architecture({**config, "layer_types": config["layer_types"][:2]})
    with pytest.raises(UserError, match="layer_types is 'chunked_attention'"):
        parse_decoder_architecture({**config, "layer_types": ["chunked_attention"] * 3})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file"),
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ("null", "expected a JSON object, found NoneType"),
        ('{"x": ' + "[" * 10**5 + "]" * 10**5 + "}", "nested more than 50 levels deep"),
        ('{"x": ' + "[" * 50 + "1" + "]" * 50 + "}", "nested more than 50 levels deep"),
    ],
)
def test_unreadable_config_files(tmp_path, content, expected):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=expected) as caught:
        read_hf_config(tmp_path if content is not None else path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_in_a_place_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match=r"x: File name too long; a Hugging Face config.json is needed$"):
        read_hf_config(tmp_path / ("x" * 300))
