"""Skip updates with a non-finite or spiking loss on all ranks, and end the run after too many in a row.

The device decides whether to skip, so an ordinary step does not wait for it. The host reads the counts when it reads
the loss anyway: on log steps and before a checkpoint. Only the optional guard against loss spikes needs the loss on the
host before the update. A skipped step still consumes its samples and tokens, and the learning rate continues. The same
holds for a step without targets, which computes nothing; these are counted separately.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.settings import TrainingConfig
from ..errors import UserError
from ..optim.local import local_part
from ..optim.loss_scaling import LossScaler
from ..parallel.process_group import Ranks

WINDOW = 64
"""Number of former losses with which a loss is compared."""
_FEWEST = 32
"""Minimum number of former losses for the detection of spikes."""

MAX_STEPS_WITHOUT_TARGETS = 100
"""Limit of consecutive steps without a target: the data has nothing to predict."""


class StepGuard:
    """Decides which updates to skip, and counts them.

    Args:
        config: of the training, with the limits.
        ranks: that train together.
        newest: names the newest checkpoint, for messages.
        say: prints a line for people.
    """

    def __init__(self, config: TrainingConfig, ranks: Ranks, newest: Callable[[], str], say: Callable[[str], None]):
        self._config, self._ranks, self._newest, self._say = config, ranks, newest, say
        self.counts = torch.zeros(3, device=ranks.device)
        """[3] fp32 on the device: number of skipped steps, in a row up to now, and in a row at most. Steps whose fp16
        gradients overflow are not among them. Each step makes a new tensor."""
        self.loss_scaler = LossScaler(config, ranks.device) if config.precision == "fp16" else None
        """In fp16 training: counts and skips steps whose gradients overflow."""
        self._overflows = 0
        self._skipped = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.spiked = False
        """True if the last step was a loss spike."""
        self.steps_without_targets = 0
        self._without_targets_in_a_row = 0
        self.rewinds: list[dict[str, int]] = []
        """Rollbacks of the run: ``{"step", "to_step", "samples"}``, the last being the number of skipped samples."""

    def should_skip(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return whether to skip the update of ``step``, the same on every rank. All ranks must call this.

        Args:
            step: its number.
            loss: [] this rank's part.
            grad_norm: [] of all ranks, not finite if the loss of any rank is not finite.

        Returns:
            [] fp32 on the device, 1 to skip it, else 0.
        """
        self._without_targets_in_a_row = 0
        skip = (~grad_norm.isfinite()).to(self.counts)
        overflow = None if self.loss_scaler is None else self.loss_scaler.update(loss, skip)
        if self._config.loss_spike_zscore is not None:
            self.spiked = self._is_spike(step, self._ranks.all_reduce(loss.item()))
            skip = torch.ones_like(skip) if self.spiked else skip
        total, in_a_row, most = self.counts.unbind()
        counted, now_in_a_row = skip, (in_a_row + skip) * skip
        if overflow is not None:
            counted, now_in_a_row = skip * (1 - overflow), torch.where(overflow > 0, in_a_row, now_in_a_row)
        self.counts = torch.stack([total + counted, now_in_a_row, torch.maximum(most, now_in_a_row)])
        return skip

    @property
    def numbers(self) -> Tensor:
        """Return :attr:`counts`, and in fp16 training :attr:`LossScaler.state` after them; on the device."""
        return self.counts if self.loss_scaler is None else torch.cat([self.counts, self.loss_scaler.state])

    def count_without_targets(self, step: int) -> None:
        """Count ``step``, in which no rank has a target.

        Raises:
            UserError: on all ranks, after too many in a row.
        """
        self.spiked = False
        self.steps_without_targets += 1
        self._without_targets_in_a_row += 1
        if self._without_targets_in_a_row >= MAX_STEPS_WITHOUT_TARGETS:
            raise UserError(
                f"step {step}: {MAX_STEPS_WITHOUT_TARGETS} steps in a row had no target: loss masks leave out every "
                f"token, or documents have only one token; {self._newest()}, inspect the data with "
                "tools/show_dataset.py, or raise training.global_batch_size"
            )

    def _is_spike(self, step: int, loss: float) -> bool:
        if not math.isfinite(loss):
            return False  # skipped in any case
        score = robust_zscore(loss, self._losses) if len(self._losses) >= _FEWEST else 0.0
        # Spikes are kept as well: if losses stay high, as after a change of the mixture, they become the new normal.
        self._losses.append(loss)
        bound = self._config.loss_spike_zscore
        assert bound is not None
        if score > bound:
            self._say(
                f"  step {step}: loss {loss:.4f} is a spike, z-score {score:.1f} is above training.loss_spike_zscore "
                f"{bound:g}: update skipped"
            )
        return score > bound

    def check(
        self, step: int, numbers: Mapping[str, float], counts: Sequence[float], parameters: Iterable[Tensor]
    ) -> None:
        """End the run after too many skipped steps, or without a loss scale. All ranks must call this.

        Args:
            step: number of a step, not necessarily the last one.
            numbers: its loss and gradient norm, for the message.
            counts: :attr:`numbers` after it.
            parameters: of this rank at present; if steps were skipped, they are checked, which waits for the device.

        Raises:
            UserError: more steps in a row were skipped than allowed, a weight is not finite, or gradients overflow
                with every scale of the loss.
        """
        total, _, most = map(int, counts[:3])
        bound, new = self._config.max_skipped_steps, total - self._skipped
        if most > bound:
            found = ", ".join(f"{name} {number}" for name, number in numbers.items())
            reason = "not finite"
            if bound > 0 or all(map(math.isfinite, numbers.values())):
                reason = (
                    f"{most} updates in a row were skipped, more than training.max_skipped_steps {bound}: loss or "
                    "gradients were not finite, or the loss was a spike"
                )
            raise self._error(step, f"{found}: {reason}")
        if self.loss_scaler is not None:
            self._check_loss_scale(step, counts[3:])
        if new:
            self.require_finite_weights(step, parameters)
            plural = "s" if new > 1 else ""
            self._say(f"  skipped {new} update{plural} by step {step}, {total} in all: not finite, or a spike")
            self._skipped = total

    def _check_loss_scale(self, step: int, state: Sequence[float]) -> None:
        assert self.loss_scaler is not None
        scale, overflows = state[0], int(state[2])
        if problem := self.loss_scaler.problem(scale):
            raise UserError(f"step {step}: {problem}; {self._newest()}")
        if new := overflows - self._overflows:
            plural = "s" if new > 1 else ""
            self._say(
                f"  skipped {new} update{plural} by step {step}, {overflows} in all: fp16 gradients overflowed; the "
                f"loss scale is now {scale:g}"
            )
            self._overflows = overflows

    def require_finite(self, step: int, numbers: Mapping[str, float]) -> None:
        """Raise UserError if any of ``numbers``, the same on all ranks, is not finite."""
        if not all(map(math.isfinite, numbers.values())):
            found = ", ".join(f"{name} {number}" for name, number in numbers.items())
            raise self._error(step, f"{found}: not finite")

    def require_finite_weights(self, step: int, parameters: Iterable[Tensor]) -> None:
        """Raise UserError on all ranks if a weight is not finite. All ranks must call this.

        Loss and gradients do not show it: they belong to the weights before the update.
        """
        finite = torch.stack([local_part(weight).isfinite().all() for weight in parameters])
        if self._ranks.all_reduce(not finite.all().item()):
            raise self._error(step, "the update produced weights that are not finite")

    def require_rewinds_left(self, step: int) -> None:
        """Raise UserError if a spike in ``step`` needs more rollbacks than allowed."""
        if len(self.rewinds) >= self._config.max_rewinds:
            steps = ", ".join(str(rewind["step"]) for rewind in self.rewinds) or "none"
            raise self._error(
                step,
                f"the loss is a spike again, after training.max_rewinds {self._config.max_rewinds} (spikes in steps "
                f"{steps})",
            )

    def _error(self, step: int, what: str) -> UserError:
        return UserError(f"step {step}: {what}; {self._newest()}, lower optimizer.learning_rate or inspect the data")

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs to skip the same steps, in JSON's types. Waits for the device."""
        total, in_a_row, _ = (int(count) for count in self.counts.tolist())
        state: dict[str, Any] = {"skipped_steps": total, "in_a_row": in_a_row, "losses": list(self._losses)}
        if self.steps_without_targets:
            state["without_targets"] = [self.steps_without_targets, self._without_targets_in_a_row]
        if self.loss_scaler is not None:
            state["loss_scaling"] = self.loss_scaler.state_dict()
        return state | ({"rewinds": self.rewinds} if self.rewinds else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; an empty one means that nothing was skipped."""
        total, in_a_row = state.get("skipped_steps", 0), state.get("in_a_row", 0)
        self._skipped = total
        self.counts = torch.tensor([total, in_a_row, in_a_row], dtype=torch.float32, device=self._ranks.device)
        if self.loss_scaler is not None and "loss_scaling" in state:
            self.loss_scaler.load_state_dict(state["loss_scaling"])
            self._overflows = state["loss_scaling"]["overflows"]
        self._losses = deque(state.get("losses", ()), maxlen=WINDOW)
        self.steps_without_targets, self._without_targets_in_a_row = state.get("without_targets", (0, 0))
        self.spiked, self.rewinds = False, list(state.get("rewinds", ()))


def robust_zscore(value: float, others: Iterable[float]) -> float:
    """Return the distance of ``value`` from the median of ``others`` in units of their median absolute deviation.

    The unit is scaled to standard deviations. See Iglewicz and Hoaglin, "How to Detect and Handle Outliers" (1993),
    whose bound for outliers is 3.5.
    """
    others = list(others)
    median = statistics.median(others)
    deviation = statistics.median(abs(other - median) for other in others)
    # 1.4826 makes it the standard deviation of a normal distribution. It is zero for equal losses.
    return (value - median) / max(1.4826 * deviation, 1e-6 * abs(median), 1e-12)
