"""Bases in 4 and 8 bits: the losses and gradients of the PEFT library with bitsandbytes, and of dequantized weights."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import parity_run
import pytest
import sampling_run
import tiny_run
import torch
import transformers
from safetensors.torch import load_file, save_file

from retemper.engine import pretrain, start_kinds
from retemper.engine.config import packages
from retemper.engine.config.parser import parse_config
from retemper.engine.errors import UserError
from retemper.engine.evaluation import count_targets
from retemper.engine.model.dtypes import DTYPES
from retemper.engine.model.quantized import import_bitsandbytes, quantized_bytes
from retemper.engine.parallel import adapter

bitsandbytes = import_bitsandbytes()  # before peft, which imports it otherwise

from peft import LoraConfig, get_peft_model  # noqa: E402

RANK, ALPHA, STEPS = 4, 12.0, 3
HIDDEN = 64
"""Rows of 64 elements are blocks of NF4."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A Hugging Face folder with biases, in fp32."""
    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 192, "tie_word_embeddings": False, "pad_token_id": 0}
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(**{**parity_run.FAMILIES["qwen2"], **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def build(base: Path, folder: Path, ranks: Any, *options: str):
    """A run with an adapter, before its first step."""
    folder.mkdir(exist_ok=True)
    path = parity_run.write_run(folder, parity_run.Model("qwen2", tied=False, packed=False))
    overrides = [
        *("--model.initialize_from", str(base), "--model.architecture", "null", "--adapter.kind", "lora"),
        *("--adapter.rank", str(RANK), "--adapter.alpha", str(ALPHA), "--training.warmup_tokens", "0"),
        *("--optimizer.schedule", "constant", "--optimizer.learning_rate", "0.005"),
        *options,
    ]
    return pretrain.build(parse_config(["--config", str(path), *overrides]), ranks)


def of_base(model: Any, make: Any) -> None:
    """Replace the linear layers of the blocks of transformers' ``model`` by ``make(layer)``."""
    for block in model.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, torch.nn.Linear):
                owner, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(owner), leaf, make(module))


def in_nf4(layer: torch.nn.Linear) -> torch.nn.Module:
    """The layer as bitsandbytes makes it for QLoRA."""
    sizes = layer.in_features, layer.out_features
    made = bitsandbytes.nn.Linear4bit(*sizes, layer.bias is not None, torch.float32, True, "nf4")
    made.weight = bitsandbytes.nn.Params4bit(
        layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    made.bias = layer.bias
    return made.to("cpu")


def with_int8_values(layer: torch.nn.Linear) -> torch.nn.Linear:
    """The layer with the values of the codes of bitsandbytes' own 8-bit parameter."""
    weight = bitsandbytes.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    weight = weight.to("cpu")
    with torch.no_grad():
        layer.weight.copy_(weight.CB.double() * weight.SCB.double()[:, None] / 127)
    return layer


PEFT_BASE = {"nf4": in_nf4, "int8": with_int8_values}


def peft_model(base: Path, kind: str, dora: bool) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    of_base(model, PEFT_BASE[kind])
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=dora, target_modules=r".*\.layers\..*_proj", bias="none")
    return get_peft_model(model, config).train()


def our_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace("vector.default.weight", "vector").replace(".default", "")


@pytest.mark.parametrize("implementation", ["native", "transformers"])
@pytest.mark.parametrize(("kind", "dora"), [("nf4", False), ("nf4", True), ("int8", False)])
def test_trains_as_peft_and_bitsandbytes_do(kind, dora, implementation, base, one_rank, tmp_path):
    options = ["--adapter.quantize_base", kind, "--adapter.dora", str(dora).lower()]
    run = build(base, tmp_path, one_rank, *options, "--model.implementation", implementation)
    model = peft_model(base, kind, dora)
    theirs = {our_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    mine = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    assert mine.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            if name.endswith("vector"):
                torch.testing.assert_close(mine[name], parameter, rtol=1e-6, atol=0)
            parameter.copy_(mine[name])
    kept, accumulate = {}, run.forward_backward.accumulate_gradients

    def keeping(*arguments):
        loss = accumulate(*arguments)
        kept.update({name: parameter.grad.clone() for name, parameter in mine.items()})
        return loss

    run.forward_backward.accumulate_gradients = keeping
    for step in range(STEPS):
        batches = run.data.micro_batches(step * parity_run.GLOBAL_BATCH)
        num_targets, loss = count_targets(batches, run.mesh), 0.0
        for batch in batches:
            logits = model(input_ids=batch.tokens[None]).logits[0]
            part = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum") / num_targets
            part.backward()
            loss += part.item()
        assert pretrain.one_step(run, batches, num_targets).loss.item() == pytest.approx(loss, rel=1e-5)
        for name, parameter in theirs.items():
            bound = 1e-5 * parameter.grad.abs().max().item()
            torch.testing.assert_close(
                kept[name], parameter.grad, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
            )
            parameter.data.copy_(mine[name].detach())
            parameter.grad = None


def dequantized(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The values of ``weight`` after bitsandbytes has quantized it."""
    if kind == "nf4":
        codes, state = bitsandbytes.functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        return bitsandbytes.functional.dequantize_4bit(codes, state)
    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    return (codes.float() * (scales / 127)[:, None]).to(weight.dtype)


def dequantized_base(base: Path, folder: Path, kind: str, dtype: torch.dtype) -> Path:
    """The same base, whose matrices of the blocks have the values of their codes."""
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight"):
                tensors[name] = dequantized(tensor.to(dtype), kind).float()
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
    return folder


def three_steps(run: Any) -> tuple[list[float], dict[str, torch.Tensor], list[float]]:
    """Losses, what has learned, and losses of an evaluation."""
    losses = []
    for step in range(STEPS):
        batches = run.data.micro_batches(step * parity_run.GLOBAL_BATCH)
        losses.append(pretrain.one_step(run, batches, count_targets(batches, run.mesh)).loss.item())
    evaluated = run.forward_backward.evaluate(run.data.micro_batches(0)).tolist()
    return losses, {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}, evaluated


@pytest.mark.parametrize(
    ("kind", "precision", "options"),
    [
        ("nf4", "bf16", ["--parallel.recompute", "full"]),
        ("nf4", "fp32", ["--adapter.dropout", "0.2", "--parallel.recompute", "selective"]),
        ("nf4", "fp16", []),
        ("int8", "bf16", ["--training.micro_batch_size", "4"]),
    ],
)
def test_is_bitwise_an_adapter_of_the_dequantized_base(kind, precision, options, base, one_rank, tmp_path):
    """In training, evaluation, recomputation and with several micro-batches."""
    options = [*options, "--training.precision", precision]
    run = build(base, tmp_path / "one", one_rank, "--adapter.quantize_base", kind, *options)
    other = dequantized_base(base, tmp_path / "base", kind, DTYPES[precision])
    plain = build(other, tmp_path / "other", one_rank, *options)
    losses, learned, evaluated = three_steps(run)
    expected_losses, expected, expected_evaluated = three_steps(plain)
    assert losses == expected_losses and evaluated == expected_evaluated
    assert learned.keys() == expected.keys()
    assert all(torch.equal(learned[name], expected[name]) for name in expected)


@pytest.mark.parametrize("implementation", ["native", "transformers"])
def test_random_weights_are_quantized_as_well(implementation, one_rank, tmp_path):
    path = parity_run.write_run(tmp_path, parity_run.Model("qwen2", tied=True, packed=False))
    options = ["--adapter.kind", "lora", "--model.implementation", implementation]
    plain, run = (
        pretrain.build(parse_config(["--config", str(path), *options, "--adapter.quantize_base", kind]), one_rank)
        for kind in ("none", "nf4")
    )
    weights = dict(plain.model.named_parameters())
    layers, held = run.model.quantized_layers, dict(run.model.named_parameters())
    assert layers.keys() == {name for name in weights if name.endswith("_proj.weight")} and layers.keys().isdisjoint(
        held
    )
    for name, weight in weights.items():
        expected = dequantized(weight.detach(), "nf4") if name in layers else weight
        assert torch.equal(layers[name].weight if name in layers else held[name], expected), name


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_one_matrix_at_a_time_is_whole_while_loading(kind, base, one_rank, tmp_path, monkeypatch):
    whole, load = [], start_kinds.load_hf_tensors

    def watched(weights, tensors):
        assert all(reference() is None for _, reference in whole)
        whole.extend((name, weakref.ref(tensor)) for name, tensor in tensors.items() if name.endswith("_proj.weight"))
        load(weights, tensors)

    monkeypatch.setattr(start_kinds, "load_hf_tensors", watched)
    layers = build(base, tmp_path, one_rank, "--adapter.quantize_base", kind).model.quantized_layers
    assert [name for name, _ in whole] == list(layers) and len(layers) == 4 * 7
    for layer in layers.values():
        held = sum(buffer.numel() * buffer.itemsize for buffer in layer.buffers(recurse=False))
        assert held == quantized_bytes(kind, layer.out_features, layer.in_features)


def test_prompts_are_continued_as_by_the_dequantized_weights(one_rank, tmp_path):
    path = sampling_run.write_run(tmp_path)
    adapter = ["--adapter.kind", "lora", "--adapter.quantize_base", "nf4"]
    folders = [["--run_folder", str(tmp_path / name)] for name in ("plain", "quantized")]
    plain, run = (
        pretrain.build(tiny_run.configure(path, *sampling_run.SAMPLING, *options, *folder), one_rank)
        for options, folder in zip(([], adapter), folders, strict=True)
    )
    weights, layers = dict(plain.model.named_parameters()), run.model.quantized_layers
    with torch.no_grad():
        for name, layer in layers.items():
            weights[name].copy_(layer.weight)

    def texts(some):
        return some.samples.generate(some.model, some.forward_backward, 0, lambda: False, lambda *lines: None)

    assert texts(run) == texts(plain)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--parallel.cpu_offload", "true"], "adapter.quantize_base is nf4, but parallel.cpu_offload is true"),
        (
            ["--parallel.cpu_offload", "optimizer"],
            "but parallel.cpu_offload is optimizer, and a quantized base",
        ),
        (["--training.compile", "on"], "training.compile is on, but adapter.quantize_base is nf4"),
        (["--adapter.kind", "null"], "adapter.quantize_base is nf4, but adapter.kind is null"),
        (["--training.fuse_projections", "true"], "training.fuse_projections"),
    ],
)
def test_settings_that_do_not_work_are_refused(options, fragment, base, one_rank, tmp_path):
    with pytest.raises(UserError) as refusal:
        build(base, tmp_path, one_rank, "--adapter.quantize_base", "nf4", *options)
    assert fragment in str(refusal.value) and "\n" not in str(refusal.value)


def test_several_ranks_and_a_missing_package_are_refused(base, one_rank, tmp_path, monkeypatch):
    run = build(base, tmp_path, one_rank, "--adapter.quantize_base", "nf4")
    with pytest.raises(UserError, match=r"adapter\.quantize_base is nf4 on 2 ranks.*use one rank"):
        adapter.check(run.start.architecture, run.config, 2)
    monkeypatch.setattr(packages, "_is_installed", lambda module: False)
    with pytest.raises(UserError, match=r"bitsandbytes is not installed: pip install '.*\[qlora\]'"):
        adapter.check(run.start.architecture, run.config, 1)


def test_import_needs_no_kernels_of_the_hub():
    """bitsandbytes asks for one when it is imported on some CPUs."""
    program = (
        "import sys; from retemper.engine.model.quantized import import_bitsandbytes as get; get(); "
        "print([name for name in ('kernels', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n" and "kernels-community" not in done.stderr
