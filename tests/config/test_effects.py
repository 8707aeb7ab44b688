"""Values without effect: every setting is in the table, and each rule speaks exactly when its value does nothing."""

import dataclasses
import inspect
from dataclasses import replace
from typing import get_args, get_origin

import pytest

from retemper.engine.config.checks import problems
from retemper.engine.config.effects import ALWAYS, ELSEWHERE, RULES, Situation, refused, without_effect
from retemper.engine.config.settings import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainingConfig
from retemper.engine.config.types_check import bare, hints_of

ONE = [SourceConfig("a")]
TWO = [SourceConfig("a", weight=2.0), SourceConfig("b")]
RUN = RunConfig(
    run_folder="runs/x",
    data=DataConfig(train=TWO, validation={"news": "v"}),
    training=TrainingConfig(train_tokens=32 * 1024 * 2000),
    model=ModelConfig(architecture={}),
)
"""2,000 steps of 32,768 tokens. Nothing in it is without effect."""


def changed(**values) -> RunConfig:
    """RUN with ``section__key=value``."""
    run = RUN
    for name, value in values.items():
        section, _, key = name.rpartition("__")
        run = replace(run, **({section: replace(getattr(run, section), **{key: value})} if section else {key: value}))
    return run


def all_keys(kind: type = RunConfig, prefix: str = ""):
    for name, hint in hints_of(kind).items():
        kind = bare(hint)
        inner = get_args(kind)[0] if get_origin(kind) is list else None
        if dataclasses.is_dataclass(kind):
            yield from all_keys(kind, f"{prefix}{name}.")
            continue
        yield prefix + name
        if dataclasses.is_dataclass(inner) and not prefix.endswith("[]."):
            yield from all_keys(inner, f"{prefix}{name}[].")


def test_every_setting_has_a_place_in_the_table():
    """A new setting needs a rule, or a reason why it needs none: this fails until it has one."""
    in_rules = {key for rule in RULES for key in rule.keys}
    assert set(all_keys()) == in_rules | ALWAYS | ELSEWHERE.keys()
    assert not in_rules & ALWAYS and not in_rules & ELSEWHERE.keys() and not ALWAYS & ELSEWHERE.keys()
    for place in ELSEWHERE.values():
        path, _, function = place.partition(": ")
        module = __import__(f"retemper.{path.removesuffix('.py').replace('/', '.')}", fromlist=["x"])
        assert f"def {function.split()[0]}" in inspect.getsource(module)


def test_settings_that_have_an_effect_are_not_mentioned():
    assert without_effect(Situation(RUN)) == []
    several = {"reduces": True, "same_weights": True, "num_micro_batches": 2, "device": "cuda"}
    run = changed(
        parallel__reduce_gradients="step",
        parallel__reshard_after_forward=False,
        parallel__prefetch_blocks=3,
        parallel__recompute="full",
        parallel__recompute_every=2,
        parallel__cpu_offload=True,
        training__check_replicas_interval=10,
        training__eval_interval=2000,
        training__eval_tokens=5,
        training__eval_at_start=True,
        training__loss_spike_zscore=9.0,
        training__loss_spike_action="rewind",
        training__rewind_steps=3,
        training__max_rewinds=9,
        training__warmup_tokens=32 * 1024 + 1,
        checkpoint__save_interval=20,
        checkpoint__keep_every=30,
        checkpoint__export_hf=True,
        checkpoint__push_to_hub="a/b",
        optimizer__schedule="wsd",
        optimizer__decay_tokens=1000,
        optimizer__schedule_start_tokens=7,
        optimizer__min_learning_rate=0.0,
        allow_changes=["seed"],
        data__weights="documents",
    )
    same_start = {"model": {"initialize_from": None}}
    assert without_effect(Situation(run, **several, resumed=same_start)) == []
    assert list(problems(run)) == []


STEPS = "has no effect: the run has fewer steps"


@pytest.mark.parametrize(
    ("values", "situation", "expected"),
    [
        (
            {"data__validation": {}, "training__eval_interval": 5, "training__eval_tokens": 7},
            {},
            "training.eval_interval 5, training.eval_tokens 7 have no effect: there",
        ),
        (
            {"data__validation": {}, "checkpoint__keep_best": "improved"},
            {},
            "checkpoint.keep_best improved has no effect: there is no validation set",
        ),
        ({"training__eval_interval": 2001}, {}, f"training.eval_interval 2,001 {STEPS}; it evaluates only at the end"),
        ({"training__check_replicas_interval": 2001}, {"same_weights": True}, f"replicas_interval 2,001 {STEPS}"),
        ({"training__check_replicas_interval": 5}, {}, "no two ranks hold the same values"),
        ({"checkpoint__save_interval": 3000}, {}, f"checkpoint.save_interval 3,000 {STEPS}; it saves only at the end"),
        ({"checkpoint__keep_every": 999}, {}, "checkpoint.keep_every 999 has no effect: no step"),
        ({"training__rewind_steps": 5, "training__max_rewinds": 1}, {}, "training.loss_spike_action is skip"),
        ({"training__warmup_tokens": 32 * 1024}, {}, "training.warmup_tokens 32,768 has no effect: the first step"),
        ({"optimizer__schedule": "constant", "optimizer__min_learning_rate": 0.0}, {}, "min_learning_rate 0.0 has no"),
        ({"optimizer__schedule": "linear", "training__warmup_tokens": 32 * 1024 * 2000}, {}, "schedule linear has no"),
        (
            {"optimizer__schedule": "constant", "optimizer__schedule_start_tokens": 9},
            {},
            "start_tokens 9 has no effect",
        ),
        ({"parallel__recompute_every": 4}, {}, "parallel.recompute_every 4 has no effect: parallel.recompute is none"),
        ({"data__train": [SourceConfig("a", weight=3.0)]}, {}, "data.train[0].weight 3.0 has no effect: no mixture"),
        ({"data__train": ONE, "data__weights": "documents"}, {}, "data.weights documents has no effect: no mixture"),
        ({"parallel__reduce_gradients": "step"}, {"num_micro_batches": 2}, "parallel.reduce_gradients step has no"),
        ({"parallel__reduce_gradients": "step"}, {"reduces": True}, "parallel.reduce_gradients step has no effect"),
        ({"parallel__reshard_after_forward": False}, {}, "reshard_after_forward false has no effect: no other rank"),
        ({"parallel__prefetch_blocks": 2}, {}, "parallel.prefetch_blocks 2 has no effect: no other rank"),
        ({"parallel__cpu_offload": True}, {}, "parallel.cpu_offload true has no effect: the run computes on the CPU"),
        (
            {"training__precision": "auto", "training__initial_loss_scale": 4.0},
            {},
            "training.initial_loss_scale 4.0 has no effect: training.precision auto did not choose fp16",
        ),
        (
            {"training__router_aux_loss_coef": 0.0, "training__router_z_loss_coef": 0.1},
            {"has_router_losses": False},
            "training.router_aux_loss_coef 0.0, training.router_z_loss_coef 0.1 have no effect: the model has no",
        ),
        (
            {"training__router_bias_update_rate": 0.0},
            {"has_selection_biases": False},
            "training.router_bias_update_rate 0.0 has no effect: no router of the model",
        ),
        ({"allow_changes": ["seed"]}, {}, "allow_changes ['seed'] has no effect: the run starts fresh"),
        (
            {"model__initialize_from": "new"},
            {"resumed": {"model": {"initialize_from": "old"}}},
            "model.initialize_from new has no effect: the run continues from its checkpoint",
        ),
        (
            {"data__train": [SourceConfig("a", max_epochs=2.0, max_tokens=500), SourceConfig("b")]},
            {"source_tokens": {"a": 1000}},
            "data.train[0].max_epochs 2 has no effect: max_tokens 500 is the smaller limit (1,000 tokens an epoch)",
        ),
        (
            {"data__train": [SourceConfig("a", max_epochs=0.25, max_tokens=500), SourceConfig("b")]},
            {"source_tokens": {"a": 1000}},
            "data.train[0].max_tokens 500 has no effect: max_epochs 0.25 is the smaller limit",
        ),
    ],
)
def test_a_value_without_effect_is_one_line(values, situation, expected):
    [line] = without_effect(Situation(changed(**values), **situation))
    assert expected in line and "\n" not in line


def test_a_default_is_not_mentioned():
    assert without_effect(Situation(changed(data__validation={}))) == []


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"optimizer__decay_tokens": 5}, "optimizer.decay_tokens is 5, but"),
        ({"optimizer__decay_steps": 5}, "optimizer.decay_steps is 5, but"),
        ({"optimizer__decay_ratio": 0.5}, "optimizer.decay_ratio is 0.5, but"),
        ({"training__loss_spike_action": "rewind"}, "training.loss_spike_action is rewind, but"),
        ({"checkpoint__push_to_hub": "a/b"}, "checkpoint.push_to_hub is a/b, but"),
        ({"parallel__pipeline_schedule": "interleaved_1f1b"}, "parallel.pipeline_schedule is interleaved_1f1b, but"),
        ({"parallel__pipeline_stages_per_rank": 2}, "parallel.pipeline_stages_per_rank is 2, but"),
    ],
)
def test_what_cannot_be_meant_is_refused(values, key):
    assert list(refused(RUN)) == []
    [line] = refused(changed(**values))
    assert line.startswith(key)
    assert line in problems(changed(**values))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"training__weight_dtype": "bf16"}, "training.precision is fp16, but training.weight_dtype is bf16"),
        ({"training__float8": True}, "training.precision is fp16, but training.float8 is true"),
        ({"training__initial_loss_scale": 3.0}, "training.initial_loss_scale is 3.0; it must be a power of two"),
        (
            {"training__initial_loss_scale": 2.0, "training__min_loss_scale": 4.0},
            "training.min_loss_scale 4 is above training.initial_loss_scale 2",
        ),
        (
            {"training__precision": "bf16", "training__loss_scale_window": 7},
            "training.loss_scale_window is 7, but only training.precision fp16 scales the loss",
        ),
    ],
)
def test_what_fp16_does_not_work_with(values, expected):
    [line] = problems(changed(**{"training__precision": "fp16", **values}))
    assert line.startswith(expected) and "\n" not in line
