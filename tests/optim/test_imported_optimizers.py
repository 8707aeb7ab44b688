"""Optimizers of users: they update as outside of the engine, and what a checkpoint cannot store is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny_run
import torch
from torch import nn

from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import OptimizerConfig
from retemper.engine.errors import UserError
from retemper.engine.optim import allocate_states, build_optimizer, step_unless
from retemper.engine.optim.imported import ImportedOptimizer

MODULE = '''
import torch


class Signed(torch.optim.Optimizer):
    """The sign of the gradient, with a count of steps that is not a tensor."""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["count"] = self.state[parameter].get("count", 0) + 1


class Stateless(torch.optim.SGD):
    pass


class Blocks(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["blocks"] = torch.zeros(3)


class Momentum(torch.optim.SGD):
    pass
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> Path:
    """Folder of the module ``users_optimizers``."""
    folder = tmp_path_factory.mktemp("users")
    (folder / "users_optimizers.py").write_text(MODULE, encoding="utf-8")
    return folder


@pytest.fixture
def importable(module, monkeypatch):
    monkeypatch.syspath_prepend(str(module))


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "options"),
    [("torch.optim.NAdam", {"betas": [0.8, 0.9]}), ("torch.optim.SGD", {"momentum": 0.9, "nesterov": True})],
)
def test_it_updates_as_outside_of_the_engine(name, options):
    mine, theirs = ([nn.Parameter(_random(*s)) for s in ((6, 5), (4,))] for _ in range(2))
    config = OptimizerConfig(name=name, options=options, learning_rate=0.02, weight_decay=0.1)
    optimizer = build_optimizer([(str(n), p) for n, p in enumerate(mine)], config)
    assert isinstance(optimizer, ImportedOptimizer)
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    reference = getattr(torch.optim, name.rpartition(".")[2])(groups, lr=0.02, **options)
    for step in range(4):
        skipped = step == 2
        for one, other in zip(mine, theirs, strict=True):
            one.grad = torch.full_like(one, torch.nan) if skipped else _random(*one.shape, seed=step) * 3
            other.grad = None if skipped else _random(*one.shape, seed=step)
        step_unless(optimizer, torch.tensor(float(skipped)), torch.tensor(3.0))
        reference.step()
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_states_are_allocated_without_changing_weights():
    parameters = [nn.Parameter(_random(6, 5)), nn.Parameter(_random(4))]
    before = [parameter.detach().clone() for parameter in parameters]
    named = [(str(n), p) for n, p in enumerate(parameters)]
    optimizer = build_optimizer(named, OptimizerConfig(name="torch.optim.Adam", options={"amsgrad": True}))
    allocate_states(optimizer)
    for parameter, values in zip(parameters, before, strict=True):
        assert torch.equal(parameter, values) and parameter.grad is None
        assert optimizer.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        assert not any(state.any() for state in optimizer.state[parameter].values())
    assert {group["lr"] for group in optimizer.param_groups} == {OptimizerConfig.learning_rate}


@pytest.mark.parametrize("name", ["NAdam", "Rprop", "Adam"])
def test_a_skipped_first_step_leaves_no_trace(name):
    """States are then allocated for checkpoints; NAdam's mu_product and Rprop's step_size do not begin as zero."""
    mine, theirs = nn.Parameter(_random(6, 5)), nn.Parameter(_random(6, 5))
    kind = getattr(torch.optim, name)
    optimizer = build_optimizer([("weight", mine)], OptimizerConfig(name=f"torch.optim.{name}", learning_rate=0.02))
    reference = kind([theirs], lr=0.02, **({} if name == "Rprop" else {"weight_decay": 0.1}))
    for step in range(4):
        mine.grad, theirs.grad = _random(6, 5, seed=step), _random(6, 5, seed=step)
        step_unless(optimizer, torch.tensor(float(step < 2)))
        optimizer.zero_grad(set_to_none=True)
        allocate_states(optimizer)
        if step >= 2:
            reference.step()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("no_such_module.Optimizer", {}, "there is no module no_such_module"),
        ("users_optimizers.Nothing", {}, "has no class Nothing"),
        ("pathlib.Path", {}, "has a Path that is not a subclass of Optimizer"),
        ("torch.optim.NAdam", {"betta": 1}, "failed on a small matrix: TypeError"),
        ("users_optimizers.Signed", {}, "keeps a state 'count' that is a int, not a tensor"),
        ("users_optimizers.Stateless", {}, "keeps no states"),
        ("users_optimizers.Blocks", {}, "'blocks' that is of shape [3] for a parameter of [64, 128]"),
        ("torch.optim.LBFGS", {}, "LBFGS"),
        ("torchao.optim.AdamW8bit", {}, "keeps a state 'exp_avg' that is a OptimState8bit, not a plain tensor"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(name, options, expected, importable):
    parameter = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(UserError) as error:
        build_optimizer([("weight", parameter)], OptimizerConfig(name=name, options=options))
    assert expected in str(error.value) and "\n" not in str(error.value)


def options_of(folder: Path) -> list[str]:
    steps = ["--training.train_tokens", str(8 * 8 * 32), "--training.eval_interval", "0", "--run_folder", str(folder)]
    momentum = ["--optimizer.options", "{momentum: 0.9}", "--optimizer.learning_rate", "0.05"]
    return [*steps, "--optimizer.name", "torch.optim.SGD", *momentum]


@pytest.fixture(scope="module")
def undisturbed(one_rank, run_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sgd") / "run"
    tiny_run.train(one_rank, run_file, options_of(folder))
    return folder


def test_a_run_resumes_bitwise(undisturbed, one_rank, run_file, tmp_path):
    tiny_run.train_until(one_rank, run_file, options_of(tmp_path), 6)
    tiny_run.train(one_rank, run_file, options_of(tmp_path))
    assert tiny_run.curve(tmp_path) == tiny_run.curve(undisturbed)
    one, other = (tiny_run.tensors_of(folder / "checkpoints" / "step-00000008") for folder in (tmp_path, undisturbed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(name.startswith("optimizer.momentum_buffer.") for name in one)


def test_two_ranks_give_the_same_curve(undisturbed, two_ranks, run_file, tmp_path):
    two_ranks.run(tiny_run.train, run_file, [*options_of(tmp_path), "--checkpoint.save_interval", "1000"])
    for one, other in zip(tiny_run.curve(tmp_path), tiny_run.curve(undisturbed), strict=True):
        assert one[:2] == other[:2] and one[2:] == pytest.approx(other[2:], rel=1e-5)


def test_the_module_is_found_in_the_folder_of_the_configuration(module, run_file, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = module / "run.yaml"
    path.write_text(run_file.read_text(), encoding="utf-8")
    options = ["--config", str(path), "--optimizer.name", "users_optimizers.Momentum"]
    config = parse_config([*options, "--optimizer.options", "{momentum: 0.9}"]).optimizer
    optimizer = build_optimizer([("weight", nn.Parameter(torch.ones(3, 4)))], config)
    assert isinstance(optimizer, ImportedOptimizer)
    sys.modules.pop("users_optimizers", None)


def test_a_mistake_ends_a_run_before_the_model_is_built(one_rank, run_file, tmp_path):
    options = ["--run_folder", str(tmp_path), "--optimizer.name"]
    line = tiny_run.refusal(one_rank, run_file, [*options, "torch.optim.AdamWWW"])
    assert "has no class AdamWWW" in line and not any(tmp_path.iterdir())
