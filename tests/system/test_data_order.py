"""The order of the data in real runs: stages, caps, layouts of documents and loss masks, through the run."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_run
import torch

from retemper.engine import pretrain
from retemper.engine.errors import UserError
from retemper.kernels.linear_cross_entropy import IGNORE_INDEX
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter

STEP = 8 * 32
"""Tokens of the tiny run's steps."""
LAST = "step-00000020"


@pytest.fixture(scope="module")
def staged(run_file):
    """Options of a run whose first stage ends inside step 6, and in which 'first' reaches its cap inside step 10."""
    first, second = (run_file.parent / name for name in ("first", "second"))
    stages = (
        f"[{{train: [{{path: {first}}}], train_tokens: {5 * STEP + 100}}}, "
        f"{{train: [{{path: {second}}}, {{path: {first}, max_tokens: {60 * 32}}}], train_tokens: {15 * STEP - 100}}}]"
    )
    return ["--data.train", "[]", "--data.stages", stages, "--training.eval_interval", "0"]


@pytest.fixture(scope="module")
def undisturbed(one_rank, run_file, staged, tmp_path_factory):
    """Run folders of the staged run, by data.packing and data.shuffle."""
    folders = {}
    for packing, shuffle in (("concat", "windows"), ("best_fit", "documents")):
        folders[packing] = folder = tmp_path_factory.mktemp("staged") / packing
        options = ["--data.packing", packing, "--data.shuffle", shuffle, "--run_folder", str(folder)]
        tiny_run.train(one_rank, run_file, [*staged, *options])
    return folders


def assert_same(run, other):
    """The same losses, and the same weights and optimizer states bit for bit at the end."""
    assert tiny_run.curve(run) == tiny_run.curve(other)
    expected, actual = (tiny_run.tensors_of(folder / "checkpoints" / LAST) for folder in (other, run))
    assert actual.keys() == expected.keys()
    assert all(actual[name].equal(tensor) for name, tensor in expected.items())


def test_stages_and_caps_are_said_and_drawn(one_rank, run_file, staged, tmp_path, capsys):
    """By counting: 'first' alone for 44 samples (1,380 tokens reach into the 44th), then half of each until it has
    given 60, then 'second' alone; and the start-up summary says so."""
    run = pretrain.build(tiny_run.configure(run_file, *staged, "--run_folder", str(tmp_path)), one_rank)
    names = [run.catalog.train[run.order.sample(index).source].name for index in range(160)]
    assert set(names[:44]) == {"first"}
    assert names[44:76] == ["second", "first"] * 16
    assert set(names[76:]) == {"second"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "make_steps", lambda *_: None)
        pretrain.train(run)
    said = capsys.readouterr().out
    assert "stage 1     from 0 to 1,408 tokens: first 1\n" in said
    assert "stage 2     from 1,408 to the end: second 1, first 1\n" in said
    assert "caps        from 2,432 tokens on first reached the cap; continuing with second\n" in said


@pytest.mark.parametrize(("packing", "shuffle"), [("concat", "windows"), ("best_fit", "documents")])
def test_resumed_in_the_middle_of_each_stage_it_is_the_undisturbed_run(
    packing, shuffle, one_rank, run_file, staged, undisturbed, tmp_path
):
    """From step 4, in the first stage, through its end; and from step 8, before the cap is reached."""
    options = [*staged, "--data.packing", packing, "--data.shuffle", shuffle, "--run_folder", str(tmp_path)]
    tiny_run.train_until(one_rank, run_file, options, 5)
    tiny_run.train_until(one_rank, run_file, options, 9)
    checkpoints = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert checkpoints == ["step-00000004", "step-00000008"]
    tiny_run.train(one_rank, run_file, options)
    assert_same(tmp_path, undisturbed[packing])


def test_layouts_and_stages_change_what_is_trained_on(undisturbed, reference):
    curves = [tiny_run.curve(folder) for folder in (*undisturbed.values(), reference)]
    losses = [[record[2] for record in curve if record[1] == "train"][3] for curve in curves]
    assert len(set(losses)) == 3


def test_stages_on_two_ranks_read_the_same_samples(two_ranks, run_file, staged, undisturbed, tmp_path):
    options = ["--data.packing", "best_fit", "--data.shuffle", "documents", "--run_folder", str(tmp_path)]
    two_ranks.run(tiny_run.train, run_file, [*staged, *options])
    actual, expected = tiny_run.curve(tmp_path), tiny_run.curve(undisturbed["best_fit"])
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one[:2] == other[:2]
        assert one[2:] == pytest.approx(other[2:], rel=1e-5)


def test_a_stage_that_is_added_behind_leaves_no_trace_before(one_rank, run_file, staged, undisturbed, tmp_path):
    """The first stage as it was, with nothing known of a second; then, from step 4 on, the whole."""
    stages = staged[3]
    alone = stages[: stages.index("}],") + 2] + f", train_tokens: {20 * STEP}}}]"
    options = ["--run_folder", str(tmp_path)]
    tiny_run.train_until(one_rank, run_file, [*staged[:3], alone, *staged[4:], *options], 5)
    tiny_run.train(one_rank, run_file, [*staged, *options])
    assert_same(tmp_path, undisturbed["concat"])


def test_caps_that_run_out_are_refused_before_anything_is_written(one_rank, run_file, tmp_path):
    first = run_file.parent / "first"
    options = ["--run_folder", str(tmp_path / "run"), "--data.train", f"[{{path: {first}, max_tokens: 2000}}]"]
    message = tiny_run.refusal(one_rank, run_file, options)
    assert message == (
        "training.train_tokens needs 160 samples x 32 = 5,120 tokens in whole steps, but the data ends after 62 "
        "samples = 1,984 tokens, because all its sources have reached their caps (first 62 samples); raise "
        "max_epochs or max_tokens, add data, or lower training.train_tokens"
    )
    assert not (tmp_path / "run").exists()


def test_a_resume_with_another_layout_is_refused(one_rank, run_file, reference, tmp_path):
    for option, value, former in (("packing", "best_fit", "concat"), ("shuffle", "documents", "windows")):
        with pytest.raises(UserError, match=rf"data\.{option} is {value}, but .* was trained with {former}"):
            pretrain.build(
                tiny_run.configure(run_file, "--run_folder", str(reference), f"--data.{option}", value), one_rank
            )


# --------------------------------------------------------------------------------------------------------------------
# Loss masks


def write_masked(prefix, mask_of) -> None:
    generator = np.random.default_rng(5)
    with IndexedDatasetWriter(prefix, np.uint16, mask=True) as writer:
        for _ in range(80):
            tokens = np.append(generator.integers(0, tiny_run.EOD, size=int(generator.integers(1, 80))), tiny_run.EOD)
            writer.add_documents(tokens, [len(tokens)], mask=mask_of(len(tokens)))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Prefix of a dataset with a mask that counts the second half of each document."""
    folder = tmp_path_factory.mktemp("masked")
    write_masked(folder / "chat", lambda length: np.arange(length) >= length // 2)
    for end in ("bin", "idx"):
        (folder / f"plain.{end}").write_bytes((folder / f"chat.{end}").read_bytes())
    return folder / "chat"


def options_of(prefix, folder) -> list[str]:
    return ["--run_folder", str(folder), "--data.train", f"[{{path: {prefix}, name: chat}}]"]


def test_gradients_of_a_mask_are_those_of_targets_masked_by_hand(one_rank, two_ranks, run_file, masked, tmp_path):
    """Bit for bit, for every parameter; the file's bytes are read here, apart from everything else. And on two ranks,
    which have unequal numbers of targets."""
    ours = tiny_run.first_gradients(one_rank, run_file, options_of(masked, tmp_path))

    plain = masked.with_name("plain")
    run = pretrain.build(tiny_run.configure(run_file, *options_of(plain, tmp_path)), one_rank)
    mask = np.frombuffer(masked.with_name("chat.mask.bin").read_bytes(), np.uint8)
    batches, index = [], 0
    for batch in run.data.micro_batches(0):
        targets = batch.targets.clone()
        for place in range(0, len(targets), 32):
            window = run.order.sample(index).chunk
            for offset in range(32):
                if mask[window * 32 + offset + 1] == 0:
                    targets[place + offset] = IGNORE_INDEX
            index += 1
        batches.append(batch._replace(targets=targets))
    num_targets = sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in batches)
    unmasked = sum(batch.num_targets for batch in run.data.micro_batches(0))
    assert 0.3 * unmasked < num_targets < 0.7 * unmasked
    run.forward_backward.accumulate_gradients(batches, num_targets, lambda phase: None)
    by_hand = {name: parameter.grad for name, parameter in run.model.named_parameters()}
    assert ours.keys() == by_hand.keys()
    assert all(torch.equal(ours[name], gradient) for name, gradient in by_hand.items())

    without = tiny_run.first_gradients(one_rank, run_file, options_of(plain, tmp_path))
    assert not any(torch.equal(ours[name], gradient) for name, gradient in without.items())
    shared = two_ranks.run(tiny_run.first_gradients, run_file, options_of(masked, tmp_path))[0]
    for name, gradient in ours.items():
        assert (shared[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_validation_set_that_is_masked_altogether_is_refused(one_rank, run_file, tmp_path):
    write_masked(tmp_path / "none", lambda length: np.zeros(length, bool))
    options = ["--run_folder", str(tmp_path / "run"), "--data.validation.none", str(tmp_path / "none")]
    assert "validation set 'none' has no target" in tiny_run.refusal(one_rank, run_file, options)
    assert not (tmp_path / "run").exists()
