"""Runs of native mixtures: published names at the start and in exports, and checkpoints of former versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
import yaml
from library_models import library_model
from model_table import tiny_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from retemper.engine import pretrain
from retemper.engine.batch import Batch
from retemper.engine.model.decoder import Decoder
from retemper.engine.model.families import parse_decoder_architecture
from retemper.engine.model.family_table import FAMILIES

LAST = "checkpoints/step-00000006"
SHORT = ("--training.train_tokens", "1536", "--training.eval_interval", "3", "--checkpoint.save_interval", "3")
"""Six steps."""


def write_run(folder: Path, model: dict[str, Any]) -> Path:
    path = tiny_run.write_config(folder)
    content = yaml.safe_load(path.read_text())
    content["model"] = model
    path.write_text(yaml.safe_dump(content))
    return path


def bf16_run(folder: Path, model_type: str) -> tuple[Path, list[str]]:
    """The configuration and options of a run with bf16 weights that begins with published files."""
    library_model(model_type).save_pretrained(folder / "hf")
    path = write_run(folder, {"initialize_from": str(folder / "hf"), "implementation": "native"})
    return path, [*SHORT, "--training.weight_dtype", "bf16", "--checkpoint.export_hf", "true"]


def check_export(run: Path) -> tuple[Decoder, dict[str, torch.Tensor], Any]:
    """Compare logits of the last checkpoint with those of its export in transformers.

    Returns:
        The decoder of the checkpoint, its tensors, and the model of transformers.
    """
    loaded, problems = AutoModelForCausalLM.from_pretrained(
        run / "hf" / "step-00000006", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(problems.values()), problems
    trained = {name: t for name, t in tiny_run.tensors_of(run / LAST).items() if not name.startswith("optimizer.")}
    decoder = Decoder(parse_decoder_architecture(loaded.config.to_dict()))
    decoder.load_state_dict({name: tensor.float() for name, tensor in trained.items()}, strict=True)
    tokens = torch.arange(40) * 7 % 97
    with torch.no_grad():
        expected, actual = loaded(tokens[None]).logits[0], decoder.logits(Batch.of_documents(tokens, [40]))
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
    return decoder, trained, loaded


@pytest.mark.parametrize("model_type", ["glm4_moe", "mixtral"])
def test_export_of_a_run_that_began_with_published_files(model_type: str, two_ranks: Any, tmp_path: Path) -> None:
    """bf16 weights: the export computes what the checkpoint does, and biases of the choice are those of the start."""
    path, options = bf16_run(tmp_path, model_type)
    run = tmp_path / "run"
    options += ["--run_folder", str(run), "--training.router_bias_update_rate", "0"]
    two_ranks.run(tiny_run.train, path, options)
    decoder, trained, _ = check_export(run)
    start = library_model(model_type).state_dict()
    assert decoder.constants == {name for name in start if name.endswith("e_score_correction_bias")}
    assert all(trained[name].dtype == torch.float32 for name in decoder.constants)
    assert all(torch.equal(trained[name], start[name]) for name in decoder.constants)
    router = "model.layers.1.mlp.gate.weight"
    stored = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in start.items()}
    assert trained[router].dtype == torch.bfloat16 and not torch.equal(trained[router], stored[router].bfloat16())


@pytest.mark.parametrize(("model_type", "layout"), [("glm4_moe", "--parallel.expert 2"), ("dots1", "")])
def test_biases_that_moved_are_resumed_and_exported(
    model_type: str, layout: str, two_ranks: Any, tmp_path: Path
) -> None:
    """In fp32, as bf16 would round a step of 0.001 away; transformers chooses the experts that we do."""
    path, options = bf16_run(tmp_path, model_type)
    rate = 0.003
    options += [*layout.split(), "--training.router_bias_update_rate", str(rate)]
    runs = {name: [*options, "--run_folder", str(tmp_path / name)] for name in ("whole", "resumed")}
    two_ranks.run(tiny_run.train, path, runs["whole"])
    two_ranks.run(tiny_run.train_until, path, runs["resumed"], 4)  # saved at 3
    two_ranks.run(tiny_run.train, path, runs["resumed"])
    decoder, trained, loaded = check_export(tmp_path / "resumed")
    whole = tiny_run.tensors_of(tmp_path / "whole" / LAST)
    start, exported = library_model(model_type).state_dict(), loaded.state_dict()
    stored = load_file(tmp_path / "resumed" / "hf" / "step-00000006" / "model.safetensors")
    resumed = tiny_run.tensors_of(tmp_path / "resumed" / LAST)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert len(decoder.constants) >= 2
    for name in decoder.constants:
        assert {trained[name].dtype, stored[name].dtype} == {torch.float32}
        assert torch.equal(trained[name], exported[name])
        steps = (trained[name] - start[name]) / rate
        assert steps.abs().max() > 1 and torch.allclose(steps, steps.round(), atol=1e-3), steps


def test_checkpoints_of_former_versions_are_resumed(
    one_rank: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """When transformers computed the type, the experts had one tensor for gate and up projection."""
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    path = write_run(tmp_path, {"architecture": str(tmp_path)})
    runs = {name: [*SHORT, "--run_folder", str(tmp_path / name)] for name in ("whole", "resumed")}
    with monkeypatch.context() as former:
        former.delitem(FAMILIES, "qwen3_moe")
        tiny_run.train(one_rank, path, runs["whole"])
        tiny_run.train_until(one_rank, path, runs["resumed"], 4)
    tiny_run.train(one_rank, path, runs["resumed"])
    whole, resumed = (tiny_run.tensors_of(tmp_path / name / LAST) for name in runs)
    assert "model.layers.1.mlp.experts.gate_up_proj" in resumed
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert tiny_run.curve(tmp_path / "whole") == tiny_run.curve(tmp_path / "resumed")


def test_an_adapter_leaves_the_biases_as_they_are(one_rank: Any, tmp_path: Path) -> None:
    """The losses of the routers have gradients in the adapters below them; the base, biases included, stays."""
    path, options = bf16_run(tmp_path, "glm4_moe")
    options += ["--adapter.kind", "lora", "--training.router_bias_update_rate", "0.1", "--optimizer.weight_decay", "0"]
    gradients = []
    for coefficient in ("0", "0.5"):
        folder = tmp_path / f"run-{coefficient}"
        words = [*options, "--run_folder", str(folder), "--training.router_aux_loss_coef", coefficient]
        run = pretrain.build(tiny_run.configure(path, *words), one_rank)
        pretrain.train(run)
        start, model = library_model("glm4_moe").state_dict(), run.model.decoders[0]
        assert model.constants == {name for name in start if name.endswith("e_score_correction_bias")}
        stored = load_file(folder / "hf" / "step-00000006" / "model.safetensors")
        for name in model.constants:
            assert torch.equal(model.get_parameter(name), start[name]) and torch.equal(stored[name], start[name])
            assert stored[name].dtype == torch.float32
        records = [record for record in tiny_run.records(folder) if "grad_norm" in record]
        assert all(record["router_aux_loss"] > 0 for record in records)
        gradients.append(records[-1]["grad_norm"])
    assert gradients[0] != gradients[1]


def test_8_bit_states_of_shared_experts_are_resumed(one_rank: Any, tmp_path: Path) -> None:
    """And of the stacked ones: the same bits in a run that was left and continued."""
    widths = {"shared_expert_intermediate_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 2}
    config = tiny_config("qwen2_moe").to_dict() | widths | {"layer_types": None}
    path = write_run(tmp_path, {"architecture": config})
    runs = {
        name: [*SHORT, "--optimizer.name", "adamw_8bit", "--run_folder", str(tmp_path / name)]
        for name in ("whole", "resumed")
    }
    tiny_run.train(one_rank, path, runs["whole"])
    tiny_run.train_until(one_rank, path, runs["resumed"], 4)
    tiny_run.train(one_rank, path, runs["resumed"])
    whole, resumed = (tiny_run.tensors_of(tmp_path / name / LAST) for name in runs)
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    narrow = {name for name in whole if name.startswith("optimizer.exp_avg_codes.")}
    for part in ("shared_expert.down_proj", "experts.down_proj"):  # whose rows have blocks of 256
        assert any(f".{part}." in name for name in narrow), (part, narrow)
