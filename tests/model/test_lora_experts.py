"""Adapters of experts: each expert computes with its own W + s B A, in any layout, after a resume and in exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mixture_folders
import parity_run
import pytest
import tiny_run
import torch
import transformers
from torch import Tensor
from torch.func import functional_call

from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import AdapterConfig
from retemper.engine.evaluation import count_targets
from retemper.engine.model.adapters import adapter_parameters
from retemper.engine.model.implementations import architecture_of
from retemper.engine.observe.start_summary import describe_start
from retemper.engine.parallel import trainable
from retemper.engine.weights.checkpoint.tensors import stored_tensors

RANK, ALPHA, STEPS = 4, 12.0, 4
LORA = ["--adapter.kind", "lora", "--adapter.rank", str(RANK), "--adapter.alpha", str(ALPHA)]
DROPOUT = ["--adapter.dropout", "0.25", "--adapter.targets", "['*.experts.*']"]
"""At experts only, so that nothing else draws masks."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return mixture_folders.save_mixture(tmp_path_factory.mktemp("base") / "hf", "qwen2_moe", vocab_size=96)


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory) -> Path:
    return parity_run.write_run(tmp_path_factory.mktemp("run"), parity_run.Model("qwen2", tied=False, packed=False))


def options(base: Path, *more: str) -> list[str]:
    start = ["--model.initialize_from", str(base), "--model.architecture", "null"]
    return [*start, *LORA, "--optimizer.learning_rate", "0.01", "--training.micro_batch_size", "4", *more]


class Reference:
    """The model of transformers, computed with W + s B A for adapters that are trained here."""

    def __init__(self, folder: Path, scaling: float):
        options = {"dtype": torch.float64, "experts_implementation": "eager"}  # its grouped products have no float64
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        self._scaling = scaling

    def weights(self, adapters: dict[str, Tensor]) -> dict[str, Tensor]:
        """All parameters; gradients flow back to ``adapters``, which have our names."""
        weights = dict(self._model.named_parameters())
        for name, a in adapters.items():
            module, found, _ = name.partition(".lora_A.")
            if not found:
                continue
            update = self._scaling * adapters[f"{module}.lora_B.weight"] @ a
            prefix, experts, kind = module.partition(".experts.")
            if not experts:
                weights[f"{module}.weight"] = weights[f"{module}.weight"] + update
            elif kind == "down_proj":
                weights[f"{prefix}.experts.down_proj"] = weights[f"{prefix}.experts.down_proj"] + update
            else:
                halves = [torch.zeros_like(update), torch.zeros_like(update)]
                halves[kind == "up_proj"] = update
                fused = f"{prefix}.experts.gate_up_proj"
                weights[fused] = weights[fused] + torch.cat(halves, 1)
        return weights

    def logits(self, adapters: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return functional_call(self._model, self.weights(adapters), (), {"input_ids": tokens[None]}).logits[0]


def adapters_of(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().double().requires_grad_() for n, p in model.named_parameters() if ".lora_" in n}


@pytest.mark.parametrize("rslora", [False, True])
def test_losses_and_gradients_are_those_of_transformers_with_merged_weights(rslora, one_rank, base, run_yaml, tmp_path):
    """After the first step, A and B of every layer have gradients. The routers have no adapter."""
    one = ["--training.micro_batch_size", "1", "--training.router_aux_loss_coef", "0", "--run_folder", str(tmp_path)]
    arguments = options(base, *one, "--adapter.rslora", str(rslora).lower())
    run = pretrain.build(parse_config(["--config", str(run_yaml), *arguments]), one_rank)
    reference = Reference(base, ALPHA / (RANK**0.5 if rslora else RANK))
    kept: dict[str, Tensor] = {}
    accumulate = run.forward_backward.accumulate_gradients

    def keeping(*given):
        loss = accumulate(*given)
        kept.update({name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None})
        return loss

    run.forward_backward.accumulate_gradients = keeping
    for step in range(STEPS):
        leaves, total = adapters_of(run.model), 0.0
        batches = run.data.micro_batches(step * parity_run.GLOBAL_BATCH)
        num_targets = count_targets(batches, run.mesh)
        for batch in batches:
            logits = reference.logits(leaves, batch.tokens)
            part = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum") / num_targets
            part.backward()
            total += part.item()
        assert pretrain.one_step(run, batches, num_targets).loss.item() == pytest.approx(total, rel=1e-5)
        assert kept.keys() == leaves.keys()
        for name, leaf in leaves.items():
            assert (kept[name] - leaf.grad).norm() <= 1e-4 * leaf.grad.norm() + 1e-9, name
            assert leaf.grad.any() == (step > 0 or "lora_B" in name)
    layer = {name.partition(".lora_")[0].removeprefix("model.layers.1.") for name in kept if ".layers.1." in name}
    assert {f"mlp.experts.{kind}_proj" for kind in ("gate", "up", "down")} < layer and "mlp.gate" not in layer


def test_description_is_what_is_built(one_rank, base, run_yaml, tmp_path):
    run = pretrain.build(
        parse_config(["--config", str(run_yaml), *options(base), "--run_folder", str(tmp_path)]), one_rank
    )
    found = adapter_parameters(run.start.architecture, run.config.adapter)
    assert {name: tuple(p.shape) for name, p in run.model.named_parameters() if p.requires_grad} == found.trained
    assert found.trained["model.layers.0.mlp.experts.down_proj.lora_A.weight"] == (6, RANK, 24)
    assert found.trained["model.layers.0.mlp.experts.down_proj.lora_B.weight"] == (6, 32, RANK)
    assert found.num_frozen == sum(p.numel() for p in run.model.parameters() if not p.requires_grad)
    experts = sum(p.numel() for name, p in run.model.named_parameters() if ".experts." in name and ".lora_" in name)
    others = sum(p.numel() for name, p in run.model.named_parameters() if ".experts." not in name and ".lora_" in name)
    learning = trainable.learning(run.start.architecture, run.config.training, run.config.adapter)
    assert learning.added == others + experts * 2 // 6  # a token uses two of six experts
    a = dict(run.model.named_parameters())["model.layers.0.mlp.experts.down_proj.lora_A.weight"]
    bound = 1 / 24**0.5  # of nn.Linear, by its inputs
    assert 0.95 * bound < a.abs().max() <= bound


def assert_same(actual, expected):
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
    for ours, theirs in ((actual.gradients, expected.gradients), (actual.parameters, expected.parameters)):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


@pytest.fixture(scope="module")
def with_dropout(one_rank, base, run_yaml):
    return parity_run.five_steps(one_rank, run_yaml, options(base, *DROPOUT))


def test_dropout_changes_what_is_learned_and_recomputation_repeats_its_masks(with_dropout, one_rank, base, run_yaml):
    without = parity_run.five_steps(one_rank, run_yaml, options(base, *DROPOUT[2:]))
    assert without.losses[0] == with_dropout.losses[0] and without.losses[1] != with_dropout.losses[1]
    again = parity_run.five_steps(one_rank, run_yaml, options(base, *DROPOUT, "--parallel.recompute", "full"))
    assert again.losses == with_dropout.losses
    assert all(torch.equal(again.parameters[name], value) for name, value in with_dropout.parameters.items())


@pytest.mark.parametrize("layout", ["shard", "context"])
def test_two_ranks_give_the_numbers_of_one(layout, with_dropout, two_ranks, base, run_yaml):
    """Masks are functions of token and expert."""
    found = two_ranks.run(parity_run.five_steps, run_yaml, options(base, *DROPOUT, f"--parallel.{layout}", "2"))
    assert_same(parity_run.joined(found), with_dropout)


def short(base: Path, folder: Path, *more: str) -> list[str]:
    steps = ["--training.train_tokens", str(STEPS * 8 * 32), "--checkpoint.save_interval", "2", "--run_folder"]
    return options(base, "--adapter.dropout", "0.1", *steps, str(folder), *more)


def test_checkpoints_hold_the_adapter_resume_bitwise_and_exports_have_merged_experts(
    one_rank, base, run_yaml, tmp_path
):
    export = ["--checkpoint.export_hf", "true"]
    tiny_run.train(one_rank, run_yaml, short(base, tmp_path / "first", *export))
    tiny_run.train_until(one_rank, run_yaml, short(base, tmp_path / "again"), 3)
    tiny_run.train(one_rank, run_yaml, short(base, tmp_path / "again"))
    last = f"checkpoints/step-{STEPS:08d}"
    names = [name for name in stored_tensors(tmp_path / "first" / last) if not name.startswith("optimizer.")]
    assert names and all(".lora_" in name for name in names)
    first, again = (tiny_run.tensors_of(tmp_path / name / last) for name in ("first", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)

    adapters = {name: first[name].double() for name in names}
    tokens = mixture_folders.TOKENS[0] % 96
    with torch.no_grad():
        expected = Reference(base, ALPHA / RANK).logits(adapters, tokens)
        exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first/hf" / last[12:])
        found = exported.eval()(input_ids=tokens[None]).logits[0]
        start = Reference(base, 0.0).logits(adapters, tokens)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max() < (start - expected).abs().max()


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--adapter.dora", "true"], "DoRA is not implemented"),
        (["--adapter.export", "peft", "--checkpoint.export_hf", "true"], "PEFT has other forms for experts"),
    ],
)
def test_refused_in_one_line_at_the_start(more, line, one_rank, base, run_yaml, tmp_path):
    said = tiny_run.refusal(one_rank, run_yaml, short(base, tmp_path, *more))
    assert line in said and "\n" not in said


def test_dora_and_the_form_of_peft_remain_for_other_layers(base):
    others = AdapterConfig(kind="lora", dora=True, targets=["*.self_attn.*", "*.shared_expert.*"])
    assert adapter_parameters(architecture_of(base), others).modules


@pytest.mark.slow
def test_a_quantized_base_keeps_its_experts_and_says_how_large_they_are(one_rank, base, run_yaml, tmp_path):
    arguments = options(base, "--run_folder", str(tmp_path), "--adapter.quantize_base", "int8")
    run = pretrain.build(parse_config(["--config", str(run_yaml), *arguments]), one_rank)
    assert any("its adapted matrices in int8, but its experts stay in fp32" in line for line in describe_start(run))
