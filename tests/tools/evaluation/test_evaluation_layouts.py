"""An evaluation gives the same numbers in every layout of ranks, and those that training logs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_run
from evaluating import FP32, evaluate, request, save_model, write_dataset

from retemper.tools.evaluation.scores import SetScore

LAYOUTS = {
    "sharded": ["--parallel.shard", "2"],
    "replicated": ["--parallel.replicate", "2"],
    "tensor": ["--parallel.tensor", "2"],
    "context": ["--parallel.context", "2"],
    "ring": ["--parallel.context", "2", "--parallel.context_kind", "ring"],
    "pipeline": ["--parallel.pipeline", "2"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "qwen2", tiny_tokenizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    generator = np.random.default_rng(3)
    lengths = [*generator.integers(1, 90, 30), 1, 2]
    documents = [[*generator.integers(2, 350, length), 0] for length in lengths]
    return write_dataset(tmp_path_factory.mktemp("data") / "set", documents)


def require_equal(found: SetScore, expected: SetScore) -> None:
    """Require the same sums and the same extreme documents."""
    for name in ("nats", "text_nats"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6)
    for name in ("targets", "text_targets", "text_bytes", "documents", "tokens"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("highest", "lowest"):
        assert [one.index for one in getattr(found, name)] == [one.index for one in getattr(expected, name)]


@pytest.mark.parametrize("mode", ["packed", "sliding"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_compute_what_one_does(layout: str, mode: str, one_rank, two_ranks, model: Path, data: str) -> None:
    options = request(model, data, mode=mode, sequence_length=32, batch_size=2)
    [expected] = evaluate(one_rank, options).model.sets
    for result in two_ranks.run(evaluate, options, [*FP32, *LAYOUTS[layout]]):
        require_equal(result.model.sets[0], expected)
    assert expected.text_bytes


@pytest.mark.parametrize("model_type", ["qwen2_moe", "glm4_moe"])
def test_ranks_that_share_experts(
    model_type: str, one_rank, two_ranks, tiny_tokenizer: Path, tmp_path: Path, data: str
) -> None:
    folder = save_model(tmp_path / "model", model_type, tiny_tokenizer)
    options = request(folder, data, sequence_length=32, batch_size=2)
    [expected] = evaluate(one_rank, options).model.sets
    for result in two_ranks.run(evaluate, options, [*FP32, *LAYOUTS["sharded"], "--parallel.expert", "2"]):
        require_equal(result.model.sets[0], expected)


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zbv_zero_bubble"])
def test_pipelines_with_several_stages_on_a_rank(
    schedule: str, one_rank, two_ranks, tiny_tokenizer: Path, tmp_path: Path, data: str
) -> None:
    folder = save_model(tmp_path / "model", "qwen2", tiny_tokenizer, num_hidden_layers=4)
    options = request(folder, data, sequence_length=32, batch_size=1)
    words = ["--parallel.pipeline_schedule", schedule, "--parallel.pipeline_stages_per_rank", "2"]
    words += ["--parallel.reshard_after_forward", "false"]
    [expected] = evaluate(one_rank, options).model.sets
    for result in two_ranks.run(evaluate, options, [*FP32, *LAYOUTS["pipeline"], *words]):
        require_equal(result.model.sets[0], expected)


@pytest.mark.parametrize("words", [["--data.attend_across_documents", "true"], []], ids=["across", "documents"])
@pytest.mark.parametrize("eval_tokens", [500, 10_000_000], ids=["a part", "all"])
def test_packed_is_the_validation_that_training_logs(
    words: list[str], eval_tokens: int, one_rank, run_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    short = ["--training.train_tokens", "512", "--training.warmup_tokens", "0", "--run_folder", str(run)]
    tiny_run.train(one_rank, run_file, [*words, *short, "--training.eval_tokens", str(eval_tokens)])
    logged = [record["loss"] for record in tiny_run.records(run) if "evaluation" in record]
    options = request(run, run_file.parent / "validation", max_tokens=eval_tokens, batch_size=3)
    result = evaluate(one_rank, options, [*FP32, *words])
    assert result.settings["sequence_length"] == 32  # that of the run
    assert result.model.sets[0].loss == pytest.approx(logged[-1], rel=1e-6)
    assert result.model.sets[0].bits_per_byte is None  # without a tokenizer
