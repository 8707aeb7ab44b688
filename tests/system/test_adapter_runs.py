"""Runs that train an adapter: what their checkpoints hold, how they resume, and what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path

import hf_starts
import pytest
import sampling_run
import tiny_run
import torch
from safetensors.torch import load_file, save_file

from retemper.engine import pretrain
from retemper.engine.errors import UserError
from retemper.engine.weights.base_identity import content_hash
from retemper.engine.weights.checkpoint.manifest import read_manifest
from retemper.engine.weights.checkpoint.tensors import stored_tensors
from retemper.engine.weights.hugging_face.initial import open_weights

STEPS = 8
SAVED = {"model.norm.weight"}
ADAPTER = [
    *("--model.architecture", "null", "--adapter.kind", "lora", "--adapter.rank", "4", "--adapter.dropout", "0.2"),
    *("--adapter.targets", "['*_proj']", "--adapter.modules_to_save", "[model.norm]", "--adapter.dora", "true"),
    *("--training.train_tokens", str(STEPS * 8 * 32), "--training.eval_interval", "4"),
    *("--checkpoint.save_interval", "3"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A Hugging Face folder of several bf16 files."""
    return hf_starts.save_model(tmp_path_factory.mktemp("base") / "hf")


@pytest.fixture(scope="module")
def options(base) -> list[str]:
    """Of the run with an adapter."""
    return [*ADAPTER, "--model.initialize_from", str(base)]


@pytest.fixture(scope="module")
def undisturbed(one_rank, run_file, options, tmp_path_factory) -> Path:
    """Run folder of the whole run."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    tiny_run.train(one_rank, run_file, [*options, "--run_folder", str(folder)])
    return folder


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def assert_same_end(one: Path, other: Path, step: int = STEPS) -> None:
    mine, theirs = (tiny_run.tensors_of(checkpoint(folder, step)) for folder in (one, other))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def in_one_file(base: Path, folder: Path, change: float = 0.0) -> Path:
    """The same weights divided into files in another way; one element of one tensor may differ."""
    folder.mkdir()
    tensors = {name: tensor for path in sorted(base.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += change
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    return folder


def test_checkpoint_holds_what_learns_and_the_identity_of_the_base(undisturbed, base):
    last = checkpoint(undisturbed, STEPS)
    stored = stored_tensors(last)
    learns = {name for name in stored if not name.startswith("optimizer.")}
    linears = 2 * 7
    assert sum(".lora_A.weight" in name for name in learns) == linears and learns >= SAVED
    assert len(learns) == 3 * linears + len(SAVED)
    assert {name for name in stored if name not in learns} == {
        f"optimizer.{state}.{name}" for state in ("step", "exp_avg", "exp_avg_sq") for name in learns
    }
    assert {stored[name].dtype for name in learns} == {torch.float32}
    manifest = read_manifest(last)
    assert manifest.base["folder"] == str(base.resolve()) and len(manifest.base["hash"]) == 32
    said = (undisturbed / "log.txt").read_text() if (undisturbed / "log.txt").exists() else ""
    assert not said or "adapter     DoRA, rank 4" in said


def test_resumed_bitwise_from_a_base_in_other_files(one_rank, run_file, options, undisturbed, base, tmp_path):
    folder = ["--run_folder", str(tmp_path / "run")]
    tiny_run.train_until(one_rank, run_file, [*options, *folder], 5)
    elsewhere = in_one_file(base, tmp_path / "base")
    tiny_run.train(one_rank, run_file, [*options, *folder, "--model.initialize_from", str(elsewhere)])
    assert tiny_run.curve(tmp_path / "run") == tiny_run.curve(undisturbed)
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_base_is_resumed_bitwise(kind, one_rank, run_file, options, base, tmp_path):
    """The codes are computed again from the base, whose hash is that of its files, and are in no checkpoint."""
    options = [*options, "--adapter.quantize_base", kind]
    undisturbed, resumed = (tmp_path / name for name in ("undisturbed", "resumed"))
    tiny_run.train(one_rank, run_file, [*options, "--run_folder", str(undisturbed)])
    tiny_run.train_until(one_rank, run_file, [*options, "--run_folder", str(resumed)], 5)
    tiny_run.train(one_rank, run_file, [*options, "--run_folder", str(resumed)])
    assert tiny_run.curve(resumed) == tiny_run.curve(undisturbed)
    assert_same_end(resumed, undisturbed)
    stored = stored_tensors(checkpoint(undisturbed, STEPS))
    learns = {name for name in stored if not name.startswith("optimizer.")}
    assert len(learns) == 3 * 2 * 7 + len(SAVED)
    assert read_manifest(checkpoint(undisturbed, STEPS)).base["hash"] == content_hash(open_weights(base).weights)


def test_another_base_is_refused(one_rank, run_file, options, undisturbed, base, tmp_path):
    elsewhere = in_one_file(base, tmp_path / "base", change=1.0)
    run = ["--run_folder", str(tiny_run.copy_of(undisturbed, tmp_path / "run")), "--training.train_tokens", "2560"]
    line = tiny_run.refusal(one_rank, run_file, [*options, *run, "--model.initialize_from", str(elsewhere)])
    assert f"{elsewhere} has other weights" in line and str(base) in line and "\n" not in line


@pytest.mark.parametrize(
    ("changes", "here", "there"),
    [
        ("rank 8", "adapter.rank is 8", "with 4"),
        ("alpha 1", "adapter.alpha is 1", "with 32"),
        ("dora false", "adapter.dora is false", "with true"),
        ("targets ['*.q_proj']", "adapter.targets is ['*.q_proj']", "with ['*_proj']"),
        ("quantize_base nf4", "adapter.quantize_base is nf4", "with none"),
        ("modules_to_save []", "adapter.modules_to_save is []", "with ['model.norm']"),
    ],
)
def test_another_adapter_is_refused(changes, here, there, one_rank, run_file, options, undisturbed):
    key, value = changes.split(" ", 1)
    overrides = [*options, "--run_folder", str(undisturbed), f"--adapter.{key}", value]
    line = tiny_run.refusal(one_rank, run_file, overrides)
    assert here in line and there in line and "\n" not in line


def test_run_without_an_adapter_is_refused(one_rank, run_file, undisturbed):
    overrides = ["--run_folder", str(undisturbed), "--training.train_tokens", "2560"]
    line = tiny_run.refusal(one_rank, run_file, overrides)
    assert "adapter.kind is null" in line and "was trained with lora" in line and "\n" not in line


def test_failing_step_saves_what_learns(one_rank, run_file, options, undisturbed, tmp_path):
    overrides = [*options, "--run_folder", str(tmp_path)]
    run = pretrain.build(tiny_run.configure(run_file, *overrides), one_rank)

    def fail():
        if run.progress.step == 5:
            raise RuntimeError("an illegal kernel")

    tiny_run.before_step(run, fail)
    with pytest.raises(RuntimeError, match="illegal"):
        pretrain.train(run)
    manifest = read_manifest(checkpoint(tmp_path, 5))
    assert manifest.emergency and manifest.base == read_manifest(checkpoint(undisturbed, STEPS)).base
    tiny_run.train(one_rank, run_file, overrides)
    assert tiny_run.curve(tmp_path) == tiny_run.curve(undisturbed)
    assert_same_end(tmp_path, undisturbed)


def test_rollback_restores_what_learns(one_rank, run_file, options, undisturbed, tmp_path):
    run = pretrain.build(tiny_run.configure(run_file, *options, "--run_folder", str(tmp_path)), one_rank)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for step in range(2):
        batches = run.data.micro_batches(step * 8)
        pretrain.one_step(run, batches, float(sum(batch.num_targets for batch in batches)))
    run.optimizer.zero_grad(set_to_none=True)
    target = checkpoint(undisturbed, 6)
    run.start.at_checkpoint(target, read_manifest(target)).load_into(run.model, run.optimizer)
    there = tiny_run.tensors_of(target)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, there[name] if parameter.requires_grad else before[name]), name


def without_adapter(options: list[str]) -> list[str]:
    """The other options of the same run."""
    pairs = list(zip(options[::2], options[1::2], strict=True))
    return [word for pair in pairs if not pair[0].startswith("--adapter") for word in pair]


def test_evaluation_is_that_of_the_merged_weights_without_dropout(one_rank, run_file, options, tmp_path):
    """The merged matrix in float64, by the definition of the paper."""
    overrides = [*options, "--adapter.dora", "false", "--adapter.dropout", "0.5", "--run_folder", str(tmp_path)]
    run = pretrain.build(tiny_run.configure(run_file, *overrides), one_rank)

    def evaluate(some):
        return some.validation.evaluate(some.forward_backward, 0, lambda: False, lambda *lines: None)

    for step in range(3):
        batches = run.data.micro_batches(step * 8)
        pretrain.one_step(run, batches, float(sum(batch.num_targets for batch in batches)))
    mine = {name: p.detach().double() for name, p in run.model.named_parameters()}
    plain = pretrain.build(
        tiny_run.configure(run_file, *without_adapter(overrides), "--run_folder", str(tmp_path / "plain")), one_rank
    )
    before = evaluate(plain)
    with torch.no_grad():
        for name, parameter in plain.model.named_parameters():
            module, merged = name.removesuffix(".weight"), mine[name]
            if f"{module}.lora_A.weight" in mine:
                merged = merged + 32 / 4 * mine[f"{module}.lora_B.weight"] @ mine[f"{module}.lora_A.weight"]
            parameter.copy_(merged)
    after = evaluate(run)
    assert after == pytest.approx(evaluate(plain), rel=1e-5)
    assert all(abs(after[name] - before[name]) > 1e-3 for name in before)


def test_prompts_are_continued_with_the_adapter(one_rank, tmp_path):
    """As by the model with the merged weights; the adapter's dropout is off."""
    path = sampling_run.write_run(tmp_path)
    adapter = ["--adapter.kind", "lora", "--adapter.rank", "4", "--adapter.dropout", "0.5"]
    folders = [["--run_folder", str(tmp_path / name)] for name in ("plain", "adapted")]
    plain, adapted = (
        pretrain.build(tiny_run.configure(path, *sampling_run.SAMPLING, *options, *folder), one_rank)
        for options, folder in zip(([], adapter), folders, strict=True)
    )

    def texts(run):
        return run.samples.generate(run.model, run.forward_backward, 0, lambda: False, lambda *lines: None)

    unchanged = texts(plain)
    assert texts(adapted) == unchanged
    weights, matrices = dict(plain.model.named_parameters()), dict(adapted.model.named_parameters())
    with torch.no_grad():
        for name in weights:
            module = name.removesuffix(".weight")
            if f"{module}.lora_B.weight" in matrices:
                matrices[f"{module}.lora_B.weight"].normal_(0.0, 0.1)
                product = matrices[f"{module}.lora_B.weight"] @ matrices[f"{module}.lora_A.weight"]
                weights[name].add_(product, alpha=32 / 4)
    assert texts(adapted) == texts(plain) != unchanged


def test_bf16_holds_the_base_once_and_adapters_in_fp32(two_ranks, one_rank, run_file, options, tmp_path):
    overrides = [*options, "--training.precision", "bf16", "--run_folder"]
    alone = dtypes_and_losses(one_rank, run_file, [*overrides, str(tmp_path / "alone")])
    shared = two_ranks.run(dtypes_and_losses, run_file, [*overrides, str(tmp_path / "shared")])
    assert alone[0] == {(True, torch.float32), (False, torch.bfloat16)} == shared[0][0]
    assert shared[0][1][0] == pytest.approx(alone[1][0], rel=1e-6)
    assert all(math.isfinite(loss) for _, losses in shared for loss in losses)


def dtypes_and_losses(ranks, path, overrides):
    """(Trained, dtype) of the parameters, and the losses of two steps."""
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
    losses = []
    for step in range(2):
        batches = run.data.micro_batches(step * 8)
        targets = ranks.all_reduce(tiny_run.count_targets(batches, run.mesh))
        losses.append(ranks.all_reduce(pretrain.one_step(run, batches, targets).loss.item()))
    return {(p.requires_grad, p.dtype) for _, p in run.model.named_parameters()}, losses


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        ("--adapter.kind lora --training.trainable embeddings", "training.trainable is embeddings, but adapter.kind"),
        ("--adapter.rank 8", "adapter.rank is 8, but adapter.kind is null"),
        ("--adapter.kind lora --adapter.dropout 1", "adapter.dropout is 1.0; it must be in [0, 1)"),
        ("--adapter.kind lora --adapter.targets []", "adapter.targets is empty"),
        ("--adapter.kind lora --training.fuse_projections true", "does not work with adapter.kind lora"),
        ("--adapter.kind lora --adapter.targets ['*.nothing']", "which matches no linear layer"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides, fragments, one_rank, run_file, tmp_path):
    with pytest.raises(UserError) as refusal:
        config = tiny_run.configure(run_file, "--run_folder", str(tmp_path), *overrides.split())
        pretrain.build(config, one_rank)
    assert fragments in str(refusal.value) and "\n" not in str(refusal.value)


def test_stage_without_trained_parameters_is_refused(two_ranks, run_file, options, tmp_path):
    targets = ["--adapter.targets", "['*.layers.0.*']", "--adapter.modules_to_save", "[]"]
    layout = ["--parallel.pipeline", "2", "--training.micro_batch_size", "1", "--run_folder", str(tmp_path)]
    lines = two_ranks.run(tiny_run.refusal, run_file, [*options, *targets, *layout])
    assert all("leave stage 1 of parallel.pipeline 2 without trained parameters" in line for line in lines)


def test_manifest_of_a_run_without_an_adapter_has_no_base(reference):
    assert "base" not in json.loads((checkpoint(reference, 20) / "manifest.json").read_text())


def test_a_random_base_cannot_be_exported(one_rank, run_file, tmp_path):
    random = ["--adapter.kind", "lora", "--training.train_tokens", "1024", "--run_folder", str(tmp_path / "run")]
    for key, value in (("export_hf", "true"), ("export_best", "true"), ("model_folders", "on")):
        line = tiny_run.refusal(
            one_rank, run_file, [*random, "--checkpoint.keep_best", "true", f"--checkpoint.{key}", value]
        )
        assert line.startswith(
            f"checkpoint.{key} is {value}, but adapter.kind is lora and model.initialize_from is null"
        )
        assert "\n" not in line
    tiny_run.train(one_rank, run_file, [*random, "--checkpoint.model_folders", "auto"])
    assert not (tmp_path / "run/final_model").exists()


def test_what_has_no_adapter_and_where_nothing_is_are_refused_by_name(one_rank, run_file, base, tmp_path):
    start = ["--model.architecture", "null", "--training.train_tokens", "1024", "--run_folder", str(tmp_path / "run")]
    line = tiny_run.refusal(one_rank, run_file, [*start, "--model.initialize_from", f"{base}/none"])
    assert line.startswith(f"model.initialize_from is {base}/none, which does not exist") and "\n" not in line
    tiny_run.train(one_rank, run_file, [*start, "--model.initialize_from", str(base)])
    line = tiny_run.refusal(
        one_rank, run_file, [*start, "--model.initialize_from", str(base), "--adapter.kind", "lora"]
    )
    assert "adapter.kind is lora" in line and "was trained without an adapter" in line
