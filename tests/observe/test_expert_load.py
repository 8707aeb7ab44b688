"""What records and the console say about routers."""

from __future__ import annotations

import pytest
import torch

from retemper.engine.config.settings import TrainingConfig
from retemper.engine.model.expert_settings import ExpertSettings
from retemper.engine.observe.expert_load import ExpertLoad
from retemper.engine.parallel.router_losses import WINDOW, RouterLosses

SETTINGS = ExpertSettings(layers=(True, False, True), num_experts=4, per_token=1, intermediate_size=8)
EVEN = [25.0, 25.0, 25.0, 25.0]


@pytest.fixture
def routers():
    training = TrainingConfig(sequence_length=100, global_batch_size=1, router_aux_loss_coef=0.01)
    return RouterLosses({}, SETTINGS, training, torch.device("cpu"))


def steps(routers: RouterLosses, load: ExpertLoad, number: int, first: list[float], last: list[float]):
    """Values of the last of some steps, and the lines of all of them."""
    lines, values = [], {}
    for _ in range(number):
        routers.begin_step(None)
        routers._totals[:, :4] = torch.tensor([first, last])
        routers._totals[:, 4:8] = 25.0  # sums of even scores
        routers._totals[:, 8] = torch.tensor([200.0, 400.0])
        routers.update(torch.tensor(0.0))
        values, more = load.report(load.copy())
        lines += more
    return values, lines


def skipped(routers: RouterLosses, number: int, counts: list[float]) -> None:
    """Steps whose updates are skipped."""
    for _ in range(number):
        routers.begin_step(None)
        routers._totals[:, :4] = torch.tensor(counts)
        routers.update(torch.tensor(1.0))


def test_values_of_a_step(routers):
    load = ExpertLoad(routers)
    assert load.copy() is None and load.report(None) == ({}, [])
    values, lines = steps(routers, load, 1, [70.0, 10.0, 10.0, 10.0], EVEN)
    # 4 * sum of f_e / 4 = 1 with even scores, whatever the load.
    expected = {"router_aux_loss": 1.0, "router_z_loss": 3.0, "expert_load_max": 2.8}
    assert values == pytest.approx({**expected, "expert_load/layer_0": 2.8, "expert_load/layer_2": 1.0})
    assert lines == [] and ExpertLoad(None).report(ExpertLoad(None).copy()) == ({}, [])


def test_a_layer_whose_experts_starve_is_named_once(routers):
    load, starved = ExpertLoad(routers), [50.0, 46.0, 2.0, 2.0]
    assert steps(routers, load, WINDOW - 1, EVEN, starved)[1] == []
    [line] = steps(routers, load, 2 * WINDOW, EVEN, starved)[1]
    assert "layer 2 (2) had less than 10%" in line and "layer 0" not in line
    [line] = steps(routers, load, WINDOW + 1, [98.0, 1.0, 1.0, 0.0], starved)[1]
    assert "layer 0 (3) had" in line and "layer 2" not in line and "router_aux_loss_coef, now 0.01" in line
    assert steps(routers, load, WINDOW, EVEN, EVEN)[1] == []
    assert len(steps(routers, load, WINDOW, EVEN, starved)[1]) == 1


def test_skipped_steps_are_not_in_the_window(routers):
    """Many of them would make up for what the others lack, or end the window early."""
    load, starved = ExpertLoad(routers), [50.0, 46.0, 2.0, 2.0]
    assert steps(routers, load, WINDOW - 1, EVEN, starved)[1] == []
    skipped(routers, 3 * WINDOW, [0.0, 0.0, 1e6, 1e6])
    [line] = steps(routers, load, 1, EVEN, starved)[1]
    assert "layer 2 (2) had less than 10%" in line and "layer 0" not in line
    skipped(routers, 2 * WINDOW + 7, starved)
    assert steps(routers, load, WINDOW - 1, EVEN, EVEN)[1] == []
    assert routers.state_dict()["window.steps"] == str(WINDOW - 1)


def test_a_run_that_is_often_continued_warns_as_one_that_is_not(routers):
    """Every few steps from its state, as from a checkpoint; a state of an earlier version begins a window."""
    lines, starved = [], [50.0, 46.0, 2.0, 2.0]
    for made in range(0, WINDOW, 10):
        state = routers.state_dict()
        assert routers.load_state_dict(state) is bool(made) and routers.state_dict() == state
        lines += steps(routers, ExpertLoad(routers), 10, EVEN, starved)[1]
    assert len(lines) == 1 and "layer 2 (2)" in lines[0]
    steps(routers, ExpertLoad(routers), 10, EVEN, starved)
    state = routers.state_dict()
    assert state["window.2"] == "500 460 20 20" and state["2"] == "50 46 2 2" and state["window.steps"] == "10"
    assert routers.load_state_dict({name: text for name, text in state.items() if "window" not in name})
    assert routers.state_dict()["window.steps"] == "0"
