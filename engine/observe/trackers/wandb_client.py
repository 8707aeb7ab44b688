"""Weights & Biases: https://wandb.ai."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..observer import Sample
from .client import TrackedRun, TrackerClient
from .facts import SAMPLES
from .record_files import last_steps_in_wandb

if TYPE_CHECKING:
    from wandb import Run, Settings

_INIT_SECONDS, _FINISH_SECONDS = 30.0, 45.0
"""How long wandb waits for its server at the beginning and at the end. The process cannot end in the meantime."""
_NEWER: dict[str, Any] = {
    "finish_timeout": _FINISH_SECONDS,  # since wandb 0.27
    # Since 0.31. A killed run loses what wandb has not written to its file: the next start sends it again.
    "x_transaction_log_flush_interval": 1.0,
}
"""Settings that only newer versions have."""


class WeightsAndBiases(TrackerClient):
    """Writes to the server of the user's login, or offline to files in the run folder, which `wandb sync` uploads."""

    def __init__(self) -> None:
        self._run: Run
        self._offline: bool = False
        self._folder = Path()

    def connect(self, run: TrackedRun) -> str:
        """See :class:`TrackerClient`."""
        import wandb

        self._folder = run.folder / "wandb"
        run.folder.mkdir(parents=True, exist_ok=True)
        wandb.setup(wandb.Settings(silent=True))  # it then asks for no login at the terminal
        self._run = wandb.init(
            id=run.id,
            project=run.project,
            name=run.name,
            group=run.group,
            tags=list(run.tags),
            dir=str(run.folder),
            config={**run.config, "facts": run.facts},
            mode="offline" if run.offline else None,
            resume=None if run.offline else "allow",
            settings=_settings(run),
        )
        self._offline = self._run.settings.mode == "offline"
        return self._folder.as_posix() if self._offline else self._run.url or run.id

    def recorded(self) -> Mapping[str, int] | int:
        """See :class:`TrackerClient`. The server refuses earlier steps than its last one, of any metric."""
        return last_steps_in_wandb(self._folder, self._run.id) if self._offline else self._run.starting_step - 1

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`TrackerClient`."""
        self._run.log(dict(values), step=step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """See :class:`TrackerClient`."""
        import wandb

        rows = [[step, sample.prompt, sample.text] for sample in samples]
        self._run.log({SAMPLES: wandb.Table(columns=["step", "prompt", "text"], data=rows)}, step=step)

    def finish(self, summary: Mapping[str, float], finished: bool, report: Path | None) -> None:
        """See :class:`TrackerClient`."""
        import wandb

        self._run.summary.update(dict(summary))
        if report is not None:
            artifact = wandb.Artifact(f"report-{self._run.id}", "report")
            artifact.add_file(str(report), policy="immutable")
            self._run.log_artifact(artifact)
        self._run.finish(exit_code=0)


def _settings(run: TrackedRun) -> Settings:
    """Return settings with which wandb records nothing but what we give it, and never waits for long."""
    import wandb

    commit = run.facts["code"].get("git_commit")
    return wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,  # a remote's URL may contain a password
        disable_job_creation=True,
        git_commit=commit,
        save_code=False,
        silent=True,
        x_disable_meta=True,  # the command line may contain a secret
        x_save_requirements=False,  # URLs of packages may as well
        init_timeout=_INIT_SECONDS,
        **{name: value for name, value in _NEWER.items() if name in wandb.Settings.model_fields},
    )
