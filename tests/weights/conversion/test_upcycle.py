"""Dense models as mixtures, against transformers: the same logits, copies in every expert, and refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from family_models import hf_config, hf_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from retemper.engine.batch import Batch
from retemper.engine.errors import UserError
from retemper.engine.model.decoder import Decoder
from retemper.engine.weights.conversion.upcycle import upcycle
from retemper.engine.weights.hugging_face.model import open_hf_model
from retemper.tools import upcycle as command

TOKENS = torch.randint(3, 200, (1, 24), generator=torch.Generator().manual_seed(1))


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes) -> Path:
    config = hf_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    hf_model(config).to(dtype).save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits[0]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama multi-head", "llama3 rope", "mistral", "qwen3"])
def test_logits_of_transformers_are_unchanged(name, dtype, tmp_path):
    source = saved(name, tmp_path / "source", dtype)
    upcycle(str(source), tmp_path / "out", 4, 2, max_shard_size="200KB", say=lambda line: None)
    expected = logits(source)
    assert (logits(tmp_path / "out") - expected).abs().max() <= 2e-6 * expected.abs().max()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == ("qwen3_moe" if name == "qwen3" else "mixtral")
    before, after = tensors(source), tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    ups = [t for key, t in after.items() if "layers.1." in key and key.endswith(("up_proj.weight", "w3.weight"))]
    assert len(ups) == 4 and all(torch.equal(up, before["model.layers.1.mlp.up_proj.weight"]) for up in ups)
    routers = [tensor.float() for key, tensor in after.items() if key.endswith(("mlp.gate.weight", "moe.gate.weight"))]
    assert len(routers) == 3 and not torch.equal(routers[0], routers[1])
    assert torch.cat(routers).std().item() == pytest.approx(config["initializer_range"], rel=0.2)


@pytest.mark.parametrize("name", ["llama multi-head", "mistral"])
def test_what_a_config_leaves_out_stays_the_default_of_the_dense_type(name, tmp_path):
    """Configs of Llama 2 and TinyLlama have no rope_theta, and that of Mixtral is another one."""
    source = saved(name, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    for key in ("rope_parameters", "rope_theta", "rope_scaling", "rms_norm_eps", "max_position_embeddings"):
        config.pop(key, None)
    if name == "llama multi-head":
        del config["num_key_value_heads"]
    (source / "config.json").write_text(json.dumps(config))
    upcycle(str(source), tmp_path / "out", 4, 2, say=lambda line: None)
    expected = logits(source)
    assert (logits(tmp_path / "out") - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_experts_learn_from_their_own_tokens(tmp_path):
    """Copies get different gradients, so they do not stay copies."""
    source = saved("qwen3", tmp_path / "source")
    upcycle(str(source), tmp_path / "out", 4, 2, say=lambda line: None)
    opened = open_hf_model(tmp_path / "out")
    model = Decoder(opened.architecture)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(opened.parameters.read(name))
    model(Batch.of_documents(TOKENS[0], [24], TOKENS[0].roll(-1))).backward()
    gradient = model.get_parameter("model.layers.1.mlp.experts.up_proj.weight").grad
    assert all(not torch.equal(gradient[0], other) for other in gradient[1:])


@pytest.mark.parametrize(
    ("name", "numbers", "words"),
    [
        ("llama", (1, 1), "--num-experts 1: a mixture has at least 2"),
        ("llama", (4, 5), "--experts-per-token 5: use 1 to --num-experts 4"),
        ("llama", (4, 2, -1), "--seed -1: use 0 to 2^63 - 1"),
        ("llama with biases", (4, 2), "cannot express"),
        ("gemma2", (4, 2), "no mixture has the blocks of model_type gemma2"),
        ("qwen2 untied", (4, 2), "no mixture has the blocks of model_type qwen2"),
    ],
)
def test_refused_in_one_line(name, numbers, words, tmp_path):
    source = saved(name, tmp_path / "source")
    with pytest.raises(UserError) as error:
        upcycle(str(source), tmp_path / "out", *numbers, say=lambda line: None)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_becomes_of_the_model(tmp_path, capfd):
    source = saved("qwen3", tmp_path / "source")
    command.main(["--model", str(source), "--output", str(tmp_path / "out"), "--num-experts", "4", "--seed", "3"])
    assert "qwen3_moe with 4 experts in each of 3 blocks, 2 for each token" in capfd.readouterr().out
    options = json.loads((tmp_path / "out" / "conversion.json").read_text())["options"]
    assert options == {"num_experts": 4, "experts_per_token": 2, "seed": 3}
