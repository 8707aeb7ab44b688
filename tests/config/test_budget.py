"""The lengths of a run, its warm-up and its decay in tokens, steps, epochs or ratios: one of each, and the same run."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.engine.config.budget import as_written, in_tokens, recorded_budget, with_budget
from retemper.engine.config.checks import problems, with_known_budget
from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import (
    DataConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    TrainingConfig,
    to_dict,
)
from retemper.engine.errors import UserError
from retemper.engine.schedule import learning_rate

PER_STEP = 8 * 32
OPTIMIZER = OptimizerConfig()
FILE = {
    "run_folder": "runs/x",
    "data": {"train": [{"path": "a"}]},
    "training": {"sequence_length": 32, "global_batch_size": 8},
    "model": {"architecture": {"model_type": "llama"}},
}


def run_of(optimizer: OptimizerConfig = OPTIMIZER, **training) -> RunConfig:
    return RunConfig(
        run_folder="runs/x",
        data=DataConfig(train=[SourceConfig("a")]),
        training=TrainingConfig(sequence_length=32, global_batch_size=8, **training),
        optimizer=optimizer,
    )


def written(folder: Path, name: str = "run.yaml", **values) -> str:
    """Write a file with ``values`` of ``training``, those of a decay in ``optimizer``."""
    decay = {key: value for key, value in values.items() if key.startswith("decay")}
    training = {key: value for key, value in values.items() if key not in decay}
    path = folder / name
    optimizer = {"schedule": "wsd", **decay} if decay else {}
    path.write_text(yaml.safe_dump({**FILE, "training": {**FILE["training"], **training}, "optimizer": optimizer}))
    return str(path)


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(arguments)
    return str(caught.value)


def test_steps_and_ratios_become_tokens_when_the_configuration_is_read(tmp_path):
    config = parse_config(["--config", written(tmp_path, train_steps=100, warmup_steps=7)])
    assert (config.training.train_tokens, config.training.warmup_tokens) == (100 * PER_STEP, 7 * PER_STEP)
    config = parse_config(["--config", written(tmp_path, train_tokens=10_000, warmup_ratio=0.03)])
    assert (config.training.train_tokens, config.training.warmup_tokens) == (10_000, 300)


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({"decay_steps": 30}, 30 * PER_STEP),
        ({"decay_ratio": 0.3}, 30 * PER_STEP),
        ({"decay_ratio": 1e-9}, 1),
        ({"decay_tokens": 777}, 777),
    ],
)
def test_a_decay_in_steps_or_as_a_ratio_is_that_in_tokens(tmp_path, given, tokens):
    config = parse_config(["--config", written(tmp_path, train_steps=100, **given)])
    assert config.optimizer.decay_tokens == tokens
    same = parse_config(["--config", written(tmp_path, train_steps=100, decay_tokens=tokens)])
    for step in range(1, 101):
        arguments = (step * PER_STEP, config.training)
        assert learning_rate(*arguments, config.optimizer) == learning_rate(*arguments, same.optimizer)
    assert in_tokens(config) == in_tokens(same)


@settings(deadline=None)
@given(
    epochs=st.decimals("0.001", 1000, places=3).map(float),
    epoch_tokens=st.integers(PER_STEP, 10**12),
    ratio=st.decimals(0, 1, places=2).map(float),
)
def test_epochs_are_exact_decimal_multiples_of_the_data(epochs, epoch_tokens, ratio):
    """Oracle: the decimal fraction as written, not the nearest binary one."""
    run = run_of(train_epochs=epochs, warmup_ratio=ratio)
    assert with_budget(run).training.train_tokens is None  # the data are not open
    training = with_budget(run, epoch_tokens).training
    numerator, denominator = Fraction(str(epochs)).as_integer_ratio()
    assert training.train_tokens == -(-numerator * epoch_tokens // denominator)
    assert abs(training.warmup_tokens - Fraction(str(ratio)) * training.train_tokens) <= Fraction(1, 2)


def test_a_warmup_ratio_is_of_the_schedule_not_of_what_was_trained_before_it():
    run = run_of(OptimizerConfig(schedule_start_tokens=10_000), train_tokens=30_000, warmup_ratio=0.1)
    assert with_budget(run).training.warmup_tokens == 2_000
    run = run_of(OptimizerConfig(schedule="wsd", schedule_start_tokens=10_000, decay_ratio=0.15), train_tokens=30_000)
    assert with_budget(run).optimizer.decay_tokens == 3_000


@pytest.mark.parametrize(
    "training",
    [
        {"train_steps": 5, "warmup_ratio": 0.1},
        {"train_epochs": 1.5, "warmup_steps": 3},
        {"train_tokens": 99_999, "warmup_tokens": 5},
        {"train_tokens": 99_999},
        {"train_epochs": 1.5, "optimizer": OptimizerConfig(schedule="wsd", decay_ratio=0.2)},
        {"train_tokens": 9_999, "optimizer": OptimizerConfig(schedule="wsd", decay_steps=3)},
    ],
)
def test_derived_numbers_are_stable_and_can_be_removed(training):
    run = run_of(**training)
    derived = with_budget(run, 50_000)
    assert with_budget(derived, 50_000) == derived == with_budget(derived)
    assert as_written(derived) == run
    assert not [line for line in problems(derived) if "training." in line or "optimizer." in line]
    record = to_dict(run)["training"]
    assert recorded_budget(record, to_dict(derived)["training"]) == derived.training.budget
    assert recorded_budget(record) == (None if "train_epochs" in training else derived.training.budget)


def test_what_is_printed_is_what_was_written(tmp_path, capsys):
    file = written(tmp_path, train_steps=100, warmup_ratio=0.5)
    with pytest.raises(SystemExit):
        parse_config(["--config", file, "--print_config"])
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert yaml.safe_load(again.read_text())["training"]["train_tokens"] is None
    assert parse_config(["--config", str(again)]) == parse_config(["--config", file])


@pytest.mark.parametrize(
    ("given_twice", "message"),
    [
        (
            {"train_tokens": 25_600, "train_steps": 100},
            "training.train_tokens 25,600 and training.train_steps 100 are set together; keep one of them",
        ),
        (
            {"train_steps": 100, "train_epochs": 2},
            "training.train_steps 100 and training.train_epochs 2.0 are set together; keep one of them",
        ),
        (
            {"train_steps": 100, "warmup_tokens": 0, "warmup_ratio": 0.1},
            "training.warmup_tokens 0 and training.warmup_ratio 0.1 are set together; keep one of them",
        ),
        (
            {"train_steps": 100, "decay_tokens": 2_560, "decay_steps": 10},
            "optimizer.decay_tokens 2,560 and optimizer.decay_steps 10 are set together; keep one of them",
        ),
        (
            {"train_steps": 100, "decay_steps": 10, "decay_ratio": 0.1},
            "optimizer.decay_steps 10 and optimizer.decay_ratio 0.1 are set together; keep one of them",
        ),
    ],
)
def test_two_of_a_kind_are_refused(tmp_path, given_twice, message):
    assert refusal("--config", written(tmp_path, **given_twice)) == message
    sections = {key: "optimizer" if key.startswith("decay") else "training" for key in given_twice}
    options = [word for key, value in given_twice.items() for word in (f"--{sections[key]}.{key}", str(value))]
    options += ["--optimizer.schedule", "wsd"]
    assert refusal("--config", written(tmp_path), *options) == message


def test_values_set_in_python_are_refused_alike():
    assert [line for line in problems(run_of(train_tokens=1, train_steps=2)) if "together" in line]
    assert [line for line in problems(run_of(train_epochs=1, train_steps=2)) if "together" in line]
    for other in ({"decay_steps": 5}, {"decay_ratio": 0.5, "decay_steps": 5}):
        wrong = run_of(OptimizerConfig(schedule="wsd", decay_tokens=7, **other), train_steps=20)
        assert [line for line in problems(wrong) if "optimizer.decay_tokens 7 and optimizer.decay_" in line]
    assert "the length of the run is missing" in "\n".join(problems(run_of()))
    with pytest.raises(UserError, match=r"train_tokens 7 and training.train_epochs 2 are set together"):
        with_budget(run_of(train_tokens=7, train_epochs=2), 1_000)


def test_a_later_file_or_option_replaces_the_length_in_another_unit(tmp_path):
    first = written(tmp_path, "first.yaml", train_tokens=10_000, warmup_tokens=100)
    second = written(tmp_path, "second.yaml", train_steps=5)
    training = parse_config(["--config", first, "--config", second]).training
    assert (training.train_tokens, training.train_steps, training.warmup_tokens) == (5 * PER_STEP, 5, 100)
    training = parse_config(["--config", second, "--training.train_epochs", "3"]).training
    assert (training.train_tokens, training.train_steps, training.train_epochs) == (None, None, 3.0)
    training = parse_config(["--config", second, "--training.train_epochs", "3", "--config", first]).training
    assert (training.train_tokens, training.train_epochs) == (10_000, None)
    training = parse_config(["--config", first, "--training", "{train_steps: 9, warmup_ratio: 0.5}"]).training
    assert (training.train_tokens, training.warmup_tokens) == (9 * PER_STEP, 9 * PER_STEP // 2)
    with_decay = written(tmp_path, "decay.yaml", train_steps=100, decay_tokens=500)
    optimizer = parse_config(["--config", with_decay, "--optimizer.decay_steps", "3"]).optimizer
    assert (optimizer.decay_tokens, optimizer.decay_steps) == (3 * PER_STEP, 3)
    optimizer = parse_config(["--config", with_decay, "--optimizer", "{decay_ratio: 0.5}"]).optimizer
    assert (optimizer.decay_tokens, optimizer.decay_ratio) == (50 * PER_STEP, 0.5)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"train_steps": 0}, "training.train_steps is 0; it must be at least 1"),
        ({"train_epochs": 0.0}, "training.train_epochs is 0.0; it must be positive"),
        ({"train_steps": 9, "warmup_ratio": 1.5}, "training.warmup_ratio is 1.5; it must be in [0, 1]"),
        (
            {"train_steps": 9, "warmup_steps": 10},
            "training.warmup_steps 10 = 2,560 tokens is more than training.train_steps 9 = 2,304 tokens; lower "
            "training.warmup_steps",
        ),
        ({"train_steps": 9, "decay_steps": 0}, "optimizer.decay_steps is 0; it must be at least 1"),
        ({"train_steps": 9, "decay_ratio": 0.0}, "optimizer.decay_ratio is 0.0; it must be in (0, 1]"),
        (
            {"train_steps": 9, "warmup_steps": 2, "decay_ratio": 0.9},
            "optimizer.decay_ratio 0.9 = 2,074 tokens is not between 1 and the 1,792 tokens after the warm-up "
            "(training.train_steps 9 = 2,304 tokens, training.warmup_steps 2 = 512 tokens); change "
            "optimizer.decay_ratio",
        ),
        (
            {"train_steps": 10**14},
            "training.train_steps 100,000,000,000,000 = 25,600,000,000,000,000 tokens; a",
        ),
    ],
)
def test_values_that_no_run_can_have(tmp_path, training, message):
    assert refusal("--config", written(tmp_path, **training)).startswith(message)


def test_epochs_are_compared_with_the_schedule_once_the_data_are_open():
    run = run_of(train_epochs=2, warmup_steps=10)
    assert with_known_budget(run, 10_000).training.budget == 20_000
    decays = run_of(OptimizerConfig(schedule="wsd", decay_steps=10), train_epochs=2)
    assert with_known_budget(decays, 10_000).optimizer.decay_tokens == 10 * PER_STEP
    with pytest.raises(UserError, match=r"^optimizer.decay_steps 10 = 2,560 tokens is not between 1 and the 2,000"):
        with_known_budget(decays, 1_000)
    with pytest.raises(UserError) as caught:
        with_known_budget(run, 1_000)
    assert str(caught.value) == (
        "training.warmup_steps 10 = 2,560 tokens is more than training.train_epochs 2 = 2,000 tokens; lower "
        "training.warmup_steps"
    )


def test_stages_have_no_common_epoch(tmp_path):
    run = run_of(train_epochs=1)
    stages = DataConfig(stages=[StageConfig([SourceConfig("a")])])
    [line] = [line for line in problems(RunConfig("runs/x", stages, run.training)) if "epochs" in line]
    assert line.endswith("use training.train_tokens or training.train_steps")
    for key in ("training.eval_interval", "checkpoint.save_interval"):
        by_epoch = parse_config(["--config", written(tmp_path, train_steps=100), f"--{key}", "epoch"])
        assert not [line for line in problems(by_epoch) if "epoch" in line]
        [line] = [line for line in problems(replace(by_epoch, data=stages)) if "epoch" in line]
        assert line.endswith("use a number of steps")


def test_an_interval_is_a_number_of_steps_or_epoch(tmp_path):
    file = written(tmp_path, train_steps=100)
    for value in ("epochs", "1.5", "0"):
        assert "checkpoint.save_interval is" in refusal("--config", file, "--checkpoint.save_interval", value)
    assert parse_config(["--config", file, "--checkpoint.save_interval", "7"]).checkpoint.save_interval == 7
