"""benchmarks/peers.py: what it makes of the engines' records, when it refuses to compare, and that our engine does the
work that the records are compared by. Engines are scripts of a few lines here; no figure is looked at."""

from __future__ import annotations

import copy
import json
import types
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from retemper.benchmarks import peers
from retemper.benchmarks.peer_engines import job as job_module
from retemper.benchmarks.peer_engines import ours

TINY = ["--layers=2", "--hidden=64", "--vocab=300", "--batch=2", "--sequence=16", "--warmup=1", "--steps=2"]
TINY += ["--device=cpu", "--threads=1"]


def record(engine, rate=100.0, peak=1000, losses=(5.0, 4.0), **more):
    """What the process of an engine leaves."""
    return {
        "engine": engine,
        "tokens_per_second": rate,
        "tokens_per_cpu_second": rate / 2,
        "peak_bytes": peak,
        "warmup_seconds": 1.0,
        "losses": list(losses),
        **more,
    }


# --------------------------------------------------------------------------------------------------------------------
# Which engines are compared


@pytest.mark.parametrize(
    ("precision", "losses", "accepted"),
    [
        ("fp32", (5.0001, 4.001), True),
        ("fp32", (5.0005, 4.0), False),
        ("fp32", (5.0, 4.005), False),
        ("fp32", (4.9995, 4.0), False),
        ("bf16", (5.01, 4.04), True),
        ("bf16", (5.03, 4.0), False),
        ("bf16", (5.0, 4.06), False),
        ("bf16-states", (5.01, 4.09), True),
        ("bf16-states", (5.0, 4.11), False),
        ("bf16", (float("nan"), 4.0), False),
        ("bf16", (5.0, float("nan")), False),
    ],
)
def test_an_engine_with_other_losses_is_refused(precision, losses, accepted):
    runs = [record("trainer", 900.0, losses=losses), record(peers.OURS)]
    peers.refuse_different(runs, precision)
    rows = {row["engine"]: row for row in peers.summarize(runs)}
    assert "problem" not in rows[peers.OURS] and rows[peers.OURS]["ours_times_as_fast"] == 1.0
    assert ("rate" in rows["trainer"]) is accepted
    if not accepted:
        assert "ours_times_as_fast" not in rows["trainer"]
        assert rows["trainer"]["problem"].startswith("rejected: losses ")
        printed = peers.format_rows(list(rows.values()), {})
        assert "trainer: rejected: losses " in printed and "900" not in printed


def test_one_round_with_other_losses_refuses_the_engine():
    runs = [record(peers.OURS), record("trainer"), record(peers.OURS), record("trainer", losses=(5.0, 3.0))]
    peers.refuse_different(runs, "fp32")
    own, trainer = peers.summarize(runs)
    assert "rate" in own and "rate" not in trainer


def test_our_own_rounds_must_agree():
    runs = [record(peers.OURS), record(peers.OURS, losses=(6.0, 4.0))]
    peers.refuse_different(runs, "bf16")
    assert "rejected" in peers.summarize(runs)[0]["problem"]


def test_without_ours_nothing_is_compared():
    runs = [{"engine": peers.OURS, "problem": "out of memory"}, record("trainer"), record("litgpt", losses=(9.0, 9.0))]
    peers.refuse_different(runs, "fp32")
    rows = peers.summarize(runs)
    assert rows[0]["problem"] == "out of memory"
    assert all("rate" in row and "ours_times_as_fast" not in row for row in rows[1:])


# --------------------------------------------------------------------------------------------------------------------
# The table


def test_ratios_are_of_medians_over_rounds():
    runs = [record(peers.OURS, rate, peak) for rate, peak in ((300.0, 10), (100.0, 30), (200.0, 20))]
    runs += [record("trainer", rate, 40) for rate in (50.0, 500.0, 80.0)]
    # The median step counts where it is known, not the mean that other work on the machine has slowed.
    runs += [record("litgpt", 1.0, 16, tokens_per_second_median=400.0)]
    own, trainer, litgpt = peers.summarize(copy.deepcopy(runs))
    assert (own["rate"], own["spread"], own["peak_bytes"]) == (200.0, [100.0, 300.0], 20)
    assert (trainer["ours_times_as_fast"], trainer["ours_memory_share"]) == (200 / 80, 20 / 40)
    assert (litgpt["ours_times_as_fast"], litgpt["ours_memory_share"]) == (200 / 400, 20 / 16)
    lines = peers.format_rows([own, trainer, litgpt], {"trainer+liger": "liger_kernel is not installed"}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:5]]
    assert cells[0] == ["retemper", "200", "100 .. 300", "100", "0 MiB", "5.0000", "", "1.00", "1.00"]
    assert cells[1][-2:] == ["2.50", "0.50"] and cells[2][-2:] == ["0.50", "1.25"]
    assert lines[5] == "trainer+liger: not run: liger_kernel is not installed"


def test_a_run_that_failed_is_a_row_with_its_reason():
    runs = [record(peers.OURS), {"engine": "trainer", "problem": "not finished after 5 s"}]
    rows = peers.summarize(runs)
    assert "trainer: not finished after 5 s" in peers.format_rows(rows, {}).splitlines()


# --------------------------------------------------------------------------------------------------------------------
# The processes

STUB = """
import json, pathlib, sys, time
engine, job = sys.argv[2], pathlib.Path(sys.argv[4])
with (job.parent.parent / "started.txt").open("a") as file:
    file.write(engine + "\\n")
if engine == "litgpt":
    print("a line of talk", file=sys.stderr)
    raise ValueError("out of memory")
if engine == "trainer+liger":
    time.sleep(60)
if engine == "litgpt+compile":
    raise SystemExit(0)
if engine == "trainer+regional" and not json.loads(job.read_text())["recompute"]:
    print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.49 GiB.", file=sys.stderr)
    print("and a line after it", file=sys.stderr)
    raise SystemExit(1)
record = {"tokens_per_second": 100.0, "tokens_per_cpu_second": 50.0, "peak_bytes": 2**20, "warmup_seconds": 1.0}
record["losses"] = [9.0 if engine == "trainer" else 5.0, 4.0]
job.with_name("result.json").write_text(json.dumps(record))
"""


def stub_job(folder):
    (folder / "job").mkdir()
    return peers.job_of(peers.parse_arguments(TINY), str(folder / "job"), "cpu")


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Every engine is a script that takes no time; ``started.txt`` has the names in the order of their start."""
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    monkeypatch.setattr(peers, "__file__", str(script))
    monkeypatch.setattr(peers, "why_not", lambda engine, device: None)
    monkeypatch.setattr(peers, "make_data", lambda job: None)
    monkeypatch.setattr(peers.tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("engine", "limit", "said"),
    [
        ("litgpt", 30.0, "ValueError: out of memory"),
        ("trainer+liger", 0.3, "not finished after 0.3 s"),
        ("litgpt+compile", 30.0, "exit code 0"),
    ],
)
def test_an_engine_that_leaves_no_record_says_why(stub, engine, limit, said):
    result = peers.run_engine(engine, stub_job(stub), "none", limit, 1)
    assert result["engine"] == engine and result["problem"] == said


def test_a_record_is_not_taken_for_the_next_engine(stub):
    job = stub_job(stub)
    assert peers.run_engine(peers.OURS, job, "none", 30.0, 1)["losses"] == [5.0, 4.0]
    # Of an engine that was killed after it had written its record.
    (stub / "job" / "result.json").write_text(json.dumps({"losses": [1.0]}))
    assert "losses" not in peers.run_engine("litgpt+compile", job, "none", 30.0, 1)


def test_recomputation_is_tried_only_where_memory_runs_out(stub):
    job = stub_job(stub)
    record = peers.run_engine("trainer+compile", job, "auto", 30.0, 1)
    assert record["recompute"] == "none" and "losses" in record
    record = peers.run_engine("trainer+regional", job, "auto", 30.0, 1)
    assert record["recompute"] == "full" and "losses" in record
    record = peers.run_engine("litgpt", job, "auto", 30.0, 1)
    assert record["recompute"] == "full" and record["problem"] == "ValueError: out of memory"
    started = (stub / "started.txt").read_text().split()
    assert started == ["trainer+compile", *2 * ["trainer+regional"], *2 * ["litgpt"]]


def test_peers_are_compared_with_an_earlier_run_of_ours(stub, capsys):
    path, compared = stub / "ours.json", stub / "peers.json"
    assert peers.main([*TINY, "--engines", "retemper", "--json", str(path)]) == 0
    arguments = [*TINY, "--engines", "trainer+compile,trainer", "--json", str(compared)]
    assert peers.main([*arguments, "--compare", str(path)]) == 1
    rows = json.loads(compared.read_text())["rows"]
    assert [row["engine"] for row in rows] == ["trainer+compile", "trainer"]
    assert rows[0]["ours_times_as_fast"] == 1.0 and "rejected" in rows[1]["problem"]
    # Where ours has no result, peers have one all the same.
    assert peers.main([*arguments, "--compare", str(stub / "missing.json")]) == 0
    with pytest.raises(SystemExit, match="for peers alone"):
        peers.main([*TINY, "--compare", str(path)])


def test_command(stub, capsys):
    path = stub / "out" / "peers.json"
    arguments = [*TINY, "--engines", "retemper,trainer+compile,trainer,litgpt", "--json", str(path)]
    assert peers.main(arguments) == 1
    assert (stub / "started.txt").read_text().split() == ["retemper", "trainer+compile", "trainer", "litgpt"]
    printed = capsys.readouterr().out
    assert "trainer: rejected: losses 9.00000 .. 4.00000, ours 5.00000 .. 4.00000\n" in printed
    assert "litgpt: ValueError: out of memory\n" in printed
    written = json.loads(path.read_text())
    assert {row["engine"]: "rate" in row for row in written["rows"]} == {
        "retemper": True,
        "trainer+compile": True,
        "trainer": False,
        "litgpt": False,
    }
    assert written["command"].startswith("python benchmarks/peers.py --layers=2")
    assert written["settings"]["job"]["precision"] == "fp32" and written["machine"]["versions"]["torch"]


def test_command_succeeds_where_all_agree(stub):
    assert peers.main([*TINY, "--engines", "retemper,trainer+compile"]) == 0


def test_engines_without_time_are_named(stub, monkeypatch, capsys):
    monkeypatch.setattr(peers, "LEAST_SECONDS", 0.5)
    engines = "retemper,trainer+liger,trainer+compile"
    assert peers.main([*TINY, "--engines", engines, "--rounds", "2", "--total-time", "2"]) == 1
    assert (stub / "started.txt").read_text().split() == ["retemper", "trainer+liger"]
    printed = capsys.readouterr().out
    assert "trainer+liger: not finished after " in printed
    assert "trainer+compile: not run: no time left\n" in printed


def test_compile_compiles_every_engine(stub):
    options = peers.parse_arguments([*TINY, "--compile"])
    assert peers.asked_engines(options) == [
        "trainer+compile",
        "trainer+compile+chunked",
        "loop+compile",
        "litgpt+compile",
        peers.OURS,
    ]
    assert peers.our_settings(options) == {"training.compile": "on"}
    options = peers.parse_arguments([*TINY, "--compile", "--ours", 'training.compile="off"', "--engines", "trainer"])
    assert peers.asked_engines(options) == ["trainer"] and peers.our_settings(options) == {"training.compile": "off"}
    assert peers.our_settings(peers.parse_arguments(TINY)) == {}
    assert peers.asked_engines(peers.parse_arguments(TINY)) == list(peers.NEEDS)


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--engines", "retemper,nanotron"], "--engines nanotron: there are"), (["--warmup", "0"], "at least 1")],
)
def test_refusals(options, said):
    with pytest.raises(SystemExit, match=said):
        peers.main([*TINY, *options])


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    def find_spec(name):
        return None if name == "accelerate" else types.SimpleNamespace(name=name)

    monkeypatch.setattr(peers.importlib.util, "find_spec", find_spec)
    assert peers.why_not("trainer+compile", "cuda") == "accelerate is not installed"
    assert peers.why_not("litgpt+compile", "cuda") is None
    assert peers.why_not(peers.OURS, "cpu") is None


# --------------------------------------------------------------------------------------------------------------------
# Our engine


def job_of(folder, *options):
    """The job and the data of a tiny model."""
    job = peers.job_of(peers.parse_arguments([*TINY, *options]), str(folder), "cpu")
    peers.make_data(job)
    return job


def test_our_engine_does_the_work_that_is_described(one_rank, tmp_path, monkeypatch):
    """Its first loss is that of transformers' model with the same weights on the batch that all engines read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from retemper.engine.model.decoder import Decoder

    job = job_of(tmp_path)
    batches = job.batches()
    assert batches.shape == (3, 2, 16) and batches.dtype == np.int64
    assert batches.min() >= 0 and batches.max() < 300 and len(np.unique(batches, axis=0)) == 3
    monkeypatch.setattr(Decoder, "initialize_", Decoder.initialize_)  # the engine puts another in its place
    monkeypatch.setattr(ours, "process_group", lambda *_: nullcontext(one_rank))  # this process has one already
    found = ours.run(job, peers.OURS)
    assert len(found["losses"]) == 3 and len(found["step_seconds"]) == 2
    assert found["tokens_per_second"] > 0 and found["peak_bytes"] > 0
    reports = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum('"loss"' in line for line in reports) == 3  # every step is reported, as to users
    assert not list((tmp_path / "run").rglob("manifest.json"))

    options = {key: value for key, value in job.architecture.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(ours.draw(name, parameter.shape, job))
        tokens = torch.from_numpy(batches[0])
        logits = model(tokens).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert found["losses"][0] == pytest.approx(expected, abs=2e-5)
    assert len({round(loss, 3) for loss in found["losses"]}) == 3


class FakeEvent:
    """An event of a GPU: read only after a synchronization. Events are a second apart."""

    recorded = 0
    readable = False

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.recorded += 1
        self.place = FakeEvent.recorded

    def elapsed_time(self, other):
        assert FakeEvent.readable, "read while steps are made"
        return 1e3 * (other.place - self.place)


def test_steps_on_a_gpu_are_events_that_are_read_after_the_last_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: setattr(FakeEvent, "readable", FakeEvent.recorded >= 6))
    monkeypatch.setattr(job_module, "reset_peak", lambda device: True)
    monkeypatch.setattr(job_module, "peak_bytes", lambda device: 7)
    job = peers.job_of(peers.parse_arguments([*TINY, "--warmup=2", "--steps=3"]), str(tmp_path), "cuda")
    clock = job_module.Clock(job)
    clock.ready()
    for _ in range(5):
        clock.step_done(1.0)
    found = clock.record()
    assert found["step_seconds"] == [1.0, 1.0, 1.0] and found["warmup_seconds"] == 2.0
    assert found["tokens_per_second"] == found["tokens_per_second_median"] == 32 and found["peak_bytes"] == 7


def test_our_engine_gets_the_settings_of_the_job(tmp_path):
    job = job_of(tmp_path, "--compile", "--precision", "bf16-states", "--ours", 'optimizer.state_dtype="fp32"')
    config = ours.configure(job)
    assert config.training.compile == "on" and config.training.weight_dtype == "bf16"
    assert config.optimizer.state_dtype == "fp32" and config.training.precision == "bf16"
    assert (config.training.global_batch_size, config.training.sequence_length) == (2, 16)
