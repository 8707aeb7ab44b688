"""The tensors of Hugging Face files and the parameters in memory: the same values both ways, in any parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from library_models import library_model, own_tensors
from model_table import TYPES, sampled
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from retemper.engine.errors import UserError
from retemper.engine.model.architecture import Piece
from retemper.engine.model.generic.stored_names import float32_tensors, stored_pieces, unused_tensors
from retemper.engine.weights import parts as parts_module
from retemper.engine.weights.block_copy import copy_files
from retemper.engine.weights.hugging_face.folder import WEIGHTS_FILE, HfWeights
from retemper.engine.weights.hugging_face.layout import Layout
from retemper.engine.weights.hugging_face.shards import ShardPlan
from retemper.engine.weights.saving import save_tensors
from retemper.engine.weights.table import read_table

QUICK = ("deepseek_v3", "gpt_neox", "mixtral", "qwen3_moe")
"""Fused experts, next to dense layers and frozen buffers; other names; both; fused experts alone."""
REFUSED = ("inkling2_text",)
"""Their files hold tensors that are reshaped in memory."""


def cases() -> list:
    return sampled([name for name in TYPES if name not in REFUSED], QUICK)


def layout_of(model) -> Layout:
    shapes = {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()}
    return Layout.with_pieces(shapes, stored_pieces(model, shapes, "config.json"))


@pytest.mark.parametrize("model_type", cases())
def test_files_of_transformers_are_read_and_written_exactly(model_type: str, tmp_path: Path) -> None:
    library_model(model_type).save_pretrained(tmp_path / "theirs")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected, files = own_tensors(loaded), load_file(tmp_path / "theirs" / WEIGHTS_FILE)
    layout = layout_of(loaded)

    parameters = layout.parameters(HfWeights(tmp_path / "theirs"))
    assert parameters.tensors.keys() == expected.keys()
    assert all(torch.equal(parameters.read(name), value) for name, value in expected.items())
    parameters.require_full_coverage()

    plan = ShardPlan(layout.published(parameters).tensors, max_shard_size=1 << 40)
    (tmp_path / "ours").mkdir()
    copy_files(tmp_path / "ours", plan.files, layout.published(parameters), workers=2)
    ours = load_file(tmp_path / "ours" / WEIGHTS_FILE)
    assert ours.keys() == files.keys()
    assert all(torch.equal(ours[name], value) and ours[name].dtype == value.dtype for name, value in files.items())


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_experts_are_single_in_files_and_fused_in_memory(model_type: str) -> None:
    """As transformers 4 published them."""
    names = layout_of(library_model(model_type)).published_shapes
    first = {"qwen3_moe": "mlp.experts.0.gate_proj", "mixtral": "block_sparse_moe.experts.0.w1"}[model_type]
    assert f"model.layers.1.{first}.weight" in names
    assert not [name for name in names if "gate_up" in name]


@pytest.mark.parametrize("block_bytes", [parts_module.BLOCK_BYTES, 64])
def test_any_part_of_a_parameter_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    """What a rank reads of parameters that are sharded along any dimension, also in another dtype."""
    monkeypatch.setattr(parts_module, "BLOCK_BYTES", block_bytes)
    model = library_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    parameters, generator = layout_of(model).parameters(HfWeights(tmp_path)), torch.Generator().manual_seed(0)
    experts = {name: value for name, value in own_tensors(model).items() if ".experts." in name}
    assert {tuple(value.shape) for value in experts.values()} == {(4, 64, 64), (4, 64, 32)}
    for name, value in experts.items():
        for dtype in (torch.float32, torch.float64):
            begin = [int(torch.randint(length, (), generator=generator)) for length in value.shape]
            end = [
                int(torch.randint(*ends, (), generator=generator)) + 1 for ends in zip(begin, value.shape, strict=True)
            ]
            box = value[tuple(map(slice, begin, end))]
            into = torch.full(box.shape, torch.nan, dtype=dtype)
            parameters.read_box(name, begin, into)
            assert torch.equal(into, box.to(dtype)), (name, begin, end)


def test_published_tensors_are_read_from_the_shards_of_a_checkpoint(tmp_path: Path) -> None:
    """The other direction: the parameters are in the parts that ranks have written."""
    model = library_model("qwen3_moe")
    layout, tensors = layout_of(model), own_tensors(model)
    save_tensors(tmp_path, tensors, distributed=False)
    table = read_table(tmp_path)
    for name, [part] in table.parts.items():  # as if four ranks had written it, along the second dimension
        if len(part.sizes) == 3:
            width = part.sizes[1] // 4
            table.parts[name] = [_strip(part, number * width, width) for number in range(4)]
    table.require_full_coverage()
    model.save_pretrained(tmp_path / "theirs")
    published = layout.published(table)
    for name, value in load_file(tmp_path / "theirs" / WEIGHTS_FILE).items():
        assert torch.equal(published.read(name), value), name


def _strip(part: parts_module.Part, start: int, width: int) -> parts_module.Part:
    offsets, sizes = (0, start, 0), (part.sizes[0], width, part.sizes[2])
    return parts_module.Part(offsets, sizes, part.path, part.find, ((0, start, 0), part.sizes))


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of other kinds, as native families have them


def projections() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(rows, 6, generator=generator) for name, rows in (("q", 8), ("k", 4), ("v", 4))}


def fused(name: str, rows: int, at: int) -> list[Piece]:
    return [Piece("qkv", (at, 0), (rows, 6), (0, 0))]


SPLIT = {"q": fused("q", 8, 0), "k": fused("k", 4, 8), "v": fused("v", 4, 12)}
BY_HEAD = {
    name: [Piece("qkv", (head * 8 + first, 0), (size, 6), (head * size, 0)) for head in range(2)]
    for name, first, size in (("q", 0, 4), ("k", 4, 2), ("v", 6, 2))
}
"""Query, key and value of each head follow each other, as in GPT-NeoX."""
STACKED = {name: [Piece("kv", (number, 0, 0), (1, 4, 6), (0, 0))] for number, name in enumerate("kv")}
"""The stored tensor has more dimensions than the parameters."""


def by_head(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].unflatten(0, (2, -1)) for name in "qkv"], dim=1).flatten(0, 1)


FUSED = {
    "one after the other": (SPLIT, "qkv", lambda tensors: torch.cat(list(tensors.values()))),
    "by head": (BY_HEAD, "qkv", by_head),
    "stacked": (STACKED, "kv", lambda tensors: torch.stack([tensors["k"], tensors["v"]])),
}


@pytest.mark.parametrize("kind", FUSED)
def test_fused_projections_are_split_and_joined(kind: str, tmp_path: Path) -> None:
    pieces, name, fuse = FUSED[kind]
    parameters = projections()
    files = {key: value for key, value in parameters.items() if key not in pieces} | {name: fuse(parameters)}
    save_file(files, tmp_path / WEIGHTS_FILE)
    layout = Layout.with_pieces({key: tuple(value.shape) for key, value in parameters.items()}, pieces)
    weights = HfWeights(tmp_path)
    assert layout.published_shapes == {key: tensor.shape for key, tensor in weights.tensors.items()}
    split = layout.parameters(weights)
    assert all(torch.equal(split.read(key), value) for key, value in parameters.items())
    joined = layout.published(split)
    assert all(torch.equal(joined.read(key), value) for key, value in files.items())
    row = torch.empty(1, *files[name].shape[1:])
    with joined.rows(name) as read:
        read(1, row)
    assert torch.equal(row[0], files[name][1])


def test_files_may_hold_parameters_as_they_are_in_memory(tmp_path: Path) -> None:
    parameters = projections()
    save_file(parameters, tmp_path / WEIGHTS_FILE)
    shapes = {key: tuple(value.shape) for key, value in parameters.items()}
    weights = HfWeights(tmp_path)
    layout = Layout.with_pieces(shapes, SPLIT).found_in(weights.tensors)
    assert layout.published_shapes == shapes
    assert all(torch.equal(layout.parameters(weights).read(key), value) for key, value in parameters.items())


def test_a_parameter_of_two_dtypes_is_refused(tmp_path: Path) -> None:
    model = library_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    tensors, expert = load_file(tmp_path / WEIGHTS_FILE), "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({**tensors, expert: tensors[expert].bfloat16()}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(UserError, match=rf"float32 and {expert} is bfloat16, but .*gate_up_proj is made of both"):
        layout_of(model).parameters(HfWeights(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# What else transformers knows about the files


def test_a_type_whose_values_are_not_moved_in_boxes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    transposed = WeightConverter("mlp.up_proj.weight", "mlp.up_proj.weight", operations=[Transpose(0, 1)])
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", {"llama": [transposed]})
    model = library_model("llama")
    shapes = {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()}
    with pytest.raises(
        UserError, match=r"^here: .*model\.layers\.\d\.mlp\.up_proj\.weight of model_type llama .*transpose"
    ):
        stored_pieces(model, shapes, "here")


def test_tensors_of_other_dtypes_and_without_parameters_are_known() -> None:
    model = library_model("deepseek_v3")
    biases = {name for name in own_tensors(model) if name.endswith("e_score_correction_bias")}
    assert biases and float32_tensors(model, list(own_tensors(model))) == biases
    assert unused_tensors(library_model("llama")) == ()
    assert any("61" in pattern for pattern in unused_tensors(model))


@pytest.mark.parametrize("model_type", REFUSED)
def test_reshaped_tensors_are_refused(model_type: str) -> None:
    with pytest.raises(UserError, match=f"model_type {model_type} after reshape"):
        layout_of(library_model(model_type))
