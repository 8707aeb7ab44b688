"""Write to the folder of a run: its checkpoints, records and configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import __version__
from .config.budget import as_written
from .config.settings import RunConfig, to_dict
from .config.yaml_loader import dump_yaml
from .errors import UserError
from .files.masking import masked, without_signature
from .guards.run_guards import UnreadableData
from .model.architecture import Architecture
from .observe.console import Console
from .observe.description import describe
from .parallel.process_group import Ranks
from .run import Run
from .schedule import BatchPlan, Progress
from .weights.checkpoint.destination import require_destination
from .weights.checkpoint.manifest import Manifest
from .weights.checkpoint.run_record import CONFIG_FILE, note_start
from .weights.checkpoint.store import CheckpointStore
from .weights.checkpoint.tensors import checkpoint_tensors
from .weights.conversion.export_run import export_folders, prepare_export
from .weights.conversion.model_folders import prepare_model_folders


def run_store(config: RunConfig, ranks: Ranks) -> CheckpointStore:
    """Return the checkpoints of the run that ``config`` describes."""
    keep, training = config.checkpoint, config.training
    rewind_steps = training.rewind_steps if training.loss_spike_action == "rewind" else 0
    return CheckpointStore(
        config.run_folder, ranks, keep.keep_last, bool(keep.keep_best), keep.keep_every, rewind_steps
    )


def require_room(
    config: RunConfig, store: CheckpointStore, architecture: Architecture, plan: BatchPlan, progress: Progress
) -> list[str]:
    """Refuse a run folder without enough space for what the run will write. All ranks must call this.

    Args:
        config: of the run.
        store: of its checkpoints; is told their expected size.
        architecture: of the model.
        plan: batch sizes.
        progress: at the start.

    Returns:
        lines for the log, on the main rank.

    Raises:
        UserError: on every rank.
    """
    steps = plan.steps_left(config.training.budget, progress.tokens)
    ranks, last = store.ranks, progress.step + steps
    exports = [folder.parent for folder in export_folders(config, store.folder.parent, last)]
    lines = ranks.run_on_rank0(lambda: require_destination(config, store, architecture, steps, exports)) or []
    store.expected_bytes = ranks.broadcast(store.expected_bytes)
    lines += prepare_export(config, ranks, last)
    return lines + (ranks.run_on_rank0(lambda: prepare_model_folders(config, architecture.num_parameters)) or [])


@contextmanager
def open_run_folder(run: Run, console: Console | None) -> Iterator[None]:
    """Lock the run folder, and prepare its records, configuration and checkpoints.

    Args:
        run: built, before its first step.
        console: also prints to log.txt in the folder.

    Raises:
        UserError: on every rank, if another process writes to the folder, or it is not writable.
    """
    with run.store.locked() as remarks:
        run.ranks.run_on_rank0(lambda: _open(run, console))
        run.say(*remarks, *run.store.quarantine(), *run.store.remove_leftovers())
        yield


def _open(run: Run, console: Console | None) -> None:
    folder, resumed = Path(run.config.run_folder), run.start.resumed_from
    run.report.open(describe(run))
    # A fresh run also renames the records of one that was killed before its first checkpoint.
    run.report.start(run.progress.step if resumed else None, run.evaluation_pending)
    if console is not None:
        console.open(folder)
    (folder / CONFIG_FILE).write_text(
        dump_yaml(masked(to_dict(as_written(run.config)), without_signature)), encoding="utf-8"
    )
    note_start(folder, resumed is None, run.store.origin)


def save(run: Run, evaluation: dict[str, float], final: bool) -> None:
    """Start to write a checkpoint of ``run``; see :meth:`Saver.save`. All ranks must call this."""
    run.report.save()
    run.guards.enter_phase("save")
    tensors, manifest = checkpoint_tensors(run.model, run.optimizer), manifest_of(run, evaluation, final)
    run.saver.save(tensors, run.start.assets, manifest, run.progress.best.get("step"))


@contextmanager
def saving_on_failure(run: Run) -> Iterator[None]:
    """Save the state before a step that fails inside.

    A UserError saves nothing, unless it is about the data: it names an older checkpoint for a reason.
    """
    try:
        yield
    except Exception as error:
        run.memory.note(error, run.guards.where())
        if isinstance(error, UnreadableData) or not isinstance(error, UserError):
            run.guards.pause_watchdog()
            if run.progress.step > run.report.totals.start.step:
                run.report.save()
                manifest = lambda what: manifest_of(run, {}, final=False, emergency=what)  # noqa: E731
                run.guards.emergency(error, run.progress.step, run.optimizer, run.start.assets, manifest)
        raise


def manifest_of(run: Run, evaluation: dict[str, float], final: bool, emergency: str = "") -> Manifest:
    """Return the manifest of a checkpoint of the current state of ``run``.

    Args:
        run: between two steps.
        evaluation: losses of the validation sets after this step.
        final: whether the run ends here, because its budget is used up or it stops early.
        emergency: the failure that caused the checkpoint.
    """
    return Manifest(
        kind="training",
        step=run.progress.step,
        consumed_samples=run.progress.samples,
        consumed_tokens=run.progress.tokens,
        final=final,
        sample_order=run.order.state(),
        datasets=run.catalog.fingerprints,
        evaluation=evaluation,
        start_evaluation=run.validation.at_start,
        best=run.progress.best,
        early_stopping=run.progress.early_stopping,
        health=run.guards.step_guard.state_dict(),
        emergency=emergency,
        trackers=run.report.tracker_runs,
        base=run.start.base_record,
        router_load=run.model.routers.state_dict() if run.model.routers else {},
        config=masked(to_dict(run.config), without_signature),
        world_size=run.ranks.world_size,
        layout=run.mesh.layout._asdict(),
        retemper_version=__version__,
    )
