"""The step benchmark: its figures against hand arithmetic, where the time goes, and what it leaves alone."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from retemper.benchmarks import hardware_limits, timing
from retemper.benchmarks.hardware_limits import MatmulRate
from retemper.benchmarks.step import measure
from retemper.benchmarks.step.measure import Measurement, is_out_of_memory, measure_step
from retemper.benchmarks.step.options import TABLE_FILE, TRACE_FILE, StepBenchmarkOptions
from retemper.benchmarks.step.phases import PHASES, PhaseClock, StepTime
from retemper.benchmarks.step.report import format_report, summarize
from retemper.benchmarks.step.synthetic import DocumentLengths, write_random_dataset
from retemper.engine import step as step_module
from retemper.engine.config.checks import problems
from retemper.engine.config.parser import parse_config
from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.errors import UserError
from retemper.engine.model.decoder import Decoder
from retemper.engine.optim.local import local_part
from retemper.engine.parallel.forward_backward import NonPipelined
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.pretrain import build
from retemper.tools import benchmark as command
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
ARCHITECTURE = {
    "model_type": "qwen2",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# By hand. Matrices: q 32 x 32, k and v 32 x 16 each, o 32 x 32, three of the feed-forward 32 x 48, in two layers, and
# the head 32 x 97. Scores and their product with the values: 2 multiplications and additions x 3 passes x 2 layers x
# width 32 for every pair.
MATRICES = 6 * (2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48) + 32 * 97)
PAIR = 2 * 2 * 3 * 2 * 32


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    """A run on 8 samples x 32 tokens a step; its data, documents of 16 tokens, exist, its checkpoint does not."""
    folder = tmp_path_factory.mktemp("step")
    with IndexedDatasetWriter(folder / "real", np.uint16) as writer:
        for _ in range(100):
            writer.add_document(np.arange(16))
    config = {
        "run_folder": str(folder / "run"),
        "model": {"architecture": ARCHITECTURE, "initialize_from": str(folder / "nothing")},
        "data": {"train": [{"path": str(folder / "real")}], "validation": {"nothing": str(folder / "nothing")}},
        "training": {
            "train_tokens": 10**6,
            "warmup_tokens": 10**5,
            "sequence_length": 32,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "precision": "fp32",
            "eval_at_start": True,
        },
        "checkpoint": {"save_interval": 1},
        "device": "cpu",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def measured(ranks: Ranks, path: Path, **options: object) -> Measurement:
    """On ranks that are there already."""
    settings = StepBenchmarkOptions(**{"steps": 2, "warmup_steps": 1, "matmul_seconds": 0.0, **options})
    return measure_step(parse_config(["--config", str(path)]), settings, ranks)


def measured_on_real_data(ranks: Ranks, path: Path) -> Measurement:
    return measured(ranks, path, real_data=True)


def measured_with_sleep(ranks: Ranks, path: Path) -> Measurement:
    """In every micro-batch 0.02 s are slept in the forward pass and 0.01 s in the backward pass; 0.03 s in each step's
    clipping."""
    loss_sum, clip = NonPipelined.loss_sum, step_module.global_norm

    def slow_loss_sum(self, batch):
        time.sleep(0.02)
        loss = loss_sum(self, batch)
        loss.register_hook(lambda gradient: time.sleep(0.01))
        return loss

    def slow_clip(*arguments):
        time.sleep(0.03)
        return clip(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NonPipelined, "loss_sum", slow_loss_sum)
        patch.setattr(step_module, "global_norm", slow_clip)
        return measured(ranks, path)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command(run_file, tmp_path):
    """One process, as a user starts it."""
    (tmp_path / "temporary").mkdir()
    program = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "--config", str(run_file), "--steps", "4"]
    program += ["--warmup-steps", "1", "--documents", "fixed:8", "--matmul-seconds", "0.001", "--json", "found.json"]
    program += ["--profile", "profile"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    ran = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    record = json.loads((tmp_path / "found.json").read_text())
    summary = record["summary"]

    assert summary["tokens_per_step"] == 8 * 32
    assert summary["documents_per_step"] == 8 * 32 / 8
    per_token = summary["flops_per_token"]
    assert per_token == {
        "all pairs of positions": MATRICES + 32 * PAIR,
        "causal pairs (halved)": MATRICES + 16 * PAIR,
        "causal pairs within documents": MATRICES + 4 * PAIR,
    }
    assert MATRICES + 32 * PAIR == 135_360

    assert len(record["rows"]) == 4
    for step in record["rows"]:
        assert sum(step["phases"].values()) == pytest.approx(step["seconds"], rel=1e-6)
        assert all(step["phases"][name] > 0 for name in PHASES)
    times = [step["seconds"] for step in record["rows"]]
    assert summary["tokens_per_second"] == pytest.approx(256 / np.median(times))
    assert sum(summary["breakdown_seconds"].values()) == pytest.approx(np.mean(times))
    peak = max(one["flops_per_second"] for one in summary["matmul"] if one["dtype"] == "fp32")
    for name, flops in per_token.items():
        assert summary["mfu"][name] == {"matmul": pytest.approx(flops * 256 / np.median(times) / peak)}

    # A matrix product of a micro-batch: 4 of them in each of 3 steps, 2 layers with 7 linear layers, forward pass.
    trace = json.loads(gzip.decompress((tmp_path / "profile" / TRACE_FILE).read_bytes()))
    products = [event for event in trace["traceEvents"] if event.get("name") == "aten::linear"]
    assert len(products) == 3 * 4 * 2 * 7
    assert "aten::mm" in (tmp_path / "profile" / TABLE_FILE).read_text()

    assert "--documents fixed:8" in record["command"] and record["machine"]["versions"]["torch"] == torch.__version__
    assert record["settings"]["config"]["training"]["global_batch_size"] == 8
    assert "| tokens/s " in ran.stdout and "FLOPs per token = 6 (m" in ran.stdout
    # Nothing is left behind, and the run folder was not touched.
    assert not run_file.with_name("run").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "profile", "temporary"]
    assert not list((tmp_path / "temporary").glob("retemper*"))
    assert "temporary" not in json.dumps(summary["plan"]) and any("model" in line for line in summary["plan"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", str(ROOT / "tests")], "exists, and is not a folder with a profile"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--warmup-steps", "-1"], "--warmup-steps -1: must be at least 0"),
        (["--matmul-seconds", "-1"], "--matmul-seconds -1: must be"),
        (["--stepps", "3"], "unknown option --stepps"),
        (["--training.micro_batch_sizes", "3"], "did you mean 'training.micro_batch_size'"),
        (["--documents", "short"], "--documents short: use whole, fixed"),
        (["--documents", "fixed:0"], "--documents fixed:0"),
        (["--documents", "uniform:9:3"], "--documents uniform:9:3"),
        (["--documents", "fixed:3", "--real-data"], "--documents fixed:3: is only for random data"),
        (["--launch", "torchrun"], "--launch torchrun: is only for --sweep"),
        (["--json", "nowhere/found.json"], "--json nowhere/found.json: the folder "),
        (["--sweep", "micro_batch_size"], "--sweep micro_batch_size: use KEY=VALUE"),
        (["--sweep", "micro_batch_size=1,,2"], "--sweep micro_batch_size=1,,2: use KEY=VALUE"),
        (["--sweep", "batch=1"], "--sweep batch=1: batch is not a key"),
        (["--sweep", "seed=1", "seed=2"], "--sweep seed=2: seed is given twice"),
    ],
)
def test_wrong_options_are_one_line(run_file, arguments, message):
    with pytest.raises(UserError, match=message):
        command.main(["--config", str(run_file), *arguments])


def test_without_any_config_of_the_model_it_says_what_to_name(run_file, tmp_path):
    config = parse_config(["--config", str(run_file), "--model.architecture", "null"])
    with pytest.raises(UserError, match=r"nothing: .*hf does not exist; .* set model.architecture"):
        measure.prepare_config(config, StepBenchmarkOptions(), tmp_path)


def test_settings_of_what_is_left_out_are_left_out_too(run_file, tmp_path):
    """There is no evaluation, no export and no decay; what needs them must not refuse the measurement."""
    stops = ["--training.early_stopping.patience", "2", "--training.eval_interval", "1"]
    stops += ["--training.ema_decay", "0.9", "--training.eval_ema", "true"]
    exports = ["--adapter.kind", "lora", "--adapter.export", "both", "--checkpoint.export_hf", "true"]
    best = ["--checkpoint.keep_best", "improved", "--checkpoint.export_best", "true", "--checkpoint.export_ema", "true"]
    decay = ["--optimizer.schedule", "wsd", "--optimizer.decay_shape", "sqrt", "--optimizer.decay_tokens", "1024"]
    in_steps = [*decay[:-2], "--optimizer.decay_steps", "2"]
    for given in (decay, in_steps):
        config = parse_config(["--config", str(run_file), *stops, *exports, *best, *given])
        assert not list(problems(measure.prepare_config(config, StepBenchmarkOptions(1, 0), tmp_path)))


# ---------------------------------------------------------------------------------------------------------------------
# The measurement


def test_two_ranks(two_ranks, run_file):
    found, other = two_ranks.run(measured, run_file)
    assert (found.ranks, found.tokens_per_step, found.documents_per_step) == (2, 256, 8)
    assert len(found.steps) == len(other.steps) == 2
    assert other.memory == found.memory  # the larger one, on both
    causal = found.flops_per_step["causal pairs within documents"]
    assert causal == found.flops_per_step["causal pairs (halved)"] == 256 * (MATRICES + 16 * PAIR)
    summary = summarize(found)
    assert summary["tokens_per_second_per_rank"] == pytest.approx(summary["tokens_per_second"] / 2)
    assert summary["mfu"]["causal pairs (halved)"] == {}  # no peak is known
    assert "tokens/s per rank (2)" in format_report(found, {})


def test_real_data(two_ranks, run_file):
    found, _ = two_ranks.run(measured_on_real_data, run_file)
    assert found.documents_per_step == 8 * 32 / 16
    assert found.flops_per_step["causal pairs within documents"] == 256 * (MATRICES + 8 * PAIR)


def test_time_lands_where_it_is_spent(two_ranks, run_file):
    found, _ = two_ranks.run(measured_with_sleep, run_file)
    for step in found.steps:
        assert step.phases["forward"] >= 2 * 0.02  # two micro-batches on each of the ranks
        assert step.phases["backward"] >= 2 * 0.01
        assert step.phases["optimizer"] >= 0.03
        assert sum(step.phases.values()) == pytest.approx(step.seconds)


def test_the_clock(monkeypatch):
    clock = PhaseClock(CPU)
    moments = {"data": 1, "forward": 3, "backward": 4, "forward ": 8, "backward ": 9, "optimizer": 12, "other": 13}
    for start in (0.0, 20.0):
        for phase, moment in moments.items():
            monkeypatch.setattr(timing.time, "perf_counter", lambda now=start + moment: now)
            clock.mark(phase.strip())
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 34.0)
    clock.close()
    first, second = clock.steps()
    assert first.phases == {"data": 2, "forward": 2, "backward": 7, "optimizer": 1, "other": 8}
    assert second.phases == {**first.phases, "other": 1}
    assert (first.seconds, second.seconds) == (20, 13)


def test_on_a_gpu_moments_are_events_that_are_read_once(monkeypatch):
    """With events that stand for a GPU's: what the host's clock says does not count, and the device is waited for once,
    at the end."""
    waits, gpu_milliseconds = [], iter([0.0, 1.0, 5.0, 12.0, 13.0, 13.5, 20.0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(gpu_milliseconds)

        def elapsed_time(self, other: Event) -> float:
            assert waits
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    clock = PhaseClock(torch.device("cuda", 0))
    for phase in (*PHASES, "data"):
        clock.mark(phase)
    clock.close()
    first, second = clock.steps()
    assert first.phases == pytest.approx(
        {"data": 1e-3, "forward": 4e-3, "backward": 7e-3, "optimizer": 1e-3, "other": 0.5e-3}
    )
    assert (first.seconds, second.seconds) == pytest.approx((13.5e-3, 6.5e-3))
    assert waits == [torch.device("cuda", 0)]


def test_shares_of_the_peaks():
    steps = [StepTime(seconds, dict.fromkeys(PHASES, seconds / 5)) for seconds in (1.0, 4.0, 2.0)]
    found = Measurement(
        plan=[],
        ranks=2,
        device="NVIDIA H200",
        precision="bf16",
        parameters=1,
        tokens_per_step=1000,
        documents_per_step=3.0,
        flops_per_step={"all pairs of positions": 989e12, "causal pairs (halved)": 494.5e12},
        flops_formula="a formula",
        steps=steps,
        warmup_seconds=1.0,
        memory={"allocated": 2**30, "reserved": 2**31, "total": 2**37},
        matmul=[MatmulRate("bf16", 8, 700e12), MatmulRate("bf16", 16, 800e12), MatmulRate("fp32", 8, 900e12)],
        datasheet=("H200", 989e12),
    )
    summary = summarize(found)
    # 989 TFLOP in the median step of 2 s on two ranks.
    assert summary["mfu"]["all pairs of positions"] == pytest.approx({"datasheet": 0.25, "matmul": 989 / 4 / 800})
    assert summary["mfu"]["causal pairs (halved)"] == pytest.approx({"datasheet": 0.125, "matmul": 989 / 8 / 800})
    assert (summary["tokens_per_second"], summary["tokens_per_second_per_rank"]) == (500, 250)
    assert (summary["step_seconds"]["least"], summary["step_seconds"]["most"]) == (1.0, 4.0)
    assert sum(summary["breakdown_seconds"].values()) == pytest.approx(7 / 3)
    assert summary["peak_memory_bytes"] == 2**31
    text = format_report(found, {"torch": "x"})
    assert "of H200 datasheet, bf16: 989 TFLOP/s" in text and "of measured matmul, bf16: 800 TFLOP/s" in text
    assert "tokens/s per GPU (2)" in text and "peak memory reserved" in text
    # The datasheet's figure is of bf16.
    assert "datasheet" not in format_report(replace(found, precision="fp32"), {})


def test_weights_of_a_benchmark_are_drawn_where_the_model_is(one_rank, run_file, tmp_path):
    """As the run draws them: norms one, biases zero, matrices of the config's spread."""
    on_the_host = Decoder.initialize_
    config = parse_config(["--config", str(run_file)])
    config = measure.prepare_config(config, StepBenchmarkOptions(1, 0), tmp_path)
    with measure.quick_initialization(torch.device("cuda")):
        assert Decoder.initialize_ is not on_the_host
        model = build(config, one_rank, check_room=False).model.decoders[0]
    assert Decoder.initialize_ is on_the_host
    for name, parameter in model.named_parameters():
        values = local_part(parameter)
        if name.endswith("norm.weight") or name.endswith("bias"):
            assert (values == float(name.endswith("norm.weight"))).all(), name
        else:
            assert values.std().item() == pytest.approx(0.02, rel=0.1), name


def test_matrix_products(monkeypatch):
    rates = hardware_limits.matmul_rates(CPU, {"fp32": torch.float32, "bf16": torch.bfloat16}, 1e-3, sizes=(16, 32))
    assert [(rate.dtype, rate.size) for rate in rates] == list(itertools.product(["fp32", "bf16"], [16, 32]))
    assert all(rate.flops_per_second > 0 for rate in rates)
    monkeypatch.setattr(hardware_limits, "time_for", lambda *_, **__: [0.25, 0.5, 4.0])
    [rate] = hardware_limits.matmul_rates(CPU, {"fp32": torch.float32}, 1.0, sizes=(100,))
    assert rate.flops_per_second == 2 * 100**3 / 0.5


@pytest.mark.parametrize(
    ("text", "mean", "least", "most"),
    [("fixed:7", 7, 7, 7), ("uniform:3:9", 6, 3, 9), ("lognormal:50", 50, 1, 10**6), ("lognormal:50:0.1", 50, 20, 90)],
)
def test_document_lengths(text, mean, least, most):
    total = 400_003
    lengths = DocumentLengths.parse(text).draw(total, np.random.default_rng(0))
    assert lengths.sum() == total
    assert lengths[:-1].min() >= least and lengths.max() <= most and 1 <= lengths[-1] <= most
    assert lengths[:-1].mean() == pytest.approx(mean, rel=0.05)


def test_random_data_are_as_many_as_wanted_up_to_a_limit(tmp_path, monkeypatch):
    whole = DocumentLengths.parse("whole")
    write_random_dataset(tmp_path / "a", whole, 97, 32, samples=24, step=8, seed=1)
    dataset = IndexedDataset(tmp_path / "a")
    assert (dataset.num_tokens, dataset.num_documents) == (24 * 32 + 1, 1)
    tokens = dataset.tokens(0, dataset.num_tokens)
    assert tokens.min() >= 0 and tokens.max() < 97 and len(np.unique(tokens)) > 90
    monkeypatch.setattr("retemper.benchmarks.step.synthetic._MOST_TOKENS", 100)
    write_random_dataset(tmp_path / "b", DocumentLengths.parse("fixed:8"), 97, 32, samples=24, step=8, seed=1)
    assert IndexedDataset(tmp_path / "b").num_tokens == 8 * 32 + 1


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(of_torch.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("out of memory"))
