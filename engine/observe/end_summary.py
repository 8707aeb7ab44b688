"""Describe the end of a run: what this start has done, and the next command."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..config.settings import RunConfig
from ..errors import command_name
from ..run import Run
from ..weights.checkpoint.names import FINAL_MODEL, step_of
from ..weights.conversion.export_run import export_folder
from .loss_changes import CHANGE_HEAD, change_rows
from .terminal import heading
from .text import table_lines


def describe_end(run: Run) -> list[str]:
    """Notify the observers of the end of ``run``, and return lines about it. All ranks must call this."""
    complete = run.store.complete() if run.ranks.is_main else []
    newest, finished = complete[-1] if complete else None, run.remaining_steps == 0
    changes = run.validation.changes()
    return [
        heading("Result"),
        *run.report.end(run.progress, finished, changes),
        *(table_lines(CHANGE_HEAD, change_rows(changes)) if changes else ()),
        *next_command(run.config, newest, finished),
    ]


def next_command(config: RunConfig, checkpoint: Path | None, finished: bool) -> list[str]:
    """Return lines with the next command for the run."""
    if not finished:
        changed = ", with resume: auto," if config.resume == "none" else ""
        return [f"next        the same command{changed} continues from here"]
    if checkpoint is None or config.checkpoint.export_hf:
        return []  # the export names its folder itself
    model = checkpoint.parent.parent / FINAL_MODEL
    if model.is_dir():
        generate = command_name("generate", "tools/generate.py")
        return [f"next        {generate} --model {shlex.quote(str(model))} --prompt '...'"]
    output = export_folder(checkpoint.parent.parent, step_of(checkpoint))
    export = command_name("export", "checkpoint_convert/dcp_to_hf.py")
    return [f"next        {export} --checkpoint {shlex.quote(str(checkpoint))} --output {shlex.quote(str(output))}"]
