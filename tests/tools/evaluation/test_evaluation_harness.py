"""Tasks of lm-evaluation-harness, run by the real harness without a network, against transformers by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from evaluating import FP32, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from retemper.engine.weights.conversion import hf_to_dcp
from retemper.tools import evaluate_model

TASKS = Path(__file__).parent / "tasks"
PACKAGES = ("lm-eval==0.4.13", "accelerate>=1.0")
"""Not in requirements.lock: with scikit-learn and scipy they are larger than all other test packages."""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with the harness, in an environment that is made for these tests and sees the packages of this one."""
    if find_spec("lm_eval") is not None and find_spec("accelerate") is not None:
        return sys.executable
    folder = tmp_path_factory.mktemp("harness")
    venv.create(folder, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shared = [path for path in sys.path if path.endswith("-packages")]
    (folder / "lib" / version / "site-packages" / "shared.pth").write_text("\n".join(shared))
    subprocess.run(
        [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *PACKAGES], check=True, timeout=900
    )
    return str(folder / "bin" / "python")


@torch.no_grad()
def accuracies(folder: Path) -> tuple[float, float]:
    """Share of questions whose likeliest choice is right; the same with likelihoods per character."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = [0, 0]
    rows = [json.loads(line) for line in (TASKS / "questions.jsonl").read_text().splitlines()]
    for row in rows:
        sums = []
        for choice in row["choices"]:
            context = tokenizer(row["question"])["input_ids"]
            ids = tokenizer(f"{row['question']} {choice}")["input_ids"]
            logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            scored = logits.gather(1, torch.tensor(ids[1:])[:, None])[len(context) - 1 :]
            sums.append(scored.sum().item())
        normalized = [total / len(choice) for total, choice in zip(sums, row["choices"], strict=True)]
        for place, values in enumerate((sums, normalized)):
            right[place] += max(range(len(values)), key=values.__getitem__) == row["answer"]
    return right[0] / len(rows), right[1] / len(rows)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_documented_task(python: str, tiny_tokenizer: Path, tmp_path: Path) -> None:
    baseline = save_model(tmp_path / "baseline", "qwen2", tiny_tokenizer)
    trained = save_model(tmp_path / "trained", "qwen2", tiny_tokenizer, seed=1)
    hf_to_dcp.convert(str(trained), tmp_path / "checkpoint", say=lambda line: None)
    shutil.copytree(TASKS, tmp_path / "tasks")
    done = subprocess.run(
        [
            *(python, str(evaluate_model.__file__), "--model", "checkpoint", "--baseline", "baseline"),
            *("--lm-eval", "tasks", "--json", "result.json", "--output", "result.html", *FP32),
        ],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "result.json").read_text())
    for side, folder in (("model", trained), ("baseline", baseline)):
        found = {(one["task"], one["metric"]): one["value"] for one in record[side]["tasks"]}
        acc, acc_norm = accuracies(folder)
        assert found == {("mini", "acc"): acc, ("mini", "acc_norm"): acc_norm}
        assert all(one["samples"] == 4 for one in record[side]["tasks"])
    assert "acc_norm" in done.stdout and "mini" in (tmp_path / "result.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_unknown_task_takes_one_line(python: str, tiny_tokenizer: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen2", tiny_tokenizer)
    (model / "model.safetensors").unlink()  # the names are checked before any weights are looked for
    done = subprocess.run(
        [python, str(evaluate_model.__file__), "--model", str(model), "--lm-eval", "arc_easy,hellaswga"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "--lm-eval hellaswga: no task of this name" in line and "hellaswag" in line


def test_the_page_shows_the_task() -> None:
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert f"```yaml\n{(TASKS / 'mini.yaml').read_text()}```" in page
