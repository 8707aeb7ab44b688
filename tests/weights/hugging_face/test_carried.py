"""Tensors that are not trained go from the original folder to the export, and nowhere else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import hf_exports
import pytest
import tiny_run
import torch
import yaml
from converting import EMBEDDING, SINGLE, Copy, convert_back, convert_there, edit_tensors
from safetensors.torch import load_file, save_file
from tiny_models import edit_json, read_folder
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from wrapped_models import save_wrapped

from retemper.engine.errors import UserError
from retemper.engine.model.families import DecoderArchitecture
from retemper.engine.weights.checkpoint.assets import CARRIED_FILE
from retemper.engine.weights.checkpoint.tensors import stored_tensors
from retemper.engine.weights.conversion.stored_model import open_hf
from retemper.engine.weights.hugging_face.model import open_hf_model

TRAINED = ("gemma3", "llama4", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_vl")
"""Wrappers whose text model one of the implementations computes."""


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a model; not to be changed."""
    made: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = save_wrapped(tmp_path_factory.mktemp("wrapped") / model_type, model_type)
        return made[model_type]

    return folder


@pytest.mark.parametrize("model_type", TRAINED)
def test_a_round_trip_gives_the_whole_model(model_type: str, wrapped: Callable[[str], Path], tmp_path: Path) -> None:
    original = wrapped(model_type)
    convert_there(original, tmp_path / "checkpoint", verify=True)
    convert_back(tmp_path / "checkpoint", tmp_path / "back", verify=True)
    assert read_folder(tmp_path / "back") == read_folder(original)
    for name in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (original / name).read_bytes()
    assert not (tmp_path / "back" / CARRIED_FILE).exists()
    ours, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs = AutoModelForImageTextToText.from_pretrained(original).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())


def test_a_checkpoint_has_no_copy_of_what_is_carried(wrapped: Callable[[str], Path], tmp_path: Path) -> None:
    convert_there(wrapped("mistral3"), tmp_path / "checkpoint")
    assert not [name for name in stored_tensors(tmp_path / "checkpoint") if "vision" in name or "projector" in name]
    record = json.loads((tmp_path / "checkpoint" / "hf" / CARRIED_FILE).read_text())
    assert record["folder"] == str(wrapped("mistral3"))
    carried = {name for name in load_file(wrapped("mistral3") / SINGLE) if not name.startswith("language_model.")}
    assert record["sha256"].keys() == carried


def test_names_of_newer_files_are_kept(wrapped: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers loads a file whose names are those of its modules, too."""
    folder = shutil.copytree(wrapped("qwen2_vl"), tmp_path / "hf")
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    save_file({name: value.clone() for name, value in whole.state_dict().items()}, folder / SINGLE, {"format": "pt"})
    assert "model.language_model.embed_tokens.weight" in load_file(folder / SINGLE)
    convert_there(folder, tmp_path / "checkpoint")
    assert EMBEDDING in stored_tensors(tmp_path / "checkpoint")
    convert_back(tmp_path / "checkpoint", tmp_path / "back")
    assert read_folder(tmp_path / "back") == read_folder(folder)


def test_a_run_trains_the_text_model_and_exports_the_whole(
    two_ranks, run_file, wrapped: Callable[[str], Path], tmp_path: Path
) -> None:
    config = yaml.safe_load(run_file.read_text())
    config["model"] = {"initialize_from": str(wrapped("mistral3"))}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    two_ranks.run(tiny_run.train, path, [*hf_exports.SHORT, "--run_folder", str(tmp_path / "run")])
    before, after = load_file(wrapped("mistral3") / SINGLE), {}
    for file in (tmp_path / "run/hf/step-00000004").glob("*.safetensors"):
        after |= load_file(file)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) == (not name.startswith("language_model.")), name
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "run/hf/step-00000004", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model.model.language_model.norm.weight, after["language_model.model.norm.weight"])


def test_a_run_that_could_not_export_is_refused_when_it_resumes(
    one_rank, run_file, wrapped: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(wrapped("mistral3"), tmp_path / "hf")
    config = yaml.safe_load(run_file.read_text())
    config["model"] = {"initialize_from": str(folder)}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    options = [*hf_exports.SHORT, "--run_folder", str(tmp_path / "run"), "--checkpoint.export_hf", "false"]
    tiny_run.train(one_rank, path, options)
    folder.rename(tmp_path / "moved")
    with pytest.raises(
        UserError, match=rf"^checkpoint\.export_hf: 24 tensors .* needed from {folder}: .*--carried-from"
    ):
        tiny_run.train(one_rank, path, [*options, "--checkpoint.export_hf", "true"])


def test_rows_of_another_vocabulary(wrapped: Callable[[str], Path], tmp_path: Path) -> None:
    convert_there(wrapped("mistral3"), tmp_path / "checkpoint", pad_vocab_to_multiple_of=64)
    convert_back(tmp_path / "checkpoint", tmp_path / "wide")
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "wide").lm_head.weight.shape[0] == 128
    convert_back(tmp_path / "checkpoint", tmp_path / "back", vocab_size=98)
    assert read_folder(tmp_path / "back") == read_folder(wrapped("mistral3"))


def test_a_folder_that_is_gone_is_named_and_can_be_given(wrapped: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(wrapped("mistral3"), tmp_path / "hf")
    convert_there(folder, tmp_path / "checkpoint")
    folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=rf"needed from {folder}: .*no such folder.* --carried-from") as refusal:
        convert_back(tmp_path / "checkpoint", tmp_path / "back")
    assert "\n" not in str(refusal.value)
    convert_back(tmp_path / "checkpoint", tmp_path / "back", carried_from=str(tmp_path / "moved"))
    assert read_folder(tmp_path / "back") == read_folder(wrapped("mistral3"))


PROJECTOR = "multi_modal_projector.linear_1.weight"
CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "another value": (lambda tensors: tensors[PROJECTOR][-1, -1].add_(1), f"{PROJECTOR} is not what the run started"),
    "missing": (lambda tensors: tensors.pop(PROJECTOR), f"{PROJECTOR} is missing there"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_has_changed_is_refused(change: str, wrapped: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(wrapped("mistral3"), tmp_path / "hf")
    convert_there(folder, tmp_path / "checkpoint")
    edit_tensors(folder / SINGLE, CHANGES[change][0])
    with pytest.raises(UserError, match=CHANGES[change][1]):
        convert_back(tmp_path / "checkpoint", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"folder": 1, "sha256": {}}', '{"folder": "x", "sha256": {"a": "0"}}'])
def test_a_damaged_record_is_refused(content: str, wrapped: Callable[[str], Path], tmp_path: Path) -> None:
    convert_there(wrapped("mistral3"), tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "hf" / CARRIED_FILE).write_text(content)
    with pytest.raises(UserError, match=rf"{CARRIED_FILE}: damaged"):
        convert_back(tmp_path / "checkpoint", tmp_path / "back")


def test_the_option_needs_a_model_that_carries_tensors(saved_models: dict[str, Path], tmp_path: Path) -> None:
    convert_there(saved_models["llama"], tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"--carried-from x: .* needs no tensors from elsewhere"):
        convert_back(tmp_path / "checkpoint", tmp_path / "back", carried_from="x")


def test_a_tied_wrapper_with_another_head_is_refused(wrapped: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(wrapped("mistral3"), tmp_path / "hf")
    embedding, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    edit_tensors(folder / SINGLE, lambda tensors: tensors.update({head: tensors[embedding].clone()}))
    model = open_hf_model(folder)
    assert head not in model.carried and [head] in model.left_out.values()
    edit_tensors(folder / SINGLE, lambda tensors: tensors[head].add_(1))
    with pytest.raises(UserError, match=r"has tie_word_embeddings, but lm_head\.weight differs"):
        open_hf_model(folder)
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=False))
    assert "lm_head.weight" in open_hf_model(folder).parameters.tensors


def test_a_folder_is_extended_as_a_whole(wrapped: Callable[[str], Path]) -> None:
    """extend_vocab reads and writes all tensors, under the names of the files."""
    model = open_hf("name", wrapped("mistral3"))
    assert model.published.tensors.keys() == load_file(wrapped("mistral3") / SINGLE).keys()
    assert model.published_tables == ["language_model.model.embed_tokens.weight"]


def test_tensors_that_transformers_does_not_load_are_carried(
    copy_model: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the layers of multi-token prediction."""
    folder = copy_model("qwen3")
    edit_tensors(folder / SINGLE, lambda tensors: tensors.update({"mtp.fc.weight": torch.randn(3, 5).half()}))
    with pytest.raises(UserError, match=r"unexpected mtp\.fc\.weight"):
        open_hf_model(folder)
    monkeypatch.setattr(DecoderArchitecture, "unused_tensors", (r"^mtp\.",))
    said = convert_there(folder, tmp_path / "checkpoint")
    assert [line for line in said if line.startswith("1 tensors are not trained, such as mtp.fc.weight")]
    convert_back(tmp_path / "checkpoint", tmp_path / "back")
    assert read_folder(tmp_path / "back") == read_folder(folder)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.vocab_size == 97
