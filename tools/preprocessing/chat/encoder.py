"""Encodes records that are conversations; see the package for the rules."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import unicodedata
from dataclasses import replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ....engine.errors import UserError
from ....engine.tokenizer.files import TOKENIZER_FILE, read_config, tokenizer_kind
from ....engine.tokenizer.json_file import parse_tokenizer
from ...tokenizer.document_frame import DocumentFrame
from ...tokenizer.serving_check import auto_tokenizer
from ..options import PreprocessOptions
from ..records.errors import LeftOutError, MalformedError
from .conversation import ChatBos, Conversation, EncodedChat, all_strings
from .dropped_content import count_dropped, refuse_dropped_calls, refuse_dropped_messages
from .messages import read_conversation
from .render_limits import memory_limit
from .template import ChatTemplate, Span
from .template_files import CONFIG_FILE, has_template_for_tools, load_template
from .turns import TurnFinder, frame, trained_spans

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_UNTRAINED = np.zeros(1, np.uint8)
_BOUNDARY_TOKENS = 16
"""Tokens at the end of a text that may change with what follows: far more than one word's."""


def chat_encoder(options: PreprocessOptions, tokenizer: Path, frame: DocumentFrame, bos: ChatBos) -> ChatEncoder:
    """Return the encoder for the preprocess command's options.

    Args:
        tokenizer: its file.
        frame: of documents; an end-of-document token is the last of its suffix.
    """
    return ChatEncoder(
        tokenizer,
        frame.suffix[-1] if frame.suffix else None,
        options.max_tokens,
        options.allow_special_tokens,
        None if options.chat_template is None else Path(options.chat_template),
        None if options.chat_date is None else datetime.fromisoformat(options.chat_date),
        bos,
    )


class ChatEncoder:
    """Encodes records that are conversations.

    Args:
        tokenizer: a tokenizer.json, next to tokenizer_config.json or chat_template.jinja; or its folder.
        eod_id: token that ends a document; None: nothing is added.
        max_tokens: maximum tokens of a conversation, including its end-of-document token.
        allow_special_tokens: control tokens in contents are encoded as such.
        template: file of the chat template; None: the tokenizer's own.
        now: the time for templates that ask for it; None: the current time.
        bos: None: as the template has it.
        for_tools: use the template for conversations with tools. Otherwise these get an encoder of their own if the
            tokenizer has such a template.

    Raises:
        UserError: the tokenizer is not a tokenizer.json, or has no usable chat template.
    """

    def __init__(
        self,
        tokenizer: Path,
        eod_id: int | None,
        max_tokens: int | None,
        allow_special_tokens: bool,
        template: Path | None = None,
        now: datetime | None = None,
        bos: ChatBos | None = None,
        for_tools: bool = False,
    ) -> None:
        file = tokenizer / TOKENIZER_FILE if tokenizer.is_dir() else tokenizer
        folder = file.parent
        config = read_tokenizer_config(folder)
        now = now or datetime.now()
        source, origin = load_template(folder, config, template, for_tools)
        self._for_tools: ChatEncoder | None = None
        if template is None and not for_tools and has_template_for_tools(folder, config):
            self._for_tools = ChatEncoder(
                tokenizer, eod_id, max_tokens, allow_special_tokens, now=now, bos=bos, for_tools=True
            )
        named = named_tokens(config)
        self._file = file
        self._tokenizer = _load_tokenizer(file, list(named.values()))
        self._eod_id = eod_id
        self._max_tokens = max_tokens
        self._bos = bos or ChatBos()
        self._template = ChatTemplate(source, origin, named, now)
        control = self._control_tokens(named)
        self._control = _any_of(control)
        self._finder = None if self._template.marks_turns else TurnFinder(self._template, self._control)
        self._forbidden = None if allow_special_tokens else self._control
        normalizer = self._tokenizer.normalizer
        self._normalize = None
        """Normalizes text before control tokens are searched in it; only some tokenizers have such control tokens."""
        if normalizer is not None and any(token.normalized for token in control.values()):
            self._normalize = normalizer.normalize_str
            forms = {normalizer.normalize_str(text).strip("▁ ") for text, token in control.items() if token.normalized}
            self._normalized = _any_of(forms - {""})

    def encode(self, record: dict[str, Any]) -> EncodedChat | None:
        """Encode the conversation in ``record``.

        A conversation longer than ``max_tokens`` is cut to its longest beginning that fits and ends with a turn of the
        assistant, and rendered again. None: no beginning fits.

        Raises:
            MalformedError: it is not a conversation, or not usable for training.
            LeftOutError: all turns of the assistant are marked as not for training.
        """
        try:
            conversation = read_conversation(record)
            if conversation.tools is not None and self._for_tools is not None:
                return self._for_tools._encode(conversation)
            return self._encode(conversation)
        except RecursionError:
            raise MalformedError("nested too deeply") from None

    def _encode(self, conversation: Conversation) -> EncodedChat | None:
        if conversation.untrained and conversation.untrained.issuperset(conversation.assistant_turns()):
            raise LeftOutError("conversations marked as not for training")
        self._refuse_control_tokens(conversation)
        conversation = self._template.adapt(conversation)
        with memory_limit:
            text = self._template.render(conversation)
            refuse_dropped_messages(conversation, text)
            spans = self._find_turns(conversation, text) if self._max_tokens is None else None
        encoding = self._tokenize(text)
        if spans is not None or self._fits(encoding.ids):
            return self._finish(conversation, 0, text, encoding, spans)
        return self._shorten(conversation, text, encoding)

    @property
    def tells_date(self) -> bool:
        """Whether the template writes the date."""
        return bool(self._template.moments) or (self._for_tools is not None and self._for_tools.tells_date)

    @property
    def begins_with_bos(self) -> bool:
        """Whether a plain conversation begins with the BOS."""
        messages = [{"role": "user", "content": "Alpha"}, {"role": "assistant", "content": "Omega"}]
        ids = self._tokenize(self._template.render(Conversation(messages))).ids
        return self._bos.starts(self._bos.apply(ids, np.zeros(len(ids), np.uint8))[0])

    @property
    def fingerprint(self) -> str:
        """Hash of everything except the tokenizer that decides how conversations are encoded."""
        parts: list[Any] = [self._template.text, self._template.special_tokens, self._template.moments]
        if self._for_tools is not None:
            parts.append(self._for_tools.fingerprint)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "backslashreplace")).hexdigest()

    def check_against_transformers(self) -> bool:
        """Compare the ids of a short conversation with those of ``AutoTokenizer``. Raise UserError if they differ.

        Returns False if transformers cannot load the tokenizer from its folder.
        """
        messages = [
            {"role": "user", "content": "How do you say  “naïve” in 中文?\n\n1) cafe\u0301 🙂"},
            {"role": "assistant", "content": "天真 — 2,024 ways.\n\tIt's so."},
            {"role": "user", "content": " And\u00a0then? "},
            {"role": "assistant", "content": "Nothing else…"},
        ]
        if self._file.name != TOKENIZER_FILE:  # transformers would load another file
            return False
        reference = auto_tokenizer(self._file.parent)
        if isinstance(reference, str):
            return False
        if self._encodes_like(reference, messages):
            return True
        composed = [{**message, "content": unicodedata.normalize("NFC", message["content"])} for message in messages]
        if self._encodes_like(reference, composed):
            print(
                f"note: {self._file}: {type(reference).__name__} of transformers normalizes text to Unicode's form C, "
                "and this file does not: texts in another form get other ids when the model is served",
                file=sys.stderr,
            )
            return True
        raise UserError(
            f"{self._file}: with the chat template it gives other tokens than transformers does; "
            "save the tokenizer again (AutoTokenizer.from_pretrained(folder).save_pretrained(other))"
        )

    def _encodes_like(self, reference: Any, messages: list[dict[str, str]]) -> bool:
        theirs = reference.apply_chat_template(
            messages, chat_template=self._template.text, return_dict=False, **self._template.moments
        )
        return bool(self._tokenize(self._template.render(Conversation(messages))).ids == theirs)

    def _control_tokens(self, named: dict[str, str]) -> dict[str, Any]:
        """Return the added tokens that are control tokens: special ones, and those that the template writes itself."""
        added = self._tokenizer.get_added_tokens_decoder()
        scaffold = frame(self._template)
        return {
            token.content: token
            for number, token in added.items()
            if token.content.strip()
            and (
                token.special or number == self._eod_id or token.content in named.values() or token.content in scaffold
            )
        }

    def _refuse_control_tokens(self, conversation: Conversation) -> None:
        if self._forbidden is None:
            return
        for index, message in enumerate(conversation.messages):
            for key, value in message.items():
                if key == "role":
                    continue
                for text in (value,) if type(value) is str else all_strings([key, value]):
                    self._refuse_control_token(text, f"message {index + 1}")
        for text in all_strings(conversation.tools):
            self._refuse_control_token(text, "tools")

    def _refuse_control_token(self, text: str, place: str) -> None:
        assert self._forbidden is not None
        found = self._forbidden.search(text)
        if found is None and self._normalize is not None:
            found = self._normalized.search(self._normalize(text))
        if found:
            raise MalformedError(f"{place} contains the control token {found.group()!r}, which would forge a turn")

    def _tokenize(self, text: str) -> Any:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError:
            raise MalformedError("an escaped lone surrogate, half a character, which is not text") from None

    def _fits(self, ids: list[int]) -> bool:
        added = self._adds_eod(ids) + self._bos.change(ids)
        return self._max_tokens is None or len(ids) + added <= self._max_tokens

    def _adds_eod(self, ids: list[int]) -> bool:
        return self._eod_id is not None and (not ids or ids[-1] != self._eod_id)

    def _shorten(self, whole: Conversation, whole_text: str, whole_encoding: Any) -> EncodedChat | None:
        assert self._max_tokens is not None
        for index in reversed(whole.assistant_turns()):
            if index + 1 == len(whole.messages):
                continue
            conversation = replace(whole, messages=whole.messages[: index + 1])
            if conversation.untrained.issuperset(conversation.assistant_turns()):
                return None
            try:
                text = self._template.render(conversation)
            except MalformedError:  # some templates want another role at the end
                continue
            # Both texts have the same tokens for their common beginning, except its last word. A shorter conversation
            # may have more tokens: some templates keep the reasoning of the last turn only.
            shared = whole_encoding.char_to_token(max(_shared_length(text, whole_text) - 1, 0)) or 0
            if shared - _BOUNDARY_TOKENS > self._max_tokens:
                continue
            encoding = self._tokenize(text)
            if self._fits(encoding.ids):
                return self._finish(conversation, len(whole.messages) - index - 1, text, encoding)
        return None

    def _find_turns(self, conversation: Conversation, text: str) -> list[Span]:
        if self._finder is None:
            return self._template.render_marked(conversation)[1]
        with memory_limit:
            return self._finder.find(conversation, text)

    def _finish(
        self, conversation: Conversation, dropped: int, text: str, encoding: Any, spans: list[Span] | None = None
    ) -> EncodedChat:
        if spans is None:
            spans = self._find_turns(conversation, text)
        refuse_dropped_calls(conversation, "".join(text[start:end] for start, end in spans))
        mask = _token_mask(encoding.offsets, trained_spans(conversation, spans, text))
        if not mask.any():
            raise MalformedError("the chat template renders nothing that the assistant says")
        ids, mask = self._bos.apply(encoding.ids, mask)
        if self._eod_id is not None and self._adds_eod(ids):
            ids = [*ids, self._eod_id]
            mask = np.concatenate((mask, _UNTRAINED))
        notes = conversation.notes
        count_dropped(conversation, spans, text, self._template.text, notes)
        if conversation.untrained:
            notes["turns of the assistant marked as not for training"] += len(
                conversation.untrained.intersection(conversation.assistant_turns())
            )
        return EncodedChat(np.array(ids, np.int32), mask, dropped, len(text), len(text.encode("utf-8")), notes)


def _token_mask(offsets: list[Span], spans: list[Span]) -> npt.NDArray[np.uint8]:
    """Return 1 for the tokens that share characters with a span. A token without characters, as at the start of a word,
    belongs to the span around it.
    """
    flat = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets))
    starts, ends = flat[::2], np.maximum(flat[1::2], flat[::2] + 1)
    mask = np.zeros(len(offsets), np.uint8)
    for first, end in spans:
        mask |= (starts < end) & (ends > first)
    return mask


def _shared_length(one: str, other: str) -> int:
    """Return the length of the common prefix."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def _any_of(texts: Any) -> re.Pattern[str]:
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, with the special tokens of older folders."""
    config = read_config(folder / CONFIG_FILE)
    if "added_tokens_decoder" not in config:
        config = {**config, **read_config(folder / "special_tokens_map.json")}
    return config


def named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens that templates may use by name."""
    tokens = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    return tokens


def _load_tokenizer(file: Path, named: list[str]) -> Any:
    if not file.is_file() or tokenizer_kind(file) != "tokenizer.json":
        raise UserError(
            f"{file}: --chat needs a tokenizer with a tokenizer.json; save this one in that format (transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
        )
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    tokenizer = parse_tokenizer(content, file)
    # A post-processor would add tokens that the template writes itself, or move offsets past the space before a word.
    tokenizer.post_processor = None
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    # As transformers does with a named token that is only in the file's vocabulary.
    tokenizer.add_special_tokens(
        [text for text in named if text not in added and tokenizer.token_to_id(text) is not None]
    )
    return tokenizer
