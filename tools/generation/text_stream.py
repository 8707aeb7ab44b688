"""Turn tokens into text while they appear: no half characters, and nothing that a stop string may take back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
"""Returns the text of tokens, without special ones."""

_CONTEXT_TOKENS = 8
"""Tokens of the prompt that are decoded with the first new ones: some tokenizers drop the space at the start."""
_INCOMPLETE = "\ufffd"
"""Decoders write it for bytes that are not a whole character."""


class TextStream:
    """The text of a growing sequence.

    Args:
        decode: of the tokenizer.
        prompt_ids: the tokens before the text.
        stops: the text ends before the first of these strings.
    """

    def __init__(self, decode: Decode, prompt_ids: Sequence[int], stops: Sequence[str] = ()):
        self._decode, self._stops = decode, stops
        # Tokens are decoded from _first on. Those before _next are in the text already.
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._first, self._next = 0, len(self._ids)
        self._text = ""
        self._shown = 0
        """Number of characters that :meth:`add` and :meth:`end` have returned."""
        self.stopped = False
        """Whether a stop string was found."""

    @property
    def text(self) -> str:
        """All text so far."""
        return self._text

    def add(self, token: int) -> str:
        """Append a token, and return the text that is certain now and was not before."""
        self._ids.append(token)
        return self._take(self._decoded(), at_end=False)

    def end(self) -> str:
        """Return the rest of the text: nothing follows."""
        return "" if self.stopped else self._take(self._decoded(at_end=True), at_end=True)

    def _decoded(self, at_end: bool = False) -> str:
        """Return the text of the new tokens; empty while they end within a character."""
        before = self._decode(self._ids[self._first : self._next])
        whole = self._decode(self._ids[self._first :])
        if not at_end and (len(whole) <= len(before) or whole.endswith(_INCOMPLETE)):
            return ""
        new = whole[len(before) :]
        if new.strip():  # sentencepiece drops spaces at the start, so no part may begin with them alone
            self._first = self._next
        self._next = len(self._ids)
        return new

    def _take(self, new: str, at_end: bool) -> str:
        searched = max(0, len(self._text) - max(map(len, self._stops), default=0))
        self._text += new
        found = [place for stop in self._stops if (place := self._text.find(stop, searched)) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True
        held = 0 if found or at_end else self._start_of_stop()
        shown, self._shown = self._shown, max(self._shown, len(self._text) - held)
        return self._text[shown : self._shown]

    def _start_of_stop(self) -> int:
        """Return the number of characters at the end that may be the beginning of a stop string."""
        sizes = range(min(len(self._text), max(map(len, self._stops), default=1) - 1), 0, -1)
        return next((size for size in sizes if any(stop.startswith(self._text[-size:]) for stop in self._stops)), 0)
