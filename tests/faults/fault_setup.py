"""The tiny run that is disturbed, and the undisturbed one that all is compared with."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import fault_judge as judge
import tiny_run
from fault_launch import LONGEST_SECONDS, Launch, run_command, wait_for
from fault_lineage import KEEP_LAST, Workshop

NUM_STEPS = 60
SAMPLES_PER_STEP = 8
_KEEP_ALL = ("--checkpoint.save_interval", "1", "--checkpoint.keep_last", "1000")
_HALF_WAY = 26


def set_up(folder: Path, once_more: bool = True) -> Workshop:
    """Write the run's file, and launch the undisturbed run.

    Args:
        folder: for everything.
        once_more: also launch the very command, without keeping the checkpoints of all steps: it must agree.

    Raises:
        RuntimeError: undisturbed runs fail, or differ from each other.
    """
    run_file = write_run_file(folder / "data")
    reference = judge.read_reference(_undisturbed(folder, run_file, _KEEP_ALL), SAMPLES_PER_STEP)
    if len(reference.fingerprints) != NUM_STEPS or len(reference.curve) != NUM_STEPS + NUM_STEPS // 4:
        raise RuntimeError(f"the undisturbed run has {len(reference.curve)} records")
    if once_more and (problems := judge.finished(_undisturbed(folder, run_file, ()), reference, set())):
        raise RuntimeError(f"two undisturbed runs differ: {problems}")
    return Workshop(folder, run_file, reference, _once(lambda: _killed_half_way(folder, run_file)))


def write_run_file(folder: Path) -> Path:
    """The YAML file of a run that saves, evaluates and removes checkpoints every few steps."""
    folder.mkdir(parents=True)
    path = tiny_run.write_config(folder)
    config = yaml.safe_load(path.read_text())
    config["device"] = "cpu"
    config["training"] |= {"train_tokens": NUM_STEPS * SAMPLES_PER_STEP * 32, "eval_interval": 4, "micro_batch_size": 2}
    config["checkpoint"] = {"save_interval": 3, "keep_last": KEEP_LAST, "keep_best": "improved"}
    config["parallel"] = {"timeout_seconds": 20}
    path.write_text(yaml.safe_dump(config))
    return path


def _undisturbed(folder: Path, run_file: Path, options: tuple[str, ...]) -> Path:
    name = "kept" if options else "undisturbed"
    launch = Launch(run_command(run_file, folder / name, options), folder / f"{name}.log")
    try:
        launch.wait(LONGEST_SECONDS)
    finally:
        launch.end()
    if launch.process.returncode != 0:
        raise RuntimeError(f"the undisturbed run failed: {launch.text()[-2000:]}")
    return folder / name


def _killed_half_way(folder: Path, run_file: Path) -> Path:
    launch = Launch(run_command(run_file, folder / "midway", ()), folder / "midway.log")
    try:
        wait_for(lambda: launch.step() >= _HALF_WAY or launch.ended(), LONGEST_SECONDS)
        launch.send("node", signal.SIGKILL)
    finally:
        launch.end()
    return folder / "midway"


def _once(make: Callable[[], Path]) -> Callable[[], Path]:
    lock, made = threading.Lock(), []

    def get() -> Path:
        with lock:
            if not made:
                made.append(make())
            return made[0]

    return get
