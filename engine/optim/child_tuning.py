"""Child-tuning without a task: every step trains a random part of the elements of every parameter.

Child-Tuning_F of Xu et al., "Raise a Child in Large Language Model" (2021), https://arxiv.org/abs/2109.05687: gradients
are multiplied by a Bernoulli mask and divided by its probability just before the optimizer uses them, after clipping.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ...kernels.random_bits import stream_key, uniform
from .local import local_part
from .positions import row_chunks

_CHUNK_ELEMENTS = {"cpu": 2**16, "cuda": 2**24}
"""Elements masked at a time, by device: positions and random bits take some 40 bytes for each."""


class ChildTuning:
    """Masks gradients; the mask is a function of (seed, step, parameter, position in the whole parameter) only.

    Args:
        probability: with which an element keeps its gradient in a step, in (0, 1).
        seed: of the run.
    """

    def __init__(self, probability: float, seed: int):
        self.probability, self._seed = probability, seed

    @torch.no_grad()
    def mask_(self, parameters: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Set the gradients of the other elements to zero, without a host sync.

        The rest is not scaled: the optimizer divides gradients by ``grad_scale`` in fp32, and so by the probability.

        Args:
            parameters: by name.
            step: number of the step of the run.
        """
        for name, parameter in parameters:
            if parameter.grad is None or local_part(parameter).numel() == 0:
                continue
            gradient = local_part(parameter.grad)
            key = torch.tensor(stream_key(self._seed, step, f"child-tuning.{name}"), dtype=torch.int32)
            key = key.to(gradient.device, non_blocking=True)
            flat = gradient.view(-1, gradient.shape[-1] if gradient.ndim else 1)
            for rows, positions in row_chunks(parameter, _CHUNK_ELEMENTS.get(gradient.device.type, 2**16)):
                flat[rows].masked_fill_(uniform(positions, key) >= self.probability, 0.0)
