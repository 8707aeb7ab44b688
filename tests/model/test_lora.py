"""Adapters against the PEFT library: the same model, data and first values give the same losses and gradients."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import parity_run
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import AdapterConfig
from retemper.engine.errors import UserError
from retemper.engine.evaluation import count_targets
from retemper.engine.model.adapters import adapter_parameters
from retemper.engine.model.implementations import architecture_of
from retemper.engine.model.lora import TokenDropout, TokenNumbers

RANK, ALPHA, RATE = 4, 12.0, 5e-3
STEPS = 4
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Linear layers of phi3's files, and those of the native decoder that hold their rows."""


class Case(NamedTuple):
    """One adapter of one model."""

    family: str
    implementation: str
    options: dict[str, bool]
    saves: bool = False
    targets: tuple[str, ...] = ("*",)


CASES = {
    "qwen2": Case("qwen2", "native", {}),
    "rslora, modules_to_save": Case("qwen2", "native", {"rslora": True}, saves=True),
    "dora, some layers": Case("qwen2", "native", {"dora": True}, targets=("*.q_proj", "*.layers.1.mlp.*")),
    "phi3 in transformers, dora": Case("phi3", "transformers", {"dora": True}, saves=True),
    "phi3, fused in files": Case("phi3", "native", {}),
}


def save_base(folder: Path, family: str) -> Path:
    """A Hugging Face folder of a tiny model, in fp32, whose biases are not zero."""
    config = {**parity_run.FAMILIES[family], "tie_word_embeddings": False, "pad_token_id": 0}
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * (parameter.dim() == 1), alpha=1.0)
            assert parameter.dtype == torch.float32, name
    model.save_pretrained(folder)
    return folder


def build(tmp_path: Path, ranks, case: Case):
    """The run with the adapter, before its first step."""
    base = save_base(tmp_path / "base", case.family)
    path = parity_run.write_run(tmp_path, parity_run.Model(case.family, tied=False, packed=False))
    saved = ["model.embed_tokens", "lm_head", "*norm"] if case.saves else []
    overrides = [
        *("--model.initialize_from", str(base), "--model.architecture", "null", "--adapter.kind", "lora"),
        *("--model.implementation", case.implementation, "--adapter.rank", str(RANK), "--adapter.alpha", str(ALPHA)),
        *("--adapter.targets", str(list(case.targets)), "--adapter.modules_to_save", str(saved)),
        *("--optimizer.schedule", "constant", "--training.warmup_tokens", "0", "--optimizer.learning_rate", str(RATE)),
        *(word for name, value in case.options.items() for word in (f"--adapter.{name}", str(value).lower())),
    ]
    return pretrain.build(parse_config(["--config", str(path), *overrides]), ranks)


def peft_model(folder: Path, case: Case) -> Any:
    """The same base in PEFT. A fused layer of r rows for each of its parts stands for the adapters of the parts."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parts = FUSED if case.family == "phi3" and case.implementation == "native" else {}
    targets = "all-linear" if case.targets == ("*",) else r".*\.(q_proj|1\.mlp\.\w+_proj)"
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=targets,
        rank_pattern={name: RANK * len(of) for name, of in parts.items()},
        alpha_pattern={name: ALPHA * len(of) for name, of in parts.items()},
        use_rslora=case.options.get("rslora", False),
        use_dora=case.options.get("dora", False),
        modules_to_save=["embed_tokens", "lm_head", *NORMS] if case.saves else None,
    )
    return get_peft_model(base, config).train()


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trained parameters of PEFT's model, under our names."""
    ours = re.compile(r"^base_model\.model\.|\.modules_to_save|(?<=vector)\.default\.weight|\.default")
    return {ours.sub("", name): p for name, p in model.named_parameters() if p.requires_grad}


def boxes(name: str, mine: dict[str, Tensor]) -> list[tuple[str, tuple[slice, ...]]]:
    """Our parameters that are parts of PEFT's parameter ``name``, each with its place there."""
    module, _, leaf = name.partition(".lora_")
    parts = FUSED.get(module.rpartition(".")[2], ())
    if name in mine or not parts:
        return [(name, (slice(None),))]
    found, row = [], 0
    for place, part in enumerate(parts):
        of_part = f"{module.rpartition('.')[0]}.{part}.lora_{leaf}"
        ranks = slice(place * RANK, (place + 1) * RANK)
        rows = slice(row, row := row + len(mine[of_part]))
        found.append((of_part, (ranks,) if leaf == "A.weight" else (rows, ranks)))
    return found


def copy_first_values(run, theirs: dict[str, torch.nn.Parameter]) -> None:
    """Give PEFT's parameters our values. What a fused B has outside of the parts stays zero."""
    mine = dict(run.model.named_parameters())
    for name, parameter in theirs.items():
        inside = torch.zeros_like(parameter)
        for part, box in boxes(name, mine):
            inside[box] = 1.0
            parameter.data[box] = mine[part].detach()
        parameter.register_hook(lambda gradient, inside=inside: gradient * inside)


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Compare tensors by name, each relative to its largest element."""
    compared = set()
    for name, tensor in theirs.items():
        for part, box in boxes(name, mine):
            compared.add(part)
            bound = tolerance * tensor.abs().max().item()
            torch.testing.assert_close(mine[part], tensor[box], rtol=0, atol=bound, msg=lambda m, n=part: f"{n}: {m}")
    assert compared == mine.keys()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_trains_as_peft_does(case, one_rank, tmp_path):
    run = build(tmp_path, one_rank, case)
    model = peft_model(tmp_path / "base", case)
    theirs = trained(model)
    copy_first_values(run, theirs)
    groups = [[p for p in theirs.values() if (p.dim() > 1) == decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        lr=RATE, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    learns = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    frozen = {name: p.detach().clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    kept, accumulate = {}, run.forward_backward.accumulate_gradients

    def keeping(*arguments):
        loss = accumulate(*arguments)
        kept.update({name: parameter.grad.clone() for name, parameter in learns.items()})
        return loss

    run.forward_backward.accumulate_gradients = keeping
    for step in range(STEPS):
        batches = run.data.micro_batches(step * parity_run.GLOBAL_BATCH)
        num_targets = count_targets(batches, run.mesh)
        loss = 0.0
        for batch in batches:
            logits = model(input_ids=batch.tokens[None]).logits[0]
            part = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum") / num_targets
            part.backward()
            loss += part.item()
        result = pretrain.one_step(run, batches, num_targets)
        assert result.loss.item() == pytest.approx(loss, rel=1e-5)
        assert_same(kept, {name: p.grad for name, p in theirs.items()}, 1e-5)
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in run.model.named_parameters():
        assert name in learns or torch.equal(parameter, frozen[name])


def test_description_is_what_is_built(one_rank, tmp_path):
    run = build(tmp_path, one_rank, CASES["rslora, modules_to_save"])
    found = adapter_parameters(run.start.architecture, run.config.adapter)
    learns = {name: tuple(p.shape) for name, p in run.model.named_parameters() if p.requires_grad}
    assert learns == found.trained and found.scaling == ALPHA / 2
    model = peft_model(tmp_path / "base", CASES["rslora, modules_to_save"])
    assert found.num_trained == model.get_nb_trainable_parameters()[0]
    frozen = [p for p in run.model.parameters() if not p.requires_grad]
    assert found.num_frozen == sum(p.numel() for p in frozen)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"targets": ["q_proj"]}, 'adapter.targets has "q_proj", which matches no linear layer'),
        ({"targets": ["*.q_proj", "lm_head"]}, 'adapter.targets has "lm_head"'),
        ({"modules_to_save": ["*.nrm"]}, 'adapter.modules_to_save has "*.nrm", which matches no parameter or module'),
        ({"modules_to_save": ["*.q_proj"]}, "trains model.layers.0.self_attn.q_proj.weight fully, but adapter.targets"),
    ],
)
def test_patterns_without_a_meaning_are_refused(changes, line):
    architecture = architecture_of(parity_run.FAMILIES["qwen2"])
    with pytest.raises(UserError) as refusal:
        adapter_parameters(architecture, AdapterConfig(kind="lora", **changes))
    assert line in str(refusal.value) and "\n" not in str(refusal.value)


def dropped(name: str, numbers: Tensor | None, probability: float = 0.25) -> Tensor:
    """What the dropout of a layer makes of ones."""
    seen = TokenNumbers()
    seen.values = numbers
    return TokenDropout(probability, seen, 7, name, 300, torch.device("cpu"))(torch.ones(1, 200, 300))[0]


def test_dropout_is_a_function_of_layer_and_token():
    numbers = torch.arange(10**12, 10**12 + 200)
    mask = dropped("layers.0.q_proj", numbers)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    # 5.5 standard deviations of the mean of 60,000 draws
    assert abs((mask > 0).double().mean() - 0.75) < 5.5 * (0.75 * 0.25 / mask.numel()) ** 0.5
    assert torch.equal(dropped("layers.0.q_proj", numbers.flip(0)), mask.flip(0))
    agreeing = (mask == dropped("layers.0.k_proj", numbers)).double().mean()
    assert abs(agreeing - (0.75**2 + 0.25**2)) < 0.012
    assert torch.equal(dropped("layers.0.q_proj", None), torch.ones(200, 300))


def test_dropout_of_rows_that_are_not_tokens_is_refused():
    with pytest.raises(UserError, match=r"experts\.1 computes 200 rows of 150 tokens at a time"):
        dropped("experts.1", torch.arange(150))
