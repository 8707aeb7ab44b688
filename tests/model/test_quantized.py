"""Bases in 4 and 8 bits: the losses and gradients of the PEFT library with bitsandbytes, and of dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parity_run
import pytest
import tiny_run
import torch
import transformers

from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.errors import UserError
from retemper.engine.evaluation import count_targets
from retemper.engine.model.quantized import import_bitsandbytes, quantized_bytes
from retemper.tools.planning.memory import MemoryCounter

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
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, use_dora=dora, target_modules=r".*\.layers\..*_proj", bias="none"
    )
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
