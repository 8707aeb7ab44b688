"""Conversions of types whose files differ from memory: published names, shapes and bytes come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from converting import SINGLE, convert_back, convert_there
from library_models import library_model
from model_table import TYPES, VOCAB_SIZE, sampled
from safetensors.torch import load_file, save_file
from tiny_models import edit_json, read_folder
from transformers import AutoModelForCausalLM

from retemper.engine.errors import UserError
from retemper.engine.weights.checkpoint.tensors import stored_tensors
from retemper.engine.weights.hugging_face.model import open_hf_model

REFUSED = ("deepseek_v4", "inkling2_text", "zamba", "zamba2")
"""See docs/models.md."""
QUICK = ("deepseek_v3", "gpt2", "gpt_neox", "qwen3_moe")


@pytest.mark.parametrize("model_type", sampled(TYPES, QUICK))
def test_every_type_makes_the_round_trip(model_type: str, tmp_path: Path) -> None:
    library_model(model_type).save_pretrained(tmp_path / "hf")
    if model_type in REFUSED:
        with pytest.raises(UserError):
            convert_there(tmp_path / "hf", tmp_path / "checkpoint")
        return
    convert_there(tmp_path / "hf", tmp_path / "checkpoint", verify=True)
    convert_back(tmp_path / "checkpoint", tmp_path / "back", verify=True)
    assert read_folder(tmp_path / "back") == read_folder(tmp_path / "hf")
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()


@pytest.mark.parametrize("model_type", ["gpt_neox", "qwen3_moe"])
def test_rows_are_added_and_cut_off_under_any_name(model_type: str, tmp_path: Path) -> None:
    library_model(model_type).save_pretrained(tmp_path / "hf")
    convert_there(tmp_path / "hf", tmp_path / "checkpoint", pad_vocab_to_multiple_of=64, verify=True)
    convert_back(tmp_path / "checkpoint", tmp_path / "wide")
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "wide").get_output_embeddings().weight.shape[0]
        == -(-VOCAB_SIZE // 64) * 64
    )
    convert_back(tmp_path / "checkpoint", tmp_path / "back", vocab_size=VOCAB_SIZE)
    assert read_folder(tmp_path / "back") == read_folder(tmp_path / "hf")


def test_tensors_that_stay_in_float32_are_not_cast(tmp_path: Path) -> None:
    """DeepSeek's biases of the router choose experts, and bf16 would change the choice."""
    library_model("deepseek_v3").save_pretrained(tmp_path / "hf")
    convert_there(tmp_path / "hf", tmp_path / "checkpoint", dtype="bfloat16")
    dtypes = {name: tensor.dtype for name, tensor in stored_tensors(tmp_path / "checkpoint").items()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {name for name in dtypes if name.endswith("e_score_correction_bias")} and len(kept) == 3
    convert_back(tmp_path / "checkpoint", tmp_path / "back")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert theirs.dtype == torch.bfloat16 and theirs.state_dict()[bias].dtype == torch.float32
    assert torch.equal(theirs.state_dict()[bias], library_model("deepseek_v3").state_dict()[bias])


def test_a_missing_expert_and_a_tie_that_is_none_are_named(tmp_path: Path) -> None:
    library_model("qwen3_moe").save_pretrained(tmp_path, max_shard_size="40KB")
    edit_json(tmp_path / "config.json", lambda config: config.update(tie_word_embeddings=True))
    with pytest.raises(UserError, match=r"has tie_word_embeddings, but lm_head\.weight differs from"):
        open_hf_model(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.update(tie_word_embeddings=False, num_local_experts=5))
    with pytest.raises(UserError, match=r"missing model\.layers\.\d\.mlp\.experts\.4\.gate_proj\.weight"):
        open_hf_model(tmp_path)


@pytest.mark.parametrize(("model_type", "mask"), [("gpt2", "h.0.attn.bias"), ("gpt_neox", "layers.0.attention.bias")])
def test_old_files_of_the_base_model_with_causal_masks(model_type: str, mask: str, tmp_path: Path) -> None:
    """As GPT-2 and Pythia were published."""
    library_model(model_type).save_pretrained(tmp_path / "hf")
    published = load_file(tmp_path / "hf" / SINGLE)
    base = {name.partition(".")[2] if name.startswith(("transformer.", "gpt_neox.")) else name: value
            for name, value in published.items()}  # fmt: skip
    save_file({**base, mask: torch.ones(1, 1, 4, 4)}, tmp_path / "hf" / SINGLE, metadata={"format": "pt"})
    assert len(base) == len(published) and base.keys() != published.keys()
    assert any("follow from the config" in line for line in open_hf_model(tmp_path / "hf").notes)
    convert_there(tmp_path / "hf", tmp_path / "checkpoint", verify=True)
    convert_back(tmp_path / "checkpoint", tmp_path / "back")
    back = load_file(tmp_path / "back" / SINGLE)
    assert back.keys() == published.keys() and all(torch.equal(back[name], published[name]) for name in back)
