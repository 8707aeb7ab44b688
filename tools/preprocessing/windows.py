"""Cut documents into overlapping windows, for models whose context is shorter than the documents.

The windows of a document are those of a tokenizer of transformers with ``max_length``, ``stride`` and
``return_overflowing_tokens``: each begins with the BOS, if documents do, and then repeats the last tokens of the window
before it. Only the last one has the end-of-document token. A dataset holds them as the sequences of one document, so
duplicates, splits, limits and the shuffle work on whole documents.

All windows of a document but the last have the full length, so the number of tokens tells where they end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...engine.errors import UserError
from ...engine.tokenizer.backends import FlatIds
from .options import PreprocessOptions

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Windows:
    """How documents are cut. Small and picklable."""

    length: int
    """Tokens in a window, BOS and end-of-document token included."""
    overlap: int
    """Tokens that a window repeats of the one before it."""
    begin: tuple[int, ...] = ()
    """Ids at the beginning of each document, and therefore of each window."""
    masks: bool = False
    """Whether the repeated tokens get loss mask 0, so that every token is a target once."""

    @property
    def step(self) -> int:
        """Tokens from one window to the next."""
        return self.length - len(self.begin) - self.overlap

    def cut(self, ids: Ids, lengths: npt.NDArray[np.int64]) -> tuple[FlatIds, int]:
        """Return documents [T] of ``lengths`` [documents] with the windows of each end to end, in the same form, and
        the number of documents that have several.
        """
        if not (long := lengths > self.length).any():
            return (ids, lengths), 0
        pieces = np.split(ids, np.cumsum(lengths)[:-1])
        for place in np.flatnonzero(long):
            stream = WindowStream(self)
            pieces[place] = np.concatenate([stream.feed(pieces[place]), stream.finish()])
        return (np.concatenate(pieces), np.array(list(map(len, pieces)), np.int64)), int(long.sum())

    def mask(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8] | None:
        """Return the loss mask [T] of documents whose windows take ``lengths`` [documents] tokens; None without one."""
        if not self.masks:
            return None
        starts = np.cumsum(lengths) - lengths
        places = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
        repeated = (places >= self.length) & (places % self.length < len(self.begin) + self.overlap)
        return (~repeated).astype(np.uint8)


class WindowStream:
    """Cuts one document that comes in parts."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows
        self._waiting = np.empty(0, np.int32)
        self._is_begun = False

    def feed(self, ids: Ids) -> Ids:
        """Return the windows that are complete with the next ``ids``, of which the first ones are ``begin``."""
        windows = self._windows
        if not self._is_begun and len(ids):
            self._is_begun, ids = True, ids[len(windows.begin) :]
        content = self._waiting = np.concatenate([self._waiting, ids])
        width = windows.length - len(windows.begin)
        # A window is written when a token follows it: the last one may be shorter.
        count = max(0, -(-(len(content) - width) // windows.step))
        if not count:
            return content[:0]
        rows = content[np.arange(count)[:, None] * windows.step + np.arange(width)]
        begin = np.broadcast_to(np.array(windows.begin, np.int32), (count, len(windows.begin)))
        self._waiting = content[count * windows.step :]
        return np.concatenate([begin, rows], axis=1).reshape(-1)

    def finish(self) -> Ids:
        """Return the last window."""
        if not self._is_begun:
            return self._waiting
        return np.concatenate([np.array(self._windows.begin, np.int32), self._waiting])


def windows_of(options: PreprocessOptions, begin: tuple[int, ...]) -> Windows | None:
    """Return how ``options`` cut documents that begin with ``begin``; None without ``--window``.

    Raises:
        UserError: a window would have no token of its own.
    """
    if options.window is None:
        return None
    windows = Windows(options.window, options.window_overlap, begin, options.masks_overlap)
    if windows.step < 1:
        raise UserError(
            f"--window {options.window}: must be more than --window-overlap {options.window_overlap} and the "
            f"{len(begin)} tokens that documents begin with"
        )
    return windows
