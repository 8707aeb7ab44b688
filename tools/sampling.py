"""How text is sampled from a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..engine.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Raises:
        UserError: a value makes no sense.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability."""
    top_k: int = 0
    """Only that many of the most likely tokens; 0 for all."""
    seed: int = 0

    def __post_init__(self) -> None:
        limits = (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("--temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--top-k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("--seed", self.seed, 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        )
        for option, value, holds, expected in limits:
            if not holds:
                raise UserError(f"{option} {value}: expected {expected}")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise UserError("--top-p and --top-k choose among sampled tokens; set --temperature above 0, such as 0.8")
