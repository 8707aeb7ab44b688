"""A conversation as chat templates render it, and as it is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Conversation:
    """The input of a chat template."""

    messages: list[dict[str, Any]]
    """Each with a role; its content, where it has one, is a string. Never empty."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools that the assistant may call."""
    untrained: frozenset[int] = frozenset()
    """Indices of the assistant's messages that are marked as not for training."""
    joined_parts: int | None = None
    """Number, from 1, of the first message whose content was a list of several texts, now joined."""
    notes: Counter[str] = field(default_factory=Counter)
    """Counts of what is in the record but not trained on."""

    def assistant_turns(self) -> list[int]:
        """Return the indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


@dataclass(frozen=True)
class EncodedChat:
    """A conversation, ready to be written."""

    ids: npt.NDArray[np.int32]
    """int32[T], the end-of-document token included where one was asked for."""
    mask: npt.NDArray[np.uint8]
    """uint8[T]: 1 on tokens to be predicted. At least one is."""
    turns_dropped: int
    """Messages, of any role, that were cut off."""
    characters: int
    """Of the rendered text."""
    text_bytes: int
    """Of the rendered text in UTF-8."""
    notes: Counter[str] = field(default_factory=Counter)
    """What of the record is not trained on, by kind."""


@dataclass(frozen=True)
class ChatBos:
    """The BOS of conversations, which a chat template writes or omits.

    With ``--bos auto`` the template decides, as in transformers' ``apply_chat_template``. ``yes`` adds a BOS if the
    template writes none; ``no`` removes the one at the start.
    """

    choice: str = "auto"
    """One of ``BOS_CHOICES``."""
    ids: tuple[int, ...] = ()
    """The tokenizer's BOS; empty: it has none."""

    def starts(self, ids: Sequence[int]) -> bool:
        """Whether a conversation's ``ids`` begin with the BOS."""
        return bool(self.ids) and tuple(ids[: len(self.ids)]) == self.ids

    def change(self, ids: Sequence[int]) -> int:
        """Return by how many tokens a conversation becomes longer (or shorter, < 0) at its start."""
        if self.choice == "yes":
            return 0 if self.starts(ids) else len(self.ids)
        return -len(self.ids) if self.choice == "no" and self.starts(ids) else 0

    def apply(self, ids: list[int], mask: npt.NDArray[np.uint8]) -> tuple[list[int], npt.NDArray[np.uint8]]:
        """Return ids and loss mask with the BOS added or removed. The BOS is never a target."""
        change = self.change(ids)
        if change == 0:
            return ids, mask
        if change > 0:
            return [*self.ids, *ids], np.concatenate([np.zeros(change, np.uint8), mask])
        return ids[-change:], mask[-change:]


def all_strings(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from all_strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from all_strings(item)


def called_functions(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the functions that a message of the assistant calls, each with a name."""
    return [call.get("function", call) for call in message.get("tool_calls") or ()]
