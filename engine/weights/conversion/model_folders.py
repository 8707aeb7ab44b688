"""Write ``final_model`` and ``best_model`` into a run's folder at its end: ``checkpoint.model_folders``.

They are Hugging Face folders with the tokenizer, made by all ranks from checkpoints on the disk, as
:mod:`.export_run` does. Each is complete before it gets its name; a former one is exchanged for it. A run that could
not finish them does so when it is started again. Weights that another export of the same checkpoint has are hard links
to it, so they take no more space.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...config.effects import Situation
from ...config.settings import CheckpointConfig, RunConfig
from ...errors import UserError, command_name
from ...files.atomic import new_folder, replace_folder
from ...files.disk_space import describe_space, format_bytes, free_bytes, require_space
from ...files.hashing import hash_file
from ...files.removal import remove_tree
from ...model.config_file import ADAPTER_FILE
from ...model.implementations import parse_architecture
from ...parallel.process_group import Ranks
from ..checkpoint.assets import HfAssets
from ..checkpoint.average import evaluates_average, holds_average
from ..checkpoint.manifest import MANIFEST_FILE, read_manifest
from ..checkpoint.names import BEST_MODEL, FINAL_MODEL, step_of
from ..checkpoint.store import CheckpointStore
from ..hugging_face.folder import INDEX_FILE
from ..safetensors_format import SUFFIX
from .export_run import (
    ExportStopped,
    Form,
    export_folder,
    made_of,
    note_of_weights,
    require_undamaged_checkpoint,
    write_export,
)
from .provenance import CONVERSION_FILE

MOST_PARAMETERS = 10_000_000_000
"""Largest model for which ``auto`` writes the folders: 20 GB each in bf16."""
_BYTES = 2
"""Minimum size of a parameter in a Hugging Face folder."""


def is_on(config: CheckpointConfig, num_parameters: int) -> bool:
    """Return whether ``checkpoint.model_folders`` asks for the folders of a model of this size."""
    return config.model_folders == "on" or (config.model_folders == "auto" and num_parameters <= MOST_PARAMETERS)


def planned_folders(config: RunConfig, num_parameters: int) -> list[str]:
    """Return the names of the folders that a run will write at its end."""
    if _has_random_base(config):
        return []
    on, has_best = is_on(config.checkpoint, num_parameters), config.checkpoint.keep_best and Situation(config).evaluates
    best = has_best and (on or config.checkpoint.export_best)
    return [FINAL_MODEL] * on + [BEST_MODEL] * bool(best)


def _has_random_base(config: RunConfig) -> bool:
    """Return whether the run trains an adapter of a base that is in no folder, so that it cannot be exported."""
    return config.adapter.kind is not None and config.model.initialize_from is None


def prepare_model_folders(config: RunConfig, num_parameters: int) -> list[str]:
    """Check before the training that the folders can be written at its end. Called on the main rank.

    Returns:
        Lines for the log.

    Raises:
        UserError: a folder that is asked for by name cannot be written.
    """
    names, folder, size = planned_folders(config, num_parameters), Path(config.run_folder), num_parameters * _BYTES
    if not names:
        large = config.checkpoint.model_folders == "auto" and num_parameters > MOST_PARAMETERS
        why = f"the model has more than {MOST_PARAMETERS // 10**9} billion parameters"
        return (
            [f"models      none at the end: {why}; checkpoint.model_folders on writes {FINAL_MODEL}"] if large else []
        )
    for name in (name for name in names if _is_required(config.checkpoint, name)):
        _require_own(folder / name)
    needed, what = size * len(names), f"{' and '.join(names)} of checkpoint.model_folders"
    if any(_is_required(config.checkpoint, name) for name in names):
        require_space(folder, needed, what, lambda: "free some space there")
    lines = [f"models      {' and '.join(names)} at the end, from {format_bytes(size)} each"]
    if (free := free_bytes(folder)) < needed:
        lines.append(f"note: {folder}: {describe_space(needed, free, what)}")
    return lines


def _is_required(config: CheckpointConfig, name: str) -> bool:
    """Return whether the run fails without this folder."""
    return config.model_folders == "on" or (name == BEST_MODEL and config.export_best)


def _require_own(folder: Path) -> None:
    if os.path.lexists(folder) and not (folder / CONVERSION_FILE).is_file():
        raise UserError(
            f"{folder}: this name is needed for checkpoint.model_folders, but it exists and is not an export: it has "
            f"no {CONVERSION_FILE}; move it away"
        )


@dataclass(frozen=True)
class _Source:
    """What a folder is made of."""

    checkpoint: Path
    form: Form
    ema: bool

    def is_in(self, export: Path) -> bool:
        """Return whether ``export`` is made of this."""
        form = "peft" if (export / ADAPTER_FILE).is_file() else "merged"
        return (made_of(export), form) == ((hash_file(self.checkpoint / MANIFEST_FILE), self.ema), self.form)


def write_model_folders(
    run: RunConfig,
    store: CheckpointStore,
    step: int,
    start: str | None,
    stop_agreed: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Make the folders of a run that has ended. All ranks call this, with the arguments of ``export_run``.

    Raises:
        UserError: on every rank, if a folder that is asked for by name cannot be made. With ``auto`` this is only
            reported. Checkpoints, and a former folder, are unchanged.
    """
    config, ranks = run.checkpoint, store.ranks
    find = lambda: [  # noqa: E731
        (name, _source(run, name, checkpoint)) for name, checkpoint in _wanted(run, store.complete(), step, start)
    ]
    for name, source in ranks.broadcast(ranks.run_on_rank0(find)) or ():
        folder, checkpoint = store.folder.parent / name, source.checkpoint
        if config.export_ema and not source.ema:
            say(note_of_weights(checkpoint))
        try:
            _make(ranks, store, source, folder, stop_agreed, say)
        except ExportStopped:
            say(f"stopped the export to {folder} as requested; the same command completes it")
            return
        except UserError as error:
            export = command_name("export", "checkpoint_convert/dcp_to_hf.py")
            key = "checkpoint.export_best" if config.model_folders == "off" else "checkpoint.model_folders"
            line = f"{key}: {error}; {checkpoint} itself is complete: start the same command again, or {export} "
            if _is_required(config, name):
                raise UserError(f"{line}--checkpoint {checkpoint}") from None
            say(f"note: {line}--checkpoint {checkpoint}")


def _source(run: RunConfig, name: str, checkpoint: Path) -> _Source:
    """Return what the folder ``name`` is made of.

    An evaluation with ``eval_ema`` was that of an average, which ``best_model`` then contains. A checkpoint from before
    ``ema_decay`` was turned on has only the weights, with which the average began.
    """
    form: Form = "peft" if run.adapter.kind is not None and run.adapter.export == "peft" else "merged"
    manifest = read_manifest(checkpoint)
    asked = run.checkpoint.export_ema and holds_average(manifest)
    return _Source(checkpoint, form, asked or (name == BEST_MODEL and evaluates_average(manifest)))


def are_written(run: RunConfig, complete: Sequence[Path]) -> bool:
    """Return whether a run that has ended has all of its folders.

    Args:
        run: its configuration.
        complete: its checkpoints, the last of which is that of its last step.
    """
    return all(
        _source(run, name, checkpoint).is_in(complete[-1].parents[1] / name)
        for name, checkpoint in _wanted(run, complete, step_of(complete[-1]), None)
    )


def _wanted(run: RunConfig, complete: Iterable[Path], step: int, start: str | None) -> list[tuple[str, Path]]:
    """Return names of folders, and the checkpoint of each."""
    config = run.checkpoint
    if (config.model_folders == "off" and not config.export_best) or _has_random_base(run):
        return []
    by_step = {step_of(folder): folder for folder in complete}
    final = by_step.get(step, Path(str(start)))
    manifest = read_manifest(final)
    on = config.model_folders == "on"
    if config.model_folders == "auto":
        content = HfAssets.of_checkpoint(final).config or {}
        on = is_on(config, parse_architecture(content, str(final)).num_parameters)
    best = by_step.get(manifest.best.get("step", -1)) if config.keep_best else None
    wanted = [(FINAL_MODEL, final)] if on else []
    if best is not None and (on or config.export_best):
        wanted.append((BEST_MODEL, best))
    return wanted


def _make(
    ranks: Ranks,
    store: CheckpointStore,
    source: _Source,
    folder: Path,
    stop_agreed: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Make ``folder`` of ``source``, unless it is there."""
    new = folder.with_name(f".{folder.name}.new")

    def prepare() -> str:
        if source.is_in(folder):
            return "present"
        _require_own(folder)
        if source.is_in(new):  # a killed run has written it
            return "written"
        for rest in (new, *new.parent.glob(f".{new.name}.*.partial")):
            remove_tree(rest)
        step = step_of(source.checkpoint)
        others = (
            export_folder(folder.parent, step, source.form),
            folder.with_name(FINAL_MODEL),
            folder.with_name(BEST_MODEL),
        )
        twin = next((other for other in others if source.is_in(other)), None)
        if twin is None:
            return "absent"
        _link(twin, new)
        return "written"

    state = ranks.broadcast(ranks.run_on_rank0(prepare))
    if state == "present":
        say(f"exported    {folder} already exists")
        return
    if state == "absent":
        require_undamaged_checkpoint(store, source.checkpoint, "checkpoint.model_folders")
        write_export(ranks, source.checkpoint, source.form, new, source.ema, stop_agreed, say)
    ranks.run_on_rank0(lambda: _publish(new, folder))
    # Not "model": reports count and show the lines that begin so, one of each start.
    say(f"exported    {folder}: {'average of the weights at ' * source.ema}step {step_of(source.checkpoint):,}")


def _link(twin: Path, new: Path) -> None:
    """Copy the export ``twin`` to ``new``; weights become hard links where the file system has them."""
    with new_folder(new) as temporary:
        for file in twin.iterdir():
            if file.name.endswith(SUFFIX):
                try:
                    os.link(file, temporary / file.name)
                    continue
                except OSError:
                    pass
            shutil.copyfile(file, temporary / file.name)


def _publish(new: Path, folder: Path) -> None:
    """Give ``new`` its name, and remove a former folder, which must hold nothing but an export."""
    if folder.is_dir():
        content = json.loads((folder / CONVERSION_FILE).read_text(encoding="utf-8"))
        exported = {tensor["file"] for tensor in content["tensors"].values()} | {INDEX_FILE}
        others = sorted({file.name for file in folder.iterdir()} - {file.name for file in new.iterdir()} - exported)
        if others:
            remove_tree(new)
            raise UserError(f"{folder}: holds {others[0]}, which is not of the export and would be lost; move it away")
    try:
        replace_folder(new, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be replaced: {error.strerror or error}") from None
