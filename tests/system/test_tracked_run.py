"""Real runs in real trackers: one curve after a kill, ids in checkpoints, and no secret anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import yaml
from range_server import RangeServer
from tracker_runs import metrics_curves, mlflow_run, tracker_curves, trackio_run, wandb_records

from retemper.engine.weights.checkpoint.manifest import read_manifest

CANARY = "CANARY0123456789abcdef0123456789abcdef01"
SECRETS = {
    name: f"{CANARY}-{name}"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "COMET_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_PASSWORD")
}
RUN = """
import os, sys
import torch, torch.distributed as dist
from pathlib import Path
import tiny_run
from retemper.engine import pretrain
from retemper.engine.observe.console import Console
from retemper.engine.parallel.process_group import Ranks

path, kill_at, *overrides = sys.argv[1:]
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
console = Console()
console.install()
run = pretrain.build(tiny_run.configure(Path(path), *overrides), Ranks(0, 1, torch.device("cpu")))

def kill():
    if run.progress.step == int(kill_at):
        run.saver.wait()
        os.kill(os.getpid(), 9)

tiny_run.before_step(run, kill)
pretrain.train(run, console)
"""


def newest_ids(run_folder: Path) -> dict[str, str]:
    return dict(read_manifest(max((run_folder / "checkpoints").glob("step-*"))).trackers)


def test_ids_are_in_checkpoints_and_a_branch_gets_new_ones(one_rank, run_file, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--logging.trackers", "[mlflow, csv]", "--logging.offline", "true", "--logging.tags", "[a, b]"]
    shorter = ["--training.train_tokens", str(10 * 8 * 32)]
    tiny_run.train(one_rank, run_file, [*options, *shorter, "--run_folder", str(first)])
    ids = newest_ids(first)
    tiny_run.train(one_rank, run_file, [*options, "--run_folder", str(first)])
    assert ids == newest_ids(first) and set(ids) == {"mlflow"}
    assert tracker_curves(first, "mlflow", ids["mlflow"]) == metrics_curves(first)
    client, run = mlflow_run(first, ids["mlflow"])
    assert run.info.status == "FINISHED" and run.info.run_name == "first" and {"a", "b"} <= set(run.data.tags)
    assert run.data.params["optimizer.learning_rate"] == "0.01" and "facts.model.parameters" in run.data.params
    assert {"report.html", "summary.json", "config.yaml", "facts.json"} <= {
        file.path for file in client.list_artifacts(run.info.run_id)
    }

    checkpoint = first / "checkpoints" / "step-00000016"
    tiny_run.train(one_rank, run_file, [*options, "--run_folder", str(second), "--resume", str(checkpoint)])
    branch = newest_ids(second)
    assert branch["mlflow"] != ids["mlflow"]
    assert mlflow_run(second, branch["mlflow"])[1].data.params["facts.continues"] == ids["mlflow"]
    assert tracker_curves(second, "mlflow", branch["mlflow"]) == metrics_curves(second)


def write_config(folder: Path, tokenizer: Path, url: str) -> Path:
    """The tiny run with a text behind a signed URL with a password, and with all trackers that need no login."""
    path = tiny_run.write_config(folder)
    config = yaml.safe_load(path.read_text())
    vocab_size = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]) + 8
    config["model"] = {
        "architecture": {**tiny_run.ARCHITECTURE, "vocab_size": vocab_size},
        "tokenizer": str(tokenizer),
    }
    config["data"] = {"cache_folder": str(folder / "cache"), "train": [{"path": url}], "validation": {"same": url}}
    config["logging"] = {
        "tensorboard": True,
        "trackers": ["wandb", "mlflow", "trackio", "csv"],
        "offline": True,
        "group": "g",
        "tags": ["t"],
    }
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_one_curve_and_tells_no_secret(tiny_tokenizer, tmp_path):
    lines = [json.dumps({"text": f"document {i}: " + "some words " * (i % 13)}) for i in range(300)]
    with RangeServer(files={"/a.jsonl": "\n".join(lines).encode()}) as server:
        host = server.url.removeprefix("http://")
        url = f"http://user:{CANARY}-password@{host}/a.jsonl?X-Amz-Signature={CANARY}-signature"
        path, run = write_config(tmp_path, tiny_tokenizer, url), tmp_path / "run"
        helpers = os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), *sys.path])
        environment = {**os.environ, **SECRETS, "PYTHONPATH": helpers}
        printed = ""
        for kill_at, status in (("10", -9), ("-1", 0)):
            command = [sys.executable, "-c", RUN, str(path), kill_at]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
            printed += done.stdout + done.stderr
            assert done.returncode == status, printed
            ids = newest_ids(run)
    assert not [line for line in printed.splitlines() if "failed" in line or "not received" in line], printed
    expected = metrics_curves(run)
    assert [step for step, _ in expected["train/loss"]] == list(range(1, 21))
    for name in ("wandb", "mlflow", "trackio"):
        assert tracker_curves(run, name, ids[name]) == expected, name
    assert trackio_run(run, ids["trackio"])[0]["facts"]["model"]["model_type"] == "qwen2"
    (config,) = [r["run"]["config"]["update"] for r in wandb_records(run)[:3] if r["type"] == "run"]
    assert config["optimizer"]["learning_rate"] == 1e-2 and "datasets" in config["facts"]

    assert CANARY not in printed
    files = [file for file in run.rglob("*") if file.is_file()]
    leaks = [file for file in files if CANARY.encode() in file.read_bytes() or CANARY in file.name]
    assert len(files) > 50 and not leaks
