"""A step in which no rank has a token to predict changes nothing but the clock; it is recorded and counted as such."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tiny_run
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.tensor import DTensor

from retemper.engine import pretrain
from retemper.engine.config.settings import TrainingConfig
from retemper.engine.errors import UserError
from retemper.engine.guards.step_guard import MAX_STEPS_WITHOUT_TARGETS, StepGuard
from retemper.engine.observe.metrics_file import MetricsFile
from retemper.engine.observe.observer import StepRecord
from retemper.engine.observe.tensorboard import TensorBoard
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.schedule import Progress
from retemper.engine.weights.checkpoint.tensors import training_tensors
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter

CONSTANT_RATE = ["--optimizer.min_learning_rate", "1e-2", "--training.warmup_tokens", "0"]
STEPS = 14
IN_BF16 = ["--training.weight_dtype", "bf16", "--optimizer.state_dtype", "bf16"]


def tensors_after(ranks, path, overrides, plan):
    """All weights and optimizer states, whole, after steps on the numbered global batches of ``plan``; None: one
    without targets."""
    run = pretrain.build(tiny_run.configure(path, *CONSTANT_RATE, *overrides), ranks)
    for number in plan:
        batches = run.data.micro_batches(8 * (number or 0))
        if number is None:
            batches = [batch.without_targets() for batch in batches]
        pretrain.one_step(run, batches, ranks.all_reduce(tiny_run.count_targets(batches, run.mesh)))
    tensors = training_tensors(run.model, run.optimizer)
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}


def require_equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert torch.equal(one[name], tensor), name


@pytest.mark.parametrize("dtypes", [[], IN_BF16, ["--optimizer.clip_grad_norm", "0"]], ids=["fp32", "bf16", "no clip"])
def test_it_is_as_if_it_had_not_been(dtypes, one_rank, run_file, tmp_path):
    """Weights, moments and step counts, bit for bit, also after later steps, whose stochastic rounding depends on the
    number of updates; before the first update too."""
    overrides = [*dtypes, "--run_folder", str(tmp_path)]
    expected = tensors_after(one_rank, run_file, overrides, [0, 1, 2])
    assert {float(t) for name, t in expected.items() if name.startswith("optimizer.step.")} == {3.0}
    require_equal(tensors_after(one_rank, run_file, overrides, [None, 0, None, None, 1, 2, None]), expected)


def test_it_is_the_same_on_two_ranks(two_ranks, run_file, tmp_path):
    overrides = ["--run_folder", str(tmp_path)]
    with_empty = two_ranks.run(tensors_after, run_file, overrides, [0, None, 1])
    without = two_ranks.run(tensors_after, run_file, overrides, [0, 1])
    for one, other in zip(with_empty, without, strict=True):
        require_equal(one, other)


def gradients_where_one_rank_has_none(ranks, path, overrides):
    """Gradients of a step in which only the main rank has targets; its micro-batches, and their number of targets."""
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
    batches = run.data.micro_batches(0)
    mine = batches if ranks.is_main else [batch.without_targets() for batch in batches]
    count = ranks.all_reduce(tiny_run.count_targets(mine, run.mesh))
    run.forward_backward.accumulate_gradients(mine, count, lambda phase: None)
    return tiny_run.gradients(run), batches, count


def test_a_rank_without_targets_adds_nothing(two_ranks, one_rank, run_file, tmp_path):
    overrides = ["--run_folder", str(tmp_path)]
    (shared, batches, count), _ = two_ranks.run(gradients_where_one_rank_has_none, run_file, overrides)
    alone = pretrain.build(tiny_run.configure(run_file, *overrides), one_rank)
    alone.forward_backward.accumulate_gradients(batches, count, lambda phase: None)
    expected = tiny_run.gradients(alone)
    assert count == sum(batch.num_targets for batch in batches) and shared.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A dataset of 200 documents of 40 tokens, of which a few have targets."""
    prefix = tmp_path_factory.mktemp("sparse") / "sparse"
    generator = np.random.default_rng(3)
    with IndexedDatasetWriter(prefix, np.uint16, mask=True) as writer:
        for number in range(200):
            tokens = generator.integers(0, tiny_run.EOD, 40)
            writer.add_documents(tokens, [40], mask=np.full(40, number % 25 == 0))
    return prefix


def options(source, folder, *more):
    return [
        *("--data.train", f"[{{path: {source}}}]", "--run_folder", str(folder), "--training.global_batch_size", "2"),
        *("--training.micro_batch_size", "2"),
        *("--training.train_tokens", str(STEPS * 2 * 32), "--training.warmup_tokens", "0"),
        *("--training.eval_interval", "0", "--checkpoint.save_interval", "1", "--checkpoint.keep_last", "100", *more),
    ]


def test_what_a_run_says_and_saves(sparse, one_rank, run_file, tmp_path, capfd):
    """The loss is null exactly where counting by hand finds no target; checkpoints before and after are equal; a run
    that resumes counts on, also from before the first update."""
    overrides = options(sparse, tmp_path / "run", "--training.loss_spike_zscore", "50")
    run = pretrain.build(tiny_run.configure(run_file, *overrides), one_rank)
    counts = [sum(batch.num_targets for batch in run.data.micro_batches(2 * step)) for step in range(STEPS)]
    assert 3 <= counts.count(0) <= STEPS - 3 and counts[0] == 0
    pretrain.train(run)
    records = [record for record in tiny_run.records(tmp_path / "run") if "evaluation" not in record]
    assert [record["loss"] is None for record in records] == [count == 0 for count in counts]
    assert [record["grad_norm"] is None for record in records] == [count == 0 for count in counts]
    assert [record["steps_without_targets"] for record in records] == np.cumsum(np.array(counts) == 0).tolist()
    assert {record["skipped_steps"] for record in records} == {0}
    assert [record["tokens"] for record in records] == [64 * (step + 1) for step in range(STEPS)]
    said = capfd.readouterr().out
    assert said.count("| no targets |") == counts.count(0) and said.count("| loss ") == STEPS - counts.count(0)
    checkpoints = [tmp_path / "run" / "checkpoints" / f"step-{step:08d}" for step in range(1, STEPS + 1)]
    assert said.count(f"next        retemper export --checkpoint {checkpoints[-1]} ") == 1
    saved = [tiny_run.tensors_of(checkpoint) for checkpoint in checkpoints]
    for before, after, count in zip(saved[:-1], saved[1:], counts[1:], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before) == (count == 0)
    assert len(run.guards.step_guard.state_dict()["losses"]) == STEPS - counts.count(0)

    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    for checkpoint in checkpoints[1:]:
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / checkpoint.name)
    tiny_run.train(one_rank, run_file, options(sparse, tmp_path / "resumed", "--training.loss_spike_zscore", "50"))
    assert tiny_run.curve(tmp_path / "resumed") == tiny_run.curve(tmp_path / "run")
    again = tiny_run.tensors_of(tmp_path / "resumed" / "checkpoints" / checkpoints[-1].name)
    assert all(torch.equal(again[name], tensor) for name, tensor in saved[-1].items())


def step_guard(config=None):
    config = config or TrainingConfig(train_tokens=1, max_skipped_steps=1)
    return StepGuard(config, Ranks(0, 1, torch.device("cpu")), lambda: "no checkpoint has been written", print)


def test_too_many_in_a_row_end_the_run():
    """In a row, over a restart too, and not a number of them with others in between."""
    guard, one = step_guard(), torch.tensor(1.0)
    for step in range(3 * MAX_STEPS_WITHOUT_TARGETS):
        if step % (MAX_STEPS_WITHOUT_TARGETS - 1) == 0:
            guard.should_skip(step, one, one)
        else:
            guard.count_without_targets(step)
    assert guard.steps_without_targets == 3 * MAX_STEPS_WITHOUT_TARGETS - 4
    guard.should_skip(1000, one, one)
    for step in range(60):
        guard.count_without_targets(step)
    resumed = step_guard()
    resumed.load_state_dict(guard.state_dict())
    for step in range(60, 99):
        resumed.count_without_targets(step)
    with pytest.raises(UserError, match=r"^step 1100: 100 steps in a row had no target: .* no checkpoint has been"):
        resumed.count_without_targets(1100)


def test_neither_spikes_nor_skipped_steps_take_notice_of_it():
    config = TrainingConfig(train_tokens=1, max_skipped_steps=1, loss_spike_zscore=5.0)
    guard, norm = step_guard(config), torch.tensor(1.0)
    for step in range(40):
        guard.should_skip(step, torch.tensor(2.0 + step % 3), norm)
    assert guard.should_skip(40, torch.tensor(1e3), norm) == 1 and guard.spiked
    before = guard.state_dict()
    guard.count_without_targets(41)
    assert not guard.spiked  # or the run would go back a second time
    assert guard.state_dict() == {**before, "without_targets": [1, 1]}
    assert guard.counts[0] == 1


def test_tensorboard_gets_no_scalar_for_what_there_is_none_of(tmp_path):
    record = StepRecord(Progress(3, 3, 96), {"loss": None, "grad_norm": None, "learning_rate": 0.5}, 0, 0.0, [])
    for observer in (MetricsFile(tmp_path, print), TensorBoard(tmp_path)):
        observer.start(None)
        observer.step(record)
        observer.end({})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/learning_rate"]
    assert [(event.step, event.value) for event in events.Scalars("train/learning_rate")] == [(3, 0.5)]
    assert tiny_run.records(tmp_path) == [
        {"step": 3, "tokens": 96, "loss": None, "grad_norm": None, "learning_rate": 0.5}
    ]
