"""Layouts that cannot be are refused before anything is built: one line with both sides of the arithmetic."""

from __future__ import annotations

import parity_run
import pytest

from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.errors import UserError
from retemper.engine.parallel.process_group import Ranks


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return parity_run.write_run(tmp_path_factory.mktemp("refused"), parity_run.Model("qwen2", True, True))


def refusal(ranks: Ranks, path, options: list[str]) -> str:
    try:
        pretrain.build(parse_config(["--config", str(path), *options]), ranks)
    except UserError as error:
        return str(error)
    raise AssertionError("it was built")


def architecture(**changes: object) -> str:
    return str({**parity_run.FAMILIES["qwen2"], "tie_word_embeddings": True, **changes})


ZERO_BUBBLE = "pipeline=2 pipeline_schedule=zbv_zero_bubble pipeline_stages_per_rank=2"
CASES = {
    "shard=3": "parallel.replicate 1 x parallel.shard 3 = 3 ranks, but the run has 2",
    "tensor=3": "parallel.tensor 3 does not divide the 2 ranks of this run; use a divisor of 2",
    "pipeline=2 tensor=2": "parallel.pipeline 2 x parallel.tensor 2 = 4 does not divide the 2 ranks",
    "pipeline=2 micro_batch_size=8": "a step has 1 micro-batches, but a pipeline of 2 stages needs at least 2",
    "pipeline=2 pipeline_schedule=interleaved_1f1b": (
        "parallel.pipeline_stages_per_rank is 1, but parallel.pipeline_schedule interleaved_1f1b needs 2 or more"
    ),
    "pipeline=2 pipeline_stages_per_rank=2": "is 2, but parallel.pipeline_schedule 1f1b needs 1",
    "pipeline_schedule=interleaved_1f1b": "but parallel.pipeline is 1; set it to 2 or more",
    "pipeline=2 pipeline_schedule=interleaved_1f1b pipeline_stages_per_rank=3": (
        "parallel.pipeline 2 x parallel.pipeline_stages_per_rank 3 = 6 stages, but the model has 4 layers; use fewer"
    ),
    "pipeline=2 pipeline_schedule=interleaved_1f1b pipeline_stages_per_rank=2 global_batch_size=5": (
        "a step has 5 micro-batches, which interleaved_1f1b cannot distribute evenly over 2 ranks; make it a multiple"
    ),
    ZERO_BUBBLE: "zbv_zero_bubble needs parallel.reshard_after_forward false",
    f"{ZERO_BUBBLE} reshard_after_forward=false": "the model's embedding is also its head",
    f"{ZERO_BUBBLE} reshard_after_forward=false recompute=full": "zbv_zero_bubble needs parallel.recompute none",
    "context=2 sequence_length=31": (
        "training.micro_batch_size 1 x training.sequence_length 31 = 31 tokens cannot be divided evenly among "
        "parallel.context 2 x parallel.tensor 1 = 2 ranks"
    ),
    "context=2 context_kind=ring sequence_length=30": (
        "ring attention divides training.micro_batch_size 1 x training.sequence_length 30 = 30 tokens into 2 x "
        "parallel.context 2 = 4 equal chunks; use a multiple of 4"
    ),
    "tensor=2 async_tensor=true": "parallel.async_tensor is true, but it needs parallel.tensor > 1, a GPU and compiled",
    "global_batch_size=5": "training.global_batch_size 5 is not a multiple of micro_batch_size 1 x data-parallel",
}
SHAPES = {
    "num_attention_heads=3 num_key_value_heads=1 hidden_size=24": (
        "tensor",
        "2 does not divide the model's 3 attention heads",
    ),
    "num_key_value_heads=1": ("tensor", "2 does not divide the model's 1 key/value heads"),
    "vocab_size=97": ("tensor", "2 does not divide the model's 97 rows of the vocabulary"),
    "intermediate_size=49": ("tensor", "2 does not divide the model's 49 features of the feed-forward layer"),
    "num_attention_heads=3 num_key_value_heads=3 hidden_size=24": (
        "context",
        "2 does not divide the 3 attention heads of a rank",
    ),
    "num_attention_heads=6 num_key_value_heads=3 hidden_size=48": (
        "context",
        "2 neither divides the 3 key/value heads of a rank (3) nor is a multiple of them",
    ),
}
TRAINING = ("micro_batch_size", "global_batch_size", "sequence_length")


def options_of(settings: str) -> list[str]:
    options = []
    for setting in settings.split():
        key, value = setting.split("=")
        options += [f"--{'training' if key in TRAINING else 'parallel'}.{key}", value]
    return options


@pytest.mark.parametrize("settings", CASES)
def test_layouts_that_do_not_fit_the_ranks(settings, two_ranks, path):
    for message in two_ranks.run(refusal, path, options_of(settings)):
        assert CASES[settings] in message
        assert "\n" not in message


@pytest.mark.parametrize("shape", SHAPES)
def test_layouts_that_do_not_fit_the_model(shape, two_ranks, path):
    axis, expected = SHAPES[shape]
    changes = {key: int(value) for key, value in (change.split("=") for change in shape.split())}
    options = ["--model.architecture", architecture(**changes), f"--parallel.{axis}", "2"]
    if axis == "context":
        options += ["--parallel.context_kind", "heads"]
    for message in two_ranks.run(refusal, path, options):
        assert f"parallel.{axis} {expected}" in message


@pytest.mark.parametrize("kind", ["heads", "ring"])
def test_positions_that_depend_on_the_length_of_a_document(kind, two_ranks, path):
    dynamic = architecture(max_position_embeddings=16, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    options = ["--model.architecture", dynamic, "--parallel.context", "2", "--parallel.context_kind", kind]
    for message in two_ranks.run(refusal, path, options):
        assert "parallel.context 2 with training.sequence_length 32" in message
        assert "above 16 tokens" in message
