"""How text is sampled from a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...engine.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when a text ends.

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
    """The random numbers of a text are a function of this seed and the number of the sample."""
    min_p: float = 0.0
    """Only tokens at least this many times as likely as the most likely one; 0 for all."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that the text has already, and multiplies negative ones; 1 changes nothing."""
    samples: int = 1
    """Number of continuations of each prompt."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these strings."""

    def __post_init__(self) -> None:
        limits = (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("--temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--top-k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("--min-p", self.min_p, 0 <= self.min_p <= 1, "from 0 (all tokens) to 1"),
            ("--repetition-penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0"),
            ("--samples", self.samples, self.samples >= 1, "at least 1"),
            ("--seed", self.seed, 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        )
        for option, value, holds, expected in limits:
            if not holds:
                raise UserError(f"{option} {value}: expected {expected}")
        if "" in self.stop:
            raise UserError("--stop '': the text is empty; give at least one character")
        if self.temperature == 0:
            self._refuse_options_of_sampling()

    def _refuse_options_of_sampling(self) -> None:
        if self.top_p < 1 or self.top_k or self.min_p:
            raise UserError(
                "--top-p, --top-k and --min-p choose among sampled tokens; set --temperature above 0, such as 0.8"
            )
        if self.samples > 1:
            raise UserError(
                f"--samples {self.samples}: all are equal without randomness; set --temperature above 0, such as 0.8"
            )
