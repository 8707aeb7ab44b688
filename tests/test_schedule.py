"""Token arithmetic: how a global batch is dealt, and the learning rate on the token clock."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.engine.config.checks import problems
from retemper.engine.config.settings import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from retemper.engine.errors import UserError
from retemper.engine.schedule import BatchPlan, Progress, is_due, learning_rate, plan_batches


@settings(deadline=None)
@given(micro=st.integers(1, 8), ranks=st.integers(1, 8), accumulation=st.integers(1, 8), length=st.integers(1, 4096))
def test_the_ranks_samples_partition_the_global_batch(micro, ranks, accumulation, length):
    size = micro * ranks * accumulation
    training = TrainingConfig(1, sequence_length=length, global_batch_size=size, micro_batch_size=micro)
    plan = plan_batches(training, ranks)
    assert plan == BatchPlan(length, size, micro, ranks)
    assert plan.num_micro_batches == accumulation
    assert plan.tokens_per_step == size * length
    dealt = [plan.sample_offsets(rank) for rank in range(ranks)]
    for offsets in dealt:
        assert len(offsets) == accumulation
        assert all(len(part) == micro for part in offsets)
    assert sorted(sample for offsets in dealt for part in offsets for sample in part) == list(range(size))


@settings(deadline=None)
@given(size=st.integers(1, 200), micro=st.integers(1, 20), ranks=st.integers(1, 20))
def test_what_does_not_divide_is_refused_with_both_sides(size, micro, ranks):
    training = TrainingConfig(1, global_batch_size=size, micro_batch_size=micro)
    if size % (micro * ranks) == 0:
        assert plan_batches(training, ranks).num_micro_batches * micro * ranks == size
        return
    with pytest.raises(UserError) as caught:
        plan_batches(training, ranks)
    message = str(caught.value)
    assert f"training.global_batch_size {size} is not a multiple of micro_batch_size {micro} x" in message
    assert f"ranks {ranks} = {micro * ranks};" in message
    suggestions = [int(word) for word in message.split("; use ")[1].split(" or ")]
    assert suggestions
    for suggestion in suggestions:
        assert suggestion > 0
        assert abs(suggestion - size) < micro * ranks
        plan_batches(replace(training, global_batch_size=suggestion), ranks)


@settings(deadline=None)
@given(tokens=st.integers(0, 10**15), size=st.integers(1, 4096), length=st.integers(1, 2**17))
def test_steps_are_the_fewest_that_reach_the_budget(tokens, size, length):
    plan = BatchPlan(length, size, 1, 1)
    steps = plan.steps_for(tokens)
    assert steps * plan.tokens_per_step >= tokens
    assert (steps - 1) * plan.tokens_per_step < tokens


@settings(deadline=None)
@given(epoch=st.integers(1, 5000), per_step=st.integers(1, 100), start=st.integers(0, 100), steps=st.integers(1, 200))
def test_an_epoch_ends_at_the_first_step_that_completes_it(epoch, per_step, start, steps):
    """Oracle: the multiples of an epoch, each put into the step that reaches it. Runs may begin at any token."""
    plan, start = BatchPlan(1, per_step, 1, 1), start * per_step
    expected = {
        -(-(tokens - start) // per_step)
        for tokens in range(epoch, start + steps * per_step + 1, epoch)
        if start < tokens <= start + steps * per_step
    }
    places = [Progress(step, 0, start + step * per_step) for step in range(1, steps + 1)]
    assert {progress.step for progress in places if is_due("epoch", progress, plan, epoch)} == expected
    assert not any(is_due("epoch", progress, plan, None) or is_due(0, progress, plan, epoch) for progress in places)
    assert not is_due("epoch", Progress(), plan, epoch)


# --------------------------------------------------------------------------------------------------------------------
# Learning rate

TRAINING = TrainingConfig(train_tokens=11_000, warmup_tokens=1_000)
OPTIMIZER = OptimizerConfig(learning_rate=4e-4, min_learning_rate=1e-4)
SCHEDULES = ("cosine", "linear", "wsd", "constant", "inverse_sqrt")


@pytest.mark.parametrize(
    ("schedule", "quarter", "middle", "end"),
    [
        # A quarter and the half of the 10,000 tokens after warm-up. Cosine: min + (peak - min) (1 + cos(pi p)) / 2.
        ("cosine", 1e-4 + 3e-4 * (1 + math.sqrt(0.5)) / 2, 2.5e-4, 1e-4),
        ("linear", 3.25e-4, 2.5e-4, 1e-4),
        ("wsd", 4e-4, 4e-4, 1e-4),
        ("constant", 4e-4, 4e-4, 4e-4),
        ("inverse_sqrt", 4e-4 * math.sqrt(1 / 3.5), 4e-4 * math.sqrt(1 / 6), 4e-4 * math.sqrt(1 / 11)),
    ],
)
def test_closed_forms(schedule, quarter, middle, end):
    optimizer = replace(OPTIMIZER, schedule=schedule)
    expected = {250: 1e-4, 500: 2e-4, 1_000: 4e-4, 3_500: quarter, 6_000: middle, 11_000: end, 20_000: end}
    for tokens, rate in expected.items():
        if schedule == "inverse_sqrt" and tokens == 20_000:
            rate = 1e-4  # 4e-4 / sqrt(20) is below the minimum
        assert learning_rate(tokens, TRAINING, optimizer) == pytest.approx(rate, rel=1e-12), tokens


def library_rates(name: str, **options) -> list[float]:
    """The rates of 110 steps of transformers, with 10 of warm-up, for a peak of 4e-4."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=4e-4)
    scheduler = getattr(transformers, name)(optimizer, num_warmup_steps=10, **options)
    rates = []
    for _ in range(110):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("minimum", [{"min_learning_rate": 1e-4}, {"min_learning_rate_ratio": 0.25}], ids=str)
@pytest.mark.parametrize(
    ("ours", "name", "options"),
    [
        (
            {"schedule": "cosine"},
            "get_cosine_with_min_lr_schedule_with_warmup",
            {"num_training_steps": 110, "min_lr_rate": 0.25},
        ),
        *(
            (
                {"schedule": "wsd", "decay_tokens": 4_000, "decay_shape": shape},
                "get_wsd_schedule",
                {"num_training_steps": 110, "num_decay_steps": 40, "min_lr_ratio": 0.25, "decay_type": theirs},
            )
            for shape, theirs in (("linear", "linear"), ("cosine", "cosine"), ("sqrt", "1-sqrt"))
        ),
        ({"schedule": "inverse_sqrt"}, "get_inverse_sqrt_schedule", {}),
        ({"schedule": "constant"}, "get_constant_schedule_with_warmup", {}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_every_step_is_that_of_transformers(ours, name, options, minimum):
    """A step of 100 tokens uses the rate at its end, theirs after as many calls of ``scheduler.step``."""
    optimizer = OptimizerConfig(learning_rate=4e-4, **minimum, **ours)
    actual = [learning_rate(100 * step, TRAINING, optimizer) for step in range(1, 111)]
    expected = library_rates(name, **options)
    if ours["schedule"] == "inverse_sqrt":  # theirs has no minimum
        expected = [max(rate, 1e-4) if step > 10 else rate for step, rate in enumerate(expected, 1)]
    first = 9 if ours["schedule"] == "wsd" else 0  # their warm-up to wsd begins at the minimum
    assert actual[first:] == pytest.approx(expected[first:], rel=1e-9)
    assert actual[:10] == pytest.approx([4e-5 * step for step in range(1, 11)], rel=1e-9)


def test_minimum_is_a_tenth_of_the_peak_by_default():
    end = learning_rate(11_000, TRAINING, OptimizerConfig(learning_rate=4e-4))
    assert end == pytest.approx(4e-5) and OptimizerConfig().learning_rate == 5e-5


@pytest.mark.parametrize(
    ("training", "optimizer", "line"),
    [
        ({}, {"min_learning_rate": 1e-5, "min_learning_rate_ratio": 0.1}, "are both set; keep one of them"),
        ({}, {"min_learning_rate_ratio": 1.5}, "optimizer.min_learning_rate_ratio is 1.5; it must be in [0, 1]"),
        ({}, {"decay_shape": "sqrt"}, "optimizer.decay_shape is sqrt, but only optimizer.schedule wsd uses it"),
        ({}, {"schedule": "inverse_sqrt"}, "set training.warmup_tokens, warmup_steps or warmup_ratio"),
    ],
)
def test_impossible_schedules_are_refused(training, optimizer, line):
    config = RunConfig(
        "folder",
        DataConfig(train=[SourceConfig("x")]),
        TrainingConfig(train_tokens=10**6, **training),
        model=ModelConfig(initialize_from="x"),
        optimizer=OptimizerConfig(**optimizer),
    )
    assert [problem for problem in problems(config) if line in problem]


@pytest.mark.parametrize(
    ("decay_tokens", "expected"),
    [
        # Null is a tenth of train_tokens, 1,100: the fall begins at 9,900.
        (None, {9_900: 4e-4, 10_450: 2.5e-4, 11_000: 1e-4}),
        (2_000, {8_999: 4e-4, 9_000: 4e-4, 9_500: 3.25e-4, 10_000: 2.5e-4, 11_000: 1e-4}),
        (10_000, {1_000: 4e-4, 6_000: 2.5e-4, 11_000: 1e-4}),
    ],
)
def test_wsd_falls_over_its_decay_tokens(decay_tokens, expected):
    optimizer = replace(OPTIMIZER, schedule="wsd", decay_tokens=decay_tokens)
    for tokens, rate in expected.items():
        assert learning_rate(tokens, TRAINING, optimizer) == pytest.approx(rate, rel=1e-12), tokens


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_that_starts_again_is_the_first_one_later_but_warms_up_from_the_minimum(schedule):
    first = replace(OPTIMIZER, schedule=schedule, decay_tokens=2_000 if schedule == "wsd" else None)
    again = replace(first, schedule_start_tokens=11_000)
    longer = replace(TRAINING, train_tokens=22_000)
    for tokens in (1_000, 3_500, 9_500, 11_000):
        assert learning_rate(11_000 + tokens, longer, again) == learning_rate(tokens, TRAINING, first)
    assert [learning_rate(tokens, longer, again) for tokens in (11_000, 11_250, 11_500)] == pytest.approx(
        [1e-4, 1.75e-4, 2.5e-4], rel=1e-12
    )
    # Before it begins, it is where it begins.
    assert learning_rate(5_000, longer, again) == learning_rate(11_000, longer, again) == 1e-4


schedules = st.builds(
    OptimizerConfig,
    learning_rate=st.floats(1e-6, 1.0),
    min_learning_rate=st.just(1e-6),
    schedule=st.sampled_from(SCHEDULES),
)
budgets = st.builds(
    lambda train, share: TrainingConfig(train_tokens=train, warmup_tokens=int(train * share)),
    st.integers(1, 10**9),
    st.floats(0, 1),
)


@settings(deadline=None)
@given(training=budgets, optimizer=schedules, places=st.lists(st.floats(0, 1.2), min_size=2, max_size=2))
def test_it_rises_to_the_peak_then_never_rises(training, optimizer, places):
    earlier, later = sorted(int(place * training.train_tokens) for place in places)
    first, second = (learning_rate(tokens, training, optimizer) for tokens in (earlier, later))
    slack = 1e-12 * optimizer.learning_rate
    if later <= training.warmup_tokens:
        assert first <= second + slack
    elif earlier >= training.warmup_tokens:
        assert first >= second - slack
        assert second >= optimizer.min_learning_rate - slack
    assert 0 <= first <= optimizer.learning_rate + slack


@settings(deadline=None)
@given(training=budgets, optimizer=schedules)
def test_the_peak_is_at_the_end_of_warmup_and_the_minimum_at_the_end(training, optimizer):
    if training.warmup_tokens:
        assert learning_rate(training.warmup_tokens, training, optimizer) == pytest.approx(optimizer.learning_rate)
    if training.warmup_tokens < training.train_tokens:
        end = optimizer.learning_rate if optimizer.schedule == "constant" else optimizer.min_learning_rate
        if optimizer.schedule == "inverse_sqrt":
            share = training.warmup_tokens / training.train_tokens
            end = max(end, optimizer.learning_rate * math.sqrt(share))
        assert learning_rate(training.train_tokens, training, optimizer) == pytest.approx(end)


def test_the_reference_recipe():
    """Qwen2-72B: 32 x 1,024 tokens a step; 50 steps, 5 of warm-up, 5e-5 down to 5e-6."""
    training = TrainingConfig(
        train_tokens=1_638_400,
        warmup_tokens=163_840,
        sequence_length=1024,
        global_batch_size=32,
        micro_batch_size=1,
    )
    plan = plan_batches(training, 32)
    assert plan.num_micro_batches == 1
    assert plan.steps_for(training.train_tokens) == 50
    assert plan.steps_for(training.warmup_tokens) == 5
    rates = [learning_rate(step * plan.tokens_per_step, training, OptimizerConfig()) for step in range(1, 51)]
    assert rates[:5] == pytest.approx([1e-5, 2e-5, 3e-5, 4e-5, 5e-5])
    assert max(rates) == rates[4] == 5e-5
    assert min(rates[4:]) == rates[49] == pytest.approx(5e-6)
    assert rates[26] == pytest.approx(5e-6 + 4.5e-5 * (1 + math.cos(math.pi * 22 / 45)) / 2)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))
