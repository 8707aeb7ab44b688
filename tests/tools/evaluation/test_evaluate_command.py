"""The command: its tables, JSON and page, and errors of one line before anything is written."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluating import FP32, evaluate, request, save_model, texts, write_dataset, write_jsonl
from oracles.html_page import Page

from retemper.engine.errors import UserError
from retemper.engine.parallel import build, memory_check
from retemper.tools import evaluate_model
from retemper.tools.evaluation import command as command_module
from retemper.tools.evaluation import harness
from retemper.tools.evaluation.options import HarnessOptions
from retemper.tools.evaluation.report import format_result, result_page
from retemper.tools.evaluation.scores import DocumentScore, EvaluationResult, ModelScore, SetScore, TaskScore

SCRIPT = Path(evaluate_model.__file__)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "qwen2", tiny_tokenizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", [[5, 6, 7, 8, 0], [9, 10, 0]])


def set_score(name: str, nats: float, text_nats: float) -> SetScore:
    document = DocumentScore(7, 30, 20, 2.5, None, "a <b>\x1b[31m beginning")
    return SetScore(name, f"{name}.jsonl", 3, 120, 100, nats, 95, text_nats, 400, [document], [document])


def result_of(same_tokenizer: bool) -> EvaluationResult:
    after = [set_score("domain", 200.0, 190.0), set_score("general", 310.0, 300.0), set_score("same", 250.0, 240.0)]
    before = [set_score("domain", 250.0, 240.0), set_score("general", 300.0, 295.0), set_score("same", 250.0, 240.0)]
    tasks = [TaskScore("mini", "acc", 0.75, 0.1, 4)]
    return EvaluationResult(
        ModelScore("new", "new", {"layout": "one rank"}, "x", after, tasks, ["a remark"]),
        ModelScore("old", "old", {}, "x" if same_tokenizer else "y", before, [TaskScore("mini", "acc", 0.5, 0.1, 4)]),
    )


def test_what_was_learned_and_forgotten(tmp_path: Path) -> None:
    result = result_of(same_tokenizer=True)
    assert [one.verdict for one in result.changes] == ["learned", "forgotten", "unchanged"]
    record = json.loads(json.dumps(result.to_dict()))
    [domain, general, _] = record["changes"]
    assert domain["loss"] == {"before": 2.5, "after": 2.0, "change": -0.5, "percent": -20.0}
    bits = general["bits_per_byte"]
    assert bits["after"] == pytest.approx(300 / 400 / math.log(2)) and bits["before"] < bits["after"]
    text = format_result(result)
    row = next(line.split() for line in text.splitlines() if line.startswith("general") and "forgotten" in line)
    assert row[1:6] == ["3.0000", "3.1000", "+0.1000", "+3.3", "%"]
    assert "\x1b" not in text
    page = Page(result_page(result))
    page.require_self_contained()
    for words in ("forgotten", "learned", "+3.3 %", "a remark", "mini"):
        assert words in page.text
    heights = [float(value) for name, value in page.attributes if name == "height"]
    assert page.tags.count("rect") == 3 and len(heights) == 3 and min(heights) == 0.0 < heights[1] < heights[0]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_model_that_computes_no_numbers(loss: float) -> None:
    broken, good = set_score("domain", loss, loss), set_score("domain", 250.0, 240.0)
    for after, before in ((broken, good), (good, broken), (broken, broken)):
        sides = ModelScore("new", sets=[after]), ModelScore("old", sets=[before])
        result = EvaluationResult(*sides)
        [change] = result.changes
        assert str(loss) in format_result(result) and str(loss) in Page(result_page(result)).text
        if math.isnan(loss) or after is before:
            assert change.verdict == "not comparable"


def test_losses_of_other_tokenizers_are_not_compared() -> None:
    result = result_of(same_tokenizer=False)
    [domain, general, _] = result.to_dict()["changes"]
    assert domain["loss"] is None and (domain["verdict"], general["verdict"]) == ("learned", "forgotten")
    assert "different tokenizers" in format_result(result) and "different tokenizers" in Page(result_page(result)).text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere.jsonl"], ["--data nowhere.jsonl", "no such file"]),
        ([], ["--data is missing"]),
        (["--data", "{data}", "--stride", "4"], ["--stride 4", "--mode sliding"]),
        (["--data", "{data}", "--mode", "sliding", "--stride", "64", "--sequence-length", "32"], ["64", "32 at most"]),
        (["--lm-eval", ","], ["--lm-eval", "no task"]),
        (["--data", "{data}", "--lm-eval-limit", "4"], ["--lm-eval-limit 4", "without --lm-eval"]),
        (["--data", "{data}", "--batch-size", "0"], ["--batch-size 0"]),
        (["--data", "a={data}", "a={data}"], ["two sets are named 'a'"]),
        (["--data", "{{path: {data}, weight: 2}}"], ["weight"]),
        (["--data", "{data}", "--optimizer.learning_rate", "1"], ["--optimizer.learning_rate", "no effect"]),
        (["--data", "{data}", "--baseline", "nowhere/x/y"], ["--baseline nowhere/x/y"]),
        (["--data", "{data}", "--parallel.tensor", "2"], ["parallel.tensor 2"]),
        (["--data", "{data}", "--training.precision", "fp64"], ["training.precision"]),
        (["--data", "{data}", "--output", "{model}/config.json"], ["--output", "config.json"]),
        (["--data", "{data}", "--json", "missing/x.json"], ["--json missing/x.json", "does not exist"]),
        (["--data", "{data}", "--json", "x", "--output", "./x"], ["--output x", "--json"]),
        (
            ["--data", "{data}", "--mode", "sliding", "--data.attend_across_documents", "true"],
            ["--data.attend_across_documents", "--mode packed"],
        ),
    ],
)
def test_wrong_requests_take_one_line(
    arguments: list[str], words: list[str], run, model: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [one.format(data=data, model=model) for one in arguments]
    command = run(evaluate_model, "--model", model, *filled)
    assert command.status == 1 and command.stdout == ""
    [line] = command.stderr.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)
    assert not list(tmp_path.iterdir())


def test_a_missing_harness_names_the_command_that_installs_it(run, model: Path, monkeypatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    command = run(evaluate_model, "--model", model, "--lm-eval", "arc_easy")
    [line] = command.stderr.splitlines()
    assert "lm_eval" in line and "[eval]" in line and command.status == 1


def test_a_task_that_fails_leaves_what_was_measured(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = SimpleNamespace(options=SimpleNamespace(harness=HarnessOptions(("x",))), config=None)
    monkeypatch.setattr(evaluate_model, "_evaluate", lambda *arguments: (plan, result_of(same_tokenizer=True)))

    def fail(*arguments: object) -> None:
        raise UserError("--lm-eval x: no network")

    monkeypatch.setattr(command_module, "run_harness", fail)
    path = tmp_path / "result.json"
    command = run(evaluate_model, "--model", "x", "--data", "y", "--lm-eval", "x", "--json", path)
    assert command.status == 1 and command.stderr == "error: --lm-eval x: no network\n"
    assert [one["name"] for one in json.loads(path.read_text())["model"]["sets"]] == ["domain", "general", "same"]


def test_offload_is_not_predicted_for_an_evaluation(one_rank, model: Path, data: str) -> None:
    words = ["--parallel.cpu_offload", "auto"]
    with pytest.raises(UserError, match="auto, which predicts the memory of training") as found:
        evaluate(one_rank, request(model, data, sequence_length=32), words)
    assert "\n" not in str(found.value)


def test_a_model_larger_than_the_memory_is_refused_before_it_is_read(
    one_rank, model: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_check, "device_memory", lambda device: 50_000)
    monkeypatch.setattr(build, "build_model", None)  # is not reached
    with pytest.raises(UserError, match=r"^--model: [\d,]+ parameters x 4 bytes / 1 ranks that share them = ") as found:
        evaluate(one_rank, request(model, data, sequence_length=32))
    assert "\n" not in str(found.value) and "training.weight_dtype bf16" in str(found.value)
    size = (model / "model.safetensors").stat().st_size
    for dtype, enough in (("auto", size), ("float32", size), ("bfloat16", size // 2)):
        monkeypatch.setattr(harness, "device_memory", lambda device, enough=enough: enough)
        harness._require_memory(model, dtype, torch.device("cpu"))
        monkeypatch.setattr(harness, "device_memory", lambda device, enough=enough: enough - 10_000)
        with pytest.raises(UserError, match=r"^--lm-eval: the weights of \S+ are 0.0 GB, and cpu has"):
            harness._require_memory(model, dtype, torch.device("cpu"))


def test_an_unknown_task_is_refused_before_a_model_is_opened(run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the interface of the harness's TaskManager, which a slow test runs itself."""

    class TaskManager:
        all_tasks = ("hellaswag", "hellaswag_de", "arc_easy")

        def __init__(self, include_path: str | None) -> None:
            assert include_path is None

        def match_tasks(self, names: list[str]) -> list[str]:
            return [task for task in self.all_tasks if task in names]

    monkeypatch.setattr(harness, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=TaskManager))
    monkeypatch.setattr(command_module, "find_weights", None)  # is not reached
    monkeypatch.setattr(command_module, "open_model", None)
    command = run(evaluate_model, "--model", model, "--lm-eval", "arc_easy,hellaswga")
    assert command.status == 1 and command.stderr.count("\n") == 1
    assert "--lm-eval hellaswga: no task of this name" in command.stderr
    assert "did you mean hellaswag, hellaswag_de?" in command.stderr


def test_a_gpu_without_memory_takes_one_line(one_rank, model: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(command_module, "score", fail)
    with pytest.raises(UserError, match="Tried to allocate 2 GiB; lower --batch-size") as found:
        evaluate(one_rank, request(model, data, sequence_length=32))
    assert "\n" not in str(found.value)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command(ranks: int, model: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    """From the command line, also under torchrun: text in two sets, a baseline, JSON and page."""
    baseline = save_model(tmp_path / "baseline", "qwen2", tiny_tokenizer, seed=1)
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", texts(8, seed=len(name)))
    start = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    words = ["--model", str(model), "--baseline", str(baseline), "--data", "one.jsonl", "second=two.jsonl"]
    more = ["--json", "result.json", "--output", "result.html", "--sequence-length", "64", "--batch-size", "2", *FP32]
    environment = {**os.environ, "RETEMPER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *start, str(SCRIPT), *words, *more],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "result.json").read_text())
    assert [one["name"] for one in record["model"]["sets"]] == ["one", "second"]
    assert record["baseline"]["sets"][0]["targets"] == record["model"]["sets"][0]["targets"]
    Page((tmp_path / "result.html").read_text()).require_self_contained()
    assert f"{record['model']['sets'][1]['loss']:.4f}" in done.stdout
