"""From a record to a conversation: the shapes in which chat data comes, told apart record by record.

``messages`` of OpenAI and Hugging Face, ``conversations`` of ShareGPT, and Alpaca's instruction, input and output all
become a list of messages with a role and a content, as chat templates take them. What is none, or could be read in two
ways, is refused; nothing is guessed or mended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from .records import MalformedError
from .texts import json_type

ROLES = ("system", "developer", "user", "assistant", "tool")
_LISTS = ("messages", "conversations")
_ALPACA = ("instruction", "output")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """What a chat template renders."""

    messages: list[dict[str, Any]]
    """Each with a role of ``ROLES``; its content, where it has one, is a string. Never empty."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools that the assistant may call."""

    def assistant_turns(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


def read_conversation(record: dict[str, Any]) -> Conversation:
    """The conversation in ``record``.

    ``system`` beside any shape is the first message, ``tools`` the list of tools or its JSON. Alpaca's input follows
    the instruction on a new line; its ``history`` is a list of pairs of earlier instructions and outputs.

    Raises:
        MalformedError: there is none, or two; a message is broken; the assistant says nothing.
    """
    lists = [key for key in _LISTS if record.get(key) is not None]
    alpaca = all(record.get(key) is not None for key in _ALPACA)
    shapes = lists + (["instruction and output"] if alpaca else [])
    if len(shapes) > 1:
        raise MalformedError(f"two conversations in one record: {' beside '.join(shapes)}; keep one")
    if not shapes:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise MalformedError(f"no messages, conversations, or instruction with output (keys there: {keys})")
    messages = _alpaca_messages(record) if alpaca else _listed_messages(record[lists[0]], lists[0])
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise MalformedError(f"system is {json_type(system)}, not a string")
    if system:
        if messages[0]["role"] == "system":
            raise MalformedError("two system prompts: the key system, and the first message")
        messages.insert(0, {"role": "system", "content": system})
    if not any(message["role"] == "assistant" for message in messages):
        raise MalformedError("no turn of the assistant, so there is nothing to learn")
    return Conversation(messages, _read_tools(record.get("tools")))


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


def called_names(message: dict[str, Any]) -> list[str]:
    """Names of the functions that a message of the assistant calls."""
    return [call.get("function", call)["name"] for call in message.get("tool_calls") or ()]


def _listed_messages(value: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise MalformedError(f"{key} is {json_type(value)}, not an array")
    if not value:
        raise MalformedError(f"{key} is empty")
    return [_read_message(item, f"{key}[{index}]") for index, item in enumerate(value)]


def _read_message(item: Any, place: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise MalformedError(f"{place} is {json_type(item)}, not an object")
    # transformers leaves out what is null: templates would print None.
    item = {key: value for key, value in item.items() if value is not None}
    if "role" in item and "from" in item:
        raise MalformedError(f"{place} has both a role and a from; keep one")
    if "from" in item:
        return _read_sharegpt(item, place)
    if "role" not in item:
        raise MalformedError(f"{place} has no role and no from")
    role = item["role"]
    if role not in ROLES:
        raise MalformedError(f"{place}: role {role!r} is none of {', '.join(ROLES)}")
    if "function_call" in item:
        raise MalformedError(f"{place}: function_call is no longer known to templates; write tool_calls")
    if item.get("weight", 1) != 1:
        raise MalformedError(f"{place}: weights of single turns are not supported; leave the key weight out")
    calls = _read_calls(item, place)
    if "content" in item:
        item["content"] = _read_content(item["content"], place)
    elif not calls:
        raise MalformedError(f"{place} has no content")
    if role == "assistant" and not calls and not item["content"].strip():
        raise MalformedError(f"{place}: the assistant's content is empty")
    return item


def _read_sharegpt(item: dict[str, Any], place: str) -> dict[str, Any]:
    name = item["from"]
    role = _SHAREGPT_ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise MalformedError(f"{place}: from {name!r} is none of {', '.join(_SHAREGPT_ROLES)}")
    if "value" not in item:
        raise MalformedError(f"{place} has no value")
    return _plain_message(role, _read_content(item["value"], place), place)


def _plain_message(role: str, content: str, place: str) -> dict[str, Any]:
    if role == "assistant" and not content.strip():
        raise MalformedError(f"{place}: the assistant's content is empty")
    return {"role": role, "content": content}


def _read_content(content: Any, place: str) -> str:
    """A string, or the texts of a list of parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise MalformedError(f"{place}: the content is {json_type(content)}, not a string")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            what = f"of type {kind!r}" if isinstance(kind, str) else "without a type"
            raise MalformedError(f"{place}: a part of the content is {what}; only parts of type 'text' are supported")
        if not isinstance(part.get("text"), str):
            raise MalformedError(f"{place}: a part of the content has no text")
        texts.append(part["text"])
    return "".join(texts)


def _read_calls(item: dict[str, Any], place: str) -> list[Any]:
    calls = item.get("tool_calls", [])
    if not isinstance(calls, list):
        raise MalformedError(f"{place}: tool_calls is {json_type(calls)}, not an array")
    if calls and item["role"] != "assistant":
        raise MalformedError(f"{place}: tool_calls in a message of role {item['role']!r}; only the assistant calls")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise MalformedError(f"{place}: a tool call has no function with a name")
    return calls


def _read_tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        try:
            tools = orjson.loads(tools) if tools.strip() else None
        except orjson.JSONDecodeError as error:
            raise MalformedError(f"tools is not valid JSON: {error.msg}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise MalformedError("tools is not an array of objects")
    return tools


def _alpaca_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise MalformedError("history is not an array of pairs of an instruction and an output")
    parts = [record["instruction"], record.get("input")]
    for key, value in zip(("instruction", "input"), parts, strict=True):
        if value is not None and not isinstance(value, str):
            raise MalformedError(f"{key} is {json_type(value)}, not a string")
    question = "\n".join(part for part in parts if part)
    if not question.strip():
        raise MalformedError("the instruction is empty")
    messages = []
    for index, (asked, answered) in enumerate([*history, (question, record["output"])]):
        place = f"history[{index}]" if index < len(history) else "output"
        for text in (asked, answered):
            if not isinstance(text, str):
                raise MalformedError(f"{place} is {json_type(text)}, not a string")
        messages += [{"role": "user", "content": asked}, _plain_message("assistant", answered, place)]
    return messages
