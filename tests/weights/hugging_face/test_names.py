"""Weights under other names, and folders in which two programs find two models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from converting import EMBEDDING, HEAD, INDEX, SINGLE, Copy, edit_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from retemper.engine.errors import UserError
from retemper.engine.weights.hugging_face.initial import load_hf_tensors, open_weights
from retemper.engine.weights.hugging_face.model import open_hf_model

Tensors = dict[str, torch.Tensor]


def tied_model(copy_model: Copy) -> Path:
    """A tied model in a single file."""
    folder = copy_model("qwen2-tied")
    tensors = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): value for name, value in tensors.items()}


def bare(name: str) -> str:
    return name.removeprefix("model.")


def as_head(name: str) -> str:
    return HEAD if name == EMBEDDING else name


LOADED = {
    "base model": renamed(bare),
    "base model in part": renamed(lambda name: bare(name) if ".0." in name else name),
    "twice": renamed(lambda name: f"model.{name}"),
    "only the head": renamed(as_head),
    "only the head, of a base model": renamed(lambda name: bare(as_head(name))),
    "compiled": renamed(lambda name: f"_orig_mod.{name}"),
    "compiled base model": renamed(lambda name: f"_orig_mod.{bare(name)}"),
    "compiled blocks": renamed(lambda name: name.replace("layers.1.", "layers.1._orig_mod.")),
}


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> Tensors:
    """Change what is in the folder's file; returns what was in it."""
    before = load_file(folder / SINGLE)
    save_file({name: value.clone() for name, value in change(before).items()}, folder / SINGLE, {"format": "pt"})
    return before


@pytest.mark.parametrize("case", LOADED)
def test_other_names_are_read_as_transformers_reads_them(copy_model: Copy, case: str) -> None:
    folder = tied_model(copy_model)
    expected = rewrite(folder, LOADED[case])
    if "compiled" not in case:  # transformers does not load these, which rename no parameter
        theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        expected = {name: value for name, value in theirs.state_dict().items() if name != HEAD}
    model = open_weights(folder)
    assert model.parameters.tensors.keys() == expected.keys()
    assert all(torch.equal(model.parameters.read(name), value) for name, value in expected.items())
    read = {name: torch.empty_like(value) for name, value in expected.items()}
    load_hf_tensors(model, read, distributed=False)
    assert all(torch.equal(read[name], value) for name, value in expected.items())
    for name, value in expected.items():
        rows = torch.empty_like(value)
        with model.parameters.rows(name) as read_rows:
            read_rows(0, rows)
        assert torch.equal(rows, value)
    assert [line for line in model.notes if line.startswith("note: ")]


ADAPTER = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}
REFUSED = {
    "DistributedDataParallel": (renamed(lambda name: f"module.{name}"), ["begin with 'module.'", "save model.module"]),
    "PEFT": (renamed(lambda name: f"base_model.model.{name}"), ["base_model.model.", "merge_and_unload()"]),
    "multimodal": (renamed(lambda name: f"language_model.{name}"), ["'language_model.'", "its language model alone"]),
    "inside": (renamed(lambda name: name.replace("model.", "model.language_model.")), ["'model.language_model.'"]),
    "another library": (renamed(lambda name: name.replace("model.", "transformer.")), ["'transformer.'", "rename"]),
    "an adapter beside": (lambda tensors: {**tensors, **ADAPTER}, ["lora_A", "merge_and_unload()"]),
    "both names": (
        lambda tensors: {**tensors, "norm.weight": tensors["model.norm.weight"] + 1},
        ["model.norm.weight and norm.weight are the same parameter"],
    ),
    "compiled and not": (
        lambda tensors: {**tensors, "_orig_mod.model.norm.weight": tensors["model.norm.weight"]},
        ["_orig_mod.model.norm.weight", "the same parameter"],
    ),
    "neither embedding nor head": (
        lambda tensors: {name: value for name, value in tensors.items() if name != EMBEDDING},
        [f"missing {EMBEDDING}"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_names_are_refused_with_the_remedy(copy_model: Copy, case: str) -> None:
    change, fragments = REFUSED[case]
    folder = tied_model(copy_model)
    rewrite(folder, change)
    for open_ in (open_hf_model, open_weights):
        with pytest.raises(UserError) as caught:
            open_(folder)
        assert all(fragment in str(caught.value) for fragment in fragments), caught.value


def test_what_is_missing_and_what_is_there_instead_are_both_named(copy_model: Copy) -> None:
    folder = tied_model(copy_model)
    count = len(rewrite(folder, renamed(lambda name: f"x.{name}")))
    with pytest.raises(UserError) as caught:
        open_hf_model(folder)
    message = str(caught.value)
    assert message.count(f"and {count - 3} more") == 2
    assert f"missing {EMBEDDING}, " in message and f"unexpected x.{EMBEDDING}, " in message


def test_an_untied_model_without_its_head_is_refused(copy_model: Copy) -> None:
    """transformers makes a random head."""
    folder = copy_model("qwen3")
    edit_tensors(folder / SINGLE, lambda tensors: tensors.pop(HEAD))
    with pytest.raises(UserError, match=f"missing {HEAD}; set tie_word_embeddings to true if"):
        open_hf_model(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Two models in one folder


def stale_index(folder: Path) -> None:
    shutil.copy(folder / SINGLE, folder / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(load_file(folder / SINGLE), "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def index_of_both(folder: Path) -> None:
    stale_index(folder)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"weight_map": {**weight_map, EMBEDDING: SINGLE}}))


def twice_in_shards(folder: Path) -> None:
    stale_index(folder)
    (folder / SINGLE).unlink()
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    save_file({EMBEDDING: torch.zeros(97, 32), "x": torch.zeros(1)}, folder / "model-00002-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {**weight_map, "x": "model-00002-of-00002.safetensors"}}))


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def only(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / SINGLE).rename(folder / name) and None


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (stale_index, ["two sets of weights", SINGLE, INDEX, "model-00001-of-00001.safetensors"]),
        (index_of_both, ["two sets of weights", SINGLE, INDEX]),
        (twice_in_shards, ["both hold model.embed_tokens.weight", "model-00002-of-00002.safetensors"]),
        (
            adapter,
            ["adapter_config.json next to model.safetensors", "transformers loads the base model of the adapter"],
        ),
        (only("adapter_model.safetensors"), ["neither", "adapter_model.safetensors"]),
        (only("consolidated.safetensors"), ["neither", "consolidated.safetensors", "publisher"]),
        (only("model-00001-of-00002.safetensors"), ["shards without their model.safetensors.index.json"]),
        (only("model-Q4_K_M.gguf"), ["neither", "model-Q4_K_M.gguf, the llama.cpp format"]),
        (only("model.fp16.safetensors"), ["neither", "model.fp16.safetensors"]),
    ],
)
def test_folders_with_two_models_or_none_are_refused(
    copy_model: Copy, spoil: Callable[[Path], None], fragments: list[str]
) -> None:
    folder = copy_model("qwen3")
    spoil(folder)
    with pytest.raises(UserError) as caught:
        open_weights(folder)
    assert all(fragment in str(caught.value) for fragment in ["model.initialize_from", *fragments]), caught.value


def test_further_weights_that_transformers_does_not_read_are_named(copy_model: Copy) -> None:
    folder = copy_model("qwen3")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model-00001-of-00009.safetensors"):
        (folder / name).write_bytes(b"of another model")
    (folder / "training_args.bin").write_bytes(b"no weights")
    weight_map = dict.fromkeys(load_file(folder / SINGLE), SINGLE)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))  # of the same file: no contradiction
    model = open_hf_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(model.parameters.read(name), value) for name, value in theirs.items())
    (note,) = (line for line in model.notes if line.startswith("ignored "))
    assert note.endswith("consolidated.safetensors, model-00001-of-00009.safetensors, pytorch_model.bin")
