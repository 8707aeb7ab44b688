"""Write the Hugging Face folder at the end of a run: ``checkpoint.export_hf``.

All ranks write it together, from the checkpoint on the disk and not from memory. The files are those that
checkpoint_convert/dcp_to_hf.py makes of that checkpoint. If a run could not finish the export, the same command does it
when started again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal

from ...config.settings import RunConfig
from ...errors import UserError
from ...files.hashing import hash_file
from ...guards.background import run_in_background
from ...parallel.process_group import Ranks
from ..block_copy import OutputFile, WrittenFile, copy_files
from ..checkpoint.average import holds_average
from ..checkpoint.manifest import MANIFEST_FILE, read_manifest
from ..checkpoint.names import EXPORTS, PEFT_EXPORTS
from ..checkpoint.store import CheckpointStore, require_visible, step_of
from ..finite import OPTION
from ..hugging_face.upload import open_repository, upload_folder
from ..partial_folder import partial_folder
from ..workers import default_workers, share_by_size
from .dcp_to_hf import plan_export
from .pipeline import Conversion
from .provenance import CONVERSION_FILE
from .writing import size_of

Form = Literal["merged", "peft"]
KEY_OF_UPLOAD = "checkpoint.push_to_hub"


def export_folder(run_folder: Path, step: int, form: Form = "merged") -> Path:
    """Return the folder to which the checkpoint of ``step`` is exported."""
    return run_folder / (PEFT_EXPORTS if form == "peft" else EXPORTS) / f"step-{step:08d}"


def export_folders(config: RunConfig, run_folder: Path, step: int) -> list[Path]:
    """Return the folders to which a run exports the checkpoint of ``step``."""
    return [folder for _, folder in _exports(config, run_folder, step)]


def _exports(config: RunConfig, run_folder: Path, step: int) -> list[tuple[Form, Path]]:
    """Return the form and the folder of each export of a run; none without ``checkpoint.export_hf``."""
    if not config.checkpoint.export_hf:
        return []
    chosen = config.adapter.export if config.adapter.kind is not None else "merged"
    forms: tuple[Form, Form] = ("merged", "peft")
    both = [(form, export_folder(run_folder, step, form)) for form in forms]
    return [(form, folder) for form, folder in both if chosen in (form, "both")]


def prepare_export(config: RunConfig, ranks: Ranks, step: int) -> list[str]:
    """Check before the training that the export after it will be possible. All ranks call this.

    Args:
        config: of the run.
        ranks: of the run.
        step: its last one.

    Returns:
        Lines for the log, on the main rank.

    Raises:
        UserError: on every rank, if it is not possible.
    """
    for folder in export_folders(config, Path(config.run_folder), step):
        ranks.run_on_rank0(partial(_require_own, folder))
    repository = config.checkpoint.push_to_hub
    if repository is None:
        return []
    place = ranks.run_on_rank0(lambda: open_repository(repository, KEY_OF_UPLOAD, config.checkpoint.hub_private))
    return [f"upload      at the end, to {place}"]


def _require_own(output: Path) -> None:
    if os.path.lexists(output) and not (output / CONVERSION_FILE).is_file():
        raise UserError(
            f"{output}: this name is needed for the export of checkpoint.export_hf at the end, but it exists and is "
            f"not an export: it has no {CONVERSION_FILE}; move it away"
        )


def export_run(
    config: RunConfig,
    store: CheckpointStore,
    step: int,
    start: str | None,
    stop_agreed: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Make, and upload, the exports of a run's configuration. All ranks call this.

    Args:
        config: of the run.
        store: its checkpoints.
        step: its last step.
        start: the checkpoint that it continued from. It is exported if the run had no steps left.
        stop_agreed: whether all ranks have been asked to stop; called repeatedly on all ranks.
        say: receives lines for the log.

    Raises:
        UserError: on every rank, if the export cannot be made or uploaded. The checkpoint is unchanged.
    """
    exports = _exports(config, store.folder.parent, step)
    if not exports:
        return
    ranks = store.ranks
    complete = ranks.broadcast(ranks.run_on_rank0(store.complete))
    checkpoint = next((folder for folder in complete if step_of(folder) == step), None)
    if checkpoint is None:
        checkpoint = Path(str(start))
    try:
        for form, output in exports:
            _export(store, checkpoint, form, output, config.checkpoint.export_ema, stop_agreed, say)
    except ExportStopped as stopped:
        say(f"stopped the export to {stopped} as requested; the same command completes it")
        return
    except _Damaged:
        raise
    except UserError as error:
        raise UserError(
            f"checkpoint.export_hf: {error}; {checkpoint} itself is complete: start the same command again, or export "
            f"it with checkpoint_convert/dcp_to_hf.py --checkpoint {checkpoint}"
        ) from None
    repository, (_, output) = config.checkpoint.push_to_hub, exports[0]
    if repository is not None:
        say(f"uploading   {output} to {repository}")
        message = config.checkpoint.hub_message
        upload = lambda: upload_folder(output, repository, KEY_OF_UPLOAD, [CONVERSION_FILE], message)  # noqa: E731
        say(f"uploaded    {run_in_background(ranks, upload if ranks.is_main else None)}")


def _export(
    store: CheckpointStore,
    checkpoint: Path,
    form: Form,
    output: Path,
    ema: bool,
    stop_agreed: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Write one export, if it does not exist."""
    ranks = store.ranks
    if ema and not ranks.broadcast(ranks.run_on_rank0(lambda: holds_average(read_manifest(checkpoint)))):
        ema = False
        say(note_of_weights(checkpoint))
    if ranks.broadcast(ranks.run_on_rank0(lambda: _is_there(output, checkpoint, ema))):
        say(f"exported    {output} already exists")
        return
    require_undamaged_checkpoint(store, checkpoint, "checkpoint.export_hf")
    written = write_export(ranks, checkpoint, form, output, ema, stop_agreed, say)
    say(f"exported    {output}: {written}")


def note_of_weights(checkpoint: Path) -> str:
    """Return a line about an export of the average of ``checkpoint``, which holds none."""
    return (
        f"note: {checkpoint} was written without training.ema_decay: its average would begin with its weights, which "
        "are exported"
    )


class ExportStopped(Exception):
    """All ranks have been asked to stop. The text is the folder of the export."""


class _BrokenOff(Exception):
    """The remaining work is useless."""


class _Damaged(UserError):
    """The checkpoint differs from what was written."""


def require_undamaged_checkpoint(store: CheckpointStore, checkpoint: Path, key: str) -> None:
    """Verify ``checkpoint``, which the setting ``key`` exports. All ranks call this.

    Raises:
        UserError: on every rank, if it is damaged.
    """
    try:
        store.require_valid(str(checkpoint), key)
    except UserError as error:
        problem = str(error).partition("; name another checkpoint")[0]
        raise _Damaged(
            f"{key}: {problem}; start the same command again: it continues from the newest undamaged one"
        ) from None


def _is_there(output: Path, checkpoint: Path, ema: bool) -> bool:
    """Return whether ``output`` has been made from ``checkpoint``, from its average if ``ema``.

    Raises:
        UserError: it is something else.
    """
    if not os.path.lexists(output):
        return False
    if made_of(output) != (hash_file(checkpoint / MANIFEST_FILE), ema):
        raise UserError(
            f"{output}: exists already, and {CONVERSION_FILE} there names another checkpoint or export_ema; move it "
            "away"
        )
    return True


def made_of(output: Path) -> tuple[str, bool] | None:
    """Return the hash of the manifest of the checkpoint of which ``output`` is an export, and whether it is of the
    average; None if it is not an export.
    """
    try:
        content = json.loads((output / CONVERSION_FILE).read_text(encoding="utf-8"))
        return str(content["source"]["manifest_xxh3_128"]), bool(content["options"].get("ema"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_export(
    ranks: Ranks,
    checkpoint: Path,
    form: Form,
    output: Path,
    ema: bool,
    stop_agreed: Callable[[], bool],
    say: Callable[[str], None],
) -> str:
    """Export ``checkpoint`` to ``output``, which does not exist. All ranks call this.

    Args:
        ranks: that write together.
        checkpoint: complete and verified.
        form: the whole model, or a folder of PEFT.
        output: the folder to write.
        ema: export the average of the weights.
        stop_agreed: see :func:`export_run`.
        say: receives lines for the log.

    Returns:
        The number of tensors and their size, for the log.

    Raises:
        ExportStopped: all ranks have been asked to stop.
        UserError: on every rank, if it cannot be written. Nothing is left.
    """
    export = ranks.fail_together(lambda: plan_export(checkpoint, ema=ema, adapter=form == "peft"))
    for line in export.casts:
        say(f"export      {line}")
    with ExitStack() as stack:
        identity = export.record.identity
        # Files of a killed run are not reused: they are written again.
        partial = ranks.run_on_rank0(lambda: stack.enter_context(partial_folder(output, identity, say, reuse=False)))
        content: Path = ranks.broadcast(partial and partial.content)
        ranks.fail_together(lambda: require_visible(content))
        sizes = {file.name: file.num_bytes for file in export.target.files}
        names = share_by_size(sizes, ranks.rank, ranks.world_size)
        mine = [file for file in export.target.files if file.name in names]
        stopping = False

        def broken_off() -> bool:
            nonlocal stopping
            stopping = stop_agreed()
            return stopping

        copying = _Copying(export, content, mine)
        done = run_in_background(ranks, copying, broken_off, copying.stop)
        if stopping:
            raise ExportStopped(output)
        written = [file for of_rank in ranks.all_gather(done) for file in of_rank or ()]

        def complete() -> None:
            export.complete(content, {file.name: file for file in written}, say)
            stack.close()

        ranks.run_on_rank0(complete)
    return f"{len(export.tensors)} tensors, {size_of(written)}"


class _Copying:
    """This rank's files, written in a thread that another thread can stop."""

    def __init__(self, export: Conversion, folder: Path, files: list[OutputFile]):
        self._export, self._folder, self._files = export, folder, files
        self._broken_off = False

    def stop(self) -> None:
        self._broken_off = True

    def __call__(self) -> list[WrittenFile]:
        export = self._export
        workers = max(1, default_workers() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        try:
            rows = export.hashed_rows
            remedy = f"go back to an earlier checkpoint, or give dcp_to_hf.py {OPTION}"
            done = copy_files(
                self._folder, self._files, export.source, workers, rows, self._on_bytes, nonfinite_remedy=remedy
            )
        except _BrokenOff:
            return []
        return list(done.values())

    def _on_bytes(self, count: int) -> None:
        if self._broken_off:
            raise _BrokenOff
