"""Runs that start from a folder that PEFT has saved: losses and gradients are PEFT's, in every layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import adapter_files
import parity_run
import pytest
import torch
import transformers
from converting import edit_tensors
from peft import PeftModel
from tiny_models import edit_json

from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import AdapterConfig
from retemper.engine.errors import UserError
from retemper.engine.evaluation import count_targets
from retemper.engine.parallel.process_group import Ranks

SAVED = ["model.embed_tokens", "model.norm"]
ADAPTERS = {
    "lora": AdapterConfig(kind="lora", rank=4, alpha=12.0, rslora=True),
    "dora": AdapterConfig(kind="lora", rank=4, alpha=12.0, dora=True, modules_to_save=SAVED),
}
LINEARS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def save_base(folder: Path) -> Path:
    """A tiny model in fp32."""
    config = {**parity_run.FAMILIES["qwen2"], "tie_word_embeddings": False, "pad_token_id": 0}
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, folders of PEFT for it, and the file of a run."""
    folder = tmp_path_factory.mktemp("start")
    save_base(folder / "base")
    for name, config in ADAPTERS.items():
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        adapter_files.peft_model(base, config, LINEARS, list(config.modules_to_save)).save_pretrained(folder / name)
    parity_run.write_run(folder, parity_run.Model("qwen2", tied=False, packed=False))
    return folder


def options(folder: Path, adapter: str, layout: str = "") -> list[str]:
    """Of the run that starts from the folder ``adapter``; "shard=2" is an option of the layout."""
    config = ADAPTERS[adapter]
    settings: dict[str, Any] = {
        "rank": config.rank, "alpha": config.alpha, "rslora": str(config.rslora).lower(),
        "dora": str(config.dora).lower(), "targets": [f"*.{name}" for name in LINEARS],
        "modules_to_save": config.modules_to_save, "initialize_from": folder / adapter, "kind": "lora",
    }  # fmt: skip
    return [
        *("--model.initialize_from", str(folder / "base"), "--model.architecture", "null"),
        *("--optimizer.learning_rate", "0.01", "--training.micro_batch_size", "4"),
        *(word for key, value in settings.items() for word in (f"--adapter.{key}", str(value))),
        *(word for axis in layout.split() for word in (f"--parallel.{axis.split('=')[0]}", axis.split("=")[1])),
    ]


def build(ranks: Ranks, folder: Path, more: list[str]) -> Any:
    return pretrain.build(parse_config(["--config", str(folder / "run.yaml"), *more]), ranks)


@pytest.fixture(scope="module")
def alone(one_rank: Ranks, folder: Path) -> dict[str, parity_run.Outcome]:
    """What one process does."""
    return {name: parity_run.five_steps(one_rank, folder / "run.yaml", options(folder, name)) for name in ADAPTERS}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_first_loss_and_gradients_are_those_of_peft(adapter, one_rank, folder, alone) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / adapter, is_trainable=True).train()
    run = build(one_rank, folder, options(folder, adapter))
    batches = run.data.micro_batches(0)
    num_targets = count_targets(batches, run.mesh)
    loss = 0.0
    for tokens, targets in ((batch.tokens.view(-1, 32), batch.targets.view(-1, 32)) for batch in batches):
        logits = model(input_ids=tokens).logits
        part = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / num_targets
        part.backward()
        loss += part.item()
    assert alone[adapter].losses[0] == pytest.approx(loss, rel=1e-5)
    expected = adapter_files.tensors_of(model, lambda parameter: parameter.grad)
    assert alone[adapter].gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (alone[adapter].gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize(
    ("adapter", "layout"), [("dora", "shard=2"), ("dora", "tensor=2"), ("lora", "tensor=2"), ("dora", "pipeline=2")]
)
def test_two_ranks_give_the_numbers_of_one(adapter, layout, two_ranks, folder, alone) -> None:
    found = two_ranks.run(parity_run.five_steps, folder / "run.yaml", options(folder, adapter, layout))
    actual, expected = parity_run.joined(found), alone[adapter]
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
    for ours, theirs in ((actual.gradients, expected.gradients), (actual.parameters, expected.parameters)):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


def test_a_resume_continues_from_the_checkpoint_without_the_folder(one_rank, folder, tmp_path) -> None:
    copy = shutil.copytree(folder / "lora", tmp_path / "adapter")
    more = [*options(folder, "lora"), "--adapter.initialize_from", str(copy), "--run_folder"]
    parity_run.run_until(one_rank, folder / "run.yaml", [*more, str(tmp_path / "whole")], 99)
    parity_run.run_until(one_rank, folder / "run.yaml", [*more, str(tmp_path / "resumed")], 4)
    shutil.rmtree(copy)
    parity_run.run_until(one_rank, folder / "run.yaml", [*more, str(tmp_path / "resumed")], 99)
    whole, resumed = (parity_run.checkpoint(tmp_path / name, parity_run.STEPS) for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_base_than_that_of_the_folder_is_refused(one_rank, folder, tmp_path) -> None:
    other = shutil.copytree(folder / "base", tmp_path / "other")
    edit_tensors(other / "model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(1.01))
    more = [*options(folder, "lora"), "--model.initialize_from", str(other)]
    with pytest.raises(
        UserError, match=r"^model.initialize_from: \S+other has other weights .* than the base of [^\n]*$"
    ):
        build(one_rank, folder, more)
    record = tmp_path / "adapter"
    shutil.copytree(folder / "lora", record)
    name = {"base_model_name_or_path": "organization/model"}
    edit_json(record / "adapter_config.json", lambda content: content.update(name))
    build(one_rank, folder, [*options(folder, "lora"), "--adapter.initialize_from", str(record)])


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("--model.initialize_from null --model.architecture {folder}/base", "but model.initialize_from is null; name"),
        ("--adapter.kind null", "adapter.kind is null, so there is no adapter"),
        ("--adapter.rank 8", "adapter.rank is 8 here and 4 there; set adapter.rank to 4"),
    ],
)
def test_settings_without_a_meaning_are_refused(more, line, one_rank, folder) -> None:
    with pytest.raises(UserError) as caught:
        build(one_rank, folder, [*options(folder, "lora"), *more.format(folder=folder).split()])
    assert line in str(caught.value) and "\n" not in str(caught.value)
