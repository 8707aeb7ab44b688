"""Sweeps of the step benchmark: every combination is a row, whatever becomes of it."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import yaml

from retemper.benchmarks.step.sweep import SweepRow, format_sweep, parse_sweep, run_sweep
from retemper.engine.config.parser import parse_config
from retemper.engine.errors import UserError
from retemper.tools import benchmark as command

# The command, in which memory runs out in the second step if a micro-batch has 4 samples.
SMALL_MEMORY = """
import sys
import torch
from retemper.engine.errors import run_command
from retemper.tools import benchmark
from retemper.engine import step as module

step, calls = module.train_step, []

def limited(model, forward_backward, optimizer, batches, *rest):
    calls.append(1)
    if len(batches[0].tokens) == 4 * 16 and len(calls) == 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return step(model, forward_backward, optimizer, batches, *rest)

module.train_step = limited
run_command(benchmark.main)
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    """A run of a tiny model."""
    folder = tmp_path_factory.mktemp("sweep")
    architecture = {"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16}
    config = {
        "run_folder": str(folder / "run"),
        "model": {"architecture": {**architecture, "num_hidden_layers": 1, "num_attention_heads": 2}},
        "data": {"train": [{"path": str(folder / "nothing")}]},
        "training": {"train_tokens": 1000, "sequence_length": 16, "global_batch_size": 8, "precision": "fp32"},
        "device": "cpu",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.mark.slow
def test_out_of_memory_is_a_row(run_file, tmp_path, monkeypatch, capsys):
    program = tmp_path / "program.py"
    program.write_text(SMALL_MEMORY)
    monkeypatch.setattr(command, "__file__", str(program))
    arguments = ["--config", str(run_file), "--steps", "2", "--warmup-steps", "1", "--matmul-seconds", "0"]
    command.main([*arguments, "--sweep", "micro_batch_size=4,2", "--json", str(tmp_path / "found.json")])
    shown = capsys.readouterr()
    record = json.loads((tmp_path / "found.json").read_text())
    failed, good = record["rows"]
    assert failed == {"sweep": {"training.micro_batch_size": "4"}, "outcome": "out of memory"}
    assert good["outcome"] == "ok" and good["settings"]["config"]["training"]["micro_batch_size"] == 2
    assert len(good["rows"]) == 2
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.out.splitlines() if line.startswith("|")]
    assert rows[2] == ["4", "", "", "", "", "", "out of memory"]
    assert rows[3][0] == "2" and rows[3][-1] == "ok"
    assert "best that fits: --training.micro_batch_size=2:" in shown.out
    assert "Traceback" not in shown.err
    assert not run_file.with_name("run").exists()


def test_nothing_fits(run_file, tmp_path, monkeypatch, capsys):
    program = tmp_path / "program.py"
    program.write_text("import sys; sys.exit('[rank 0] error: out of memory: CUDA out of memory')")
    monkeypatch.setattr(command, "__file__", str(program))
    with pytest.raises(UserError, match="no setting succeeded"):
        command.main(["--config", str(run_file), "--sweep", "recompute=none,full"])
    assert capsys.readouterr().out.count("out of memory") == 2


def test_combinations(run_file):
    config = parse_config(["--config", str(run_file)])
    assert parse_sweep(["micro_batch_size=1,2", "parallel.recompute=none,full"], config) == [
        {"training.micro_batch_size": "1", "parallel.recompute": "none"},
        {"training.micro_batch_size": "1", "parallel.recompute": "full"},
        {"training.micro_batch_size": "2", "parallel.recompute": "none"},
        {"training.micro_batch_size": "2", "parallel.recompute": "full"},
    ]


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        (
            "import sys; print('warning: x\\nerror: a bad value; use another\\nsignal', file=sys.stderr); sys.exit(1)",
            "a bad value; use another",
        ),
        ("import sys; sys.exit('W1 noise\\n[rank 1] error: out of memory: none left\\nE2 failed')", "out of memory"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", "killed, usually because memory ran out"),
        ("raise KeyError('a bug')", "KeyError: 'a bug'"),
        ("import sys; sys.exit(3)", "exit status 3"),
    ],
)
def test_what_a_failure_is_called(program, outcome):
    [row] = run_sweep([{"seed": "1"}], [sys.executable, "-S", "-c", program])
    assert row == SweepRow({"seed": "1"}, outcome)


def test_a_launcher_that_is_not_there():
    with pytest.raises(UserError, match="--launch no-such-launcher: No such file"):
        run_sweep([{"seed": "1"}], ["no-such-launcher"])


def test_under_torchrun_it_is_refused(run_file, monkeypatch):
    launcher = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--sweep: starts processes itself"):
        command.main(["--config", str(run_file), "--sweep", "recompute=none"])


def test_the_fastest_is_named():
    def row(size: str, rate: float) -> SweepRow:
        summary = {
            "tokens_per_second": rate,
            "tokens_per_second_per_rank": rate / 2,
            "mfu": {"causal pairs (halved)": {"datasheet": 0.5, "matmul": 0.6}},
            "step_seconds": {"median": 0.25},
            "peak_memory_bytes": 3 * 2**30,
        }
        return SweepRow({"training.micro_batch_size": size}, "ok", {"summary": summary})

    text = format_sweep(
        [row("1", 1000.0), row("2", 3000.0), SweepRow({"training.micro_batch_size": "4"}, "out of memory")]
    )
    assert text.endswith("best that fits: --training.micro_batch_size=2: 3,000 tokens/s")
    cells = [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]]
    assert cells == ["1", "1,000", "500", "50.0% of datasheet", "250.0 ms", "3.00 GiB", "ok"]
