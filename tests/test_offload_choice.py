"""``parallel.cpu_offload: auto`` of a run: who decides, that all ranks decide alike, and that a resume may differ."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import plan_runs
import pytest
import tiny_run
import torch

from retemper.engine import offload_choice, pretrain, start
from retemper.engine.errors import UserError
from retemper.engine.offload_choice import with_named_offload, with_offload
from retemper.engine.parallel.process_group import Ranks

AUTO = ("--parallel.cpu_offload", "auto")
GPU = torch.device("cuda", 0)
GiB = 2**30
CHOICES = (False, "optimizer", True)


def answer(chosen, fits=True):
    """What the planner writes."""
    return {"cpu_offload": {"chosen": chosen, "fits": fits, "reason": "predicted: false needs 2 GiB"}}


@pytest.fixture
def config(tmp_path):
    """A run that leaves the choice open."""
    return plan_runs.configure(plan_runs.write_config(tmp_path), " ".join(AUTO))


@pytest.mark.parametrize("chosen", CHOICES)
def test_a_gpu_takes_what_the_planner_says(chosen, config, monkeypatch):
    calls, said = [], []
    monkeypatch.setattr(offload_choice, "device_memory", lambda device: 24 * GiB)
    monkeypatch.setattr(offload_choice, "plan_run", lambda *given: calls.append(given) or answer(chosen))
    decided, reason = with_offload(config, Ranks(0, 1, GPU), said.append)
    assert decided == replace(config, parallel=replace(config.parallel, cpu_offload=chosen))
    assert reason == "auto, predicted: false needs 2 GiB"
    [(asked, _, memory, seconds, *_)] = calls
    assert asked == config and memory == 24 * GiB and f"for at most {seconds:.0f} s" in said[0]


def test_a_cpu_and_what_is_set_need_no_planner(config, monkeypatch):
    monkeypatch.setattr(offload_choice, "plan_run", lambda *given: pytest.fail("planned"))
    on_cpu, reason = with_offload(config, Ranks(0, 1, torch.device("cpu")), print)
    assert on_cpu.parallel.cpu_offload is False and "on the CPU" in reason
    for value in CHOICES:
        configured = with_named_offload(config, value)
        assert with_offload(configured, Ranks(0, 1, GPU), print) == (configured, None)


def test_without_an_answer_the_run_ends_in_one_line(config, monkeypatch):
    monkeypatch.setattr(offload_choice, "device_memory", lambda device: 24 * GiB)

    def fails(*given):
        raise UserError("it needed more than 300 s")

    remedy = "set parallel.cpu_offload to false, optimizer or true"
    for planner, words in (
        (fails, "the planner failed: it needed more than 300 s"),
        (lambda *given: answer(True, fits=False), "nothing fits, predicted: false needs 2 GiB; lower"),
    ):
        monkeypatch.setattr(offload_choice, "plan_run", planner)
        with pytest.raises(UserError, match=words) as caught:
            with_offload(config, Ranks(0, 1, GPU), print)
        assert remedy in str(caught.value) and "\n" not in str(caught.value)


def decide_on_gpus(ranks: Ranks, config, fails: bool) -> tuple:
    """What this rank decides: its GPU has 10 GiB, or 20 on rank 1, and its own planner another opinion."""
    planned = []

    def plan(config, ranks, memory, seconds, *options):
        planned.append(memory)
        if fails:
            raise UserError("no")
        return answer(CHOICES[ranks.rank + 1])

    ours = replace(ranks, device=torch.device("cuda", ranks.rank))
    with (
        mock.patch.object(offload_choice, "device_memory", lambda device: (20 - 10 * device.index) * GiB),
        mock.patch.object(offload_choice, "plan_run", plan),
    ):
        try:
            decided, reason = with_offload(config, ours, lambda line: None)
        except UserError as error:
            return planned, str(error)
        return planned, decided.parallel.cpu_offload, reason


def test_one_rank_plans_for_the_smallest_gpu_and_all_do_the_same(two_ranks, config):
    (planned, *first), (none, *second) = two_ranks.run(decide_on_gpus, config, False)
    assert planned == [10 * GiB] and none == []
    assert first == second == ["optimizer", "auto, predicted: false needs 2 GiB"]
    for _, said in two_ranks.run(decide_on_gpus, config, True):
        assert "the planner failed: no" in said


def test_a_resume_may_choose_otherwise(one_rank, run_file, reference, tmp_path, monkeypatch, capsys):
    """Bit for bit the run that was never interrupted, and never offloaded."""
    overrides = ["--run_folder", str(tmp_path), *AUTO]
    for chosen, step in (("optimizer", 6), (True, 11), (False, None)):
        monkeypatch.setattr(
            start, "with_offload", lambda config, ranks, say, chosen=chosen: (with_named_offload(config, chosen), "why")
        )
        if step is None:
            tiny_run.train(one_rank, run_file, overrides)
        else:
            tiny_run.train_until(one_rank, run_file, overrides, step)
        out = capsys.readouterr().out
        assert f"offload     {str(chosen).lower()} (why)" in out
    assert "parallel.cpu_offload" in out and tiny_run.curve(tmp_path) == tiny_run.curve(reference)
    expected, actual = (
        tiny_run.tensors_of(folder / "checkpoints" / "step-00000020") for folder in (reference, tmp_path)
    )
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_a_cpu_run_says_so(one_rank, run_file, tmp_path, capsys):
    run = pretrain.build(tiny_run.configure(run_file, "--run_folder", str(tmp_path), *AUTO), one_rank)
    assert run.config.parallel.cpu_offload is False
    assert run.choices.offload_reason == "auto: the run computes on the CPU"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_planner_decides_for_a_run(tmp_path, monkeypatch):
    """The real process; a budget in epochs, of data that nobody has counted. States of 3 GiB alone exclude false."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8}
    path = plan_runs.write_config(tmp_path, **shape, num_key_value_heads=8, head_dim=128, vocab_size=32000)
    text = path.read_text().replace("train_tokens: 100000", "train_epochs: 1\n  warmup_ratio: 0.1")
    path.write_text(text)
    config = plan_runs.configure(path, " ".join(AUTO))
    parameters = 2 * 32000 * 1024 + 8 * (4 * 1024**2 + 3 * 1024 * 4096)
    memory = 4 * GiB + 12 * parameters
    monkeypatch.setattr(offload_choice, "device_memory", lambda device: memory)
    monkeypatch.setattr("retemper.engine.planner_process.device_peak_flops", lambda device: None)
    decided, reason = with_offload(config, Ranks(0, 1, GPU), print)
    assert decided.parallel.cpu_offload == "optimizer", reason
    assert f"{memory / GiB:.2f} GiB - 4.00 GiB reserve" in reason
