"""tools/report.py: what it says of a run against the run's own files, read here by other means; and bad input."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from oracles.html_page import Page

from retemper.engine.errors import run_command
from retemper.engine.weights.checkpoint import manifest as manifests
from retemper.engine.weights.checkpoint.manifest import Manifest
from retemper.tools import report
from retemper.tools.reports import charts
from retemper.tools.reports.run import read_run

HOSTILE = "<script>alert('&')</script>\x1b"
BATCH = 8 * 32


def training_record(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    speed = {"tokens_per_second": 1000.0 + step, "tokens_per_second_per_rank": 500.0 + step / 2, "step_seconds": 0.25}
    values = {"loss": loss, "learning_rate": 1e-3 / step, "grad_norm": 1.0 + step / 7, "peak_memory_bytes": 3 << 30}
    return {"step": step, "tokens": BATCH * step, **values, **speed, **more}


def evaluation_record(step: int, name: str, loss: float) -> dict[str, Any]:
    return {"step": step, "tokens": BATCH * step, "evaluation": name, "loss": loss, "perplexity": math.exp(loss)}


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def losses(first: float, last: float, names: tuple[str, ...] = ("domain", "general")) -> list[dict[str, Any]]:
    """A run of 20 steps with an evaluation of each set at step 0 and at the end."""
    records = [evaluation_record(0, name, first) for name in names]
    records += [training_record(step, 4.0 - 0.1 * step, mfu=0.3 + step / 1000) for step in range(1, 21)]
    return records + [evaluation_record(20, name, last) for name in names]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with all that a report shows."""
    folder = tmp_path / "runs" / "medicine"
    (folder / "checkpoints").mkdir(parents=True)
    write_lines(folder / "metrics.jsonl", losses(3.0, 2.5))
    config = {
        "training": {"train_tokens": 20 * BATCH, "sequence_length": 32},
        "data": {"train": [{"path": "a"}], "validation": {"domain": "sets/domain", "general": "sets/general"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for step in (10, 20):
        write_checkpoint(folder, step, config)
    (folder / "samples.jsonl").write_text(json.dumps({"prompt": "def f(", "before": "the", "after": "x):"}) + "\n")
    return folder


def write_checkpoint(folder: Path, step: int, config: dict[str, Any]) -> Path:
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir()
    (path / "x.distcp").write_bytes(bytes(1500))
    shares = [{"name": name, "weight": weight, "max_samples": None} for name, weight in (("a", 3.0), ("b", 1.0))]
    manifest = Manifest(
        kind="training",
        step=step,
        consumed_samples=8 * step,
        consumed_tokens=BATCH * step,
        final=step == 20,
        sample_order={"start": 0, "cursors": {}, "stages": [{"stop": None, "shares": shares}]},
        datasets={name: {"path": f"data/{name}", "tokens": 1280, "hash": 8 * f"{name}0"} for name in "ab"},
        evaluation={"domain": 2.5} if step == 20 else {},
        best={"step": 10, "name": "domain", "loss": 2.4},
        config=config,
        world_size=2,
        layout={"shard": 2, "tensor": 1},
        versions={"torch": "2.13.0"},
    )
    manifests.write_manifest(path, manifest)
    return path


def show(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> str:
    report.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Run the command, require exit status 1 and one line on stderr, and return that line."""

    def check(*arguments: Path | str) -> str:
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: report.main([str(argument) for argument in arguments]))
        found = capsys.readouterr()
        assert exit_.value.code == 1 and found.out == ""
        [line] = found.err.splitlines()
        return line

    return check


def test_profiled_steps_do_not_count_as_speed(run: Path) -> None:
    records = [training_record(step, 2.0, mfu=0.4) for step in range(1, 6)]
    slow = [training_record(step, 2.0, mfu=0.1, profiled=True) for step in range(6, 12)]
    write_lines(run / "metrics.jsonl", [*records, *[record | {"tokens_per_second": 1.0} for record in slow]])
    found = read_run(run)
    assert found.median("tokens_per_second") == 1003.0 and found.median("mfu") == 0.4
    assert found.seconds_in_steps == 5 * 0.25 and len(found.curves.points("loss")) == 11


def table_row(text: str, name: str) -> list[str]:
    """Cells of the row that begins with ``name``, in the terminal's summary."""
    return next(re.split(r"  +", line) for line in text.splitlines() if re.match(rf"{re.escape(name)}  ", line))


def test_the_numbers_are_those_of_the_metrics_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = show(capsys, run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "evaluation" not in record]
    speed = statistics.median(record["tokens_per_second"] for record in steps)
    assert table_row(out, "tokens per second")[1] == f"{speed:,.0f} (median), {speed / 2:,.0f} per rank"
    assert table_row(out, "MFU")[1] == f"{statistics.median(record['mfu'] for record in steps):.1%} (median)"
    assert table_row(out, "tokens")[1] == "5,120 of 5,120 (100.0%)"
    assert table_row(out, "time in steps")[1] == "0:00:05"
    assert table_row(out, "peak memory")[1] == "3.00 GiB on rank 0"
    last = statistics.mean(record["loss"] for record in steps[-10:])
    assert table_row(out, "training loss")[1] == f"3.9000 at first, {last:.4f} in the last records"
    change = ("0 → 20", "3.000", "2.500", "-0.500", "-16.7 %", "learned", "20.1 → 12.2", "2.500 (step 20)")
    assert table_row(out, "domain") == ["domain", *change]
    assert "domain loss fell by 0.500 nats (-16.7 %): learned\ngeneral loss fell by" in out
    # Of four samples, three are of the first source; 160 samples of 32 tokens have been trained on.
    assert table_row(out, "a") == ["a", "75.0%", "1,280", "3,840", "3", "a0a0a0a0a0a0a0a0", "data/a"]
    assert table_row(out, "b")[3:5] == ["1,280", "1"]
    assert table_row(out, "step-00000010")[1:4] == ["10", "2,560", "3.0000"]
    assert table_row(out, "step-00000010")[-2:] == ["best", "complete"]
    assert table_row(out, "step-00000020")[1:5] == ["20", "5,120", "2.0000", "2.5000"]
    assert table_row(out, "step-00000020")[-2:] == ["last, final", "complete"]
    page = Page((run / "report.html").read_text("utf-8"))
    for name in ("tokens per second", "MFU", "training loss", "a", "domain", "step-00000020"):
        assert " ".join(table_row(out, name)) in page.text, name
    assert "before def f( the after def f( x):" in page.text and "validation: domain: sets/domain" in page.text


def write_model(run: Path, name: str, step: int, ema: bool = False) -> Path:
    folder = run / name
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(2_000_000))
    record = {"source": {"step": step}, "options": {"ema": ema}}
    (folder / "conversion.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def test_models_are_listed_with_their_losses(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss of the record of the step, the evaluation of the first set; the best is of a step without one."""
    assert "final_model" not in show(capsys, run)
    write_model(run, "final_model", 20)
    write_model(run, "best_model", 10, ema=True)
    out = show(capsys, run, "--overwrite")
    assert table_row(out, "final_model") == ["final_model", "20", "2.0000", "2.5000", "2 MB", "of the step"]
    assert table_row(out, "best_model") == ["best_model", "10", "3.0000", "2 MB", "the average"]
    page = Page((run / "report.html").read_text("utf-8"))
    assert "Models" in page.text and " ".join(table_row(out, "final_model")) in page.text
    record = json.loads(show(capsys, run, "--overwrite", "--json"))
    assert [(one["name"], one["step"], one["is_average"]) for one in record["models"]] == [
        ("final_model", 20, False),
        ("best_model", 10, True),
    ]


@pytest.mark.parametrize("content", [None, "[]", '{"source": {"step": null}}', "{"])
def test_a_model_folder_without_its_record_gives_a_remark(
    content: str | None, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(run, "final_model", 20)
    (folder / "conversion.json").unlink()
    if content is not None:
        (folder / "conversion.json").write_text(content, encoding="utf-8")
    assert "! final_model is not shown: its conversion.json: " in show(capsys, run)


def test_the_page_is_sound_and_repeatable(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(capsys, run)
    text = (run / "report.html").read_text("utf-8")
    page = Page(text)
    page.require_self_contained()
    assert page.tags.count("svg") == 6  # learned and forgotten, loss, and four small ones
    for name in set(re.findall(r"var\(--(\w+)\)", text)):
        assert text.count(f"--{name}: #") == 2, f"{name}: one value in light, one in dark"
    show(capsys, run, "--overwrite")
    assert (run / "report.html").read_text("utf-8") == text


def test_evaluations_are_drawn_where_they_belong(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [training_record(step, 3.0) for step in range(1, 21)]
    points = [(0, 4.0), (5, 3.5), (10, 2.0), (20, 1.5)]
    write_lines(run / "metrics.jsonl", records + [evaluation_record(step, "domain", loss) for step, loss in points])
    show(capsys, run)
    svg = (run / "report.html").read_text("utf-8").partition('aria-label="Loss, in')[2].partition("</svg>")[0]
    circles = [tuple(map(float, found)) for found in re.findall(r'<circle[^>]* cx="([\d.]+)" cy="([\d.]+)"', svg)]
    across, up = zip(*circles, strict=True)
    steps, values = zip(*points, strict=True)
    for shown, true, sign in ((across, steps, 1), (up, values, -1)):
        slope, offset = np.polyfit(true, shown, 1)
        assert sign * slope > 0 and np.allclose(np.array(true) * slope + offset, shown, atol=0.1)
    assert "domain 3.5000 at 1,280" in svg


def test_a_long_curve_is_drawn_as_means_in_a_band() -> None:
    values = np.random.default_rng(0).normal(size=10 * charts.MOST_POINTS)
    curve, band = charts.thinned(list(enumerate(values.tolist())))
    parts = values.reshape(-1, 10)
    assert np.allclose([value for _, value in curve], parts.mean(1))
    outline = np.array([value for _, value in band])
    assert np.array_equal(outline[: len(parts)], parts.max(1)) and np.array_equal(
        outline[: -len(parts) - 1 : -1], parts.min(1)
    )
    few = [(0.0, 1.0), (1.0, 2.0)]
    assert charts.thinned(few) == (few, [])


@pytest.mark.parametrize("numbers", [(0, 1), (1.52, 4.91), (-0.004, 0.003), (0, 2.7e9), (7, 7)])
@pytest.mark.parametrize("most", [3, 8])
def test_ticks_are_round_and_inside(numbers: tuple[float, float], most: int) -> None:
    scale = charts._Scale(charts.Axis(), numbers, 0, 100)
    ticks = scale.ticks(most)
    assert 2 <= len(ticks) <= most + 2
    assert all(-0.1 <= scale(tick) <= 100.1 for tick in ticks)
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0]) and f"{steps[0]:.0e}"[0] in "1235"


@pytest.mark.parametrize(
    ("before", "after", "domain", "general"),
    [
        (2.0, 1.5, "fell by 0.500 nats (-25.0 %): learned", "fell by 0.500 nats (-25.0 %): nothing forgotten"),
        (2.0, 2.5, "rose by 0.500 nats (+25.0 %): not learned", "rose by 0.500 nats (+25.0 %): forgotten"),
        (2.0, 2.0004, "did not change", "did not change"),
    ],
)
def test_verdict_follows_the_sign(run: Path, capsys, before: float, after: float, domain: str, general: str) -> None:
    write_lines(run / "metrics.jsonl", losses(before, after))
    assert f"domain loss {domain}\ngeneral loss {general}" in show(capsys, run)


def test_a_run_that_was_resumed_and_rewound(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(run / "metrics.14.jsonl", [training_record(step, 9.0) for step in range(9, 15)])
    write_lines(run / "metrics.18.jsonl", [training_record(step, 9.0) for step in (17, 18)])
    write_lines(run / "metrics.30.jsonl", [training_record(step, 9.0) for step in range(1, 31)])
    at = "2026-11-29 18:12:11+0000"
    log = [
        "model       a former model, 1 parameters",
        f"records     {run}/metrics.jsonl of an earlier run renamed to metrics.30.jsonl",
        "model       qwen2, 2 parameters",
        "records     6 of metrics.jsonl after step 8 moved to runs/medicine/metrics.14.jsonl",
        "model       qwen2, 3 parameters",
        "  rewound to step 16 (step-00000016): the 16 samples from there to the spike in step 18 are skipped",
        "records     2 of metrics.jsonl after step 16 moved to runs/medicine/metrics.18.jsonl",
    ]
    (run / "log.txt").write_text("".join(f"{at} {line}\n" for line in log), encoding="utf-8")
    out = show(capsys, run)
    assert table_row(out, "resumed")[1:] == ["8", "14", "6", "metrics.14.jsonl"]
    assert table_row(out, "rewound")[1:] == ["16", "18", "2", "metrics.18.jsonl"]
    assert table_row(out, "starts")[1] == "2" and table_row(out, "model")[1] == "qwen2, 3 parameters"
    assert table_row(out, "steps")[1] == "20; 8 repeated after restarts"
    assert "! metrics.30.jsonl is the curve of an earlier run" in out
    assert f"resumed {6 * BATCH:,} tokens earlier" in Page((run / "report.html").read_text("utf-8")).text
    (run / "log.txt").unlink()  # as of an earlier version: each file continues the curve from where it branches off
    out = show(capsys, run, "--overwrite")
    assert [row[:4] for row in re.findall(r"^resumed +(\d+) +(\d+)", out, re.MULTILINE)] == [("8", "14"), ("16", "18")]


def test_of_a_step_recorded_twice_the_later_record_counts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [training_record(1, 9.0), training_record(2, 8.0), evaluation_record(2, "domain", 7.0)]
    records += [training_record(2, 5.0), evaluation_record(2, "domain", 4.0), training_record(3, 3.0)]
    write_lines(run / "metrics.jsonl", records)
    curves = read_run(run).curves
    assert curves.points("loss") == [(BATCH, 9.0), (2 * BATCH, 5.0), (3 * BATCH, 3.0)]
    assert [one.loss for one in curves.evaluations["domain"]] == [4.0]


def test_a_run_that_is_training_or_was_killed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [training_record(1, None, grad_norm=None, skipped_steps=1), training_record(2, 3.5, skipped_steps=2)]
    write_lines(run / "metrics.jsonl", records)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tok')
    (run / "checkpoints" / ".step-00000003.0123.tmp").mkdir()
    (run / "checkpoints" / "step-00000030").mkdir()
    (run / "checkpoints" / "step-00000005.damaged").mkdir()
    (run / "checkpoints" / "step-00000020" / "manifest.json").write_text("{")
    (run / "config.yaml").unlink()
    out = show(capsys, run)
    assert "the last line of metrics.jsonl is incomplete" in out and "2 steps were skipped" in out
    assert re.search(r"^state +not finished; the last record was written at 20\d\d-\d\d", out, re.MULTILINE)
    assert table_row(out, "step-00000030")[-1] == "damaged: manifest.json is missing"
    assert "manifest.json: cannot be read as JSON" in table_row(out, "step-00000020")[-1]
    assert table_row(out, "step-00000005.damaged")[-1] == "quarantined"
    assert table_row(out, "a")[3] == f"{8 * 10 * 32 * 3 // 4:,}"  # as of the checkpoint before
    assert "config.yaml: No such file or directory" in out and ".tmp" not in out
    page = Page((run / "report.html").read_text("utf-8"))
    assert "No evaluation is recorded" in page.text
    page.require_self_contained()


def test_only_the_curve_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "metrics.jsonl", [training_record(1, 3.0)])
    out = show(capsys, tmp_path)
    assert table_row(out, "training loss")[1] == "3.0000 at first, 3.0000 in the last records"
    assert "there is no checkpoint yet" in out
    Page((tmp_path / "report.html").read_text("utf-8")).require_self_contained()


def test_two_runs_are_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_lines(other / "metrics.jsonl", losses(3.0, 2.25, ("domain",)))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["training"]["train_tokens"] *= 2
    (other / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    output = tmp_path / "both.html"
    out = show(capsys, run, "--compare", other, "--output", output)
    assert table_row(out, "training.train_tokens")[1:] == ["5120", "10240"]
    assert table_row(out, "domain loss")[1:] == ["2.500 at step 20", "2.250 at step 20"]
    assert table_row(out, "general loss")[1:] == ["2.500 at step 20"]
    assert "training.sequence_length" not in out
    page = Page(output.read_text("utf-8"))
    page.require_self_contained()
    assert "domain, medicine general, medicine training, other domain, other" in page.text
    assert "Compared with other" in page.text and "training.train_tokens 5120 10240" in page.text
    record = json.loads(show(capsys, run, "--compare", other, "--output", output, "--overwrite", "--json"))
    assert record["differences"]["training.train_tokens"] == ["5120", "10240"]
    assert record["compared"]["evaluations"]["domain"][-1]["loss"] == 2.25
    assert not (run / "report.html").exists()


def test_json_is_strict_and_holds_the_facts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [training_record(step, None) for step in (1, 2)]
    write_lines(run / "metrics.jsonl", [*records, evaluation_record(2, "domain", math.nan)])
    record = json.loads(show(capsys, run, "--json"), parse_constant=pytest.fail)
    assert (record["step"], record["tokens"], record["final_loss"]) == (2, 2 * BATCH, None)
    assert record["median"]["tokens_per_second"] == 1001.5
    assert record["evaluations"] == {"domain": [{"step": 2, "tokens": 2 * BATCH, "loss": None}]}
    assert [one["trained_tokens"] for one in record["sources"]] == [3840, 1280]


def test_sources_are_parts_of_their_set(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("held_out", "general", "held_out/a", "held_out/b")  # as by a version that recorded no sources at first
    write_lines(run / "metrics.jsonl", [*losses(3.0, 2.5, names), evaluation_record(20, "held_out/b", 3.25)])
    out = show(capsys, run)
    rows = [line.split()[0] for line in out.splitlines() if " (step 20)" in line or " (step 0)" in line]
    assert rows == ["held_out", "held_out/a", "held_out/b", "general"]
    assert table_row(out, "held_out/b")[6] == "forgotten" and table_row(out, "held_out/b")[4] == "+0.250"
    assert "held_out loss fell" in out and "held_out/a loss fell" not in out
    page = Page((run / "report.html").read_text("utf-8"))
    assert "Forgotten: a higher loss on general." in page.text


def test_a_resumed_run_without_the_first_records_has_its_losses_before(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [training_record(12, 2.0), {**evaluation_record(12, "domain", 2.75), "change_since_start": -0.25}]
    write_lines(run / "metrics.jsonl", records)
    assert table_row(show(capsys, run), "domain")[1:5] == ["0 → 12", "3.000", "2.750", "-0.250"]
    changes = json.loads(show(capsys, run, "--json", "--overwrite"))["changes"]
    assert changes == {"domain": {"before": 3.0, "after": 2.75, "change": -0.25}}


def test_the_first_and_the_last_sample_of_each_prompt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [{"step": s, "tokens": BATCH * s, "prompt": p, "text": f"{p}{s}"} for s in (0, 10, 20) for p in "xy"]
    write_lines(run / "samples.jsonl", samples)
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 20, "tok')
    show(capsys, run)
    page = Page((run / "report.html").read_text("utf-8"))
    for prompt in "xy":
        assert f"before (step 0) {prompt} {prompt}0 after (step 20) {prompt} {prompt}20" in page.text
    assert "x10" not in page.text and "samples are not shown" not in page.text
    (run / "samples.jsonl").write_text('{"step": 0, "prompt": "x"}\n')
    assert "samples are not shown" in show(capsys, run, "--overwrite")


def test_every_text_is_escaped(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "samples.jsonl").write_text(json.dumps(dict.fromkeys(("prompt", "before", "after"), HOSTILE)))
    config = yaml.safe_dump({"data": {"train": [], "validation": {HOSTILE: HOSTILE}}, "model": HOSTILE})
    (run / "config.yaml").write_text(config)
    write_lines(run / "metrics.jsonl", losses(3.0, 2.5, (HOSTILE, "general")))
    out = show(capsys, run)
    page = Page((run / "report.html").read_text("utf-8"))
    page.require_self_contained()
    assert "script" not in page.tags and page.text.count("<script>alert('&')</script>") > 10
    assert "\x1b" not in out


def test_what_is_no_run_is_one_line(run: Path, tmp_path: Path, refused) -> None:
    assert "no such folder; name the run_folder of a run" in refused(tmp_path / "absent")
    assert "not a run folder, it holds no metrics.jsonl" in refused(tmp_path)
    assert f"name the run_folder of a run, here {run}" in refused(run / "checkpoints" / "step-00000010")
    assert f"{tmp_path}: not a run folder" in refused(run, "--compare", tmp_path)
    metrics = run / "metrics.jsonl"
    metrics.write_text("")
    assert "no step is recorded yet" in refused(run)
    metrics.unlink()
    os.mkfifo(metrics)
    assert "metrics.jsonl: cannot be read: not a regular file" in refused(run)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("\0" * 20, "Expecting value"),
        ("[]", "not a JSON object"),
        ('{"tokens": 1, "loss": 1}', "no 'step'"),
        ('{"step": 1.5, "tokens": 1, "loss": 1}', "not a whole number"),
        (f'{{"step": {2**63}, "tokens": 1}}', "not a whole number"),
        ("[" * 100_000, "maximum recursion"),
        ('{"step": 2, "tokens": 1, "loss": "x"}', "'x' is not a number"),
        ('{"step": 2, "tokens": 1, "evaluation": "a"}', "no 'loss'"),
    ],
)
def test_a_damaged_line_is_named_by_its_number(run: Path, refused, line: str, said: str) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:6], line, *lines[6:]]) + "\n")
    message = refused(run)
    assert re.search(rf"metrics\.jsonl:7: not a record of a run \(.*{re.escape(said)}", message)
    assert not (run / "report.html").exists()


def test_no_file_is_replaced_by_mistake(run: Path, tmp_path: Path, capsys, refused) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (run / ".lock").touch()
    for name in ("metrics.jsonl", "config.yaml", ".lock"):
        assert f"{name} is an input (RUN_FOLDER" in refused(run, "--output", run / name, "--overwrite")
    manifest = run / "checkpoints" / "step-00000010" / "manifest.json"
    assert "not a report of this command" in refused(run, "--output", manifest, "--overwrite")
    assert "is a folder" in refused(run, "--output", tmp_path)
    assert "does not exist; create it" in refused(run, "--output", tmp_path / "no" / "page.html")
    show(capsys, run)
    assert "already there; pass --overwrite" in refused(run)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in run.iterdir()) == sorted(
        [".lock", "checkpoints", "config.yaml", "metrics.jsonl", "report.html", "samples.jsonl"]
    )


def test_it_starts_without_torch(run: Path) -> None:
    code = (
        "import sys, time; from retemper.tools import report; report.main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'matplotlib'} & {*sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]" and "page: " in done.stdout


def test_the_guide_names_what_there_is() -> None:
    root = Path(report.__file__).parents[1]
    guide, code = ((root / name).read_text("utf-8") for name in ("docs/reports.md", "tools/report.py"))
    options = set(re.findall(r"--[a-z]+", guide))
    assert (
        options
        == {"--output", "--overwrite", "--compare", "--json"}
        == set(re.findall(r'"(--[a-z]+)", (?:type|a)', code))
    )
    assert f"more than {charts.MOST_POINTS} records" in guide
