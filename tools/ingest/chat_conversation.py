"""A conversation in the one form that chat templates render, whatever form it was read from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


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
