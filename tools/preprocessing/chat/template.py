"""Chat templates: where they are found, how they are rendered, and where the assistant's turns stand in the text.

Rendering is that of transformers, by its own ``render_jinja_template``: the same sandbox, filters and globals in
whichever version is installed, and importing it (0.8 s) loads no PyTorch. One thing is held still: ``strftime_now``,
which many templates use for today's date, gives one moment for the whole run, so that a corpus does not depend on how
long it took. Templates come from the tokenizer's folder or a file, never from the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property, partial
from typing import Any

from ....engine.errors import UserError
from ..records.errors import MalformedError
from .conversation import Conversation, all_strings, called_functions
from .render_limits import FREE_OUTPUT, MAX_FAILURES, TooCostlyError, check_output, check_source, render_within_limits
from .tool_calls import with_arguments

Span = tuple[int, int]
"""First character and end, exclusive."""

_MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_CLOCK_CALL = re.compile(r"""strftime_now\(\s*(?:'([^']*)'|"([^"]*)")\s*\)""")
# The line feed at its end is taken away by trim_blocks, so that the template still begins at the start of a line.
_CLOCK = (
    "{%- macro strftime_now(format) -%}"
    "{%- if format not in retemper_moment -%}"
    "{{- raise_exception('strftime_now with a format that is no literal is not supported') -}}"
    "{%- endif -%}{{- retemper_moment[format] -}}{%- endmacro %}\n"
)
_OPEN_REASONING = re.compile(r"<think>\s*\Z")
_MARKERS = "\ue0f0\ue0f1\ue1f0\ue1f1\ue2f0\ue2f1\ue3f0\ue3f1"
_ARGUMENTS = {"alpha": "omega"}
_QUESTION, _ANSWERS = "Alpha", ("Omega", "Zeta")


class ChatTemplate:
    """A template that renders conversations.

    Args:
        source: the template's text.
        origin: where it comes from, for messages.
        special_tokens: what templates call bos_token, eos_token...
        now: the moment that templates take for the present.

    Raises:
        UserError: jinja2 is missing.
    """

    def __init__(self, source: str, origin: str, special_tokens: dict[str, str], now: datetime) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

        check_source(source, origin)
        self.origin = origin
        self._failures = 0
        self.marks_turns = _MARKED.search(source) is not None
        """Whether {% generation %} blocks say what the assistant writes."""
        self._render: Any = render_jinja_template
        self.special_tokens = special_tokens
        self.text = source
        """What is rendered, with :attr:`moments`."""
        self.moments: dict[str, Any] = {}
        if "strftime_now" in source:
            formats = {single or double for single, double in _CLOCK_CALL.findall(source)}
            self.moments["retemper_moment"] = {form: now.strftime(form) for form in formats}
            self.text = _CLOCK + source

    def adapt(self, conversation: Conversation) -> Conversation:
        """The conversation with its contents and tool calls in the form that this template is written for.

        Arguments become objects, which is what transformers documents, unless the template concatenates strings.
        Several texts of a content are joined, provided that the template does so too, or takes no lists.
        A content of null next to calls is kept, as transformers does, unless the template would print "None".

        Raises:
            MalformedError: the template writes several texts of a content in another way.
        """
        if conversation.joined_parts is not None and not self._joins_parts:
            raise MalformedError(
                f"message {conversation.joined_parts}: the content is several texts, which the chat template does not "
                "simply join; write one text"
            )
        if not any("tool_calls" in message for message in conversation.messages):
            return conversation
        conversation = with_arguments(conversation, self._wants_argument_strings)
        if not self._prints_null:
            return conversation
        messages = [
            {key: value for key, value in message.items() if value is not None} for message in conversation.messages
        ]
        return replace(conversation, messages=messages)

    @cached_property
    def _wants_argument_strings(self) -> bool:
        """Whether arguments must be strings of JSON: an object is an error, or printed as Python writes it."""
        as_object, as_string = (self._try_call(arguments) for arguments in (_ARGUMENTS, json.dumps(_ARGUMENTS)))
        if as_string is None or json.dumps(_ARGUMENTS) not in as_string:
            return False
        return as_object is None or str(_ARGUMENTS) in as_object

    @cached_property
    def _prints_null(self) -> bool:
        """Whether a content of null next to calls is an error, or printed."""
        arguments = json.dumps(_ARGUMENTS) if self._wants_argument_strings else _ARGUMENTS
        text = self._try_call(arguments, {"content": None})
        return text is None or "None" in text or "null" in text

    def _try_call(self, arguments: Any, more: dict[str, Any] | None = None) -> str | None:
        """The text of a conversation with a tool call; None: the template refuses it."""
        call = {"id": "call00000", "type": "function", "function": {"name": "look", "arguments": arguments}}
        message = {"role": "assistant", "tool_calls": [call], **({"content": ""} if more is None else more)}
        try:
            return self.render(Conversation([*_probe(None).messages, message]))
        except (MalformedError, RecursionError):
            return None

    @cached_property
    def _joins_parts(self) -> bool:
        """Whether contents that are a list of texts are written as the joined texts are; or cannot be lists."""
        texts = (_QUESTION, _ANSWERS[0])
        parts, joined = [{"type": "text", "text": text} for text in texts], "".join(texts)
        for role in ("user", "assistant"):
            before = [] if role == "user" else _probe(None).messages
            try:
                as_list = self.render(Conversation([*before, {"role": role, "content": parts}]))
            except (MalformedError, RecursionError):
                continue
            as_text = self.render(Conversation([*before, {"role": role, "content": joined}]))
            # A template that takes no lists may print them, as Python or as JSON writes them.
            if as_list != as_text and not re.search(r"""['"]type['"]""", as_list):
                return False
        return True

    def render(self, conversation: Conversation, prompt: bool = False) -> str:
        """The text of a conversation, with ``prompt`` up to where the assistant begins to write.

        Raises:
            MalformedError: the template refuses it.
        """
        return self._call(conversation, add_generation_prompt=prompt)[0]

    def render_marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text, and what its {% generation %} blocks rendered.

        Raises:
            MalformedError: the template refuses it.
        """
        return self._call(conversation, return_assistant_tokens_mask=True)

    def _call(self, conversation: Conversation, **options: bool) -> tuple[str, list[Span]]:
        render = partial(
            self._render,
            conversations=[conversation.messages],
            tools=conversation.tools,
            chat_template=self.text,
            **options,
            **self.special_tokens,
            **self.moments,
        )
        try:
            texts, spans = render_within_limits(render)
            if len(texts[0]) > FREE_OUTPUT:
                check_output(texts[0], sum(map(len, all_strings([conversation.messages, conversation.tools]))))
        except TooCostlyError as error:
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                raise UserError(
                    f"{self.origin}: the chat template cannot be used: {error}, and so for {MAX_FAILURES} "
                    "conversations; give --chat-template FILE with another"
                ) from None
            raise MalformedError(f"the chat template cannot be used for the conversation: {error}") from None
        except ImportError as error:
            raise UserError(f"--chat needs jinja2: pip install 'jinja2>=3.1.6' ({error})") from None
        except RecursionError:
            raise
        except Exception as error:  # a template is a program: whatever it raises, it was about this conversation
            reason = " ".join(str(error).split()) or type(error).__name__
            raise MalformedError(f"the chat template refuses the conversation: {reason}") from None
        return texts[0], spans[0] if spans else []


def trained_spans(conversation: Conversation, spans: list[Span], text: str) -> list[Span]:
    """The spans of the turns that are not marked as not for training.

    Raises:
        MalformedError: there are such turns, and the template's {% generation %} blocks are not one for each turn.
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
        "a turn is marked as not for training, but the {% generation %} blocks of the chat template are not one for "
        "each turn of the assistant; give --chat-template a template without such blocks, or leave the record out"
    )


def _may_be_turn(message: dict[str, Any], said: str) -> bool:
    """Whether what is known of the message is in what a span says."""
    content = (message.get("content") or "").rpartition("</think>")[2].strip()
    return content.lower() in said.lower() and all(call["name"] in said for call in called_functions(message))


class TurnFinder:
    """Finds the assistant's turns in a rendered conversation, for templates that do not mark them.

    A turn is what the assistant has to write: from the end of the generation prompt to the token that ends the turn.
    Rendering the messages before a turn, with the generation prompt, gives its start, provided that this text begins
    the whole conversation's; that is looked at for each turn. Where it does not hold (a template that moves the system
    prompt to the last question; a conversation that the assistant opens), two characters that occur nowhere else are
    put around the contents, which must leave everything else as it was.

    Args:
        control: matches the control tokens that may not stand in contents.

    Raises:
        UserError: the template cannot render a question with an answer.
    """

    def __init__(self, template: ChatTemplate, control: re.Pattern[str]) -> None:
        self._template = template
        self._control = control
        question, *answered = (_probe(answer) for answer in (None, *_ANSWERS))
        asked = _render_probe(template, question)
        turns = [_render_probe(template, conversation) for conversation in answered]
        self._prompted = _render_probe(template, question, prompt=True) != asked
        header = ""
        if not self._prompted and all(turn.startswith(asked) for turn in turns):
            header = _common_prefix(*(turn[len(asked) :] for turn in turns))
        # Space that no prompt contains is the assistant's to write.
        self._header, self._space = (header, "") if header.strip() else ("", header)
        """What stands before an answer when there is no generation prompt to tell: "<|assistant|>" or " "..."""
        closing = control.search(turns[0], turns[0].rfind(_ANSWERS[0]) + len(_ANSWERS[0]))
        self._closing = closing.group() if closing else None
        """The token that ends a plain turn."""

    def find(self, conversation: Conversation, text: str) -> list[Span]:
        """The turns in ``text``, which is the rendered conversation, in order.

        Raises:
            MalformedError: a turn cannot be told apart from the rest with certainty.
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
                "the chat template renders earlier messages differently once more follow, so that the turns of the "
                "assistant cannot be found; give --chat-template a template with {% generation %} blocks"
            )
        return marked

    def _find_by_prefix(self, conversation: Conversation, index: int, text: str, after: int) -> Span:
        before = replace(conversation, messages=conversation.messages[:index])
        prompt = self._template.render(before, prompt=self._prompted) + self._header
        if not text.startswith(prompt):
            # Prompts that begin the reasoning, before an answer that has none.
            prompt = _OPEN_REASONING.sub("", prompt)
        if not text.startswith(prompt) or len(prompt) < after:
            raise _NotThereError
        message = conversation.messages[index]
        end = self._find_plain_end(message, text, len(prompt))
        if end is None:
            end = self._find_end(conversation, index, text, prompt)
        return len(prompt), end

    def _find_plain_end(self, message: dict[str, Any], text: str, start: int) -> int | None:
        """End of a turn that is its content and the closing token, no other before it; None: it may be another."""
        closing = self._control.search(text, start)
        if closing is None or closing.group() != self._closing or message.get("tool_calls"):
            return None
        return closing.end() if text[start : closing.start()].rstrip().endswith(message["content"].strip()) else None

    def _find_end(self, conversation: Conversation, index: int, text: str, prompt: str) -> int:
        """End of a turn: that of the conversation which stops after it, found again in the whole."""
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
        # In the whole, an earlier turn may have lost its beginning (its reasoning), nothing else.
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
        # Templates that strip contents leave space that the markers protect.
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
    """Render a plain conversation that every template must be able to.

    Raises:
        UserError: it is not.
    """
    try:
        return template.render(conversation, prompt)
    except (MalformedError, RecursionError) as error:
        raise UserError(f"{template.origin}: not a usable chat template, a plain question fails: {error}") from None


def frame(template: ChatTemplate) -> str:
    """All that the template writes around a question, an answer without reasoning, and a question."""
    messages = [*_probe(_ANSWERS[0]).messages, *_probe(None).messages]
    text = _render_probe(template, Conversation(messages))
    for content in (_QUESTION, *_ANSWERS):
        text = text.replace(content, "")
    return text


class _NotThereError(Exception):
    """A turn does not stand where the messages before it end."""


def _probe(answer: str | None) -> Conversation:
    messages: Sequence[dict[str, Any]] = [{"role": "user", "content": _QUESTION}]
    if answer is not None:
        messages = [*messages, {"role": "assistant", "content": answer}]
    return Conversation(list(messages))


def _common_prefix(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]
