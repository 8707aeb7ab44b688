"""``optimizer.groups`` against ``torch.optim.AdamW`` with the groups written by hand; patterns; the summary."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from retemper.engine.config.checks import problems
from retemper.engine.config.settings import (
    DataConfig,
    ModelConfig,
    MuonConfig,
    OptimizerConfig,
    ParameterGroupConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from retemper.engine.errors import UserError
from retemper.engine.optim import build_optimizer, set_learning_rate, step_unless
from retemper.engine.optim.groups import check, describe, require_same_optimizer
from retemper.engine.schedule import learning_rate

SHAPES = {
    "model.embed_tokens.weight": (12, 4),
    "model.layers.0.q_proj.weight": (4, 4),
    "model.layers.0.norm.weight": (4,),
    "model.norm.weight": (4,),
    "lm_head.weight": (12, 4),
}
GROUPS = [
    ParameterGroupConfig(["*embed_tokens*", "lm_head.*"], learning_rate=1e-3),
    ParameterGroupConfig("*.layers.*.norm.weight", learning_rate=0.0, weight_decay=0.3),
]


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def config(groups=GROUPS, **values) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=1e-2, min_learning_rate=1e-3, groups=groups, **values)


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
def test_each_group_has_its_own_rate_and_decay(state_dtype):
    """Through warm-up and decay: the rate of a group is that of a run whose peak and minimum are so much smaller."""
    mine, theirs = parameters(), parameters()
    optimizer = build_optimizer(mine.items(), config(state_dtype=state_dtype))
    training = TrainingConfig(train_tokens=100, warmup_tokens=20)
    settings = {"betas": (0.9, 0.95), "eps": 1e-8}
    by_hand = {
        "model.embed_tokens.weight": (0.1, 0.1),
        "lm_head.weight": (0.1, 0.1),
        "model.layers.0.q_proj.weight": (1.0, 0.1),
        "model.layers.0.norm.weight": (0.0, 0.3),
        "model.norm.weight": (1.0, 0.0),
    }
    reference = torch.optim.AdamW(
        [{"params": [theirs[name]], "weight_decay": decay} for name, (_, decay) in by_hand.items()], **settings
    )
    for tokens in (10, 20, 60, 100):
        rate = learning_rate(tokens, training, config())
        set_learning_rate(optimizer, rate)
        for group, (share, _) in zip(reference.param_groups, by_hand.values(), strict=True):
            scaled = OptimizerConfig(learning_rate=1e-2 * share, min_learning_rate=1e-3 * share)
            group["lr"] = learning_rate(tokens, training, scaled)
        for name in SHAPES:
            mine[name].grad = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(tokens))
            theirs[name].grad = mine[name].grad.clone()
        step_unless(optimizer, torch.zeros(()))
        reference.step()
    for name in SHAPES:
        tolerance = 1e-6 if state_dtype == "fp32" else 1e-3
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=tolerance)
    assert torch.equal(mine["model.layers.0.norm.weight"], parameters()["model.layers.0.norm.weight"])


@pytest.mark.parametrize("name", ["muon", "lion", "torch.optim.NAdam"])
def test_every_optimizer_has_the_groups(name):
    optimizer = build_optimizer(parameters().items(), config(name=name), tables={"lm_head.weight"})
    set_learning_rate(optimizer, 2e-2)
    found = {parameter: (group["lr"], group["weight_decay"]) for parameter, group, _ in optimizer.named()}
    assert found["lm_head.weight"] == pytest.approx((2e-3, 0.1))
    assert found["model.layers.0.q_proj.weight"] == (2e-2, 0.1)
    assert found["model.layers.0.norm.weight"] == (0.0, 0.3)
    assert found["model.norm.weight"] == (2e-2, 0.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"groups": [ParameterGroupConfig("*embed*", 1.0), ParameterGroupConfig(["*mlp*"], 1.0)]},
            "groups[1].match has",
        ),
        (
            {"groups": [ParameterGroupConfig("*norm*", 1.0), ParameterGroupConfig("*layers*", 1.0)]},
            "both match model.la",
        ),
        (
            {"groups": [], "muon": MuonConfig(exclude=["router"])},
            "optimizer.muon.exclude has 'router', which matches no",
        ),
    ],
)
def test_patterns_without_parameters_and_overlapping_groups_are_refused(values, expected):
    check(config(), SHAPES)
    with pytest.raises(UserError) as error:
        check(config(**values), SHAPES)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (config([ParameterGroupConfig("*")]), "optimizer.groups[0] sets neither"),
        (config([ParameterGroupConfig([], weight_decay=0.0)]), "optimizer.groups[0].match is [], which matches no"),
        (config([ParameterGroupConfig("*", weight_decay=-1.0)]), "optimizer.groups[0].weight_decay is -1.0"),
        (OptimizerConfig(groups=GROUPS, learning_rate=0.0, min_learning_rate=0.0), "is 0; set"),
        (OptimizerConfig(name="adam"), "optimizer.name is 'adam'; use adamw, adamw_8bit, muon"),
        (OptimizerConfig(name="adamw_bnb_8bit"), "use adamw_8bit"),
        (OptimizerConfig(name="adamw_8bit", state_dtype="bf16"), "adamw_8bit has 8-bit states of matrices"),
        (OptimizerConfig(name="a.B", options={"lr": 1.0}), "optimizer.options has 'lr'"),
        (OptimizerConfig(options={"x": 1}), "only an optimizer with an import path gets options"),
        (OptimizerConfig(muon=MuonConfig(momentum=0.9)), "only optimizer.name muon uses it"),
        (OptimizerConfig(name="lion", beta1=0.8), "lion has optimizer.lion"),
        (OptimizerConfig(name="a.B", state_dtype="bf16"), "chooses the dtype of its states"),
        (OptimizerConfig(child_tuning=1.0), "optimizer.child_tuning is 1.0; it must be in (0, 1)"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(optimizer, expected):
    assert any(expected in line for line in problems(run_with(optimizer)))


def test_an_imported_class_does_not_write_bf16_weights():
    """It has no stochastic rounding; gradients summed in fp32 would not even have the dtype of its states."""
    run = run_with(OptimizerConfig(name="torch.optim.NAdam"), weight_dtype="bf16")
    [line] = problems(run)
    assert "training.weight_dtype is bf16" in line and "set it to fp32" in line
    assert not list(problems(run_with(OptimizerConfig(name="torch.optim.NAdam"))))


def run_with(optimizer, **training):
    data, model = DataConfig(train=[SourceConfig("a")]), ModelConfig(architecture={})
    return RunConfig("x", data, TrainingConfig(train_tokens=10**9, **training), optimizer=optimizer, model=model)


def test_the_summary_lists_the_groups():
    lines = describe(config(name="muon"), SHAPES, {"lm_head.weight", "model.embed_tokens.weight"})
    assert lines[0].startswith("optimizer   muon for 1 parameters with 16 elements")
    assert "2 parameters with 96 elements, learning rate 0.001" in lines[1]
    assert "1 parameters with 4 elements, learning rate 0, weight decay 0.3" in lines[2]


def test_another_choice_of_muons_parameters_is_refused():
    former = {"optimizer": {"name": "muon", "muon": {"exclude": []}}}
    require_same_optimizer(former, config(name="muon"), "c")
    require_same_optimizer({}, config(), "c")
    with pytest.raises(UserError, match=r"optimizer.muon.exclude is \['\*q_proj\*'\], but c was trained with \[\]"):
        require_same_optimizer(former, config(name="muon", muon=MuonConfig(exclude=["*q_proj*"])), "c")
