"""Reads a conversation from a record; the format is detected for each record.

``messages`` of OpenAI and Hugging Face, ``conversations`` of ShareGPT, the usual mixtures of their keys and roles, and
Alpaca's instruction, input and output become a list of messages with a role and a content, as chat templates expect
them. Ambiguous records are refused. Unused keys are counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..records.errors import MalformedError
from ..records.text_choice import json_type
from .conversation import Conversation
from .tool_calls import parse_embedded, read_calls, read_tools
from .training_marks import may_be_mark, take_training_mark

ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "chatbot", "model", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
"""Roles of data sets, and ours. A "call" is a turn of the assistant whose content is the JSON of its tool calls."""
_ROLE_KEYS, _OTHER_ROLE_KEYS = ("role", "from"), ("speaker", "author")
_CONTENT_KEYS, _OTHER_CONTENT_KEYS = ("content", "value"), ("text", "utterance", "message")
"""The second of each pair counts only without a key of the first."""
_LISTS = ("messages", "conversations")
_OTHER_LISTS = ("conversation", "dialog", "dialogue", "turns", "chat")
"""Lists only if their value is one: "chat" may also be a name."""
_ALPACA = ("instruction", "output")
_ALPACA_KEYS = frozenset({"instruction", "input", "output", "history"})
_SHAPES = frozenset({*_LISTS, *_OTHER_LISTS, *_ALPACA})
_CONVERSATION_KEYS = frozenset({"system", "tools"})
_PLAIN = frozenset(ROLES) - {"function_call", "tool_call"}
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_SEVERAL = "several texts in the content"
"""Internal mark of a message whose content was joined from several texts."""
_MOST_KEYS = 100
"""Unused keys of a conversation that are counted by name."""


_Message = tuple[dict[str, Any], bool | None]
"""A message, and whether a mark says to train on it."""


def read_conversation(record: dict[str, Any]) -> Conversation:
    """Return the conversation in ``record``.

    In any format, ``system`` is the first message and ``tools`` the list of tools or its JSON. Alpaca's input follows
    the instruction on a new line; its ``history`` is a list of pairs of earlier instructions and outputs.

    Raises:
        MalformedError: there is no conversation, or two; a message is broken; the assistant says nothing; a training
            mark is not supported.
    """
    notes: Counter[str] = Counter()
    record, key = _find_list(record)
    trained = _read_other_keys(record, key, notes) if len(record) > 1 else None
    messages = _alpaca_messages(record) if key is None else _listed_messages(record[key], key, notes)
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise MalformedError(f"system is {json_type(system)}, not a string")
    if system:
        if messages[0][0]["role"] == "system":
            raise MalformedError("two system prompts: the key system, and the first message")
        messages.insert(0, ({"role": "system", "content": system}, None))
    turns = [index for index, (message, _) in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise MalformedError("no turn of the assistant, so there is nothing to learn")
    untrained = frozenset(index for index in turns if trained is False or messages[index][1] is False)
    tools = record.get("tools")
    if tools is not None:
        tools = read_tools(tools, notes)
    several = next((index + 1 for index, (message, _) in enumerate(messages) if message.pop(_SEVERAL, False)), None)
    return Conversation([message for message, _ in messages], tools, untrained, several, notes)


def _read_other_keys(record: dict[str, Any], key: str | None, notes: Counter[str]) -> bool | None:
    """Count the unused keys next to the conversation; return what a training mark among them says."""
    used = _CONVERSATION_KEYS | (_ALPACA_KEYS if key is None else {key})
    others = {name: value for name, value in record.items() if name not in used and value is not None}
    _refuse_media(others, "the record")
    trained = take_training_mark(others, "the record") if any(map(may_be_mark, others)) else None
    for name in list(others)[:_MOST_KEYS]:
        notes[f"key {name!r} next to the conversation not used"] += 1
    return trained


def _find_list(record: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return the record and the key of its list of messages, None for Alpaca's keys.

    A list within an object, such as {"conversation": {"messages": [...]}}, is moved to the record itself.
    """
    shapes = [name for name, value in record.items() if name in _SHAPES and value is not None]
    if len(shapes) > 1 or shapes[:1] != ["messages"]:
        shapes = [name for name in shapes if name in _LISTS or (name in _OTHER_LISTS and _may_be_list(record[name]))]
        if all(record.get(name) is not None for name in _ALPACA):
            shapes.append("instruction and output")
    if len(shapes) > 1:
        raise MalformedError(f"two conversations in one record: {' and '.join(shapes)}; keep one")
    if not shapes:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise MalformedError(f"no messages, conversations, or instruction with output (keys there: {keys})")
    key = shapes[0]
    if key not in record:
        return record, None
    value = record[key]
    if isinstance(value, list):
        return record, key
    if isinstance(value, str):
        value = parse_embedded(value, key)
    if not isinstance(value, dict):
        return {**record, key: value}, key
    inner = {name: item for name, item in value.items() if item is not None}
    outer = {name: item for name, item in record.items() if name != key and item is not None}
    if inner.keys().isdisjoint((*_LISTS, *_OTHER_LISTS, *_ALPACA)):
        raise MalformedError(f"{key} is an object, not an array")
    if both := sorted(inner.keys() & outer.keys()):
        raise MalformedError(f"{key} and the record both have the key {both[0]!r}; keep one")
    return _find_list({**outer, **inner})


def _may_be_list(value: Any) -> bool:
    return isinstance(value, list | dict) or (isinstance(value, str) and value.lstrip().startswith(("[", "{")))


def _refuse_media(item: dict[str, Any], place: str) -> None:
    for key in _MEDIA:
        if item.get(key):
            raise MalformedError(f"{place} has {key}, which are not supported; only text can be trained on")


def _listed_messages(value: Any, key: str, notes: Counter[str]) -> list[_Message]:
    if not isinstance(value, list):
        raise MalformedError(f"{key} is {json_type(value)}, not an array")
    if not value:
        raise MalformedError(f"{key} is empty")
    return [_read_message(item, f"{key}[{index}]", notes) for index, item in enumerate(value)]


def _read_message(item: Any, place: str, notes: Counter[str]) -> _Message:
    if not isinstance(item, dict):
        raise MalformedError(f"{place} is {json_type(item)}, not an object")
    if len(item) == 2 and type(content := item.get("content", item.get("value"))) is str:
        role = item.get("role", item.get("from"))  # the fast path: only these two keys
        if type(role) is str and role in _PLAIN and (ROLES[role] != "assistant" or content.strip()):
            return {"role": ROLES[role], "content": content}, None
    # Drop null as transformers does: templates would print None.
    null_content = any(key in item and item[key] is None for key in _CONTENT_KEYS)
    item = {key: value for key, value in item.items() if value is not None}
    role = _take_role(item, place)
    several = any(isinstance(item.get(key), list) and len(item[key]) > 1 for key in _CONTENT_KEYS)
    content = _take_content(item, place)
    mark = take_training_mark(item, place)
    if mark and role not in ("assistant", "call"):
        raise MalformedError(
            f"{place}: a turn of role {role!r} is marked for training, but only turns of the assistant are trained on; "
            "remove the mark"
        )
    _refuse_media(item, place)
    if "function_call" in item:
        raise MalformedError(f"{place}: templates no longer support function_call; write tool_calls")
    if role == "call":
        if "tool_calls" in item:
            raise MalformedError(f"{place} has tool_calls, and is a tool call itself; keep one")
        calls = parse_embedded(content or "", f"{place}: the tool call")
        item["tool_calls"] = calls if isinstance(calls, list) else [calls]
        role, content = "assistant", None
    calls = read_calls(item.pop("tool_calls", []), place, notes)
    if calls and role != "assistant":
        raise MalformedError(f"{place}: tool_calls in a message of role {role!r}; only the assistant calls")
    if content is None and not calls:
        raise MalformedError(f"{place} has no content")
    if role == "assistant" and not calls and not (content or "").strip():
        raise MalformedError(f"{place}: the assistant's content is empty")
    message: dict[str, Any] = {"role": role}
    if content is not None or null_content:
        message["content"] = content
    if calls:
        message["tool_calls"] = calls
    if several:
        message[_SEVERAL] = True
    return {**message, **item}, mark


def _take_role(item: dict[str, Any], place: str) -> str:
    keys = [key for key in _ROLE_KEYS if key in item] or [key for key in _OTHER_ROLE_KEYS if key in item]
    if not keys:
        raise MalformedError(f"{place} has no role and no from")
    roles = []
    for key in keys:
        name = item.pop(key)
        role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
        if role is None:
            raise MalformedError(f"{place}: {key} {name!r} is not one of {', '.join(ROLES)}")
        roles.append(role)
    if len(set(roles)) > 1:
        raise MalformedError(f"{place}: {' and '.join(keys)} name different roles; keep one")
    return roles[0]


def _take_content(item: dict[str, Any], place: str) -> str | None:
    keys = [key for key in _CONTENT_KEYS if key in item] or [key for key in _OTHER_CONTENT_KEYS if key in item]
    contents = [_read_content(item.pop(key), place) for key in keys]
    if len(set(contents)) > 1:
        raise MalformedError(f"{place}: {' and '.join(keys)} differ; keep one")
    return contents[0] if contents else None


def _read_content(content: Any, place: str) -> str:
    """Return a string content, or the joined texts of a list of parts."""
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


def _alpaca_messages(record: dict[str, Any]) -> list[_Message]:
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
    messages: list[_Message] = []
    for index, (asked, answered) in enumerate([*history, (question, record["output"])]):
        place = f"history[{index}]" if index < len(history) else "output"
        for text in (asked, answered):
            if not isinstance(text, str):
                raise MalformedError(f"{place} is {json_type(text)}, not a string")
        if not answered.strip():
            raise MalformedError(f"{place}: the assistant's content is empty")
        messages += [({"role": "user", "content": asked}, None), ({"role": "assistant", "content": answered}, None)]
    return messages
