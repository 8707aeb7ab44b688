"""Records that are too long to hold: a line of JSON or a text file of any size, read and encoded in pieces.

A line longer than ``LONG_BYTES`` is copied to a temporary file. Its JSON is checked and parsed without its long
strings, which stay in the file as :class:`LongText` and are decoded piece by piece.

Tokenization is not the concatenation of the tokenizations of any two parts, so pieces are cut only where it is: at a
place of a kind that tokenizers split at, where the tokens of the text around it are those of its two halves.
"""

from __future__ import annotations

import codecs
import mmap
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from .errors import MalformedError, Where
from .json_values import WantedKeys, parse_json, raise_bad_json

LONG_BYTES = 16 << 20
"""A record of more bytes is long."""
_LONG_STRING = 1 << 20
_PIECE_BYTES = 4 << 20
_MAX_UNCUT = 16 << 20
_SCAN_BYTES = 32 << 20
_CONTEXT = 256  # characters on either side of a cut of which the tokens are compared
_TRIES = 16
_SEARCHED = 1 << 16  # characters before the end of a text in which to cut it
_MAX_CHARACTER = 4  # bytes
_BACKSLASH = 0x5C
_ROW_BYTES = 4096

_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]..\\u....|u....|.)", re.DOTALL)
_CUTS = (
    re.compile(r"(?<=\S\n)(?=\w)"),
    re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])"),
    re.compile(r"(?<=[^\W\d_])(?=[。，、；：！？])"),  # noqa: RUF001
)
"""Where pieces may end. No character that stands behind such a place composes with the one before it, so that
normalization too is the same for both halves."""


@dataclass(frozen=True)
class LongText:
    """Text in a part of a file: UTF-8, or what stands between the quotes of a JSON string."""

    path: str
    start: int
    stop: int
    is_json: bool
    where: Where
    """The record that it is of."""

    def pieces(self) -> Iterator[str]:
        """The text in pieces of some MB, cut anywhere between characters.

        Raises:
            MalformedError: it is not valid UTF-8, or no valid JSON string.
        """
        return self._json_pieces() if self.is_json else self._plain_pieces()

    def check(self) -> LongText:
        """Read all of it, so that what is wrong is known while its place in the input is.

        Raises:
            MalformedError: as :meth:`pieces`.
        """
        for _ in self.pieces():
            pass
        return self

    def _plain_pieces(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset = self.start
        for block in self._blocks():
            waiting = len(decoder.getstate()[0])
            try:
                yield decoder.decode(block, final=offset + len(block) == self.stop)
            except UnicodeDecodeError as error:
                found, place = error.object[error.start], offset - waiting + error.start + 1
                raise MalformedError(
                    f"not valid UTF-8: byte 0x{found:02x} at byte {place:,} of the text", "invalid UTF-8"
                ) from None
            offset += len(block)

    def _json_pieces(self) -> Iterator[str]:
        rest = b""
        end = self.start
        for block in self._blocks():
            start, end = end - len(rest), end + len(block)
            raw = rest + block
            cut = len(raw) if end == self.stop else _json_cut(raw)
            rest = raw[cut:]
            if cut:
                yield _json_string(raw[:cut], start)

    def _blocks(self) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            left = self.stop - self.start
            while left > 0:
                block = file.read(min(left, _PIECE_BYTES))
                if not block:
                    raise MalformedError("the file became shorter while it was read")
                left -= len(block)
                yield block


def _json_cut(raw: bytes) -> int:
    """Where the content of a JSON string can be cut, near its end: between characters and outside of escapes.

    ``raw`` begins at such a place. Zero: nowhere yet.
    """
    cut = len(raw)
    # A pair of escapes that make one character is twelve bytes long.
    while (backslash := raw.rfind(b"\\", max(cut - 12, 0), cut)) >= 0:
        cut = backslash
    if cut < len(raw) // 2:
        # Escapes almost without end: they are followed from the start, which is the middle of none.
        escapes = (match.start() for match in _ESCAPE.finditer(raw) if match.end() > len(raw) - 12)
        cut = next(escapes, cut)
    # The last character may be incomplete. More than three such bytes are in no character: the parser will say so.
    for place in range(min(cut, len(raw) - 1), max(cut - _MAX_CHARACTER, 0) - 1, -1):
        if raw[place] & 0xC0 != 0x80:
            return place
    return cut


def _json_string(raw: bytes, offset: int) -> str:
    try:
        return orjson.loads(b'"' + raw + b'"')
    except orjson.JSONDecodeError as error:
        raise_bad_json(raw, error, f" near byte {offset + 1:,} of the line", offset)


def read_long_json(path: Path, keys: WantedKeys, where: Where) -> Any:
    """Parse the JSON value in a file, the record ``where``; its strings of more than 1 MB become :class:`LongText`.

    Raises:
        MalformedError: it is not JSON, an object that has one of ``keys`` twice, or too much of it is no long string.
    """
    skeleton: list[bytes] = []
    strings: list[LongText] = []
    size = 0
    for start, stop, content in _json_parts(path):
        if content is None:
            skeleton.append(orjson.dumps(_placeholder(path, len(strings))))
            strings.append(LongText(str(path), start, stop, True, where).check())
        else:
            skeleton.append(content)
            size += len(content)
            if size > LONG_BYTES:
                raise MalformedError(
                    f"more than {LONG_BYTES >> 20} MB of JSON besides its longest strings; split the record"
                )
    value = parse_json(b"".join(skeleton), keys, whole=False)
    return _filled(value, {_placeholder(path, index): text for index, text in enumerate(strings)})


def _placeholder(path: Path, index: int) -> str:
    return f"\0{path}\0{index}\0"


def _filled(value: Any, strings: dict[str, LongText]) -> Any:
    """``value`` with ``strings`` in the place of their placeholders."""
    whole = [value]
    waiting: list[dict[str, Any] | list[Any]] = [whole]
    while waiting:
        container = waiting.pop()
        if isinstance(container, dict) and not strings.keys().isdisjoint(container):
            raise MalformedError(f"a key of more than {_LONG_STRING >> 20} MB")
        for key, item in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(item, str):
                container[key] = strings.get(item, item)  # type: ignore[index]
            elif isinstance(item, (dict, list)):
                waiting.append(item)
    return whole[0]


def _json_parts(path: Path) -> Iterator[tuple[int, int, bytes | None]]:
    """The file in order: long strings' contents as (start, stop, None), everything else as (start, stop, bytes)."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        done, position = 0, 0
        while (opening := _find_quote(content, position)) >= 0:
            closing = _find_quote(content, opening + 1, escapes=True)
            if closing < 0:
                raise MalformedError("not valid JSON: a string without its closing quote")
            if closing - opening > _LONG_STRING:
                yield done, opening, content[done:opening]
                yield opening + 1, closing, None
                done = closing + 1
            elif opening - done > LONG_BYTES:
                yield done, opening, content[done:opening]
                done = opening
            position = closing + 1
        for start in range(done, len(content), LONG_BYTES):
            yield start, min(start + LONG_BYTES, len(content)), content[start : start + LONG_BYTES]


def _find_quote(content: mmap.mmap, position: int, escapes: bool = False) -> int:
    """The next quote from ``position``, with ``escapes`` the next that no backslash escapes; -1 when there is none."""
    first = held = position
    while position < len(content):
        if position - held >= _SCAN_BYTES:
            _forget(content, held, position)
            held = position
        stop = min(position + _SCAN_BYTES, len(content))
        quote = content.find(b'"', position, stop)
        if quote < 0:
            position = stop
        elif not escapes or _backslashes_before(content, first, quote) % 2 == 0:
            return quote
        else:
            position = quote + 1
    return -1


def _backslashes_before(content: mmap.mmap, first: int, stop: int) -> int:
    """How many backslashes stand in a row right before ``stop``, back to ``first``."""
    position = stop
    while position > first and content[position - 1] == _BACKSLASH:
        # Rows of them are short, but need not be.
        block = content[max(first, position - _ROW_BYTES) : position]
        rest = len(block.rstrip(b"\\"))
        position -= len(block) - rest
        if rest:
            break
    return stop - position


def _forget(content: mmap.mmap, start: int, stop: int) -> None:
    """Let go of pages that have been searched: they need not stay in this process's memory."""
    start -= start % mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED") and stop > start:
        content.madvise(mmap.MADV_DONTNEED, start, stop - start)


def encode_in_pieces(
    pieces: Iterable[str], encode: Callable[[str], npt.NDArray[Any]]
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The text of ``pieces`` in other pieces, each with its ids, which laid end to end are the ids of the whole.

    ``encode`` gives the ids [tokens] of a text. If it begins every text in a way of its own, as sentencepiece does with
    its dummy prefix, a piece is encoded behind some of the text before it, of which the ids are taken away.

    Raises:
        MalformedError: there is no place to cut in 16 MB of text.
    """
    text, context = "", ""
    for piece in pieces:
        text += piece
        cut = _find_cut(text, encode)
        if cut is None:
            if len(text) > _MAX_UNCUT:
                raise MalformedError(
                    f"{len(text):,} characters without a line end or a space between words, where tokens surely end: "
                    "no natural text; leave the record out"
                )
            continue
        place, needs_context = cut
        yield text[:place], _encode_behind(context, text[:place], encode)
        context = text[place - _CONTEXT : place] if needs_context else ""
        text = text[place:]
    if text:
        yield text, _encode_behind(context, text, encode)


def _encode_behind(context: str, text: str, encode: Callable[[str], npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return encode(context + text)[len(encode(context)) :] if context else encode(text)


def _find_cut(text: str, encode: Callable[[str], npt.NDArray[Any]]) -> tuple[int, bool] | None:
    """The last place in the second half of ``text`` at which a token ends, whatever the tokens on its two sides are.

    With it, whether the tokens behind it need text before them to be the same.
    """
    first = max(len(text) // 2, len(text) - _SEARCHED, _CONTEXT)
    for pattern in _CUTS:
        places = [match.start() for match in pattern.finditer(text, first, len(text) - _CONTEXT)]
        for place in places[: -_TRIES - 1 : -1]:
            before, after = text[place - _CONTEXT : place], text[place : place + _CONTEXT]
            left, both = encode(before), encode(before + after)
            if np.array_equal(both[: len(left)], left):
                return place, not np.array_equal(both[len(left) :], encode(after))
    return None
