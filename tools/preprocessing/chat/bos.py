"""The BOS of conversations, which a chat template writes or leaves out.

With ``--bos auto`` a conversation has the tokens of transformers' ``apply_chat_template``: the template decides. With
``yes`` it gets a BOS where the template wrote none, never a second one; with ``no`` the one at its start is taken away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ChatBos:
    """Small and picklable."""

    choice: str = "auto"
    """One of ``BOS_CHOICES``."""
    ids: tuple[int, ...] = ()
    """The tokenizer's BOS; empty: it has none."""

    def starts(self, ids: Sequence[int]) -> bool:
        """Whether a conversation's ``ids`` begin with the BOS."""
        return bool(self.ids) and tuple(ids[: len(self.ids)]) == self.ids

    def change(self, ids: Sequence[int]) -> int:
        """By how many tokens at its start a conversation becomes longer, or shorter."""
        if self.choice == "yes":
            return 0 if self.starts(ids) else len(self.ids)
        return -len(self.ids) if self.choice == "no" and self.starts(ids) else 0

    def apply(self, ids: list[int], mask: npt.NDArray[np.uint8]) -> tuple[list[int], npt.NDArray[np.uint8]]:
        """Return ids and loss mask with the beginning that ``choice`` asks for; the BOS is never a target."""
        change = self.change(ids)
        if change == 0:
            return ids, mask
        if change > 0:
            return [*self.ids, *ids], np.concatenate([np.zeros(change, np.uint8), mask])
        return ids[-change:], mask[-change:]
