"""Pretrain a model: the whole recipe, from the command line to the last checkpoint.

Run it with ``python engine/pretrain.py --config run.yaml``, or under ``torchrun`` for several ranks. :func:`build`
opens and builds everything; :func:`train` makes the steps, and is the first to write to the run folder. Modules that
need PyTorch are imported where they are used, so that ``--help`` and configuration errors do not wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from retemper.engine.config.checks import validate
from retemper.engine.config.packages import require_trackers
from retemper.engine.config.parser import build_parser as build_parser
from retemper.engine.config.parser import config_folders, parse_config
from retemper.engine.config.settings import RunConfig
from retemper.engine.errors import UserError, run_command
from retemper.engine.files.open_limit import raise_open_files_limit
from retemper.engine.guards.garbage_collection import without_gc
from retemper.engine.guards.rank_consistency import agree_on_config
from retemper.engine.guards.stop_request import StoppedBeforeTraining, StopRequest
from retemper.engine.observe.console import Console
from retemper.engine.parallel.launcher import read_launcher
from retemper.engine.parallel.layout import check_layout, plan_layout
from retemper.engine.schedule import learning_rate, plan_batches
from retemper.engine.system import end_with_parent

if TYPE_CHECKING:
    from retemper.engine.batch import Batch
    from retemper.engine.data.loader import Prefetcher
    from retemper.engine.guards.rollback import Rollback
    from retemper.engine.parallel.process_group import Ranks
    from retemper.engine.run import Run
    from retemper.engine.step import StepResult


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, by default that of this process, join the other ranks, and train."""
    console = Console(logged=os.environ.get("RANK", "0") == "0")
    console.install()  # to the end of the process: the log of the run has the error that ends it
    with StopRequest() as stop:
        end_with_parent()
        launcher = read_launcher()
        raise_open_files_limit()
        several = launcher.world_size > 1
        config, rendezvous = agree_on_config(lambda: prepare(launcher.world_size, arguments), several)
        from retemper.engine.parallel.process_group import process_group

        stop.defer()  # from here a signal only asks the ranks to agree on an end
        with process_group(config.device, config.parallel.timeout_seconds, rendezvous) as ranks:
            stop.defer(ranks)
            with suppress(StoppedBeforeTraining):  # raised on all ranks, which then leave the process group together
                train(build(config, ranks, stop), console)


def prepare(world_size: int, arguments: Sequence[str] | None = None) -> RunConfig:
    """Return the configuration, and import all that the run needs: errors in both end it before other ranks wait."""
    config = parse_config(arguments)
    check_layout(config, world_size)
    require_trackers(config.logging)
    if config.callbacks:
        from retemper.engine.observe.callbacks import import_callbacks

        import_callbacks(config.callbacks, [*config_folders(arguments), Path.cwd()])
    with without_gc():
        from retemper.engine import prepare_data, run, run_folder  # noqa: F401
        from retemper.engine.guards import rollback  # noqa: F401
        from retemper.engine.observe import end_summary, start_summary  # noqa: F401
    return config


def build(config: RunConfig, ranks: Ranks, stop: StopRequest | None = None, check_room: bool = True) -> Run:
    """Open and check everything, and build the model with its weights. Write nothing. All ranks must call this.

    Args:
        stop: receives requests to stop; after one, StoppedBeforeTraining is raised on all ranks.
        check_room: whether to require disk space for checkpoints; benchmarks write none.

    Raises:
        UserError: training with this configuration, data or checkpoint is impossible.
    """
    from retemper.engine.data.loader import TrainingData
    from retemper.engine.evaluation import Validation
    from retemper.engine.guards.run_guards import RunGuards
    from retemper.engine.observe.profiler import StepProfiler
    from retemper.engine.observe.reporter import Reporter, create_early_observers
    from retemper.engine.observe.waiting import rank0_printer, report_if_slow
    from retemper.engine.optim import build_average, build_optimizer, keep_average
    from retemper.engine.out_of_memory import MemoryGuard
    from retemper.engine.parallel.build import build_model
    from retemper.engine.parallel.mesh import build_mesh
    from retemper.engine.prepare_data import prepare_data
    from retemper.engine.prompt_samples import PromptSamples
    from retemper.engine.run import Run
    from retemper.engine.run_folder import require_room, run_store
    from retemper.engine.start import open_run
    from retemper.engine.weights.checkpoint.average import load_average
    from retemper.engine.weights.checkpoint.saver import Saver

    validate(config)
    stop, say, store = stop or StopRequest(ranks), rank0_printer(ranks.is_main), run_store(config, ranks)
    stop.stop_after(config.training.stop_after_minutes)
    observers = ranks.run_on_rank0(lambda: create_early_observers(config, say)) or []
    config = prepare_data(config, ranks, stop, say)
    layout = plan_layout(config.parallel, ranks.world_size)
    plan = plan_batches(config.training, layout.data_parallel)
    config, start, choices, catalog, order, progress, remarks = open_run(config, plan, ranks, store, say)
    architecture = start.architecture
    samples = PromptSamples(config, start, catalog, plan, ranks)
    room = require_room(config, store, architecture, plan, progress) if check_room else []

    mesh, memory = build_mesh(layout, ranks.device.type, config.parallel.expert), MemoryGuard(config, ranks)
    with report_if_slow("building the model", say), memory.explained(lambda: "the start, building the model"):
        model, forward_backward = build_model(config, architecture, ranks, mesh, choices)
    optimizer = build_optimizer(model.named_parameters(), config.optimizer, config.seed, model.table_names)
    keep_average(optimizer, build_average(model.named_parameters(), config.training, config.seed))
    stop.exit_if_agreed()
    with report_if_slow("loading the weights", say), memory.explained(lambda: "the start, loading the weights"):
        casts = ranks.fail_together(lambda: start.load_into(model, optimizer))
        casts += ranks.fail_together(lambda: load_average(start.folder, start.resumed_tensors, optimizer))

    across, pinned = config.data.attend_across_documents, ranks.device.type == "cuda"
    data = TrainingData(catalog.train, order, plan, mesh.data_rank, architecture.vocab_size, across, pinned)
    with report_if_slow("reading the validation sets", say):
        validation = Validation(config, catalog, plan, architecture.vocab_size, mesh, ranks, start.resumed_from)
    ranks.fail_together(catalog.finish_checks)
    saver = Saver(store, ranks, config.checkpoint, say)
    profiler = StepProfiler(config.logging.profile_steps, config.run_folder, ranks, say)
    guards = RunGuards(config, ranks, store, saver, model, say, start.resumed_from, profiler.begin_phase)
    report = Reporter(config, ranks, plan, architecture, model, progress, say, observers, catalog.epoch_tokens)
    return Run(
        config=config, ranks=ranks, stop=stop, say=say, mesh=mesh, choices=choices, start=start, catalog=catalog,
        data=data, validation=validation, samples=samples, model=model, forward_backward=forward_backward,
        optimizer=optimizer, store=store, saver=saver, guards=guards, memory=memory, report=report, profiler=profiler,
        remarks=[*casts, *remarks, *room], progress=progress,
    )  # fmt: skip


def train(run: Run, console: Console | None = None) -> None:
    """Train until the token budget is used up, or the run stops early or is asked to stop. All ranks must call this."""
    from retemper.engine.guards.rollback import roll_back
    from retemper.engine.observe.end_summary import describe_end
    from retemper.engine.observe.start_summary import describe_start
    from retemper.engine.run_folder import open_run_folder
    from retemper.engine.weights.conversion.export_run import export_run
    from retemper.engine.weights.conversion.model_folders import write_model_folders

    with run.memory.explained(run.guards.where), open_run_folder(run, console):
        run.say(*describe_start(run))
        with run.stop, run.guards, run.saver:  # main() may have entered run.stop already, which may be nested
            rollback = None
            while rollback := make_steps(run, rollback):
                roll_back(run, rollback)
            if run.remaining_steps == 0:
                step, start = run.progress.step, run.start.folder
                for write in (export_run, write_model_folders):
                    write(run.config, run.store, step, start, run.stop.agreed, run.say)
        run.say(*describe_end(run))


def make_steps(run: Run, after: Rollback | None = None) -> Rollback | None:
    """Make the remaining steps. Return the rollback that a loss spike requires, or None at the end or after a stop.

    ``after`` is the rollback that has just been made.
    """
    from retemper.engine.data.loader import Prefetcher
    from retemper.engine.guards.rollback import rollback_if_spiking
    from retemper.engine.run_folder import saving_on_failure
    from retemper.engine.weights.checkpoint.tensors import checkpoint_tensors

    if run.evaluation_pending:
        evaluate(run)
    if after is None:
        run.stop.exit_if_agreed()
    elif run.stop.agreed():
        run.say(f"stopped at step {run.progress.step} as requested, after a rollback; resume: auto continues")
        return None  # the checkpoint of this step exists already
    run.report.stopwatch.restart()
    step_starts = range(run.progress.samples, run.end_sample, run.plan.global_batch_size)
    prefetcher = Prefetcher(run.data.micro_batches, step_starts, run.config.data.prefetch_steps)
    with prefetcher, run.profiler.following(run.progress.step), saving_on_failure(run):
        for first_sample in step_starts:
            result = one_step(run, *next_batches(run, prefetcher))
            run.report.stopwatch.step_done(run.profiler.slows_down)
            first = first_sample == step_starts[0]
            if first:  # the optimizer has its states now
                run.saver.reserve_host_memory(checkpoint_tensors(run.model, run.optimizer))
            run.saver.poll()
            report_pending(run)  # of the step before, while the device makes this one
            if rollback := rollback_if_spiking(run):  # by what guards.should_skip has seen
                return rollback
            last, stopping = run.remaining_steps == 0, run.stop.agreed()
            if first or last or stopping or run.progress.step % run.config.logging.log_interval == 0:
                note_step(run, result)
            run.guards.pause_watchdog()  # until the next step begins
            with run.report.stopwatch.paused():
                stopping = evaluate_and_save(run, result, last, stopping)
                run.profiler.step_done(run.progress.step)
            if run.remaining_steps == 0:
                break
            if stopping:
                run.saver.wait(raise_on_failure=True)
                run.say(f"stopped at step {run.progress.step} as requested; resume: auto continues")
                return None
    run.saver.wait(raise_on_failure=True)
    if run.stopped_early:
        run.say(run.early_stopping.describe(run.progress))
    run.say(f"finished: {run.progress.tokens:,} tokens in {run.progress.step:,} steps")
    return None


def next_batches(run: Run, prefetcher: Prefetcher) -> tuple[list[Batch], float]:
    """Begin a step: return this rank's micro-batches, and the targets of all ranks. Data errors are raised on all."""
    from retemper.engine.evaluation import count_targets
    from retemper.engine.guards.run_guards import UnreadableData

    run.guards.begin_step(run.progress.step + 1)
    problem, batches = None, []
    try:
        with run.report.stragglers.reading():
            batches = prefetcher.get()
    except UserError as error:
        problem = str(error)
    try:
        return batches, run.guards.sum_targets(count_targets(batches, run.mesh), problem)
    except UnreadableData:
        report_pending(run)  # all ranks are here
        raise


def one_step(run: Run, batches: list[Batch], num_targets: float) -> StepResult:
    """Make one optimizer step on this rank's ``batches``, and count it, also if its update is skipped."""
    from retemper.engine.step import train_step

    rate = learning_rate(run.progress.tokens + run.plan.tokens_per_step, run.config.training, run.config.optimizer)
    clip = run.config.optimizer.clip_grad_norm
    parts, step = (run.model, run.forward_backward, run.optimizer), run.progress.step + 1
    result = train_step(*parts, batches, num_targets, rate, clip, run.guards, step)
    run.progress = run.progress.after_step(run.plan)
    run.guards.step_done()
    return result


def note_step(run: Run, result: StepResult) -> None:
    """Report the last step: now, or on a GPU with :func:`report_pending` while the next one runs."""
    guard = run.guards.step_guard
    run.report.step(run.progress, run.remaining_steps, result, guard.numbers, guard.steps_without_targets)
    if not run.report.reports_late:
        report_pending(run)


def report_pending(run: Run) -> None:
    """Report the step that was noted but not reported, if any, and end the run after too many skipped steps."""
    reported = run.report.report_pending()
    if reported is not None:
        run.guards.check_skipped(*reported)


def evaluate_and_save(run: Run, result: StepResult, last: bool, stopping: bool) -> bool:
    """Evaluate and save if it is due after this step; return whether to stop. Never saves non-finite numbers."""
    from retemper.engine.run_folder import save

    step, checkpoint = run.progress.step, run.config.checkpoint
    run.guards.check_replicas(step, run.optimizer)
    losses: dict[str, float] = {}
    improved, due = False, run.is_due(checkpoint.save_interval)
    # Launchers wait some seconds for a run to stop: they are for saving. The resumed run evaluates.
    if run.validation and run.evaluation_due() and (last or not stopping):
        # keep_best: true considers only steps that are saved anyway; "improved" saves those that improve.
        losses, improved = evaluate(run, may_be_best=last or due or checkpoint.keep_best is not True)
        last = run.remaining_steps == 0  # also if it stops early because of these losses
        stopping = stopping or run.stop.agreed()  # asked during the evaluation, which may be interrupted
    if last or stopping or due or (improved and checkpoint.keep_best == "improved"):
        report_pending(run)
        run.guards.require_savable(step, result)
        save(run, losses, final=last)
        stopping = stopping or run.stop.agreed()  # asked during the save: this step is saved
    return stopping


def evaluate(run: Run, may_be_best: bool = True) -> tuple[dict[str, float], bool]:
    """Return the losses of the validation sets (none after a stop request), and whether they are the best so far."""
    from retemper.engine.evaluation import evaluated_weights

    report_pending(run)
    run.guards.enter_phase("evaluate")
    step = run.progress.step
    with evaluated_weights(run.config.training, run.optimizer, run.saver.hold_update):
        losses = run.validation.evaluate(run.forward_backward, step, run.stop.agreed, run.say)
        run.report.evaluation(run.progress, losses, run.validation.changes())
        run.guards.require_finite(step, {f"validation loss of {n}": x for n, x in losses.items()})
        if losses and run.samples:
            texts = run.samples.generate(run.model, run.forward_backward, step, run.stop.agreed, run.say)
            run.report.samples(run.progress, texts)
    run.progress = run.early_stopping.after(run.progress, losses)
    best = run.validation.best(losses, run.progress) if may_be_best or run.remaining_steps == 0 else None
    if best is not None:
        run.progress = replace(run.progress, best=best)
    return run.validation.of_sets(losses), best is not None


if __name__ == "__main__":
    run_command(main)
