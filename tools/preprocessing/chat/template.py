"""Renders chat templates.

It calls ``render_jinja_template`` of the installed transformers, and so has its sandbox, filters and globals; importing
it takes 0.8 s and does not load PyTorch. Only ``strftime_now``, which many templates use for the date, is replaced: it
returns one time for the whole run, so that the data do not depend on how long the run takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property, partial
from typing import Any

from ....engine.errors import UserError, install_command
from ..records.errors import MalformedError
from .conversation import Conversation, all_strings
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
    "{{- raise_exception('strftime_now with a format that is not a literal is not supported') -}}"
    "{%- endif -%}{{- retemper_moment[format] -}}{%- endmacro %}\n"
)
_ARGUMENTS = {"alpha": "omega"}
QUESTION, ANSWERS = "Alpha", ("Omega", "Zeta")


class ChatTemplate:
    """A template that renders conversations.

    Args:
        source: the template's text.
        origin: its file, for messages.
        special_tokens: bos_token, eos_token and others, by name.
        now: the time for ``strftime_now``.

    Raises:
        UserError: jinja2 is missing.
    """

    def __init__(self, source: str, origin: str, special_tokens: dict[str, str], now: datetime) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

        check_source(source, origin)
        self.origin = origin
        self._failures = 0
        self.marks_turns = _MARKED.search(source) is not None
        """Whether {% generation %} blocks mark what the assistant writes."""
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
        """Return the conversation with contents and tool calls in the form that this template expects.

        Arguments become objects, as transformers documents, unless the template concatenates strings. A null content
        next to calls is kept, as in transformers, unless the template would print "None".

        Raises:
            MalformedError: a content is several texts, which the template does not simply join.
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
        """Whether arguments must be JSON strings: an object is an error, or printed as a Python dict."""
        as_object, as_string = (self._try_call(arguments) for arguments in (_ARGUMENTS, json.dumps(_ARGUMENTS)))
        if as_string is None or json.dumps(_ARGUMENTS) not in as_string:
            return False
        return as_object is None or str(_ARGUMENTS) in as_object

    @cached_property
    def _prints_null(self) -> bool:
        """Whether a null content next to calls is an error, or printed."""
        arguments = json.dumps(_ARGUMENTS) if self._wants_argument_strings else _ARGUMENTS
        text = self._try_call(arguments, {"content": None})
        return text is None or "None" in text or "null" in text

    def _try_call(self, arguments: Any, more: dict[str, Any] | None = None) -> str | None:
        """Render a conversation with a tool call; None: the template refuses it."""
        call = {"id": "call00000", "type": "function", "function": {"name": "look", "arguments": arguments}}
        message = {"role": "assistant", "tool_calls": [call], **({"content": ""} if more is None else more)}
        try:
            return self.render(Conversation([*probe(None).messages, message]))
        except (MalformedError, RecursionError):
            return None

    @cached_property
    def _joins_parts(self) -> bool:
        """Whether a content that is a list of texts is rendered like the joined text, or lists are not supported."""
        texts = (QUESTION, ANSWERS[0])
        parts, joined = [{"type": "text", "text": text} for text in texts], "".join(texts)
        for role in ("user", "assistant"):
            before = [] if role == "user" else probe(None).messages
            try:
                as_list = self.render(Conversation([*before, {"role": role, "content": parts}]))
            except (MalformedError, RecursionError):
                continue
            as_text = self.render(Conversation([*before, {"role": role, "content": joined}]))
            # A template without support for lists may print them as Python or JSON.
            if as_list != as_text and not re.search(r"""['"]type['"]""", as_list):
                return False
        return True

    def render(self, conversation: Conversation, prompt: bool = False) -> str:
        """Render a conversation; with ``prompt``, add the generation prompt. Raise MalformedError if refused."""
        return self._call(conversation, add_generation_prompt=prompt)[0]

    def render_marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Like :meth:`render`; return also the spans of the {% generation %} blocks."""
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
            raise UserError(f"--chat needs jinja2: {install_command('jinja2')} ({error})") from None
        except RecursionError:
            raise
        except Exception as error:  # a template is a program, which may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise MalformedError(f"the chat template refuses the conversation: {reason}") from None
        return texts[0], spans[0] if spans else []


def probe(answer: str | None) -> Conversation:
    """Return a question, and its ``answer`` if there is one, to see what the template writes around it."""
    messages: Sequence[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
    if answer is not None:
        messages = [*messages, {"role": "assistant", "content": answer}]
    return Conversation(list(messages))
