"""Unpacks tool calls and tool schemas from their stored forms to the objects that templates render.

APIs send arguments as a JSON string, data sets store whole lists as one, and Arrow fills objects with null for the keys
of other rows. Templates expect objects: ``arguments | tojson`` of a string would write a quoted string, and the model
would learn it. Broken JSON and values of another type are refused.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

from ..records.errors import MalformedError
from ..records.text_choice import json_type
from .conversation import Conversation

NULLS_DROPPED = "null values dropped from tool calls and tools"


def parse_embedded(text: str, place: str) -> Any:
    """Parse a JSON string strictly: integers of any size, no repeated key, no NaN. Raise MalformedError if broken."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            raise MalformedError(f"{place} is JSON with the same key twice in one object")
        return value

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise MalformedError(f"{place} is JSON with the number {digits[:40]}, which is not finite")
        return value

    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=number, parse_constant=number)
    except json.JSONDecodeError as error:
        raise MalformedError(f"{place} is not valid JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise MalformedError(f"{place} is JSON with an integer of thousands of digits") from None


def parse_if_text(value: Any, place: str) -> Any:
    """Return ``value``, parsed if it is a JSON string."""
    return parse_embedded(value, place) if isinstance(value, str) else value


def read_calls(calls: Any, place: str, notes: Counter[str]) -> list[dict[str, Any]]:
    """Read ``tool_calls``. Arguments are an object, or a string that contains one.

    Raises:
        MalformedError: broken JSON, not an array, or a call without a name.
    """
    calls = parse_if_text(calls, f"{place}: tool_calls") if calls != "" else []
    if not isinstance(calls, list):
        raise MalformedError(f"{place}: tool_calls is {json_type(calls)}, not an array")
    return [_read_call(call, f"{place}: tool_calls[{index}]", notes) for index, call in enumerate(calls)]


def _read_call(call: Any, place: str, notes: Counter[str]) -> dict[str, Any]:
    call = parse_if_text(call, place)
    if isinstance(call, dict) and isinstance(call.get("function"), str):
        call = {**call, "function": parse_embedded(call["function"], f"{place}.function")}
    inner = call.get("function") if isinstance(call, dict) else None
    function = call if inner is None else inner
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise MalformedError(f"{place}: a tool call has no function with a name")
    has_arguments = "arguments" in function
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}  # as vLLM reads it
    read = parse_if_text(arguments, f"{place}: arguments")
    if not isinstance(read, dict):
        raise MalformedError(f"{place}: arguments is {json_type(read)}, not an object")
    # A null in a JSON string comes from the author of the data, not from Arrow.
    arguments = arguments if isinstance(arguments, str) else without_nulls(arguments, notes)
    function = {key: value for key, value in function.items() if value is not None}
    if has_arguments:
        function["arguments"] = arguments
    if inner is None:
        return function
    return {**{key: value for key, value in call.items() if value is not None}, "function": function}


def read_tools(tools: Any, notes: Counter[str]) -> list[dict[str, Any]] | None:
    """Read the schemas of a record's tools. Raise MalformedError if they are not an array of objects."""
    if isinstance(tools, str):
        tools = parse_embedded(tools, "tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise MalformedError("tools is not an array of objects")
    return [_read_tool(tool, f"tools[{index}]", notes) for index, tool in enumerate(tools)]


def _read_tool(tool: Any, place: str, notes: Counter[str]) -> dict[str, Any]:
    if not isinstance(tool := _parse_if_object(tool, place), dict):
        raise MalformedError("tools is not an array of objects")
    tool = dict(tool)
    for key in ("function", "parameters"):
        if isinstance(tool.get(key), str):
            tool[key] = parse_embedded(tool[key], f"{place}.{key}")
    function = tool.get("function")
    if isinstance(function, dict) and isinstance(function.get("parameters"), str):
        parameters = parse_embedded(function["parameters"], f"{place}.function.parameters")
        tool["function"] = {**function, "parameters": parameters}
    read: dict[str, Any] = without_nulls(tool, notes)
    return read


def _parse_if_object(value: Any, place: str) -> Any:
    return parse_embedded(value, place) if isinstance(value, str) and value.lstrip().startswith("{") else value


def without_nulls(value: Any, notes: Counter[str]) -> Any:
    """Return ``value`` without keys that are null, at any depth. Arrays keep theirs: Arrow adds none."""
    if isinstance(value, dict):
        kept = {key: without_nulls(item, notes) for key, item in value.items() if item is not None}
        if len(kept) < len(value):
            notes[NULLS_DROPPED] += len(value) - len(kept)
        return kept
    return [without_nulls(item, notes) for item in value] if isinstance(value, list) else value


def with_arguments(conversation: Conversation, as_text: bool) -> Conversation:
    """Return the conversation with the arguments of all calls as objects, or as JSON strings."""
    messages = []
    for message in conversation.messages:
        if calls := message.get("tool_calls"):
            message = {**message, "tool_calls": [_convert_call(call, as_text) for call in calls]}
        messages.append(message)
    return replace(conversation, messages=messages)


def _convert_call(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if arguments is None or isinstance(arguments, str) == as_text:
        return call
    converted = json.dumps(arguments, ensure_ascii=False) if as_text else json.loads(arguments)
    function = {**function, "arguments": converted}
    return {**call, "function": function} if "function" in call else function
