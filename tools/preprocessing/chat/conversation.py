"""A conversation in the one form that chat templates render, whatever form it was read from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Conversation:
    """What a chat template renders."""

    messages: list[dict[str, Any]]
    """Each with a role; its content, where it has one, is a string. Never empty."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools that the assistant may call."""
    untrained: frozenset[int] = frozenset()
    """Indices of the assistant's messages that are marked as not for training."""
    joined_parts: int | None = None
    """Number, from 1, of the first message whose content is several texts, joined here."""
    notes: Counter[str] = field(default_factory=Counter)
    """What the record holds that is not trained on, and how often."""

    def assistant_turns(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


@dataclass(frozen=True)
class EncodedChat:
    """A conversation, ready to be written."""

    ids: npt.NDArray[np.int32]
    """int32[T], the end-of-document token included where one was asked for."""
    mask: npt.NDArray[np.uint8]
    """uint8[T]: 1 on tokens to be predicted. At least one is."""
    turns_kept: int
    """Messages of any role, as are the dropped ones."""
    turns_dropped: int
    characters: int
    """Of the rendered text."""
    text_bytes: int
    """Of the rendered text in UTF-8."""
    notes: Counter[str] = field(default_factory=Counter)
    """What of the record is not trained on, by kind."""


def all_strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
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
    """The functions that a message of the assistant calls, each with a name."""
    return [call.get("function", call) for call in message.get("tool_calls") or ()]
