"""Records too long for memory: a line of JSON or a text file of any size, read and encoded in pieces.

A line longer than ``LONG_BYTES`` is copied to a temporary file. Its JSON is parsed without the long strings, which stay
in the file as :class:`LongText` and are decoded piece by piece.

The tokens of a text are not in general those of its parts. Therefore a text is cut only where tokenizers split, and
where the tokens of the surrounding text are verified to be those of its two halves.
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
_CONTEXT = 256  # characters on either side of a cut whose tokens are compared
_TRIES = 16
_SEARCHED = 1 << 16  # last characters of a text in which to look for a cut
_MAX_CHARACTER = 4  # bytes
_BACKSLASH = 0x5C
_ROW_BYTES = 4096

_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]..\\u....|u....|.)", re.DOTALL)
_CUTS = (
    re.compile(r"(?<=\S\n)(?=\w)"),
    re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])"),
    re.compile(r"(?<=[^\W\d_])(?=[。，、；：！？])"),  # noqa: RUF001
)
"""Where pieces may end. No character after such a place composes with the one before it, so that normalization is also
the same for both halves."""


@dataclass(frozen=True)
class LongText:
    """Text in a part of a file: UTF-8, or the content of a JSON string."""

    path: str
    start: int
    stop: int
    is_json: bool
    where: Where
    """Its record."""

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces of some MB, cut anywhere between characters. Raise MalformedError if invalid."""
        return self._json_pieces() if self.is_json else self._plain_pieces()

    def check(self) -> LongText:
        """Read all of it, to raise MalformedError while the place in the input is known."""
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
    """Return where the content of a JSON string can be cut near its end, between characters and outside of escapes.

    ``raw`` begins at such a place. 0: nowhere yet.
    """
    cut = len(raw)
    # A pair of escapes that make one character is twelve bytes long.
    while (backslash := raw.rfind(b"\\", max(cut - 12, 0), cut)) >= 0:
        cut = backslash
    if cut < len(raw) // 2:
        # Nearly everything is escapes: follow them from the start, which is not within one.
        escapes = (match.start() for match in _ESCAPE.finditer(raw) if match.end() > len(raw) - 12)
        cut = next(escapes, cut)
    # The last character may be incomplete. More than three continuation bytes are an error, which the parser reports.
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
        MalformedError: invalid JSON, an object with one of ``keys`` twice, or too much besides long strings.
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
                    f"more than {LONG_BYTES >> 20} MB of JSON outside its longest strings; split the record"
                )
    value = parse_json(b"".join(skeleton), keys, whole=False)
    return _filled(value, {_placeholder(path, index): text for index, text in enumerate(strings)})


def _placeholder(path: Path, index: int) -> str:
    return f"\0{path}\0{index}\0"


def _filled(value: Any, strings: dict[str, LongText]) -> Any:
    """Return ``value`` with ``strings`` instead of their placeholders."""
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
    """Yield the file in order: contents of long strings as (start, stop, None), the rest as (start, stop, bytes)."""
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
    """Return the next quote from ``position``, with ``escapes`` the next unescaped one; -1 if there is none."""
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
    """Count the backslashes directly before ``stop``, back to ``first``."""
    position = stop
    while position > first and content[position - 1] == _BACKSLASH:
        block = content[max(first, position - _ROW_BYTES) : position]
        rest = len(block.rstrip(b"\\"))
        position -= len(block) - rest
        if rest:
            break
    return stop - position


def _forget(content: mmap.mmap, start: int, stop: int) -> None:
    """Release searched pages from this process's memory."""
    start -= start % mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED") and stop > start:
        content.madvise(mmap.MADV_DONTNEED, start, stop - start)


def encode_in_pieces(
    pieces: Iterable[str], encode: Callable[[str], npt.NDArray[Any]]
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the text of ``pieces`` in other pieces, each with its ids; end to end they are the ids of the whole.

    ``encode`` returns the ids [tokens] of a text. If it begins every text specially, as sentencepiece does with its
    dummy prefix, a piece is encoded after some of the text before it, whose ids are then removed.

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
                    f"{len(text):,} characters without a line end or a space between words: this is not "
                    "natural text; leave the record out"
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
    """Return the last place in the second half of ``text`` at which a token ends, judged by the text around it.

    Also return whether the tokens after it depend on the text before it.
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
