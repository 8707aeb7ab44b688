"""States of parameters that never get a gradient, such as those that a model does not use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from retemper.engine.config.settings import OptimizerConfig
from retemper.engine.optim import allocate_states, build_optimizer


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
def test_unused_parameters_get_states_of_zeros_and_change_nothing(state_dtype):
    torch.manual_seed(0)
    parameters = {"used": nn.Parameter(torch.randn(4, 3)), "unused": nn.Parameter(torch.randn(4, 3))}
    optimizer = build_optimizer(parameters.items(), OptimizerConfig(state_dtype=state_dtype))
    parameters["used"].grad = torch.randn(4, 3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    used = {name: state.clone() for name, state in optimizer.state[parameters["used"]].items()}

    allocate_states(optimizer)

    assert all(torch.equal(parameters[name], value) for name, value in before.items())
    assert optimizer.state[parameters["used"]].keys() == optimizer.state[parameters["unused"]].keys() == used.keys()
    assert all(torch.equal(optimizer.state[parameters["used"]][name], value) for name, value in used.items())
    assert all(not value.any() for value in optimizer.state[parameters["unused"]].values())
    assert [group["lr"] for group in optimizer.param_groups] == [OptimizerConfig.learning_rate]
    assert parameters["used"].grad is None and parameters["unused"].grad is None
