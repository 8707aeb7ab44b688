"""Describe a run to its observers."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from ... import __version__
from ..config.settings import to_dict
from ..files.code import PACKAGE
from ..parallel import trainable
from ..run import Run
from ..weights.checkpoint.manifest import code_versions
from .curves import last_record
from .observer import RunDescription

_GIT_SECONDS = 10.0


def describe(run: Run) -> RunDescription:
    """Return the facts of ``run`` for trackers and callbacks. Only rank 0 needs them."""
    architecture, resumed = run.start.architecture, run.start.resumed_from
    ids = dict(resumed.trackers) if resumed else {}
    # With resume: PATH the run repeats steps that trackers may have already, with other settings, or in another folder.
    branches = run.store.origin is not None
    last = last_record(Path(run.config.run_folder))

    def request_stop(reason: str) -> None:
        run.say(f"stop requested: {reason}")
        run.stop.request()

    return RunDescription(
        folder=Path(run.config.run_folder),
        config=to_dict(run.config),
        model={
            "model_type": architecture.model_type,
            "parameters": architecture.num_parameters,
            "active_parameters": architecture.num_active_parameters,
            "trainable_parameters": trainable.count(architecture, run.config.training, run.config.adapter),
            "implementation": architecture.describe_implementation(),
        },
        datasets=run.catalog.fingerprints,
        code={"retemper": __version__, **code_versions(), **git_state(PACKAGE)},
        world_size=run.ranks.world_size,
        resumed=resumed is not None,
        tracker_runs={} if branches else ids,
        former_tracker_runs=ids if branches else {},
        recorded_step=last["step"] if last else None,
        request_stop=request_stop,
    )


def git_state(folder: Path) -> dict[str, Any]:
    """Return commit and state of the git repository at ``folder``; nothing if it is not the root of one."""
    if not (folder / ".git").exists():
        return {}
    commit, changes = (_git(folder, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    return {} if commit is None or changes is None else {"git_commit": commit, "git_changed_files": bool(changes)}


def _git(folder: Path, *words: str) -> str | None:
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
