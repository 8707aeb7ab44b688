"""``retemper train``: from a model and texts to a configuration, a run and a model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
import yaml
from oracles.tiny_tokenizer import train_tiny_tokenizer

from retemper.engine.config import packages
from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import DataConfig, ParallelConfig, RunConfig, TrainingConfig
from retemper.engine.errors import UserError
from retemper.engine.parallel import memory_check
from retemper.tools import train
from retemper.tools.planning.gpus import GPUS
from retemper.tools.training import command, fitting, recipe

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Hugging Face folder with a tiny model and its tokenizer, written by transformers."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    train_tiny_tokenizer(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(**shape, vocab_size=368, num_key_value_heads=2, max_position_embeddings=128)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A folder of text files, and general text next to it."""
    folder = tmp_path_factory.mktemp("user") / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(f"chapter {number}: " + "the domain has its own words. " * 20)
    lines = (json.dumps({"text": f"{number} " + "general prose is different. " * 9}) for number in range(80))
    (folder.parent / "general.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def planned(model, texts, tmp_path, capsys, monkeypatch):
    """Run ``--dry-run`` with more options; return the YAML and the lines of the plan."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETEMPER_CACHE", str(tmp_path / "cache"))

    def run(*options: object) -> tuple[dict, str]:
        train.main(["--model", str(model), "--data", str(texts), "--dry-run", *map(str, options)])
        out, err = capsys.readouterr()
        (tmp_path / "printed.yaml").write_text(out)
        parse_config(["--config", str(tmp_path / "printed.yaml")])
        return yaml.safe_load(out), err

    return run


def test_a_dry_run_prints_a_configuration_and_writes_nothing(planned, texts, tmp_path):
    tree, lines = planned(
        "--replay", f"{texts.parent / 'general.jsonl'}:0.25", "--evaluate", f"more={texts / '00.txt'}"
    )
    assert tree["run_folder"] == f"runs/{tree['model']['initialize_from'].rpartition('/')[2]}-texts"
    assert [(one["name"], one["weight"]) for one in tree["data"]["train"]] == [("texts", 0.75), ("general", 0.25)]
    assert tree["data"]["validation"] == {"more": str(texts / "00.txt")}
    num_bytes = sum(path.stat().st_size for path in texts.iterdir())
    assert tree["training"]["train_tokens"] == round(num_bytes / 4 / 0.75)
    assert "estimated" in lines and "dry run" not in lines
    assert [path.name for path in tmp_path.iterdir()] == ["printed.yaml"]


def test_cached_texts_are_counted(planned, model, texts, capsys):
    train.main(["--model", str(model), "--data", str(texts), "--save-config", "saved.yaml", "--tokens", "5k"])
    counted = re.search(r"texts: (\d+) documents, ([\d,]+) tokens; (\d+) documents held out", capsys.readouterr().err)
    assert int(counted[1]) + int(counted[3]) == 60
    tree, lines = planned("--epochs", 3)
    assert tree["training"]["train_tokens"] == 3 * int(counted[2].replace(",", ""))
    assert counted[0] in lines
    words = ["--model", str(model), "--data", str(texts), "--save-config", "all.yaml", "--validation", "0"]
    train.main(words)
    assert "texts: 60 documents" in capsys.readouterr().err


def test_files_and_options_win_over_what_is_chosen(planned, tmp_path):
    (tmp_path / "more.yaml").write_text(
        "run_folder: runs/mine\ndata: {train: [{path: other}], validation: {old: gone}, shuffle: documents}\n"
        "training: {train_tokens: 5000, sequence_length: 32}\noptimizer: {learning_rate: 1e-3}\n"
    )
    tree, _ = planned("--config", tmp_path / "more.yaml", "--training.sequence_length", 64, "--checkpoint.keep_last", 1)
    assert tree["run_folder"] == "runs/mine"
    assert tree["data"]["shuffle"] == "documents" and "validation" not in tree["data"]
    assert [one["name"] for one in tree["data"]["train"]] == ["texts"]
    assert (tree["training"]["train_tokens"], tree["training"]["sequence_length"]) == (5000, 64)
    assert tree["checkpoint"]["keep_last"] == 1 and tree["optimizer"]["learning_rate"] == 1e-3
    tree, _ = planned("--config", tmp_path / "more.yaml", "--tokens", "9k", "--output", "there")
    assert (tree["training"]["train_tokens"], tree["run_folder"]) == (9000, "there")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--validation", "1"], "--validation 1"),
        (["--epochs", "0"], "--epochs 0"),
        (["--replay", "general.jsonl:0.6", "--replay", "other.jsonl:0.5"], "--replay.*1.1"),
        (["--ranks", "0"], "--ranks 0"),
        (["--training.sequence_lenth", "3"], "sequence_length"),
        (["--data", "missing"], "missing"),
        (["--gpu", "unknown"], "--gpu unknown"),
        (["--data.train", "[{path: x}]"], "--data.train and --data"),
        (["--tokens", "5k", "--training.train_tokens", "6000"], "--training.train_tokens and --tokens"),
        (["--output", "a", "--run_folder", "b"], "--run_folder and --output"),
        (["--epochs", "2", "--training.train_tokens", "6000"], "--training.train_tokens and --epochs"),
        (["--evaluate", "x=nothing.txt"], "--evaluate x=nothing.txt"),
    ],
)
def test_impossible_requests_are_refused(planned, options, named):
    with pytest.raises(UserError, match=named):
        planned(*options)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--data", "x"], "--model is missing"),
        (["--model", "x"], "--data is missing"),
        (["--model", "x", "--data", "y", "--gpu", "h200"], "--dry-run"),
    ],
)
def test_incomplete_requests_are_refused(words, named):
    with pytest.raises(UserError, match=named):
        train.main(words)


def test_a_rank_of_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="--save-config"):
        train.main(["--model", "x", "--data", "y"])


def test_a_run_folder_inside_the_text_is_refused(model, texts):
    with pytest.raises(UserError, match="inside the text"):
        train.main(["--model", str(model), "--data", str(texts), "--output", str(texts / "run"), "--dry-run"])


def test_saved_settings_are_those_of_the_dry_run(planned, model, texts, tmp_path, capsys):
    tree, _ = planned("--tokens", "5k")
    words = ["--model", str(model), "--data", str(texts), "--tokens", "5k", "--save-config", "run.yaml"]
    train.main(words)
    saved = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert saved["training"] == tree["training"]
    assert saved["data"]["train"][0].pop("validation_fraction") == pytest.approx(8 / 60, abs=1e-4)  # few documents
    with pytest.raises(UserError, match=r"run\.yaml: exists"):
        train.main(words)


def test_lora_has_settings_of_its_own(planned, tmp_path):
    tree, lines = planned("--lora", "--adapter.rslora", "true")
    assert tree["adapter"] == {"kind": "lora", "rank": 64, "alpha": 128, "rslora": True}
    assert tree["optimizer"] == {"learning_rate": pytest.approx(5e-4)} and tree["checkpoint"]["export_hf"] is True
    per_block = 4 * 32 + 2 * (32 + 16) + 3 * (32 + 48)  # inputs and outputs of all linear layers
    assert f"LoRA of rank 64, alpha 128, on all linear layers: {2 * 64 * per_block:,} parameters learn" in lines
    tree, _ = planned("--lora-rank", 8, "--optimizer.learning_rate", "1e-3", "--adapter.alpha", "4")
    assert (tree["adapter"]["rank"], tree["adapter"]["alpha"], tree["optimizer"]["learning_rate"]) == (8, 4, 1e-3)
    assert "adapter" not in planned()[0]
    with pytest.raises(UserError, match=r"--adapter\.rank and --lora-rank set the same"):
        planned("--lora-rank", 8, "--adapter.rank", 4)
    with pytest.raises(UserError, match="--lora-rank 0: must be at least 1"):
        planned("--lora-rank", 0)


def test_qlora_is_lora_on_a_base_in_4_bits_on_one_rank(planned, monkeypatch):
    tree, lines = planned("--qlora", "--lora-rank", 8)
    assert tree["adapter"] == {"kind": "lora", "rank": 8, "alpha": 16, "quantize_base": "nf4"}
    assert tree["optimizer"] == {"learning_rate": pytest.approx(5e-4)} and "frozen, its matrices in nf4" in lines
    with pytest.raises(UserError, match=r"--adapter\.quantize_base and --qlora set the same"):
        planned("--qlora", "--adapter.quantize_base", "int8")
    with pytest.raises(UserError, match=r"^--qlora: adapter.quantize_base is nf4 on 2 ranks, but [^\n]*use one rank"):
        planned("--qlora", "--ranks", 2)
    monkeypatch.setattr(packages, "_is_installed", lambda module: False)
    with pytest.raises(UserError, match=r"^--qlora: adapter.quantize_base is nf4, but bitsandbytes is not installed"):
        planned("--qlora")


def test_auto_quantizes_where_lora_does_not_fit_and_the_machine_can(planned, monkeypatch):
    """On a CPU, by arithmetic: matrices in 4 bits take about an eighth of those in fp32."""
    monkeypatch.setattr(recipe, "LORA_RANK", 2)
    monkeypatch.setattr(memory_check, "device_memory", lambda device: 160_000)
    tree, lines = planned("--auto")
    assert tree["adapter"] == {"kind": "lora", "rank": 2, "alpha": 4, "quantize_base": "nf4"}
    assert "all parameters does not fit, and LoRA neither, so a LoRA adapter of rank 2 is trained on matrices" in lines
    tree, lines = planned("--auto", "--lora-rank", 2)
    assert tree["adapter"]["quantize_base"] == "nf4" and "LoRA does not fit, so" in lines
    for excluded in (("--adapter.quantize_base", "none"), ("--adapter.kind", "null")):
        with pytest.raises(UserError, match="trainable ones"):
            planned("--auto", *excluded)
    monkeypatch.setattr(memory_check, "device_memory", lambda device: 80_000)
    with pytest.raises(UserError, match="2 ranks that share them"):  # half as much for each of two ranks
        planned("--auto", "--ranks", 2)
    monkeypatch.setattr(memory_check, "device_memory", lambda device: 160_000)
    monkeypatch.setattr(packages, "_is_installed", lambda module: False)
    with pytest.raises(UserError, match="trainable ones"):
        planned("--auto")


def test_auto_trains_an_adapter_where_all_parameters_do_not_fit(planned, monkeypatch):
    """On a CPU, by arithmetic: fp32 weights of 12,000 parameters take 16 bytes each to train, 4 frozen."""
    monkeypatch.setattr(memory_check, "device_memory", lambda device: 600_000)
    with pytest.raises(UserError, match=r"parameters x 4 bytes \+ .* trainable ones x 12 bytes"):
        planned()
    monkeypatch.setattr(recipe, "LORA_RANK", 2)
    tree, lines = planned("--auto")
    assert tree["adapter"] == {"kind": "lora", "rank": 2, "alpha": 4}
    assert "training all parameters does not fit, so a LoRA adapter of rank 2 is trained" in lines
    with pytest.raises(UserError, match="trainable ones"):
        planned("--auto", "--adapter.kind", "null")
    monkeypatch.setattr(memory_check, "device_memory", lambda device: 6_000_000)
    tree, lines = planned("--auto")
    assert "adapter" not in tree and "LoRA" not in lines


def test_offload_that_a_run_chooses_itself_is_not_a_change():
    config = RunConfig("x", data=DataConfig(), training=TrainingConfig(train_tokens=1))
    asked = replace(config, parallel=ParallelConfig(cpu_offload="auto"))
    chosen = replace(config, parallel=ParallelConfig(cpu_offload="optimizer", recompute="full"))
    assert fitting._changes(chosen, asked) == {"parallel": {"recompute": "full"}}
    assert fitting._changes(chosen, config) == {"parallel": {"recompute": "full", "cpu_offload": "optimizer"}}


@pytest.mark.slow
def test_settings_shrink_until_the_model_fits(planned, monkeypatch):
    """Memory from a dry run of this tiny model: the reserve is most of it, so the GPU has little more than that."""
    gpu = GPUS["a100-80gb"]
    words = ("--gpu", "a100-80gb", "--ranks", 2, "--tokens", "100k")
    tree, lines = planned(*words)
    assert "fits" in lines and "parallel" not in tree
    needed = {}
    original = fitting.plan_briefly

    def note(layouts, cluster, pool):
        [plan] = original(layouts, cluster, pool)
        parallel = plan.config.parallel
        kind = plan.config.adapter.kind or parallel.recompute
        needed[kind, parallel.cpu_offload, plan.config.training.micro_batch_size] = plan.peak_bytes
        return [plan]

    monkeypatch.setattr(fitting, "plan_briefly", note)
    monkeypatch.setattr(fitting, "find_gpu", lambda name: replace(gpu, memory=int(fitting.RESERVE)))
    with pytest.raises(UserError, match="does not fit"):
        planned(*words, "--auto")
    assert needed["none", False, 1] > needed["full", False, 1] > needed["full", True, 1]
    enough = int(fitting.RESERVE + needed["full", False, 1])
    monkeypatch.setattr(fitting, "find_gpu", lambda name: replace(gpu, memory=enough))
    with pytest.raises(UserError, match="--auto"):
        planned(*words)
    tree, _ = planned(*words, "--auto")
    assert tree["parallel"] == {"recompute": "full"} and tree["training"]["micro_batch_size"] == 1
    needed.clear()
    with pytest.raises(UserError, match="does not fit"):
        planned(*words, "--auto", "--parallel.recompute", "none", "--parallel.cpu_offload", "false")
    assert set(needed) == {("none", False, 1), ("lora", False, 1)}  # what the user has set stays


@pytest.mark.slow
def test_a_finished_run_is_not_reported_as_another_one_or_without_its_models(one_rank, run_file, tmp_path, monkeypatch):
    options = ["--run_folder", str(tmp_path / "run"), "--training.train_tokens", "1024"]
    options += ["--checkpoint.model_folders", "auto"]
    tiny_run.train(one_rank, run_file, options)
    started = []
    monkeypatch.setattr(command, "run_training", lambda words: started.append(words) or 3)
    machine = fitting.Machine(1, None)

    def start(*more: str) -> int:
        return command.run_plan(command.TrainingPlan(tiny_run.configure(run_file, *options, *more), {}, machine, []))

    assert start() == 0 and not started
    with pytest.raises(UserError, match=r"adapter.kind is lora, but .*step-00000004 was trained without an adapter"):
        start("--adapter.kind", "lora")
    shutil.rmtree(tmp_path / "run/final_model")
    assert start() == 3 and len(started) == 1  # the run writes it


def test_one_command_makes_a_better_model_also_after_a_kill(model, texts, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    environment = {**os.environ, "RETEMPER_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "tools" / "train.py"), "--model", str(model), "--data", str(texts)]
    command += [
        "--replay",
        f"{texts.parent / 'general.jsonl'}:0.2",
        "--tokens",
        "60k",
        "--checkpoint.save_interval",
        "5",
    ]
    command += ["--optimizer.learning_rate", "1e-2"]

    def run(folder: str) -> subprocess.CompletedProcess[str]:
        line = [*command, "--output", folder]
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    whole = run("whole")
    assert whole.returncode == 0, whole.stderr
    killed = subprocess.Popen(
        [*command, "--output", "killed"],
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    while not list((tmp_path / "killed").glob("checkpoints/step-*/manifest.json")):
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    resumed = run("killed")
    assert resumed.returncode == 0 and "resumed from" in resumed.stdout, resumed.stdout
    [first], [second] = (list((tmp_path / name / "hf").iterdir()) for name in ("whole", "killed"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert "<svg" in (tmp_path / "killed" / "report.html").read_text()
    assert "texts loss fell by" in resumed.stdout and "general loss fell by" in resumed.stdout
    tokenizer = AutoTokenizer.from_pretrained(second)
    loss = []
    for folder in (model, second):
        trained = AutoModelForCausalLM.from_pretrained(folder).float()
        ids = tokenizer("the domain has its own words.", return_tensors="pt")["input_ids"]
        loss.append(float(trained(ids, labels=ids).loss))
    assert loss[1] < loss[0] - 1
    before = (tmp_path / "killed" / "run.yaml").read_bytes()
    again = run("killed")
    assert again.returncode == 0 and "finished" in again.stderr, again.stderr
    command[command.index("--data") + 1] = str(texts.parent / "general.jsonl")
    other = run("killed")
    assert other.returncode == 1 and "was trained on other data" in other.stderr
    assert (tmp_path / "killed" / "run.yaml").read_bytes() == before
