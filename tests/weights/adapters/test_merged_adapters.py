"""Adapters on the disk: merged as PEFT merges them, and exported as PEFT loads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_files import export, peft_model, random_adapter, stored_adapter, tensors_of
from family_models import hf_config, hf_model, parts_of
from library_models import library_model
from peft import PeftModel
from transformers import AutoModelForCausalLM

from retemper.engine.config.settings import AdapterConfig
from retemper.engine.errors import UserError
from retemper.engine.model.adapters import LORA_A, LORA_B, MAGNITUDE
from retemper.engine.model.decoder import Decoder
from retemper.engine.model.implementations import parse_architecture
from retemper.engine.weights import parts as parts_module
from retemper.engine.weights.adapters.merged import merged_parameters
from retemper.engine.weights.hugging_face.model import HfModel, open_hf_model

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(26).view(2, 13) * 7 % 199


def lora(**settings: object) -> AdapterConfig:
    return AdapterConfig(**{"kind": "lora", "rank": 4, "alpha": 12, **settings})


def saved(model: torch.nn.Module, folder: Path) -> HfModel:
    """``model`` as a folder, opened."""
    model.save_pretrained(folder)
    return open_hf_model(folder)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


CASES = {
    "plain": ("llama", lora(), LINEAR, []),
    "rslora on some layers": ("qwen3", lora(rslora=True, targets=["*.q_proj", "*.layers.1.mlp.up_proj"]), None, []),
    "dora": ("llama with biases", lora(dora=True, rslora=True), LINEAR, []),
    "trained embedding, head and norm": (
        "qwen2 untied",
        lora(modules_to_save=["model.embed_tokens", "lm_head", "model.norm"]),
        LINEAR,
        ["model.embed_tokens", "lm_head", "model.norm"],
    ),
    "trained tied embedding": ("qwen2 tied", lora(modules_to_save=["*embed_tokens*"]), LINEAR, ["embed_tokens"]),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_those_of_peft_and_its_folder_gives_its_logits(tmp_path: Path, case: str) -> None:
    name, config, targets, trained = CASES[case]
    model = hf_model(hf_config(name))
    base = saved(model, tmp_path / "base")
    parameters = [module for module, _ in model.named_modules() if module.endswith(("q_proj", "layers.1.mlp.up_proj"))]
    theirs = peft_model(model, config, targets or parameters, trained)
    adapter = stored_adapter(tmp_path / "step", base.architecture, config, tensors_of(theirs))
    expected = logits(theirs)

    peft, folder = export(base, adapter, tmp_path / "peft")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    assert (logits(loaded) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert not peft.config.content("")["rank_pattern"]
    assert (peft.config.content("")["target_modules"] == LINEAR) == (targets is not None)

    merged = base.layout.published(merged_parameters(base.parameters, adapter, base.layout))
    unmerged = base.published
    reference = theirs.merge_and_unload().state_dict()
    for tensor in merged.tensors:
        assert (merged.read(tensor) - reference[tensor]).abs().max() <= 1e-6, tensor
    changed = [tensor for tensor in merged.tensors if not torch.equal(merged.read(tensor), unmerged.read(tensor))]
    assert len(changed) == len(adapter.changed)


@pytest.mark.parametrize("name", ["phi3", "gpt_neox"])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_parts_of_a_fused_projection(tmp_path: Path, name: str, dora: bool) -> None:
    """Here q, k and v have their own adapters, there is one for qkv_proj; and one layer lacks that of k."""
    base = saved(hf_model(hf_config(name)), tmp_path / "base")
    targets = ["*.q_proj", "*.v_proj", "*.layers.1.*", "*.layers.2.*"]
    config = lora(dora=dora, rslora=not dora, targets=targets)
    tensors = random_adapter(base.architecture, config)
    adapter = stored_adapter(tmp_path / "step", base.architecture, config, tensors)
    peft, folder = export(base, adapter, tmp_path / "peft")
    assert set(peft.config.content("")["rank_pattern"].values()) >= {8, 12}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    from_peft = parts_of(Decoder(base.architecture), _as_stored(name, loaded.merge_and_unload().state_dict()))

    merged = merged_parameters(base.parameters, adapter, base.layout)
    for parameter in merged.tensors:
        expected, module = base.parameters.read(parameter), parameter.removesuffix(".weight")
        if f"{module}.{LORA_A}" in tensors:
            scaling = 12 / (4 if dora else 2)
            expected = expected + scaling * tensors[f"{module}.{LORA_B}"] @ tensors[f"{module}.{LORA_A}"]
            if dora:
                expected = tensors[f"{module}.{MAGNITUDE}"][:, None] * expected / expected.norm(dim=1, keepdim=True)
        assert (merged.read(parameter) - expected).abs().max() <= 2e-6, parameter
        assert (from_peft[parameter] - expected).abs().max() <= 2e-6, parameter


def _as_stored(name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("lm_head.", "embed_out.") if name == "gpt_neox" else key: value for key, value in state.items()}


@pytest.mark.parametrize("model_type", ["olmoe", "qwen3_next"])
def test_models_of_transformers_keep_their_names(tmp_path: Path, model_type: str) -> None:
    base = saved(library_model(model_type), tmp_path / "base")
    config = lora(targets=["*.q_proj", "*.o_proj"])
    tensors = random_adapter(base.architecture, config)
    adapter = stored_adapter(tmp_path / "step", base.architecture, config, tensors)
    _, folder = export(base, adapter, tmp_path / "peft")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    state = loaded.merge_and_unload().state_dict()
    merged = merged_parameters(base.parameters, adapter, base.layout)
    assert all((merged.read(name) - state[name]).abs().max() <= 1e-6 for name in merged.tensors)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_box_is_the_same_in_small_blocks(tmp_path: Path, monkeypatch, dora: bool, dtype: torch.dtype) -> None:
    """What ranks read that share a matrix by rows or columns, and what converters read, block by block."""
    base = saved(hf_model(hf_config("llama")).to(dtype), tmp_path / "base")
    config = lora(dora=dora, modules_to_save=["model.norm.weight"])
    tensors = random_adapter(base.architecture, config)
    adapter = stored_adapter(tmp_path / "step", base.architecture, config, tensors)
    merged = merged_parameters(base.parameters, adapter, base.layout)
    name = "model.layers.1.mlp.down_proj.weight"
    whole = merged.read(name)
    assert merged.tensors["model.embed_tokens.weight"].dtype == dtype and whole.dtype == torch.float32
    monkeypatch.setattr(parts_module, "BLOCK_BYTES", 1000)
    for row, column, rows, columns in ((0, 0, 64, 96), (3, 0, 20, 96), (0, 31, 64, 32), (63, 95, 1, 1)):
        box = torch.empty(rows, columns)
        merged.read_box(name, (row, column), box)
        assert (box - whole[row : row + rows, column : column + columns]).abs().max() <= 1e-6
    assert torch.equal(merged.read("model.norm.weight"), tensors["model.norm.weight"])


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    architecture = parse_architecture(hf_config("llama").to_dict())
    other = parse_architecture(hf_config("qwen3").to_dict())
    tensors = random_adapter(architecture, lora())
    with pytest.raises(UserError, match=r"belongs to another model or adapter: .*q_proj.*, the model needs"):
        stored_adapter(tmp_path / "step", other, lora(), tensors)


def test_a_part_of_a_tensor_that_trained_fully_has_no_form_in_peft(tmp_path: Path) -> None:
    base = saved(hf_model(hf_config("phi3")), tmp_path / "base")
    config = lora(targets=["*.down_proj"], modules_to_save=["*.layers.0.self_attn.q_proj"])
    tensors = random_adapter(base.architecture, config)
    adapter = stored_adapter(tmp_path / "step", base.architecture, config, tensors)
    with pytest.raises(
        UserError, match=r"trains .*layers.0.*q_proj.weight, which is only a part of .*qkv_proj, .*; export the merged"
    ):
        export(base, adapter, tmp_path / "peft")
