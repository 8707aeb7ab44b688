"""Saving behind the training: what is written is what stood there, in time, once; failures reach every rank."""

from __future__ import annotations

import pytest
import saved_runs
import saver_cases
import torch

from retemper.engine.errors import UserError
from retemper.engine.weights.checkpoint.verify import find_damage


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_written_is_what_stood_there(asynchronous, two_ranks, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    lines = two_ranks.run(saver_cases.values_change_behind_the_save, tmp_path / "run", asynchronous)
    assert lines[0] == lines[1] == [f"  saved {folder / f'step-0000000{step}'}" for step in (1, 2, 3)]
    for step in (1, 2, 3):
        checkpoint = folder / f"step-0000000{step}"
        assert find_damage(checkpoint)[1] == []
        stored, expected = saved_runs.tensors_of(checkpoint), saver_cases.values_at(step - 1)
        assert stored.keys() == expected.keys()
        assert all(torch.equal(stored[name], expected[name]) for name in expected)


def test_training_goes_on_meanwhile_and_all_ranks_notice_the_end_at_the_same_step(two_ranks, tmp_path):
    (steps, lines), (others, same) = two_ranks.run(saver_cases.training_goes_on_meanwhile, tmp_path)
    assert steps == others > 1 and lines == same


def test_a_failure_anywhere_is_noticed_everywhere_and_the_next_save_may_succeed(two_ranks, tmp_path):
    for lines, ended in two_ranks.run(saver_cases.failures, tmp_path, "xx.xx."):
        assert [line.split(": ")[0].split(" /")[0] for line in lines] == [
            "  not saved, 1 in a row",
            "  not saved, 2 in a row",
            "  saved",
            "  not saved, 1 in a row",
            "  not saved, 2 in a row",
            "  saved",
        ]
        assert ended is None and "nowhere" in lines[0]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize(("sequence", "bound"), [("xxx.", 2), ("x.", 0), (".x", 2)])
def test_too_many_failures_and_that_of_the_last_save_end_the_run(sequence, bound, two_ranks, tmp_path):
    for lines, ended in two_ranks.run(saver_cases.failures_with_bound, tmp_path, sequence, bound):
        assert ended is not None and "nowhere" in ended and "cannot be written" in ended
        assert len([line for line in lines if "not saved" in line]) == sequence.count("x")


def test_an_error_of_all_ranks_lets_the_save_end_and_any_other_waits_for_nobody(two_ranks, tmp_path):
    for kind, saved in ((UserError, 1), (RuntimeError, 0)):
        folder = tmp_path / kind.__name__
        for lines in two_ranks.run(saver_cases.an_error_while_saving, folder, kind):
            assert len(lines) == saved


def test_host_memory_is_taken_once(two_ranks):
    assert all(two_ranks.run(saver_cases.buffers_are_kept))


def test_only_the_update_waits_for_the_copies(two_ranks, tmp_path):
    assert all(two_ranks.run(saver_cases.an_update_waits_for_the_copies, tmp_path))


def test_no_thread_holds_tensors_after_a_save(two_ranks, tmp_path):
    """A thread that released them while Python exits would abort the process."""
    assert two_ranks.run(saver_cases.threads_after_a_save, tmp_path) == [[], []]
