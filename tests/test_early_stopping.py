"""Early stopping against transformers' callback, on the same sequences of losses."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.engine.config.checks import problems
from retemper.engine.config.settings import (
    DataConfig,
    EarlyStoppingConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from retemper.engine.early_stopping import EarlyStopping, is_stopped
from retemper.engine.errors import UserError
from retemper.engine.evaluation import BestMetric
from retemper.engine.schedule import Progress

SETS = SimpleNamespace(metrics=[BestMetric("news", "1:aa"), BestMetric("code", "1:bb")])


def evaluate(stopping: EarlyStopping, progress: Progress, losses: list[float], name: str = "news") -> Progress:
    """Evaluate every tenth step until the run stops."""
    for loss in losses:
        if stopping.stopped(progress):
            break
        progress = replace(progress, step=progress.step + 10)
        progress = stopping.after(progress, {"news": 9.0, "code": 9.0, name: loss})
    return progress


def step_of_transformers(losses: list[float], patience: int, threshold: float) -> int:
    """The step at which transformers' trainer stops: its callback, and the best metric that the trainer records."""
    from transformers import EarlyStoppingCallback, Trainer

    args = SimpleNamespace(greater_is_better=False, metric_for_best_model="loss", save_strategy="steps")
    trainer = SimpleNamespace(args=args, state=SimpleNamespace(best_metric=None, global_step=0))
    callback, control = EarlyStoppingCallback(patience, threshold), SimpleNamespace(should_training_stop=False)
    for number, loss in enumerate(losses, 1):
        trainer.state.global_step, metrics = 10 * number, {"eval_loss": loss}
        callback.on_evaluate(args, trainer.state, control, metrics)
        Trainer._determine_best_metric(trainer, metrics, None)
        if control.should_training_stop:
            break
    return trainer.state.global_step


# Multiples of 1/8 and of 1/4: differences are exact, and often equal to the threshold.
@settings(deadline=None, max_examples=200)
@given(
    losses=st.lists(st.integers(0, 12).map(lambda number: number / 8), min_size=1, max_size=30),
    patience=st.integers(1, 5),
    threshold=st.sampled_from([0.0, 0.125, 0.25, 1.0]),
    resumed_at=st.integers(0, 30),
)
def test_it_stops_where_transformers_does_also_after_a_resume(losses, patience, threshold, resumed_at):
    config = EarlyStoppingConfig(patience, threshold)
    progress = evaluate(EarlyStopping(config, SETS), Progress(), losses[:resumed_at])
    progress = evaluate(EarlyStopping(config, SETS), replace(progress), losses[resumed_at:])
    assert progress.step == step_of_transformers(losses, patience, threshold)


def test_an_evaluation_counts_once_and_one_that_was_interrupted_does_not():
    stopping = EarlyStopping(EarlyStoppingConfig(2), SETS)
    progress = evaluate(stopping, Progress(), [3.0, 3.5])
    assert progress.early_stopping["evaluations"] == 1
    for repeated in (stopping.after(progress, {"news": 3.5}), stopping.after(replace(progress, step=30), {})):
        assert repeated.early_stopping == progress.early_stopping
    assert stopping.after(Progress(), {"news": 1.0}) == Progress()  # before the first step


def test_a_stopped_run_continues_with_more_patience_or_another_set():
    progress = evaluate(EarlyStopping(EarlyStoppingConfig(2), SETS), Progress(), [3.0, 3.5, 3.5, 3.5])
    assert progress.step == 30 and is_stopped(EarlyStoppingConfig(2), progress.early_stopping)
    for config in (EarlyStoppingConfig(3), EarlyStoppingConfig(None), EarlyStoppingConfig(2, metric="code")):
        assert not EarlyStopping(config, SETS).stopped(progress) and not is_stopped(config, progress.early_stopping)
    code = EarlyStopping(EarlyStoppingConfig(2, metric="code"), SETS)
    again = evaluate(code, progress, [5.0, 6.0, 6.0, 6.0], "code")
    assert (again.step, again.early_stopping["loss"], again.early_stopping["name"]) == (60, 5.0, "code")


def test_losses_of_other_data_are_not_compared():
    progress = evaluate(EarlyStopping(EarlyStoppingConfig(1), SETS), Progress(), [3.0])
    other = EarlyStopping(EarlyStoppingConfig(1), SimpleNamespace(metrics=[BestMetric("news", "1:cc")]))
    assert other.after(replace(progress, step=20), {"news": 4.0}).early_stopping["evaluations"] == 0


def test_the_reason_is_one_line():
    stopping = EarlyStopping(EarlyStoppingConfig(2, 0.5), SETS)
    assert stopping.describe(evaluate(stopping, Progress(), [3.0, 2.75, 2.5])) == (
        "stopped early: the loss of news did not fall by more than 0.5 in the last 2 evaluations, up to step 30; the "
        "lowest is 2.5000"
    )


def test_an_unknown_set_is_refused():
    with pytest.raises(UserError) as caught:
        EarlyStopping(EarlyStoppingConfig(1, metric="cde"), SETS)
    assert str(caught.value) == (
        "training.early_stopping.metric is cde, but the validation sets are news, code; name one of them"
    )


@pytest.mark.parametrize(
    ("config", "validation", "interval", "problem"),
    [
        (EarlyStoppingConfig(2), {}, 5, "patience is 2, but there is no validation set"),
        (
            EarlyStoppingConfig(2),
            {"a": "b"},
            0,
            "patience is 2, but training.eval_interval is 0",
        ),
        (EarlyStoppingConfig(0), {"a": "b"}, 5, "patience is 0; it must be at least 1"),
        (
            EarlyStoppingConfig(1, -0.1),
            {"a": "b"},
            5,
            "min_delta is -0.1; it must be at least 0",
        ),
        (
            EarlyStoppingConfig(metric="a"),
            {"a": "b"},
            5,
            "metric is a, but training.early_stopping.patience is null",
        ),
        (EarlyStoppingConfig(2), {"a": "b"}, 5, None),
    ],
)
def test_settings_without_effect_are_refused(config, validation, interval, problem):
    run = RunConfig(
        "runs/x",
        DataConfig([SourceConfig("a")], validation=validation),
        TrainingConfig(10**9, early_stopping=config, eval_interval=interval),
        ModelConfig(architecture={}),
    )
    found = list(problems(run))
    assert len(found) == (problem is not None)
    assert all(line.startswith(f"training.early_stopping.{problem}") for line in found), found
