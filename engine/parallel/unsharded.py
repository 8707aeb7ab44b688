"""Data parallelism of one rank: parameters and gradients stay whole and where they are.

If the weights have the compute dtype, the model uses them, and gradients accumulate in place. Otherwise the model
computes with copies of the weights in the compute dtype, which are refreshed once per step. The gradient of a copy is
added to that of its weight as soon as it is complete, and freed.

With ``parallel.cpu_offload: optimizer`` the weights, their gradients and the optimizer are in host memory, and the
copies on the device (Ren et al., 2021, https://arxiv.org/abs/2101.06840).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..model.language_model import LanguageModel
from ..optim.local import local_part
from .fused_projections import FusedLayers, fuse
from .host_transfers import HostTransfers


@dataclass(frozen=True)
class UsedWeight:
    """A parameter, and the tensor that the model computes with."""

    weight: nn.Parameter
    used: nn.Parameter
    """The weight, or its copy in the compute dtype."""
    gradient_dtype: torch.dtype
    """Of the gradient of the weight."""
    transfers: HostTransfers | None = None
    """Of a weight in host memory."""

    def take_gradient(self) -> None:
        """Add the gradient of the copy to that of the weight, and free it. Cast a gradient of the weight itself."""
        gradient = self.used.grad
        if gradient is None:
            return
        if self.used is self.weight:
            self.weight.grad = gradient.to(self.gradient_dtype)
            return
        self.used.grad = None
        if self.transfers is None:
            self._add(gradient)
        else:
            self.transfers.fetch(gradient, self._add)

    def _add(self, gradient: Tensor) -> None:
        if self.weight.dtype != torch.float32:
            gradient = gradient.to(self.weight.dtype)  # as FSDP does with each reduced gradient
        if self.weight.grad is None:
            self.weight.grad = gradient.to(self.gradient_dtype)
        else:
            self.weight.grad.add_(gradient)


class Unsharded:
    """See :class:`~retemper.engine.parallel.data_parallel.DataParallel`.

    Args:
        model: on the meta device.
        compute_dtype: of the tensors that the model computes with.
        fuse_projections: see :mod:`.fused_projections`.
        transfers: of weights in host memory to the device that computes; None: they are there.
    """

    def __init__(
        self,
        model: LanguageModel,
        compute_dtype: torch.dtype,
        fuse_projections: bool = False,
        transfers: HostTransfers | None = None,
    ):
        self._transfers = transfers
        self._model, self._compute_dtype, self._fuses = model, compute_dtype, fuse_projections
        self._weights: list[UsedWeight] = []
        self._places: list[tuple[nn.Module, str, UsedWeight]] = []
        """Module and attribute of each weight that has a copy; a module may share it with others."""
        self._fused: list[FusedLayers] = []
        self._of_fused: dict[nn.Parameter, UsedWeight] = {}
        self._copies: list[Tensor] = []
        self._copied: list[Tensor] = []
        """This rank's parts of the weights that have copies, in the order of the copies."""
        self._split: list[DTensor] = []
        """The weights of tensor parallelism."""

    @property
    def copies_of_host_weights(self) -> list[Tensor]:
        """Return the device's copies of weights that are in host memory."""
        return [] if self._transfers is None else self._copies

    def on_materialized(self, accumulates: bool) -> None:
        """See the class. Allocates the copies."""
        by_weight: dict[nn.Parameter, UsedWeight] = {}
        left_alone = {weight for name, weight in self._model.named_parameters() if name in self._model.constants}
        if self._fuses:
            self._fused = fuse(self._model)
            fused = [parameter for layers in self._fused for parameter in layers.parameters]
            self._of_fused = {one.whole: self._used(one.whole, accumulates) for one in fused}
            left_alone |= {part for one in fused for part in one.parts}
        for module in self._model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight in left_alone:
                    continue
                if weight not in by_weight:
                    by_weight[weight] = self._used(weight, accumulates)
                if by_weight[weight].used is not weight:
                    self._places.append((module, name, by_weight[weight]))
        self._weights = [*by_weight.values(), *self._of_fused.values()]
        with torch.no_grad():
            with_copies = [pair for pair in self._weights if pair.used is not pair.weight]
            self._copies = [local_part(pair.used) for pair in with_copies]
            self._copied = [local_part(pair.weight) for pair in with_copies]
        self._split = [pair.weight for pair in self._weights if isinstance(pair.weight, DTensor)]

    def _used(self, weight: nn.Parameter, accumulates: bool) -> UsedWeight:
        """Choose the tensor that the model uses for ``weight``, and register what happens to its gradients."""
        used = weight
        if self._transfers is not None:
            copy = torch.empty_like(weight, dtype=self._compute_dtype, device=self._transfers.device)
            used = nn.Parameter(copy, requires_grad=weight.requires_grad)
        elif weight.dtype != self._compute_dtype:
            used = nn.Parameter(weight.detach().to(self._compute_dtype), requires_grad=weight.requires_grad)
        pair = UsedWeight(weight, used, torch.float32 if accumulates else weight.dtype, self._transfers)
        if weight.requires_grad:
            if pair.gradient_dtype != weight.dtype:
                weight.grad_dtype = None  # of any dtype
            if used is not weight or pair.gradient_dtype != weight.dtype:
                used.register_post_accumulate_grad_hook(lambda _: pair.take_gradient())
        return pair

    @contextmanager
    def computing(self) -> Iterator[None]:
        """See the class. Refreshes the copies, and shows them instead of the weights."""
        if self._transfers is not None:
            self._transfers.send(self._copies, self._copied)
        elif self._copies:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._copied)
        self._show()
        try:
            yield
        finally:
            self._hide()
        if self._transfers is not None:
            self._transfers.finish()
        self._sum_over_tensor_ranks()

    def _show(self) -> None:
        for module, name, pair in self._places:
            module._parameters[name] = pair.used
        for layers in self._fused:
            layers.show(*(self._of_fused[one.whole].used for one in layers.parameters))

    def _hide(self) -> None:
        for module, name, pair in self._places:
            module._parameters[name] = pair.weight
        for layers in self._fused:
            layers.show(None)
            for parameter in layers.parameters:
                parameter.hand_out_gradient()

    def _sum_over_tensor_ranks(self) -> None:
        """Sum the gradients of weights that all tensor-parallel ranks hold: each has those of its tokens or heads."""
        for weight in self._split:
            gradient = weight.grad
            if isinstance(gradient, DTensor) and gradient.placements != weight.placements:
                weight.grad = gradient.redistribute(placements=weight.placements)

    def reduce_gradients(self, now: bool) -> None:
        """See the class. Does nothing: no other rank has gradients of these parameters."""

    def collect_gradients(self) -> None:
        """See the class."""
        for pair in self._weights:
            pair.take_gradient()
