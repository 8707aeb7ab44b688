"""``model.rope``: the config.json that a run trains with, keeps and exports has the scaling that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import parity_run
import pytest
import torch
from converting import convert_back
from family_models import FULL, SHAPE, SLIDING
from model_table import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from retemper.engine import pretrain
from retemper.engine.batch import Batch
from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import RopeConfig
from retemper.engine.errors import UserError
from retemper.engine.model.decoder import Decoder
from retemper.engine.model.families import parse_decoder_architecture
from retemper.engine.model.longer_context import with_rope
from retemper.engine.model.rope_settings import inverse_frequencies

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 5e5, "rope_scaling": None},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "glm4": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_emb_base": 2e4, "rotary_pct": 0.5},
    "olmo3": {"rope_theta": 5e5},
    "gemma3_text": {"head_dim": 16, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
}
LENGTH = SHAPE["max_position_embeddings"]


@pytest.mark.parametrize("kind", ["yarn", "linear", "llama3", "dynamic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_scaling_that_we_write(family: str, kind: Any) -> None:
    config = {"model_type": family, **SHAPE, "num_key_value_heads": 4, **FAMILIES[family]}
    rope = RopeConfig(kind, 4.0)
    changed = with_rope(config, rope, "x")
    theirs = AutoConfig.for_model(**json.loads(json.dumps(changed)))
    assert theirs.max_position_embeddings == (LENGTH if kind == "dynamic" else 4 * LENGTH)
    nested = FULL in theirs.rope_parameters
    parameters = theirs.rope_parameters[FULL] if nested else theirs.rope_parameters
    assert (parameters["rope_type"], parameters["factor"]) == (kind, 4.0)
    if nested:
        assert theirs.rope_parameters[SLIDING]["rope_type"] == "default"
    expected, attention_factor = ROPE_INIT_FUNCTIONS[kind](theirs, layer_type=FULL if nested else None)
    architecture = parse_decoder_architecture(changed)
    plain = parse_decoder_architecture(config)
    for ours, before, window in zip(architecture.ropes, plain.ropes, architecture.sliding_windows, strict=True):
        assert ours is not None
        if window is not None and nested:
            assert ours == before
            continue
        torch.testing.assert_close(torch.tensor(inverse_frequencies(ours)), expected, rtol=2e-6, atol=0)
        assert ours.attention_factor == pytest.approx(attention_factor)
    assert with_rope(changed, rope, "x") == changed


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_base_that_we_write(family: str) -> None:
    """Of layers with full attention, whichever key had the base before; lengths grow by the factor."""
    shape = {**SHAPE, "num_hidden_layers": 6, "num_key_value_heads": 4}  # Gemma 3 has no window in the sixth
    config = {"model_type": family, **shape, **FAMILIES[family]}
    rope = RopeConfig("default", 8.0, 8e6)
    changed = with_rope(config, rope, "x")
    theirs = AutoConfig.for_model(**json.loads(json.dumps(changed)))
    assert theirs.max_position_embeddings == changed["max_position_embeddings"] == 8 * LENGTH
    modules = AutoModelForCausalLM.from_config(theirs).named_buffers()
    names = ("rotary_emb.inv_freq", f"rotary_emb.{FULL}_inv_freq")
    [expected] = [buffer for name, buffer in modules if name.endswith(names)]
    architecture, plain = parse_decoder_architecture(changed), parse_decoder_architecture(config)
    for ours, before, window in zip(architecture.ropes, plain.ropes, architecture.sliding_windows, strict=True):
        assert ours is not None and before is not None
        if window is not None and FULL in theirs.rope_parameters:
            assert ours == before
            continue
        assert (ours.theta, ours.dim, ours.scaling) == (8e6, before.dim, None) and before.theta < 8e6
        torch.testing.assert_close(torch.tensor(inverse_frequencies(ours)), expected, rtol=2e-6, atol=0)
    # Programs that read rope_theta at the top, such as transformers 4, find the same there.
    assert {changed[key] for key in ("rope_theta", "rotary_emb_base") if key in changed} <= {8e6}
    assert with_rope(changed, rope, "x") == changed
    with pytest.raises(UserError, match=r"model\.rope\.theta is 1000, but x has the larger rope_theta 8e") as caught:
        with_rope(changed, RopeConfig("default", 8.0, 1e3), "x")
    assert "\n" not in str(caught.value)


def test_the_base_of_models_that_transformers_computes() -> None:
    rope = RopeConfig("default", 2.0, 5e7)
    changed = with_rope(tiny_config("deepseek_v3").to_dict(), rope, "x")
    assert AutoConfig.for_model(**json.loads(json.dumps(changed))).rope_parameters["rope_theta"] == 5e7
    with pytest.raises(UserError, match="granite_swa models have no single rope_theta; change"):
        with_rope(tiny_config("granite_swa").to_dict(), rope, "x")


def test_the_text_model_of_a_wrapper_is_changed() -> None:
    text = {"model_type": "llama", **SHAPE}
    wrapper = {"model_type": "llava", "text_config": text, "vision_config": {}}
    rope = RopeConfig("yarn", 2.0)
    assert with_rope(wrapper, rope, "x") == {**wrapper, "text_config": with_rope(text, rope, "x")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2 models have no rotary positions"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "x has linear with factor 2.0 already"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "x has yarn with factor 2.0 already"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None"),
    ],
)
def test_what_cannot_be_lengthened_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        with_rope({"model_type": "llama", **SHAPE, **change}, RopeConfig("yarn", 4.0), "x")
    assert "\n" not in str(caught.value) and "model.rope" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("kind su factor 2", "model.rope.kind is 'su'; expected"),
        ("factor 2", "model.rope.factor is 2.0, but model.rope.kind is null"),
        ("kind yarn", "model.rope.factor is 1; set it"),
        ("kind yarn factor 0.5", "model.rope.factor is 0.5; it must be"),
        ("kind default factor 4", "model.rope.theta is null; set it to the new base"),
        ("kind default theta 8e6", "model.rope.factor is 1; set it"),
        ("kind default factor 4 theta 0.5", "model.rope.theta is 0.5; it must be above 1"),
        ("kind yarn factor 4 theta 8e6", "model.rope.theta is 8000000.0, but model.rope.kind is not default"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, options: str, message: str) -> None:
    path = parity_run.write_run(tmp_path, parity_run.Model("llama", False, True))
    words = options.split()
    arguments = [
        part for key, value in zip(words[::2], words[1::2], strict=True) for part in (f"--model.rope.{key}", value)
    ]
    with pytest.raises(UserError, match=message):
        parse_config(["--config", str(path), *arguments])


def test_checkpoints_keep_the_scaling_and_resume_with_it(one_rank, tmp_path: Path) -> None:
    path = parity_run.write_run(tmp_path, parity_run.Model("llama", False, True))
    options = ["--model.rope.kind", "yarn", "--model.rope.factor", "4"]
    parity_run.run_until(one_rank, path, options, 4)
    kept = json.loads((tmp_path / "run" / "checkpoints" / "step-00000003" / "hf" / "config.json").read_text())
    assert kept["max_position_embeddings"] == 4 * 128
    assert kept["rope_parameters"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    resumed = pretrain.build(parse_config(["--config", str(path), *options]), one_rank)
    assert resumed.progress.step == 3
    assert resumed.start.architecture.ropes == parse_decoder_architecture(kept).ropes
    with pytest.raises(UserError, match=r"model\.architecture differs"):
        pretrain.build(parse_config(["--config", str(path)]), one_rank)


@pytest.mark.parametrize("kind", ["yarn", "default"])
def test_a_published_model_is_lengthened_and_exported(kind, one_rank, saved_models, tmp_path: Path) -> None:
    path = parity_run.write_run(tmp_path, parity_run.Model("llama", False, True))
    folder = saved_models["qwen2-tied"]
    options = ["--model.architecture", "null", "--model.initialize_from", str(folder)]
    options += ["--model.rope.kind", kind, "--model.rope.factor", "4", "--checkpoint.export_hf", "true"]
    options += ["--model.rope.theta", "8e6"] if kind == "default" else []
    parity_run.run_until(one_rank, path, options, 4)
    resumed = pretrain.build(parse_config(["--config", str(path), *options]), one_rank)
    assert resumed.progress.step == 3
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    convert_back(checkpoint, tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert exported.config.max_position_embeddings == 4 * 64
    parameters = exported.config.rope_parameters
    assert parameters["rope_type"] == kind and (kind != "default" or parameters["rope_theta"] == 8e6)
    decoder = Decoder(resumed.start.architecture)
    decoder.load_state_dict({name: exported.state_dict()[name] for name in decoder.state_dict()})
    tokens = torch.arange(90) * 7 % 97
    with torch.no_grad():
        expected, actual = exported(tokens[None]).logits[0], decoder.logits(Batch.of_documents(tokens, [90]))
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
