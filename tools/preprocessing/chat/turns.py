"""Finds the assistant's turns in a rendered conversation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ....engine.errors import UserError
from ..records.errors import MalformedError
from .conversation import Conversation, called_functions
from .template import ANSWERS, QUESTION, ChatTemplate, Span, probe

_OPEN_REASONING = re.compile(r"<think>\s*\Z")
_MARKERS = "\ue0f0\ue0f1\ue1f0\ue1f1\ue2f0\ue2f1\ue3f0\ue3f1"


def trained_spans(conversation: Conversation, spans: list[Span], text: str) -> list[Span]:
    """Return the spans without those of turns that are marked as not for training.

    Raises:
        MalformedError: there are such turns, but the template does not have one {% generation %} block for each turn.
    """
    if not conversation.untrained:
        return spans
    turns = conversation.assistant_turns()
    if len(spans) == len(turns) and all(
        _may_be_turn(conversation.messages[index], text[start:end])
        for index, (start, end) in zip(turns, spans, strict=True)
    ):
        return [span for index, span in zip(turns, spans, strict=True) if index not in conversation.untrained]
    raise MalformedError(
        "a turn is marked as not for training, but the chat template does not have one {% generation %} block for "
        "each turn of the assistant; give --chat-template a template without such blocks, or leave the record out"
    )


def _may_be_turn(message: dict[str, Any], said: str) -> bool:
    """Return whether the text of a span contains the message's content and calls."""
    content = (message.get("content") or "").rpartition("</think>")[2].strip()
    return content.lower() in said.lower() and all(call["name"] in said for call in called_functions(message))


class TurnFinder:
    """Finds the assistant's turns in a rendered conversation, for templates that do not mark them.

    A turn is what the assistant has to write: from the end of the generation prompt to the token that ends the turn.
    The messages before a turn, rendered with the generation prompt, end where the turn starts, if this text is a prefix
    of the whole. If it is not (the template moves the system prompt to the last question, or the assistant opens the
    conversation), two characters that occur nowhere else are put around the contents; the rest must not change.

    Args:
        control: matches control tokens.

    Raises:
        UserError: the template cannot render a question with an answer.
    """

    def __init__(self, template: ChatTemplate, control: re.Pattern[str]) -> None:
        self._template = template
        self._control = control
        question, *answered = (probe(answer) for answer in (None, *ANSWERS))
        asked = _render_probe(template, question)
        turns = [_render_probe(template, conversation) for conversation in answered]
        self._prompted = _render_probe(template, question, prompt=True) != asked
        header = ""
        if not self._prompted and all(turn.startswith(asked) for turn in turns):
            header = _common_prefix(*(turn[len(asked) :] for turn in turns))
        # White space that is not in the prompt belongs to the answer.
        self._header, self._space = (header, "") if header.strip() else ("", header)
        """Text before an answer if the template has no generation prompt, such as "<|assistant|>" or " "."""
        closing = control.search(turns[0], turns[0].rfind(ANSWERS[0]) + len(ANSWERS[0]))
        self._closing = closing.group() if closing else None
        """The token that ends a plain turn."""

    def find(self, conversation: Conversation, text: str) -> list[Span]:
        """Return the turns in ``text``, the rendered conversation, in order.

        Raises:
            MalformedError: a turn cannot be found with certainty.
        """
        try:
            spans: list[Span] = []
            for index in conversation.assistant_turns():
                spans.append(self._find_by_prefix(conversation, index, text, spans[-1][1] if spans else 0))
            return spans
        except (_NotThereError, MalformedError):
            pass
        marked = self._find_by_markers(conversation, text)
        if marked is None:
            raise MalformedError(
                "the chat template renders earlier messages differently when more follow, so that the turns of the "
                "assistant cannot be found; give --chat-template a template with {% generation %} blocks"
            )
        return marked

    def _find_by_prefix(self, conversation: Conversation, index: int, text: str, after: int) -> Span:
        before = replace(conversation, messages=conversation.messages[:index])
        prompt = self._template.render(before, prompt=self._prompted) + self._header
        if not text.startswith(prompt):
            # The prompt opens the reasoning, but the answer has none.
            prompt = _OPEN_REASONING.sub("", prompt)
        if not text.startswith(prompt) or len(prompt) < after:
            raise _NotThereError
        message = conversation.messages[index]
        end = self._find_plain_end(message, text, len(prompt))
        if end is None:
            end = self._find_end(conversation, index, text, prompt)
        return len(prompt), end

    def _find_plain_end(self, message: dict[str, Any], text: str, start: int) -> int | None:
        """Return the end of a turn that consists of its content and the closing token; None for other turns."""
        closing = self._control.search(text, start)
        if closing is None or closing.group() != self._closing or message.get("tool_calls"):
            return None
        return closing.end() if text[start : closing.start()].rstrip().endswith(message["content"].strip()) else None

    def _find_end(self, conversation: Conversation, index: int, text: str, prompt: str) -> int:
        """Return the end of a turn: that of the conversation cut off after it, located in the whole text."""
        up_to = replace(conversation, messages=conversation.messages[: index + 1])
        alone = self._template.render(up_to)
        if not alone.startswith(prompt):
            raise _NotThereError
        turn, start = alone[len(prompt) :], len(prompt)
        closing = ""
        for match in self._control.finditer(turn):
            if not turn[match.end() :].strip():
                turn, closing = turn[: match.end()], match.group()
                break
        if turn and text.startswith(turn, start):
            return start + len(turn)
        # In the whole text, an earlier turn may lack its beginning (the reasoning), but nothing else.
        end = found = start
        while closing and (at := text.find(closing, end)) >= 0 and at + len(closing) - start <= len(turn):
            end = at + len(closing)
            if turn.endswith(text[start:end]):
                found = end
        if found == start:
            raise _NotThereError
        return found

    def _find_by_markers(self, conversation: Conversation, text: str) -> list[Span] | None:
        turns = conversation.assistant_turns()
        markers = [marker for marker in _MARKERS if marker not in text][:2]
        if len(markers) < 2 or any(conversation.messages[index].get("tool_calls") for index in turns):
            return None
        first, last = markers
        # The markers protect white space that a template would strip.
        for outside in (True, False):
            messages = list(conversation.messages)
            for index in turns:
                content = messages[index]["content"]
                core = content if outside else content.strip()
                marked = content.replace(core, f"{first}{core}{last}", 1)
                messages[index] = {**messages[index], "content": marked}
            try:
                marked_text = self._template.render(replace(conversation, messages=messages))
            except MalformedError:
                return None
            order = [character for character in marked_text if character in markers]
            if order == markers * len(turns) and marked_text.replace(first, "").replace(last, "") == text:
                return self._read_markers(marked_text, markers, text)
        return None

    def _read_markers(self, marked_text: str, markers: Sequence[str], text: str) -> list[Span]:
        found = re.finditer("|".join(markers), marked_text)
        places = [match.start() - number for number, match in enumerate(found)]  # without the markers before it
        spans = []
        for start, end in zip(places[::2], places[1::2], strict=True):
            if text.endswith(self._space, 0, start):
                start -= len(self._space)
            closing = self._control.search(text, end)
            if closing and closing.group() == self._closing and not text[end : closing.start()].strip():
                end = closing.end()
            spans.append((start, end))
        return spans


def _render_probe(template: ChatTemplate, conversation: Conversation, prompt: bool = False) -> str:
    """Render a plain conversation, which every template must support. Raise UserError if it does not."""
    try:
        return template.render(conversation, prompt)
    except (MalformedError, RecursionError) as error:
        raise UserError(f"{template.origin}: not a usable chat template, a plain question fails: {error}") from None


def frame(template: ChatTemplate) -> str:
    """Return all that the template writes around a question, an answer without reasoning, and a question."""
    messages = [*probe(ANSWERS[0]).messages, *probe(None).messages]
    text = _render_probe(template, Conversation(messages))
    for content in (QUESTION, *ANSWERS):
        text = text.replace(content, "")
    return text


class _NotThereError(Exception):
    """A turn does not start where the messages before it end."""


def _common_prefix(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]
