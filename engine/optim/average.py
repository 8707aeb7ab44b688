"""Keep an exponential moving average of the weights, ``training.ema_decay``.

The average is sharded as the parameters are. After each update, average = decay * average + (1 - decay) * weight, as in
``torch.optim.swa_utils.AveragedModel`` with ``get_ema_avg_fn``. Averages along a run go back to Polyak and Juditsky,
1992, https://doi.org/10.1137/0330046. This one begins as the weights before the first update, which keep a share of
decay^n after n updates. It is a mean of weights from the beginning, so it has no bias towards zero, which Adam's
moments divide out, and no random weights to forget, for which timm, TensorFlow and diffusers begin with a smaller
decay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...kernels.random_bits import random_bits, stream_key
from ..config.settings import TrainingConfig
from ..model.dtypes import DTYPES
from .local import local_part, sent
from .positions import row_chunks
from .stochastic_rounding import round_stochastically

_CHUNK_ELEMENTS = {"cpu": 2**16, "cuda": 2**24}
"""Elements averaged at a time, by device: the temporaries take some 8 bytes for each in fp32, 40 in bf16."""


class WeightAverage:
    """The averages of the parameters that are trained. Frozen parameters have none.

    Args:
        named_parameters: of fp32 or bf16, which may be DTensors.
        decay: of the average, in (0, 1).
        dtype: of the average: fp32, or bf16 with stochastic rounding.
        seed: of the rounding.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], decay: float, dtype: torch.dtype, seed: int
    ):
        self._parameters = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        self._averages = [torch.zeros_like(parameter, dtype=dtype) for _, parameter in self._parameters]
        self._decay, self._dtype, self._seed = decay, dtype, seed

    def tensors(self) -> dict[str, Tensor]:
        """Return the averages by name of their parameter, each with the shape and the layout of the parameter."""
        return {name: average for (name, _), average in zip(self._parameters, self._averages, strict=True)}

    @torch.no_grad()
    def reset(self) -> None:
        """Begin with the present weights; a bf16 average rounds them to the nearest."""
        for _, parameter, average in self._locals():
            average.copy_(parameter)

    @torch.no_grad()
    def update(self, skip: Tensor, step: int) -> None:
        """Average the present weights in, or change nothing, without a host sync.

        Args:
            skip: [] fp32 on the device of the parameters, 1 to change nothing, else 0.
            step: number of the step in the run, of which the random rounding is a function.
        """
        share = (1 - self._decay) * (1 - skip)
        if self._dtype == torch.float32:
            for _, parameter, average in self._locals():
                size = _CHUNK_ELEMENTS.get(average.device.type, 2**16)
                for now, mean in zip(parameter.view(-1).split(size), average.view(-1).split(size), strict=True):
                    mean.add_((now.float() - mean).mul_(share))
            return
        keys_P2 = torch.tensor([stream_key(self._seed, step, f"ema.{name}") for name, _ in self._parameters])
        keys_P2 = sent(keys_P2.to(torch.int32), share.device)
        for number, (whole, parameter, average) in enumerate(self._locals()):
            self._update_rounded(whole, parameter, average, share, keys_P2[number])

    def _update_rounded(self, whole: Tensor, parameter: Tensor, average: Tensor, share: Tensor, keys: Tensor) -> None:
        """Update a bf16 average with stochastic rounding: rounded to the nearest, it would not change at all."""
        columns = average.shape[-1] if average.ndim else 1
        if not average.numel():
            return
        now, mean = parameter.view(-1, columns), average.view(-1, columns)
        for rows, positions in row_chunks(whole, _CHUNK_ELEMENTS.get(average.device.type, 2**16)):
            before = mean[rows].float()
            after = before + (now[rows].float() - before) * share
            mean[rows] = round_stochastically(after, random_bits(positions, keys))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, let the parameters have the values of the average. The weights are kept in host memory meanwhile."""
        with torch.no_grad():
            weights = [parameter.to("cpu", copy=True) for _, parameter, _ in self._locals()]
            for _, parameter, average in self._locals():
                parameter.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, parameter, _), weight in zip(self._locals(), weights, strict=True):
                    parameter.copy_(weight)

    def _locals(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield each parameter, and this rank's parts of it and of its average."""
        for (_, parameter), average in zip(self._parameters, self._averages, strict=True):
            yield parameter, local_part(parameter).detach(), local_part(average)


def build_average(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: TrainingConfig, seed: int
) -> WeightAverage | None:
    """Return the average of ``config``; None without one."""
    if config.ema_decay is None:
        return None
    return WeightAverage(named_parameters, config.ema_decay, DTYPES[config.ema_dtype], seed)
