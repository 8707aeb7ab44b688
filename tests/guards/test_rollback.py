"""After a loss spike a run can go back and around the samples that led to it, as if it had never seen them."""

from __future__ import annotations

import json

import faulty_run
import pytest
import tiny_run
import torch

from retemper.engine import pretrain
from retemper.engine.guards import rollback
from retemper.engine.weights.checkpoint.manifest import read_manifest

BATCH, STEPS = 8, 44
SPIKE = 40
"""Step of the spike in a run that has not gone back before."""
BAD = {(SPIKE - 1) * BATCH}
"""The samples that a step with a spike begins with."""
TARGET = 30
OPTIONS = [
    *("--training.train_tokens", str(STEPS * BATCH * 32), "--training.eval_interval", "19"),
    *("--training.loss_spike_zscore", "8", "--training.loss_spike_action", "rewind", "--training.rewind_steps", "8"),
    *("--checkpoint.save_interval", "6", "--training.micro_batch_size", str(BATCH)),
]
ON_TWO_RANKS = [*OPTIONS, "--training.micro_batch_size", str(BATCH // 2)]
LAST = f"checkpoints/step-{STEPS:08d}"


def _same_tensors(one, other):
    actual, expected = tiny_run.tensors_of(one), tiny_run.tensors_of(other)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def _manifest(folder, step=STEPS):
    return json.loads((folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())


def _names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def rewound(one_rank, run_file, tmp_path_factory):
    """Run folder of a run that meets a spike once, and that nobody kills."""
    folder = tmp_path_factory.mktemp("rewound") / "run"
    assert faulty_run.train_on_bad_samples(one_rank, run_file, [*OPTIONS, "--run_folder", str(folder)], BAD) is None
    return folder


def _oracle(ranks, run_file, folder, options=OPTIONS):
    """The run resumed from the checkpoint before the spike, its place in the data moved on by hand."""
    options = [*options, "--training.loss_spike_action", "skip", "--run_folder", str(folder)]
    tiny_run.train_until(ranks, run_file, options, TARGET)
    faulty_run.train_from_sample(ranks, run_file, options, SPIKE * BATCH)


def test_it_is_the_run_that_never_saw_the_samples(one_rank, rewound, run_file, tmp_path):
    _oracle(one_rank, run_file, tmp_path)
    _same_tensors(rewound / LAST, tmp_path / LAST)
    assert tiny_run.curve(rewound) == tiny_run.curve(tmp_path)
    here, there = _manifest(rewound), _manifest(tmp_path)
    passed_over = (SPIKE - TARGET) * BATCH
    assert here["consumed_samples"] == there["consumed_samples"] == STEPS * BATCH + passed_over
    assert here["health"].pop("rewinds") == [{"step": SPIKE, "to_step": TARGET, "samples": passed_over}]
    assert here["health"] == there["health"] and here["health"]["skipped_steps"] == 0
    for key in ("consumed_tokens", "best", "evaluation", "sample_order", "final"):
        assert here[key] == there[key], key
    assert _manifest(rewound, 36)["best"] == _manifest(tmp_path, 36)["best"] and here["best"]["step"] > 36
    assert _names(rewound) == sorted([*_names(tmp_path), "step-00000036.rewound"])


def test_two_ranks_decide_alike(two_ranks, run_file, tmp_path):
    options = [*ON_TWO_RANKS, "--run_folder", str(tmp_path / "rewound")]
    assert two_ranks.run(faulty_run.train_on_bad_samples, run_file, options, BAD) == [None, None]
    two_ranks.run(_oracle, run_file, tmp_path / "oracle", ON_TWO_RANKS)
    _same_tensors(tmp_path / "rewound" / LAST, tmp_path / "oracle" / LAST)
    assert tiny_run.curve(tmp_path / "rewound") == tiny_run.curve(tmp_path / "oracle")


@pytest.mark.parametrize(
    "killed_in", ["rewind", pytest.param(3, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)]
)
def test_killed_at_any_moment_it_comes_to_the_same_end(killed_in, one_rank, rewound, run_file, tmp_path):
    """In the middle of going back; after it, before the next checkpoint; and after that."""
    options = [*OPTIONS, "--run_folder", str(tmp_path)]
    assert faulty_run.train_on_bad_samples(one_rank, run_file, options, BAD, killed_in) == "killed"
    assert faulty_run.train_on_bad_samples(one_rank, run_file, options, BAD) is None
    _same_tensors(tmp_path / LAST, rewound / LAST)
    assert tiny_run.curve(tmp_path) == tiny_run.curve(rewound)
    assert _manifest(tmp_path)["health"] == _manifest(rewound)["health"]


def test_an_evaluation_that_the_checkpoint_lacks_is_made_again(one_rank, run_file, tmp_path):
    """A run that is asked to stop saves and leaves its evaluation to the one that resumes."""
    options = [*OPTIONS, "--training.eval_interval", "10", "--run_folder", str(tmp_path)]
    # So low that the loss falls steadily.
    options += ["--optimizer.learning_rate", "1e-3", "--optimizer.min_learning_rate", "1e-4"]
    run = pretrain.build(tiny_run.configure(run_file, *options), one_rank)

    def ask_to_stop():
        if run.progress.step == TARGET - 1:
            run.stop.stop_after(0.0)

    tiny_run.before_step(run, ask_to_stop)
    pretrain.train(run)
    assert _manifest(tmp_path, TARGET)["evaluation"] == {}
    assert faulty_run.train_on_bad_samples(one_rank, run_file, options, BAD) is None
    assert _manifest(tmp_path, 36)["best"]["step"] == TARGET
    evaluations = [record["step"] for record in tiny_run.records(tmp_path) if "evaluation" in record]
    assert evaluations == [10, 20, TARGET, 40, STEPS]


def test_evaluations_that_were_rolled_back_do_not_count_for_early_stopping(one_rank, run_file, tmp_path):
    early = ["--training.eval_interval", "3", "--training.early_stopping", "{patience: 50, min_delta: 100.0}"]
    options = [*OPTIONS, *early, "--run_folder", str(tmp_path)]
    assert faulty_run.train_on_bad_samples(one_rank, run_file, options, BAD) is None
    evaluations = [record["step"] for record in tiny_run.records(tmp_path) if "evaluation" in record]
    assert evaluations == [*range(3, STEPS, 3), STEPS]
    assert _manifest(tmp_path)["early_stopping"]["evaluations"] == len(evaluations) - 1  # the first is the lowest


def test_a_damaged_checkpoint_is_not_gone_back_to(one_rank, run_file, tmp_path):
    options = [*OPTIONS, "--run_folder", str(tmp_path)]
    tiny_run.train_until(one_rank, run_file, options, SPIKE - 1)
    file = next((tmp_path / "checkpoints" / f"step-{TARGET:08d}").glob("*.safetensors"))
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    assert faulty_run.train_on_bad_samples(one_rank, run_file, options, BAD) is None
    assert _manifest(tmp_path)["health"]["rewinds"][0]["to_step"] == 24
    assert {"step-00000030.rewound", "step-00000036.rewound"} < set(_names(tmp_path))


@pytest.mark.slow
def test_too_many_end_the_run(one_rank, run_file, tmp_path, rewound):
    # The second spike comes in the eighth step after going back.
    bad = {*BAD, (SPIKE + 7) * BATCH}
    options = [*OPTIONS, "--training.max_rewinds", "1", "--run_folder", str(tmp_path)]
    said = faulty_run.train_on_bad_samples(one_rank, run_file, options, bad)
    assert said is not None and said.startswith("step 38: the loss is a spike again, after training.max_rewinds 1")
    assert "(spikes in steps 40); the newest checkpoint is" in said and "step-00000036, lower" in said
    # The same command goes no further. A higher bound does: from behind the first rewind, around the second spike.
    assert faulty_run.train_on_bad_samples(one_rank, run_file, options, bad) == said
    options[options.index("--training.max_rewinds") + 1] = "2"
    assert faulty_run.train_on_bad_samples(one_rank, run_file, options, bad) is None
    rewinds = _manifest(tmp_path)["health"]["rewinds"]
    assert rewinds == [{"step": 40, "to_step": 30, "samples": 80}, {"step": 38, "to_step": 30, "samples": 144}]
    assert [name for name in _names(tmp_path) if "rewound" in name] == [
        "step-00000036.rewound",
        "step-00000036.rewound.2",
    ]


@pytest.mark.parametrize(
    ("options", "windows", "reason"),
    [
        (
            ["--training.rewind_steps", "37", "--checkpoint.save_interval", "30"],
            None,
            "no checkpoint is training.rewind",
        ),
        ([], (STEPS + SPIKE - TARGET) * BATCH - 1, "without the samples in between, training.train_tokens needs 432"),
    ],
    ids=["no checkpoint", "no data"],
)
def test_where_it_cannot_go_back_the_update_is_skipped(options, windows, reason, one_rank, run_file, tmp_path, capfd):
    if windows is not None:
        source = f"{{path: {run_file.parent / 'first'}, max_tokens: {windows * 32}}}"
        options = [*options, "--data.train", f"[{source}]"]
    folders = {action: tmp_path / action for action in ("rewind", "skip")}
    for action, folder in folders.items():
        overrides = [*OPTIONS, *options, "--training.loss_spike_action", action, "--run_folder", str(folder)]
        assert faulty_run.train_on_bad_samples(one_rank, run_file, overrides, BAD) is None
        assert (f"  not rewound, only skipped: {reason}" in capfd.readouterr().out) == (action == "rewind")
    _same_tensors(folders["rewind"] / LAST, folders["skip"] / LAST)
    assert _manifest(folders["rewind"])["health"] == _manifest(folders["skip"])["health"]


CHANGED = "was written before the order of the data changed"


@pytest.mark.parametrize(
    ("before", "after", "spike", "reason"),
    [
        # Twice as long samples: 36 steps of before are 18 of now.
        (
            ["--training.sequence_length", "16"],
            [
                "--allow_changes",
                "[training.sequence_length]",
                "--training.train_tokens",
                str((36 // 2 + 4) * BATCH * 32),
            ],
            18 * BATCH + BATCH,
            CHANGED,
        ),
        pytest.param(["--seed", "5"], ["--allow_changes", "[seed]"], 37 * BATCH, CHANGED, marks=pytest.mark.slow),
        pytest.param(["--data.train", "[{path: FIRST}]"], [], 37 * BATCH, CHANGED, marks=pytest.mark.slow),
        pytest.param(
            [],
            ["--optimizer.schedule_start_tokens", str(31 * BATCH * 32)],
            37 * BATCH,
            "was written before optimizer.schedule_start_tokens 7,936",
            marks=pytest.mark.slow,
        ),
        # What comes later may change.
        (["--training.train_tokens", "100_000"], ["--data.train", "[{path: FIRST, max_epochs: 90}]"], 37 * BATCH, None),
    ],
    ids=["sequence length", "seed", "blend", "schedule", "nothing"],
)
def test_behind_a_change_of_its_clocks_it_does_not_go_back(
    before, after, spike, reason, one_rank, run_file, tmp_path, capfd
):
    def with_paths(options):
        return [option.replace("FIRST", str(run_file.parent / "first")) for option in options]

    if reason is None:
        before = [*before, "--data.train", "[{path: FIRST}]"]
    options = [*OPTIONS, "--training.eval_interval", "0", "--run_folder", str(tmp_path)]
    tiny_run.train_until(one_rank, run_file, [*options, *with_paths(before)], 36)
    assert faulty_run.train_on_bad_samples(one_rank, run_file, [*options, *with_paths(after)], {spike}) is None
    said = capfd.readouterr().out
    newest = read_manifest(sorted((tmp_path / "checkpoints").glob("step-????????"))[-1])
    assert newest.final
    checkpoint = tmp_path / "checkpoints" / f"step-{TARGET:08d}"
    if reason is None:
        assert newest.health["rewinds"] == [{"step": 38, "to_step": TARGET, "samples": 8 * BATCH}]
    else:
        assert f"  not rewound, only skipped: {checkpoint} {reason}\n" in said
        assert "rewinds" not in newest.health and newest.health["skipped_steps"] == 1


@pytest.mark.slow
def test_few_checkpoints_are_enough(one_rank, rewound, run_file, tmp_path):
    options = [*OPTIONS, "--checkpoint.keep_last", "1", "--run_folder", str(tmp_path)]
    assert faulty_run.train_on_bad_samples(one_rank, run_file, options, BAD) is None
    _same_tensors(tmp_path / LAST, rewound / LAST)


@pytest.mark.slow
def test_asked_to_stop_in_the_step_of_a_spike(one_rank, rewound, run_file, tmp_path, monkeypatch, capfd):
    roll_back = rollback.roll_back

    def asked_meanwhile(run, rewind):
        run.stop.stop_after(0.0)
        roll_back(run, rewind)

    options = [*OPTIONS, "--run_folder", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(rollback, "roll_back", asked_meanwhile)
        assert faulty_run.train_on_bad_samples(one_rank, run_file, options, BAD) is None
    said = capfd.readouterr().out
    assert f"stopped at step {TARGET} as requested, after a rollback; resume: auto continues\n" in said
    assert "nothing to save" not in said and said.count("next        the same command continues from here\n") == 1
    assert faulty_run.train_on_bad_samples(one_rank, run_file, options, BAD) is None
    _same_tensors(tmp_path / LAST, rewound / LAST)
    assert tiny_run.curve(tmp_path) == tiny_run.curve(rewound)
