"""Encoded documents on their way into an output: a batch of texts, a conversation, or a text too long for memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from ...tokenizer.document_frame import DocumentFrame
from ..chat.conversation import EncodedChat
from ..dedup.minhash import MinHasher
from ..options import TEXT_KEY
from ..windows import Windows, WindowStream


class Extra(NamedTuple):
    """What is kept of a record besides its text."""

    line: bytes
    """Its metadata as a line of JSON; empty without ``--metadata``."""
    bin: int
    """Number of its bin in the task; 0 without ``--bins``."""


class Documents:
    """A batch of texts of one source.

    Args:
        ids: [T], those of all texts end to end.
        lengths: [documents], in tokens.
        extras: one per document, or empty.
    """

    mask: npt.NDArray[np.uint8] | None = None
    """[T], 1 on the targets; None: all tokens are targets."""
    own_lengths: npt.NDArray[np.int64]
    """[documents], in tokens, without those that windows repeat."""

    def __init__(
        self,
        texts: Sequence[str],
        ids: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int64],
        extras: Sequence[Extra],
    ) -> None:
        self._texts, self.ids, self.lengths, self._extras = texts, ids, lengths, extras
        self.own_lengths = lengths

    def in_windows(self, windows: Windows) -> tuple[Documents, int]:
        """Return these documents cut into windows, and the number of those that have several."""
        (ids, lengths), count = windows.cut(self.ids, self.lengths)
        cut = Documents(self._texts, ids, lengths, self._extras)
        cut.mask, cut.own_lengths = windows.mask(lengths), self.lengths
        return cut, count

    @property
    def bins(self) -> list[int]:
        """Return the number of the bin of each document, or nothing."""
        return [extra.bin for extra in self._extras]

    @property
    def lines(self) -> list[bytes]:
        """Return the line of each document, or nothing."""
        return [extra.line for extra in self._extras]

    def only(self, keep: npt.NDArray[np.bool_]) -> Documents:
        """Return the documents selected by ``keep`` [documents]."""
        places, tokens = np.flatnonzero(keep).tolist(), np.repeat(keep, self.lengths)
        kept = Documents(
            [self._texts[place] for place in places],
            self.ids[tokens],
            self.lengths[keep],
            [self._extras[place] for place in places] if self._extras else (),
        )
        kept.mask = None if self.mask is None else self.mask[tokens]
        kept.own_lengths = self.own_lengths[keep]
        return kept

    @property
    def is_empty(self) -> npt.NDArray[np.bool_]:
        """bool[documents]: which have no tokens."""
        return self.lengths == 0

    def line_sizes(self) -> list[int]:
        """Return the number of bytes of each line."""
        return list(map(len, self.lines))

    def sizes(self) -> tuple[Sequence[int], Sequence[int]]:
        """Return the number of characters of each document, and of bytes in UTF-8."""
        texts = self._texts
        return list(map(len, texts)), [len(text) if text.isascii() else len(text.encode()) for text in texts]

    def digests(self) -> bytes:
        """Return the xxh3-128 of each document's content, end to end."""
        return b"".join(xxhash.xxh3_128_digest(text.encode()) for text in self._texts)

    def bands(self, hasher: MinHasher) -> npt.NDArray[np.uint64]:
        """Return the MinHash bands [documents, bands]."""
        return hasher.bands_batch(self._texts)


class ChatDocument(Documents):
    """A conversation. Its content, for deduplication, is its ids."""

    def __init__(self, encoded: EncodedChat, extras: Sequence[Extra]) -> None:
        super().__init__((), encoded.ids, np.array([len(encoded.ids)]), extras)
        self.mask = encoded.mask
        self._sizes = (encoded.characters,), (encoded.text_bytes,)

    def sizes(self) -> tuple[Sequence[int], Sequence[int]]:
        """See :class:`Documents`."""
        return self._sizes

    def digests(self) -> bytes:
        """See :class:`Documents`. The content is the ids."""
        return xxhash.xxh3_128_digest(self.ids.astype("<i4").tobytes())

    def bands(self, hasher: MinHasher) -> npt.NDArray[np.uint64]:
        """See :class:`Documents`. The words are the ids."""
        return hasher.bands_batch([" ".join(map(str, self.ids.tolist()))])


class LongDocument(Documents):
    """A text that comes in pieces. Its ids are written as they come; ``ids`` stays empty.

    Args:
        frame: ids around the document.
        pieces: returns the text again, for MinHash.
        windows: how it is cut; None: it stays whole.
    """

    def __init__(
        self,
        frame: DocumentFrame,
        extras: Sequence[Extra],
        pieces: Callable[[], Iterable[str]],
        windows: Windows | None = None,
    ) -> None:
        super().__init__((), np.empty(0, np.int32), np.zeros(1, np.int64), extras)
        self._frame, self._pieces = frame, pieces
        self._windows, self._stream = windows, None if windows is None else WindowStream(windows)
        self.own_lengths = np.zeros(1, np.int64)
        self._characters = self._text_bytes = 0
        self._last_ids = self.ids
        self._digest = xxhash.xxh3_128()

    def extend(self, text: str, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Add the next piece; return the ids to write."""
        content = text.encode()
        self._digest.update(content)
        self._characters += len(text)
        self._text_bytes += len(content)
        if not len(ids):
            return ids
        self._last_ids = ids
        front = () if self.own_lengths[0] else self._frame.missing_prefix(ids)
        return self._counted(np.concatenate([np.array(front, np.int32), ids]))

    def end(self) -> npt.NDArray[np.int32]:
        """Return the ids after the text, with the last window."""
        suffix = self._frame.missing_suffix(self._last_ids) if self.own_lengths[0] else ()
        ids = self._counted(np.array(suffix, np.int32))
        if self._stream is None or self._windows is None:
            return ids
        last = self._stream.finish()
        self.lengths += len(last)
        self.mask = self._windows.mask(self.lengths)
        return np.concatenate([ids, last])

    def _counted(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        self.own_lengths += len(ids)
        ids = ids if self._stream is None else self._stream.feed(ids)
        self.lengths += len(ids)
        return ids

    def sizes(self) -> tuple[Sequence[int], Sequence[int]]:
        """See :class:`Documents`."""
        return (self._characters,), (self._text_bytes,)

    def digests(self) -> bytes:
        """See :class:`Documents`."""
        return self._digest.digest()

    def bands(self, hasher: MinHasher) -> npt.NDArray[np.uint64]:
        """See :class:`Documents`."""
        return hasher.bands_of_pieces(self._pieces())[None]


class TextLines(Documents):
    """A batch of texts that are not tokenized. Their lines are those of ``--to-jsonl``: the text and its metadata.

    Args:
        extras: one per document, with a line of JSON, perhaps of an empty object.
    """

    def __init__(self, texts: Sequence[str], extras: Sequence[Extra]) -> None:
        super().__init__(texts, np.empty(0, np.int32), np.zeros(len(texts), np.int64), extras)

    @property
    def lines(self) -> list[bytes]:
        """See :class:`Documents`."""
        return [
            _LINE_BEGIN + orjson.dumps(text) + _line_end(extra.line)
            for text, extra in zip(self._texts, self._extras, strict=True)
        ]

    def only(self, keep: npt.NDArray[np.bool_]) -> TextLines:
        """See :class:`Documents`."""
        places = np.flatnonzero(keep).tolist()
        return TextLines([self._texts[place] for place in places], [self._extras[place] for place in places])

    @property
    def is_empty(self) -> npt.NDArray[np.bool_]:
        """See :class:`Documents`."""
        return np.array([not text for text in self._texts])


class LongTextLine(LongDocument):
    """A text that comes in pieces and is not tokenized. Its line is written as they come, but for the end."""

    def __init__(self, extra: Extra, pieces: Callable[[], Iterable[str]]) -> None:
        super().__init__(DocumentFrame((), ()), [extra._replace(line=b'"' + _line_end(extra.line))], pieces)
        self._line_bytes = len(self.lines[0])

    @property
    def is_empty(self) -> npt.NDArray[np.bool_]:
        """See :class:`Documents`."""
        return np.array([self._characters == 0])

    def line_sizes(self) -> list[int]:
        """See :class:`Documents`."""
        return [self._line_bytes]

    def begin_line(self) -> bytes:
        """Return the bytes before the text."""
        return self._counted_bytes(_LINE_BEGIN + b'"')

    def extend_line(self, text: str) -> bytes:
        """Add the next piece; return its bytes in the line."""
        self.extend(text, self.ids)
        return self._counted_bytes(orjson.dumps(text)[1:-1])

    def _counted_bytes(self, content: bytes) -> bytes:
        self._line_bytes += len(content)
        return content


_LINE_BEGIN = b"{%s:" % orjson.dumps(TEXT_KEY)


def _line_end(metadata: bytes) -> bytes:
    """Return what follows the text in its line."""
    return b"}\n" if metadata == b"{}\n" else b"," + metadata[1:]
