"""The losses of routers, the load of their experts, and the biases that balance it, over the whole global batch.

Both losses are means over the tokens of the global batch and over the layers with experts. The load-balancing loss of a
layer is ``E * sum_e f_e P_e`` (Fedus et al., 2021, https://arxiv.org/abs/2101.03961, section 2.2, for K experts of a
token): ``f_e`` is the number of tokens of expert e divided by the number of tokens, ``P_e`` the mean of its scores. Of
sigmoid scores, ``P_e`` is the mean after those of a token are divided by their sum. The z-loss is the mean of
``logsumexp(logits)^2`` (Zoph et al., 2022, https://arxiv.org/abs/2202.08906, section 3.1).

A micro-batch cannot know the tokens of later ones. So gradients of a step have the ``f`` of the step before, which is
uniform in the first step, and reported values have the ``f`` of the step itself. Gradients are then the same in every
layout and for every micro-batch size, and the forward pass needs no collective. The state is one count for each expert.

Counts and gradients are added in the backward pass: recomputed tokens count once, evaluated ones never. A router that
no gradient reaches, below all trained parameters, is not counted. The losses that a step returns do not contain those
of routers.

Shapes: L layers with experts, E experts, T tokens, K experts of a token.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.token_permutation import count
from ..config.settings import TrainingConfig
from ..model.decoder import Decoder
from ..model.expert_settings import ExpertSettings
from ..model.experts import Router
from ..model.language_model import LanguageModel
from ..optim.local import local_part

STARVING = 0.1
"""An expert with less than this share of the mean load starves."""
WINDOW = 100
"""Number of steps over which the load of an expert is summed to decide whether it starves."""


class RouterNumbers(NamedTuple):
    """What a step tells about its routers, on the host."""

    aux_loss: float
    z_loss: float
    """Means over the layers, without their coefficients."""
    loads: dict[int, float]
    """Load of the expert with most tokens divided by the mean load, by number of the layer."""
    starving: dict[int, int]
    """Number of experts that starved in the last complete window of :data:`WINDOW` steps that were not skipped, by
    number of the layer."""


class RouterLosses:
    """Adds the gradients of the losses of this rank's routers, and counts the load of all experts.

    Args:
        routers: of this rank, by number of their layer.
        settings: of the experts.
        training: coefficients, and the size of the global batch.
        device: of the model.
        counts: False on a rank whose tokens another rank counts: with tensor parallelism all route the same ones.
        moves: whether the selection biases of trained routers are updated.
    """

    def __init__(
        self,
        routers: Mapping[int, Router],
        settings: ExpertSettings,
        training: TrainingConfig,
        device: torch.device,
        counts: bool = True,
        moves: bool = True,
    ):
        self.settings = settings
        self.layers = [number for number, has_experts in enumerate(settings.layers) if has_experts]
        """Numbers of the layers with experts of the whole model."""
        aux = training.router_aux_loss_coef
        share = 1.0 / (training.tokens_per_step * len(self.layers))
        self.aux_loss_coef = settings.aux_loss_coef if aux is None else aux
        self._aux_factor = self.aux_loss_coef * settings.num_experts * share
        self._z_factor = 2 * training.router_z_loss_coef * share
        self._rate = training.router_bias_update_rate
        self.updates_biases = moves and settings.selection_bias
        """Whether there are biases that may change."""
        rows, experts = len(self.layers), settings.num_experts
        # fp64 holds every count exactly, so that the sums over ranks have the same bits in every layout.
        self._totals = torch.zeros(rows, 2 * experts + 1, dtype=torch.float64, device=device)
        """Of this step and this rank: tokens of each expert, sums of their scores, sum of the z-loss."""
        self._counts = torch.ones(rows, experts, dtype=torch.float64, device=device)
        """Tokens of each expert in the last step that was not skipped. Each step makes a new tensor."""
        self._has_counts = False
        self._recent = torch.zeros_like(self._counts)
        """Tokens of each expert in the steps of the current window."""
        self._steps = torch.zeros((), dtype=torch.float64, device=device)
        """Number of these steps. On the device, because the host does not know which are skipped."""
        self._starving = torch.zeros(rows, device=device)
        self._gradient_LE = torch.zeros(rows, experts, device=device)
        self._z_gradient = torch.zeros((), device=device)
        self._active = False
        self.numbers: Tensor | None = None
        """[2 + 2 L] fp32 on the device, of the last step: see :meth:`read`. None before the first step."""
        self._biases: list[tuple[int, Tensor]] = []
        for number, router in routers.items():
            row = self.layers.index(number)
            if self.updates_biases and router.weight.requires_grad:
                self._biases.append((row, local_part(router.e_score_correction_bias)))
            router.observe = Meter(self, row) if counts else None

    @torch.no_grad()
    def begin_step(self, loss_scale: Tensor | None) -> None:
        """Prepare the backward passes of a step.

        Args:
            loss_scale: [] fp32 on the device, the factor of gradients in fp16 training; None: one.
        """
        per_token, experts = self.settings.per_token, self.settings.num_experts
        shares_LE = self._counts * (per_token / self._counts.sum(-1, keepdim=True).clamp(min=1))
        # Scores of a token sum to one. So a constant may be subtracted, with which a uniform load has no gradient.
        gradient_LE = (shares_LE - per_token / experts) * self._aux_factor
        z_gradient = torch.full_like(self._z_gradient, self._z_factor)
        if loss_scale is not None:
            gradient_LE, z_gradient = gradient_LE * loss_scale, z_gradient * loss_scale
        self._gradient_LE, self._z_gradient = gradient_LE.float(), z_gradient
        self._totals.zero_()
        self._active = True

    @torch.no_grad()
    def update(self, skip: Tensor) -> None:
        """Sum the counts of the step over all ranks, and update the biases. All ranks must call this.

        Args:
            skip: [] fp32 on the device: 1 if the update of the step is skipped, which leaves the state as it is.
        """
        self._active = False
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._totals)
        counts_LE, scores_LE, z_L1 = self._totals.split([self.settings.num_experts, self.settings.num_experts, 1], 1)
        self._note(counts_LE, scores_LE, z_L1, 1 - skip)
        for row, bias in self._biases:
            # Wang et al., 2024, https://arxiv.org/abs/2408.15664, algorithm 1.
            excess_E = counts_LE[row] - counts_LE[row].mean()
            bias.sub_((excess_E.sign() * (1 - skip)).to(bias.dtype), alpha=self._rate)
        self._counts = torch.where(skip > 0, self._counts, counts_LE)
        self._has_counts = True

    def _note(self, counts_LE: Tensor, scores_LE: Tensor, z_L1: Tensor, is_made: Tensor) -> None:
        experts, per_token = self.settings.num_experts, self.settings.per_token
        rows_L1 = counts_LE.sum(-1, keepdim=True)
        tokens_L1 = (rows_L1 / per_token).clamp(min=1)
        aux_L1 = experts * (counts_LE * scores_LE).sum(-1, keepdim=True) / tokens_L1.square()
        losses = torch.cat([aux_L1, z_L1 / tokens_L1], 1).sum(0) / (rows_L1 > 0).sum().clamp(min=1)
        loads_L = counts_LE.amax(-1) * experts / rows_L1[:, 0].clamp(min=1)
        recent_LE, steps = self._recent + counts_LE * is_made, self._steps + is_made
        starving_L = (recent_LE < STARVING * recent_LE.mean(-1, keepdim=True)).sum(-1)
        is_complete = steps >= WINDOW
        self._starving = torch.where(is_complete, starving_L, self._starving)
        self._recent, self._steps = (value * ~is_complete for value in (recent_LE, steps))
        self.numbers = torch.cat([losses, loads_L, self._starving]).float()

    def read(self, numbers: Sequence[float]) -> RouterNumbers:
        """Return :attr:`numbers`, copied to the host, by their names. Layers that were not counted have no load."""
        loads, starving = numbers[2 : 2 + len(self.layers)], numbers[2 + len(self.layers) :]
        return RouterNumbers(
            numbers[0],
            numbers[1],
            {layer: load for layer, load in zip(self.layers, loads, strict=True) if load > 0},
            {layer: int(number) for layer, number in zip(self.layers, starving, strict=True) if number > 0},
        )

    def state_dict(self) -> dict[str, str]:
        """Return the tokens of each expert in the last step, by number of the layer, and with the prefix ``window.``
        those in the steps of the current window, and the number of these steps. Waits for the device.
        """
        if not self._has_counts:
            return {}
        window = _as_text(self._recent, [f"window.{layer}" for layer in self.layers])
        return {**_as_text(self._counts, self.layers), **window, "window.steps": str(int(self._steps))}

    def load_state_dict(self, state: Mapping[str, str]) -> bool:
        """Continue from :meth:`state_dict`; begin with a uniform load if it is that of other layers or experts.

        Returns:
            whether the state was continued.
        """
        counts = self._of_text(state, "")
        self._has_counts = counts is not None
        self._counts = torch.ones_like(self._counts) if counts is None else counts
        # Checkpoints of earlier versions have no window.
        window = self._of_text(state, "window.")
        self._recent = torch.zeros_like(self._recent) if window is None else window
        steps = 0.0 if window is None else float(state.get("window.steps", "0"))
        self._steps = torch.full_like(self._steps, steps)
        self._starving, self.numbers = torch.zeros_like(self._starving), None
        return self._has_counts

    def _of_text(self, state: Mapping[str, str], prefix: str) -> Tensor | None:
        """Return [L, E] the numbers under the layers' names with a prefix; None if they are of other layers or
        experts.
        """
        rows = [[float(number) for number in state.get(f"{prefix}{layer}", "").split()] for layer in self.layers]
        if any(len(row) != self.settings.num_experts for row in rows):
            return None
        return torch.tensor(rows, dtype=torch.float64).to(self._counts.device)

    def add(self, row: int, scores_TE: Tensor, softmax_TE: Tensor, lse_T: Tensor, experts_TK: Tensor) -> Tensor:
        """Count the tokens of a router, and return [T, E] gradients of its logits.

        Args:
            row: of the layer.
            scores_TE: [T, E] fp32.
            softmax_TE: [T, E] fp32, of the logits.
            lse_T: [T] fp32: logsumexp of the logits.
            experts_TK: [T, K] int64.
        """
        if not self._active:
            return torch.zeros_like(scores_TE)
        is_sigmoid = self.settings.scoring == "sigmoid"
        normalized_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20) if is_sigmoid else scores_TE
        experts = self.settings.num_experts
        totals = self._totals[row]
        totals[:experts] += count(experts_TK.flatten(), experts)
        totals[experts:-1] += normalized_TE.sum(0)
        totals[-1] += lse_T.square().sum()
        # Through the normalization, which softmax has as well: d P / d logits.
        of_scores_TE = self._gradient_LE[row] - (normalized_TE @ self._gradient_LE[row])[:, None]
        gradient_TE = normalized_TE * of_scores_TE
        if is_sigmoid:
            gradient_TE = gradient_TE * (1 - scores_TE)
        return gradient_TE + softmax_TE * (lse_T * self._z_gradient)[:, None]


def _as_text(counts_LE: Tensor, names: Sequence[object]) -> dict[str, str]:
    rows = zip(names, counts_LE.tolist(), strict=True)
    return {str(name): " ".join(str(int(number)) for number in row) for name, row in rows}


_METERS: weakref.WeakValueDictionary[int, Meter] = weakref.WeakValueDictionary()
"""Of this process by number. An operator takes tensors only; and a compiled graph that took the sums of the step would
refuse to run backward after another micro-batch has changed them."""
_NUMBERS = itertools.count()


class Meter:
    """Observes one router; see :data:`~retemper.engine.model.experts.Observe`.

    Args:
        losses: that it reports to.
        row: of its layer.
    """

    def __init__(self, losses: RouterLosses, row: int):
        self.losses, self.row = losses, row
        number = next(_NUMBERS)
        _METERS[number] = self
        # On the host, so that reading it waits for no device; not an int, of which torch.compile makes a constant.
        with torch.device("cpu"):
            self.number = torch.tensor(number)

    def __call__(self, logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Return the scores; their backward pass counts, and adds gradients to those of the logits."""
        if not torch.is_grad_enabled():
            return scores_TE
        return _Observed.apply(logits_TE, scores_TE, experts_TK, self.number, self.losses.settings.scoring == "sigmoid")


class _Observed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor, number: Tensor, is_sigmoid: bool
    ) -> Tensor:
        # Softmax keeps its result for its own backward pass: it costs no memory here.
        ctx.save_for_backward(logits_TE if is_sigmoid else scores_TE, scores_TE, logits_TE.logsumexp(-1), experts_TK)
        ctx.number, ctx.is_sigmoid = number, is_sigmoid
        return scores_TE.view_as(scores_TE)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        softmax_TE, scores_TE, lse_T, experts_TK = ctx.saved_tensors
        if ctx.is_sigmoid:
            softmax_TE = (softmax_TE - lse_T[:, None]).exp()
        return _add(scores_TE, softmax_TE, lse_T, experts_TK, ctx.number), grad_TE, None, None, None


@torch.library.custom_op("retemper::add_router_losses", mutates_args=())
def _add(scores_TE: Tensor, softmax_TE: Tensor, lse_T: Tensor, experts_TK: Tensor, number: Tensor) -> Tensor:
    meter = _METERS[int(number)]
    return meter.losses.add(meter.row, scores_TE, softmax_TE, lse_T, experts_TK)


@_add.register_fake
def _(scores_TE: Tensor, softmax_TE: Tensor, lse_T: Tensor, experts_TK: Tensor, number: Tensor) -> Tensor:
    return torch.empty_like(scores_TE)


def attach(
    decoders: Sequence[LanguageModel], training: TrainingConfig, device: torch.device, counts: bool
) -> RouterLosses | None:
    """Let the routers of this rank have losses; None if the model has none, or is computed by transformers.

    Args:
        decoders: of this rank, with memory for their parameters.
        training: of the run.
        device: of the model.
        counts: see :class:`RouterLosses`.
    """
    routers: dict[int, Router] = {}
    settings = None
    for decoder in decoders:
        if isinstance(decoder, Decoder) and decoder.architecture.experts is not None:
            settings = decoder.architecture.experts
            for number, block in decoder.model.layers.items():
                routers |= {int(number): module for module in block.modules() if isinstance(module, Router)}
    if settings is None:
        return None
    is_adapted = any(decoder.base_names for decoder in decoders)  # the base of an adapter stays as it is
    return RouterLosses(routers, settings, training, device, counts, moves=not is_adapted)
