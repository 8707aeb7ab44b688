"""Finds what a chat template left out of a conversation: an error for essential parts, a count for others.

Templates silently drop roles and keys that they do not know, the reasoning of earlier turns, and text next to a tool
call. Therefore each part of each message is searched in the rendered text.
"""

from __future__ import annotations

import json
import re
from collections import Counter

from ..records.errors import MalformedError
from .conversation import Conversation, all_strings, called_functions

_READ = ("role", "content", "tool_calls")
_IDENTIFIERS = ("id", "tool_call_id", "index")
"""Keys that identify a message or a call, without content to learn."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
_REASONING_END = "</think>"


def refuse_dropped_messages(conversation: Conversation, text: str) -> None:
    """Raise MalformedError when a question, a prompt, a tool's answer or a tool is not in the rendered ``text``."""
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant" and not _contains(text, message.get("content") or ""):
            raise MalformedError(f"the chat template leaves message {index + 1} out (role {message['role']!r})")
    for tool in conversation.tools or ():
        name = tool.get("function", tool).get("name") if isinstance(tool.get("function", tool), dict) else None
        if isinstance(name, str) and name not in text:
            raise MalformedError(f"the chat template leaves the tool {name!r} out")


def refuse_dropped_calls(conversation: Conversation, said: str) -> None:
    """Raise MalformedError when a call's name, or the name of an argument, is not in what the assistant writes."""
    for index in conversation.assistant_turns():
        for function in called_functions(conversation.messages[index]):
            if function["name"] not in said:
                raise MalformedError(f"the chat template leaves the tool calls of message {index + 1} out")
            arguments = function.get("arguments")
            for name in arguments if isinstance(arguments, dict) else ():
                if not _contains(said, name):
                    raise MalformedError(
                        f"the chat template leaves the argument {name!r} of a tool call of message {index + 1} out"
                    )


def count_dropped(
    conversation: Conversation, spans: list[tuple[int, int]], text: str, template: str, notes: Counter[str]
) -> None:
    """Count in ``notes``, by kind, the messages of which another part is missing in the rendered ``text``.

    Args:
        spans: the turns of the assistant in ``text``, if there is one for each.
        template: the template's source. A key whose value is not a text counts as used if the source contains its name.
    """
    turns = iter(spans if len(spans) == len(conversation.assistant_turns()) else ())
    whole = text
    for message in conversation.messages:
        role, content = message["role"], message.get("content") or ""
        text = whole
        if role == "assistant" and (span := next(turns, None)) is not None:
            text = whole[span[0] : span[1]]
        if role == "assistant" and not _contains(text, content):
            answer = content.rpartition(_REASONING_END)[2] if _REASONING_END in content else None
            if answer is None or not _contains(text, answer):
                notes["content of an assistant turn changed or dropped by the template"] += 1
            else:
                notes["reasoning in the content of an assistant turn dropped by the template"] += 1
        if len(message) == 2:  # role and content
            continue
        for key in message.keys() - _READ:
            values = [value for value in all_strings(message[key]) if value.strip()]
            used = all(_contains(text, value) for value in values) if values else _mentions(template, key)
            if key not in _IDENTIFIERS and not used:
                label = "reasoning" if key in _REASONING else f"key {key!r}"
                notes[f"{label} of a turn of role {role} dropped by the template"] += 1


def _contains(text: str, part: str) -> bool:
    """Return whether ``text`` contains ``part``, possibly trimmed or escaped as JSON, as some templates write it."""
    if part in text:
        return True
    part = part.strip()
    return part in text or any(json.dumps(part, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True) if part)


def _mentions(template: str, key: str) -> bool:
    return re.search(rf"\b{re.escape(key)}\b", template) is not None
