"""Check the cache of a model of transformers: a tiny model of the same type, with the cache and without.

A type may remember more than keys and values, keep its state in its modules, or find positions in another way. The
native families need no check, because tests cover all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .backend import RecomputingSession, Session

if TYPE_CHECKING:
    from .backend import Backend

_TOLERANCE = 5e-4
"""Of logits, relative to the largest one. Rounding causes about 1e-6, and up to 3e-4 in some recurrences."""
_TOKENS = 24
"""Longer than the window of a tiny model."""
_IDS = [(7 * number) % 50 for number in range(_TOKENS)]


class Finding(NamedTuple):
    """What a tiny model of a type shows."""

    obstacle: str | None = None
    """Why the cache of the type cannot be used, in words; None if it can."""
    takes_padding: bool = True
    """Whether prompts of different lengths can be computed together."""


def check_type(make_tiny: Callable[[], Backend]) -> Finding:
    """Compute a tiny model with the cache and without, and prompts of different lengths together and alone.

    Args:
        make_tiny: returns a tiny model of the type, in fp32 on the CPU.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are so small that threads only wait for each other
    try:
        tiny = make_tiny()
        if _cache_error(tiny) > _TOLERANCE:
            return Finding("a tiny model of its type gives other logits with it", False)
        return Finding(None, _padding_error(tiny) <= _TOLERANCE)
    except Exception as error:  # whatever the code of the type raises
        return Finding(f"a tiny model of its type fails with it ({' '.join(str(error).split())[:120]})", False)
    finally:
        torch.set_num_threads(threads)


def rope_depends_on_length(config: object) -> bool:
    """Return whether a configuration contains a rotary scaling whose frequencies change with the length of a text."""
    if not isinstance(config, Mapping):
        return False
    kind = config.get("rope_type", config.get("type"))
    return kind in ("dynamic", "longrope") or any(map(rope_depends_on_length, config.values()))


@torch.inference_mode()
def _cache_error(backend: Backend) -> float:
    # All tokens without the cache first, because some types keep their state in their modules.
    expected = _logits(RecomputingSession(backend.compute))
    return _difference(_logits(backend.open(_TOKENS)), expected)


@torch.inference_mode()
def _padding_error(backend: Backend) -> float:
    prompts = [_IDS[start:] for start in range(0, _TOKENS, 3)]
    alone = torch.cat([backend.compute([prompt]) for prompt in prompts])
    return _difference(backend.compute(prompts), alone)


def _logits(session: Session) -> Tensor:
    """Return the logits after a prompt, and after each further token of two copies of it that differ."""
    middle = _TOKENS // 2
    logits = [session.append([_IDS[:middle]])]
    session.keep([0, 0])
    logits += [session.append([[token], [other]]) for token, other in zip(_IDS[middle:], _IDS, strict=False)]
    return torch.cat(logits)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of logits, relative to the largest logit."""
    difference = float((found - expected).abs().max() / expected.abs().max())
    return math.inf if math.isnan(difference) else difference
