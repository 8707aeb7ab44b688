"""tools/report.py on what the trainer really writes: a run that was killed and resumed, and one that is training."""

from __future__ import annotations

import pytest
import tiny_run

from retemper.engine.weights.checkpoint.manifest import read_manifest
from retemper.tools import report
from retemper.tools.reports.run import read_run

OPTIONS = ["--training.eval_at_start", "true", "--logging.log_interval", "3", "--checkpoint.save_interval", "5"]


@pytest.fixture(scope="module")
def resumed(one_rank, run_file, tmp_path_factory):
    """Run folder of a run that was killed after step 13, whose newest checkpoint is of step 10."""
    folder = tmp_path_factory.mktemp("resumed") / "run"
    options = [*OPTIONS, "--run_folder", str(folder)]
    tiny_run.train_until(one_rank, run_file, options, 13)
    tiny_run.train(one_rank, run_file, options)
    return folder


def test_a_resumed_run(resumed, capsys):
    run = read_run(resumed)
    [restart] = run.restarts  # there is no log.txt: the console of the command writes it
    assert (restart.kind, restart.step, restart.tokens) == ("resumed", 10, 10 * 8 * 32)
    assert (restart.lost_step, restart.file) == (12, "metrics.12.jsonl")
    records = tiny_run.records(resumed)
    evaluations = [record for record in records if "evaluation" in record]
    assert [(one.step, one.loss) for one in run.curves.evaluations["validation"]] == [
        (record["step"], record["loss"]) for record in evaluations
    ]
    steps = [record["step"] for record in records if "evaluation" not in record]
    assert list(run.curves.steps) == steps == [1, 3, 6, 9, 11, 12, 15, 18, 20]
    manifests = [read_manifest(path) for path in sorted((resumed / "checkpoints").iterdir())]
    assert [row.manifest for row in run.checkpoints] == manifests
    losses = {record["step"]: record["loss"] for record in records if "evaluation" not in record}
    assert [row.loss for row in run.checkpoints] == [losses.get(manifest.step) for manifest in manifests]
    assert run.is_finished and "final" in run.checkpoints[-1].kept and run.remarks == []
    assert sum(source.trained_tokens for source in run.sources) == run.tokens == 20 * 8 * 32
    report.main([str(resumed)])
    out = capsys.readouterr().out
    assert f"{evaluations[0]['loss']:.3f}" in out and f"{evaluations[-1]['loss']:.3f}" in out


def test_a_run_that_is_training_now(one_rank, run_file, tmp_path):
    tiny_run.train_until(one_rank, run_file, [*OPTIONS, "--run_folder", str(tmp_path / "run")], 4)
    run = read_run(tmp_path / "run")
    assert (run.step, run.is_finished, run.checkpoints) == (3, False, [])
    assert [(source.name, source.weights, source.trained_tokens) for source in run.sources] == [
        (run.config["data"]["train"][0]["path"], [2.0], None),
        (run.config["data"]["train"][1]["path"], [1.0], None),
    ]
