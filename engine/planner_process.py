"""Run ``tools/plan.py`` as a process for a run on its own devices, and return its record.

The engine does not import the tools. The process has a time limit and needs no GPU.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .config.budget import in_tokens
from .config.settings import RunConfig, to_yaml
from .errors import UserError
from .observe.flops import device_peak_flops
from .parallel.memory_check import device_memory
from .parallel.process_group import Ranks
from .system import environment_of_tool

PLAN = Path(__file__).resolve().parents[1] / "tools" / "plan.py"
_USUAL_TFLOPS = 300.0
"""Speed of a GPU that is not in the table of :mod:`.observe.flops`; it has no influence on the memory."""
_LONG_BUDGET = 10**15
"""Tokens of a run whose budget is not known yet; it has no influence on the memory."""


def plan_run(config: RunConfig, ranks: Ranks, memory: int, seconds: float, *options: str) -> dict[str, Any]:
    """Return the record that ``tools/plan.py --json`` writes for a run on the devices of ``ranks``.

    The host memory of all nodes is that of the calling rank's.

    Args:
        config: of the run.
        ranks: all ranks.
        memory: bytes of each GPU.
        seconds: time limit.
        options: of the command, in addition to the configuration and the cluster.

    Raises:
        UserError: the planner cannot plan the run, or needs more time.
    """
    per_node = min(ranks.world_size, int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size)))
    tflops = (device_peak_flops(ranks.device) or _USUAL_TFLOPS * 1e12) / 1e12
    if config.training.train_tokens is None:
        config = replace(config, training=replace(config.training, train_tokens=_LONG_BUDGET))
    with tempfile.TemporaryDirectory(prefix="retemper-") as folder:
        file, report, problem = (Path(folder, name) for name in ("run.yaml", "plan.json", "error"))
        file.write_text(to_yaml(in_tokens(config)), encoding="utf-8")
        cluster = ["--nodes", str(math.ceil(ranks.world_size / per_node)), "--gpus-per-node", str(per_node)]
        gpu = ["--gpu-memory", str(memory / 2**30), "--gpu-tflops", str(tflops)]
        gpu += ["--host-memory", str(device_memory(torch.device("cpu")) / 2**30)]
        command = [sys.executable, str(PLAN), "--config", str(file), *cluster, *gpu, *options, "--json", str(report)]
        # Without a GPU: a context of its own would need some of the run's memory.
        env = environment_of_tool(problem) | {"CUDA_VISIBLE_DEVICES": ""}
        if status := _run_quietly(command, env, seconds):
            reason = problem.read_text(encoding="utf-8") if problem.exists() else f"it ended with status {status}"
            raise UserError(reason)
        return dict(json.loads(report.read_text(encoding="utf-8")))


def _run_quietly(command: list[str], env: dict[str, str], seconds: float) -> int:
    """Run a command without output, and return its exit status.

    Raises:
        UserError: it needs more than ``seconds``.
    """
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, env=env, stdin=null, stdout=null, stderr=null)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # it then ends its own processes
        raise UserError(f"it needed more than {seconds:.0f} s") from None
