"""The training run, readable from top to bottom: what is built, in which order, and what one step does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__
from .budget import learning_rate, plan_batches
from .checkpoint.changes import describe_changes
from .checkpoint.destination import require_destination
from .checkpoint.manifest import Manifest
from .checkpoint.retention import describe_rule
from .checkpoint.run_record import CONFIG_FILE, note_start
from .checkpoint.saver import Saver
from .checkpoint.store import CheckpointStore
from .checkpoint.tensors import training_tensors
from .config import RunConfig, to_dict, to_yaml
from .config_effect import Situation, without_effect
from .conversion.export_run import export_folder, export_run, prepare_export
from .data.loader import Prefetcher, TrainingData
from .data.packing import MicroBatch
from .emergency import EmergencySave
from .errors import UserError
from .evaluation import Validation, count_targets
from .garbage import GarbageSchedule
from .health import Health
from .hugging_face.start import with_local_weights
from .memory_bound import require_memory
from .model.config_keys import describe_unread
from .observe.closing import Totals, next_command
from .observe.console import Console
from .observe.flops import flops_per_token
from .observe.loggers import MetricLog
from .observe.progress import Stopwatch, speed, step_line
from .observe.stragglers import Stragglers
from .observe.summary import data_notes, describe_data, describe_run, describe_saving, notes
from .observe.waiting import Counted, reported_if_slow
from .optim import allocate_states, build_optimizer, clip_grad_norm, set_learning_rate, step_unless
from .parallel.build import build_model
from .parallel.layout import plan_layout
from .parallel.mesh import build_mesh
from .parallel.process_group import Ranks
from .precision import with_precision
from .replicas import ReplicaCheck
from .rewind import Rewind, plan_rewind
from .run_inputs import keep_source_names, load_weights, open_inputs
from .run_state import Progress, StepResult
from .stopping import StopRequest
from .watchdog import Watchdog


class Trainer:
    """One run on all ranks.

    Construction reads and checks everything and builds the model; nothing is written before :meth:`run`.

    Raises:
        UserError: configuration, data or checkpoint cannot be trained with.
        StoppedBeforeTraining: all ranks were asked to stop before the first step.
    """

    def __init__(
        self, config: RunConfig, ranks: Ranks, stop: StopRequest | None = None, console: Console | None = None
    ):
        self.console = console
        config, self.precision = with_precision(config, ranks)
        self.config, self.ranks, self.stop = config, ranks, stop or StopRequest(ranks)
        self.stop.stop_after(config.training.stop_after_minutes)
        layout = plan_layout(config.parallel, ranks.world_size)
        self.plan = plan_batches(config.training, layout.data_parallel)
        keep = config.checkpoint
        rewind_steps = config.training.rewind_steps if config.training.loss_spike_action == "rewind" else 0
        self.store = CheckpointStore(
            config.run_folder, ranks, keep.keep_last, bool(keep.keep_best), keep.keep_every, rewind_steps
        )
        with self._if_slow("looking for a checkpoint and verifying it"):
            self.resume_from = self.store.resolve(config.resume)
        self.config, renamed = ranks.everywhere(lambda: keep_source_names(config, self.resume_from))
        config = self.config
        # What is saved of the configuration keeps a name on the Hub; here it becomes a folder.
        local = config if self.resume_from else with_local_weights(config, ranks, self.store.require_sound)
        self.start_folder = local.model.initialize_from
        self.progress, self.owes_evaluation = Progress(), config.training.eval_at_start
        # The log is opened later.
        say = lambda line: self.log.say(line)  # noqa: E731, PLW0108
        self.health = Health(config.training, ranks, self._newest, say)
        self.saver = Saver(self.store, ranks, keep, say)
        self.check_replicas = ReplicaCheck(config.training.check_replicas_interval, ranks, self._newest)
        self.watchdog = Watchdog(config.parallel.timeout_seconds, ranks)
        with self._if_slow("opening the data"):
            self.inputs = ranks.everywhere(lambda: open_inputs(local, self.plan, self.resume_from, ranks.device))
        architecture = self.inputs.architecture
        ranks.everywhere(lambda: require_memory(config, architecture, ranks.device, ranks.world_size))
        if self.inputs.resumed:
            self.progress = self.inputs.progress
            self.health.restore(self.inputs.resumed.health)
            self.owes_evaluation = self._owes_evaluation(self.inputs.resumed.evaluation)
        ranks.everywhere(lambda: self.inputs.order.require(self._last_sample()))
        self.remarks = renamed + self.test_destination()
        self.mesh = build_mesh(layout, ranks.device.type)
        with self._if_slow("building the model"):
            self.model, self.passes = build_model(config, architecture, ranks, self.mesh, self.inputs.choices)
        self.optimizer = build_optimizer(self.model.named_parameters(), config.optimizer, config.seed)
        self.stop.leave_if_agreed()
        with self._if_slow("loading the weights"):
            self.casts = ranks.everywhere(
                lambda: load_weights(local, architecture, self.resume_from, self.model, self.optimizer)
            )
        self.data = TrainingData(
            self.inputs.catalog.train,
            self.inputs.order,
            self.plan,
            self.mesh.data_rank,
            architecture.vocab_size,
            config.data.attend_across_documents,
        )
        blocks = (block for decoder in self.model.decoders for block in decoder.model.blocks)
        self.stragglers = Stragglers(ranks, blocks, config.logging.stragglers)
        with self._if_slow("reading the validation sets"):
            self.validation = Validation(
                config, self.inputs.catalog, self.plan, architecture.vocab_size, self.mesh, ranks
            )
        ranks.everywhere(self.inputs.catalog.finish_checks)
        if self.validation.measure is not None:
            self.remarks += self.validation.measure.note_on(self.progress.best)
        parameters, seconds = dict(self.model.named_parameters()), config.parallel.timeout_seconds
        self.emergency = EmergencySave(ranks, parameters, self.saver, say, seconds)
        self.totals = Totals(self.progress)

    def test_destination(self) -> list[str]:
        """Refuse a place that cannot take what the run will write; lines for the log. For measurements to override."""
        config, steps, store = self.config, self._remaining_steps(), self.store
        output = export_folder(store.folder.parent, self.progress.step + steps)
        test = lambda: require_destination(config, store, self.inputs.architecture, steps, output.parent)  # noqa: E731
        lines = self.ranks.on_main(test) or []
        store.expected_bytes = self.ranks.share(store.expected_bytes)
        return lines + prepare_export(config.checkpoint, self.ranks, output)

    # ---------------------------------------------------------------------------------------------------------------
    # The run

    def run(self) -> None:
        """Train until the token budget is used up or somebody asks to stop.

        Raises:
            UserError: another process writes to the run folder, or the run cannot go on.
        """
        with self.store.locked() as remarks:
            self._run(remarks)

    def _run(self, remarks: list[str]) -> None:
        # A fresh run also renames the records of one that was killed before its first checkpoint.
        self.log = self._metric_log(self.progress.step if self.resume_from else None)
        self.ranks.on_main(self._open_run_folder)
        for line in [*remarks, *self.store.set_aside(), *self.store.remove_leftovers()]:
            self.log.say(line)
        self._say_plan()
        with self.stop, self.watchdog, self.saver, GarbageSchedule(self.config.training.gc_interval) as garbage:
            rewind = None
            while rewind := self._train(garbage, rewind):
                self._go_back(rewind)
            if self._remaining_steps() == 0:
                step, stop = self.progress.step, self.stop.agreed
                export_run(self.config.checkpoint, self.store, step, self.resume_from, stop, self.log.say)
        self._say_totals()
        self.log.close()

    def _train(self, garbage: GarbageSchedule, after: Rewind | None) -> Rewind | None:
        """All steps that are left, ``after`` going back, or up to a loss spike from which the run is to go back."""
        config = self.config
        if self.owes_evaluation:
            self._evaluate_for_best()
        if after is None:
            self.stop.leave_if_agreed()
        elif self.stop.agreed():
            step = self.progress.step
            self.log.say(f"stopped at step {step} as asked, gone back to before a spike; resume: auto continues")
            return None
        stopwatch = Stopwatch()
        first_samples = range(self.progress.samples, self._last_sample(), self.plan.global_batch_size)
        prefetching = Prefetcher(self._prepare, first_samples, config.data.prefetch_steps)
        with prefetching as prefetcher, self._saved_if_it_fails():
            for first_sample in first_samples:
                result = self._step(*self._next_batches(prefetcher))
                garbage.step_done(self.progress.step)
                stopwatch.step_done()
                if first_sample == first_samples[0]:
                    self.saver.reserve(training_tensors(self.model, self.optimizer))
                self.saver.poll()
                if self.health.spiked and (rewind := self._plan_rewind()):
                    return rewind
                last, stopping = self._remaining_steps() == 0, self.stop.agreed()
                due = first_sample == first_samples[0] or self.progress.step % config.logging.log_interval == 0
                if last or stopping or due:
                    self._report(result, stopwatch)
                self.watchdog.sleep()
                with stopwatch.paused():
                    stopping = self._evaluate_and_save(result, last, stopping)
                if stopping and not last:
                    self.saver.wait(required=True)
                    self.log.say(f"stopped at step {self.progress.step} as asked; resume: auto continues")
                    return None
        self.saver.wait(required=True)
        self.log.say(f"finished: {self.progress.tokens:,} tokens in {self.progress.step:,} steps")
        return None

    def _plan_rewind(self) -> Rewind | None:
        if self.config.training.loss_spike_action == "skip":
            return None
        self.watchdog.sleep()
        self.saver.wait()  # what is being written may be what to go back to
        order = self.inputs.order
        return plan_rewind(self.config, self.store, self.health, self.progress, order, self.plan, self.log.say)

    def _go_back(self, rewind: Rewind) -> None:
        """Be what the run was at that checkpoint, but for the place in the data."""
        for line in [*self.store.abandon_after(rewind.progress.step), rewind.line]:
            self.log.say(line)
        architecture = self.inputs.architecture
        self.ranks.everywhere(
            lambda: load_weights(self.config, architecture, rewind.checkpoint, self.model, self.optimizer)
        )
        self.progress = rewind.progress
        self.health.restore(rewind.health)
        self.owes_evaluation = self._owes_evaluation(rewind.manifest.evaluation)
        self.log.close()
        self.log = self._metric_log(self.progress.step)
        self.ranks.on_main(self.log.open)

    def _prepare(self, first_sample: int) -> list[MicroBatch]:
        batches = self.data.micro_batches(first_sample)
        return [batch.pin_memory() for batch in batches] if self.ranks.device.type == "cuda" else batches

    def _next_batches(self, prefetcher: Prefetcher) -> tuple[list[MicroBatch], float]:
        """This rank's micro-batches, and the number of targets in the global batch, which may be 0.

        Raises:
            UserError: on every rank, when any of them cannot read its data.
        """
        self._begin("data")
        problem, batches = None, []
        try:
            with self.stragglers.reading():
                batches = prefetcher.get()
        except UserError as error:
            problem = str(error)
        # One sum serves both ends: a rank without data makes it not a number.
        num_targets = self.ranks.sum(math.nan if problem else count_targets(batches, self.mesh))
        if math.isnan(num_targets):
            try:
                self.ranks.raise_together(problem)
            except UserError as error:
                self._save_in_emergency(error)
                raise
        return batches, num_targets

    def _step(self, micro_batches: list[MicroBatch], num_targets: float) -> StepResult:
        """One optimizer step: accumulate gradients over the micro-batches, clip, update, advance the clock.

        Without a target on any rank there is nothing to compute: only the clock advances.
        """
        tokens = self.progress.tokens + self.plan.tokens_per_step
        rate = learning_rate(tokens, self.config.training, self.config.optimizer)
        if num_targets > 0:
            loss, grad_norm = self._update(micro_batches, num_targets, rate)
        else:
            loss = grad_norm = torch.full((), math.nan)
            self.health.count_without_targets(self.progress.step + 1)
            allocate_states(self.optimizer)  # a checkpoint has them before the first update too
        self._begin("other")
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            samples=self.progress.samples + self.plan.global_batch_size,
            tokens=tokens,
        )
        self.emergency.whole = True
        return StepResult(loss, grad_norm, rate, num_targets > 0)

    def _update(self, micro_batches: list[MicroBatch], num_targets: float, rate: float) -> tuple[Tensor, Tensor]:
        """Loss and gradient norm of a step, whose update is made unless it would do harm."""
        loss = self.passes.train(micro_batches, num_targets, self._begin)
        self._begin("optimizer")
        clip = self.config.optimizer.clip_grad_norm
        grad_norm = clip_grad_norm(self.model.parameters(), clip, self.model.own_parameters(), loss)
        set_learning_rate(self.optimizer, rate)
        self.saver.hold_update()
        self.emergency.whole = False
        step_unless(self.optimizer, self.health.judge(self.progress.step + 1, loss, grad_norm))
        self.optimizer.zero_grad(set_to_none=True)
        return loss, grad_norm

    def _begin(self, name: str) -> None:
        self.watchdog.beat(f"step {self.progress.step + 1}, {name}")
        self.on_phase(name)

    def on_phase(self, name: str) -> None:
        """A part of the step begins: data, forward, backward, optimizer or other. For measurements to override."""

    def _remaining_steps(self) -> int:
        return self.plan.steps_for(max(0, self.config.training.train_tokens - self.progress.tokens))

    def _last_sample(self) -> int:
        """Samples consumed when the budget is used up."""
        return self.progress.samples + self._remaining_steps() * self.plan.global_batch_size

    # ---------------------------------------------------------------------------------------------------------------
    # Evaluating, saving, reporting

    def _evaluate(self) -> dict[str, float]:
        """Mean loss per target of every validation set, in nats; of none, when asked to stop meanwhile."""
        step, say, active = self.progress.step, self.log.say, self.ranks.is_main
        with Counted(f"evaluation at step {step}, micro-batches", self.validation.num_batches, say, active) as counted:
            losses = self.validation.losses(self.passes, self.stop.agreed, counted.update)
        if self.validation and not losses:
            self.log.say("  evaluation broken off: asked to stop; the run that resumes makes it")
        for name, loss in losses.items():
            self.totals.add_loss(f"validation {name}", self.progress.step, loss)
            values = {"evaluation": name, "loss": loss, "perplexity": math.exp(min(loss, 700.0))}
            self.log.record(self.progress.step, self.progress.tokens, values, group=f"evaluation/{name}")
            self.log.say(
                f"  evaluation of {name} at step {self.progress.step}: loss {loss:.4f}, perplexity "
                f"{values['perplexity']:.2f}"
            )
        return losses

    def _evaluate_and_save(self, result: StepResult, last: bool, stopping: bool) -> bool:
        """What is due at the end of a step; whether to stop. Numbers that are not finite are never saved."""
        if self.check_replicas.due(self.progress.step):
            self.check_replicas(self.progress.step, self.model, self.optimizer)
        evaluation: dict[str, float] = {}
        improved, keep_best = False, self.config.checkpoint.keep_best
        due = self.progress.step % self.config.checkpoint.save_interval == 0
        # Launchers give a run that is asked to stop some seconds: they are for saving. What resumes it evaluates.
        if self.validation and self._evaluation_due() and (last or not stopping):
            # With keep_best true, only an evaluation of what is saved anyway can be the best.
            evaluation, improved = self._evaluate_for_best(last or stopping or due or keep_best is not True)
            stopping = stopping or not evaluation
        if last or stopping or due or (improved and keep_best == "improved"):
            self._check(self.ranks.sum(result.loss.item()), result.grad_norm.item())
            self.health.require_finite_weights(self.progress.step, self.model.parameters())
            self._save(evaluation, final=last)
            stopping = stopping or self.stop.agreed()  # saved already
        return stopping

    def _evaluation_due(self) -> bool:
        interval = self.config.training.eval_interval
        return self._remaining_steps() == 0 or (interval > 0 and self.progress.step % interval == 0)

    def _owes_evaluation(self, made: dict[str, float]) -> bool:
        """Whether a run at a checkpoint evaluates before its next step; ``made`` are the losses measured there."""
        asked = self.config.training.eval_at_start and self._remaining_steps() == 0
        return self._evaluation_due() and (asked or not made)

    def _evaluate_for_best(self, counts: bool = True) -> tuple[dict[str, float], bool]:
        """The losses, and whether that of the first set is its lowest so far, where it ``counts``."""
        losses, step, measure = self._evaluate(), self.progress.step, self.validation.measure
        self.health.require_finite(step, {f"validation loss of {name}": loss for name, loss in losses.items()})
        if not losses or not counts or step == 0:  # which has no checkpoint
            return losses, False
        assert measure is not None
        loss = losses[measure.name]
        improved = measure.improves(self.progress.best, loss)
        if improved:
            self.progress = replace(self.progress, best=measure.record(step, loss))
        return losses, improved

    def _save(self, evaluation: dict[str, float], final: bool) -> None:
        manifest = self._manifest(evaluation, final)
        self.log.sync()
        tensors = training_tensors(self.model, self.optimizer)
        self.saver.save(tensors, self.inputs.assets, manifest, self.progress.best.get("step"))

    def _manifest(self, evaluation: dict[str, float], final: bool, emergency: str = "") -> Manifest:
        return Manifest(
            kind="training",
            step=self.progress.step,
            consumed_samples=self.progress.samples,
            consumed_tokens=self.progress.tokens,
            final=final,
            sample_order=self.inputs.order.state(),
            datasets=self.inputs.catalog.fingerprints,
            evaluation=evaluation,
            best=self.progress.best,
            health=self.health.state(),
            emergency=emergency,
            config=to_dict(self.config),
            world_size=self.ranks.world_size,
            layout=self.mesh.layout._asdict(),
            retemper_version=__version__,
        )

    @contextmanager
    def _saved_if_it_fails(self) -> Iterator[None]:
        """Save the state before the step inside, if it raises. Not for a UserError, which names an older checkpoint."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            self._save_in_emergency(error)
            raise

    def _save_in_emergency(self, error: Exception) -> None:
        self.watchdog.sleep()
        if self.progress.step > self.totals.start.step:
            self.log.sync()
            step, manifest = self.progress.step, lambda what: self._manifest({}, final=False, emergency=what)
            self.emergency(error, step, self.optimizer, self.inputs.assets, manifest)

    def _report(self, result: StepResult, stopwatch: Stopwatch) -> None:
        """One console line and one metric record."""
        loss, grad_norm = self.ranks.sum(result.loss.item()), result.grad_norm.item()
        stragglers = self.stragglers.report()
        architecture, trainable = self.inputs.architecture, self.config.training.trainable
        flops = flops_per_token(architecture, self.plan.sequence_length, causal_halved=False, trainable=trainable)
        seconds, steps = stopwatch.lap()
        self.totals.add_steps(seconds, steps)
        values = {
            "loss": loss if result.has_targets else None,
            "learning_rate": result.learning_rate,
            "grad_norm": grad_norm if result.has_targets else None,
            "skipped_steps": self.health.skipped_steps(),
            "steps_without_targets": self.health.steps_without_targets,
            **speed(seconds / steps, self.plan.tokens_per_step, flops, self.ranks),
            **stragglers.values,
        }
        self.log.record(self.progress.step, self.progress.tokens, values)
        self.totals.add_loss("training", self.progress.step, loss)
        remaining = self._remaining_steps()
        seconds_left = remaining * self.totals.mean_step_seconds
        for line in [
            step_line(self.progress.step, remaining, self.progress.tokens, values, seconds_left),
            *stragglers.lines,
        ]:
            self.log.say(line)
        self._check(loss, grad_norm)

    def _check(self, loss: float, grad_norm: float) -> None:
        """Raises UserError where too many steps in a row were skipped."""
        numbers = {"loss": loss, "gradient norm": grad_norm}
        self.health.check(self.progress.step, numbers, self.model.parameters())

    def _newest(self) -> str:
        self.watchdog.sleep()
        with suppress(UserError):
            self.saver.wait()  # what is being written is completed before the run ends
        complete = self.store.complete()
        return f"the newest checkpoint is {complete[-1]}" if complete else "no checkpoint has been written"

    def _metric_log(self, known_step: int | None) -> MetricLog:
        folder, tensorboard = self.config.run_folder, self.config.logging.tensorboard
        return MetricLog(folder, known_step, self.ranks.is_main, tensorboard, self.owes_evaluation)

    def _if_slow(self, what: str) -> AbstractContextManager[None]:
        return reported_if_slow(what, lambda line: print(line, flush=True), self.ranks.is_main)

    def _say_totals(self) -> None:
        finished = self._remaining_steps() == 0
        complete = self.store.complete() if self.ranks.is_main else []
        for line in [
            *self.totals.table(self.progress, self.plan.tokens_per_step, self.ranks),
            *next_command(self.config, complete[-1] if complete else None, finished),
        ]:
            self.log.say(line)

    def _open_run_folder(self) -> None:
        folder = Path(self.config.run_folder)
        self.log.open(renamed_with_the_curve=(CONFIG_FILE,))
        if self.console is not None:
            self.console.open(self.config.run_folder)
        (folder / CONFIG_FILE).write_text(to_yaml(self.config), encoding="utf-8")
        note_start(folder, self.resume_from is None, self.store.origin)

    def _say_plan(self) -> None:
        if self.resume_from:
            start = f"resumed from {self.resume_from} at step {self.progress.step:,}"
        else:
            name, folder = self.config.model.initialize_from, self.start_folder
            start = f"weights of {name or 'a random initialization'}" + (f": {folder}" if folder != name else "")
        assert self.inputs.assets.config is not None
        remaining = self._remaining_steps()
        summary = describe_run(self.config, self.plan, self.ranks, self.inputs, remaining, start, self.precision)
        was, layout, datasets = self.inputs.resumed, self.mesh.layout._asdict(), self.inputs.catalog.fingerprints
        given = self.config.model.architecture
        for line in [
            *(describe_changes(was, self.config, layout, datasets) if was else []),
            *(describe_unread(self.inputs.assets.config, given) if isinstance(given, str) else []),
            *notes(self.config, self.inputs.catalog, self.inputs.assets),
            *data_notes(self.inputs.catalog, self.inputs.order, self._last_sample()),
            *(f"note: {line}" for line in [*self._budget_used(), *without_effect(self._situation())]),
            *summary,
            describe_saving(self.config, self.model.parameters()),
            describe_rule(
                self.config.checkpoint,
                self.config.training.eval_interval,
                next(iter(self.inputs.catalog.validation), None),
                self.store.rewind_steps,
            ),
            *describe_data(self.config.data, self.inputs.catalog, self.inputs.order, self._last_sample()),
            *self.validation.describe(),
            *self.casts,
            *self.remarks,
        ]:
            self.log.say(line)

    def _budget_used(self) -> list[str]:
        """A line where the run has trained on more tokens than it is asked for now."""
        budget, tokens = self.config.training.train_tokens, self.progress.tokens
        if tokens - budget < self.plan.tokens_per_step:  # the last step is a whole one
            return []
        return [
            f"training.train_tokens {budget:,} is less than the {tokens:,} tokens that this run has trained on: "
            "no step is left; raise it to train on"
        ]

    def _situation(self) -> Situation:
        layout, resumed = self.mesh.layout, self.inputs.resumed
        return Situation(
            self.config,
            same_weights=layout.replicate > 1 or layout.tensor > 1,
            reduces=layout.data_parallel * layout.context > 1,
            num_micro_batches=self.plan.num_micro_batches,
            device=self.ranks.device.type,
            resumed=resumed.config if resumed else None,
            source_tokens={source.name: source.stop - source.start for source in self.inputs.catalog.train},
        )
