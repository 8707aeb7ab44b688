"""SwanLab: https://swanlab.cn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..observer import Sample
from .client import TrackedRun, TrackerClient
from .facts import SAMPLES
from .record_files import last_steps_in_swanlab

if TYPE_CHECKING:
    from swanlab import Run


class SwanLab(TrackerClient):
    """Writes to the server of the user's login, or offline to files in the run folder, which `swanlab sync` uploads."""

    def __init__(self) -> None:
        self._run: Run
        self._folder = Path()

    def connect(self, run: TrackedRun) -> str:
        """See :class:`TrackerClient`."""
        import swanlab

        self._folder = run.folder / "swanlab"
        self._run = swanlab.init(
            id=run.id,
            project=run.project,
            name=run.name,
            group=run.group,
            tags=list(run.tags),
            log_dir=str(self._folder),
            mode="offline" if run.offline else None,
            resume=None if run.offline else "allow",
            reinit=True,
            config={**run.config, "facts": run.facts},
            # Nothing but what we give it: the command line, packages and output may contain secrets.
            settings=swanlab.Settings(
                interactive=False,
                terminal={"proxy_type": "none"},
                probe={"runtime": False, "requirements": False, "git": False},
            ),
        )
        return self._folder.as_posix() if self._is_offline else self._run.url or run.id

    @property
    def _is_offline(self) -> bool:
        return bool(self._run.mode == "offline")

    def recorded(self) -> Mapping[str, int] | None:
        """See :class:`TrackerClient`."""
        return last_steps_in_swanlab(self._folder, self._run.id) if self._is_offline else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`TrackerClient`."""
        self._run.log(dict(values), step=step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """See :class:`TrackerClient`."""
        import swanlab

        texts = [swanlab.Text(sample.text, caption=sample.prompt) for sample in samples]
        self._run.log({SAMPLES: texts}, step=step)

    def finish(self, summary: Mapping[str, float], finished: bool, report: Path | None) -> None:
        """See :class:`TrackerClient`."""
        self._run.config.update({"summary": dict(summary)})
        if report is not None:
            self._run.save(str(report), base_path=str(report.parent), policy="now")
        self._run.finish()
