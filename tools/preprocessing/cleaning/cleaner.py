"""Cleans the text of documents before tokenization, and decides which documents are left out by their text.

It runs in the workers over the whole corpus; disabled steps cost nothing. Duplicates are found later (dedup/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import xxhash

from ..options import PreprocessOptions
from .filters import Watch, text_filters
from .steps import TextStep, text_steps


def _ignore(name: str) -> None:
    pass


class Cleaner:
    """Cleans texts, and returns the reason to leave a text out.

    The steps that change a text (steps.py) come first, then the filters (filters.py), each in the order of its module.

    Args:
        options: those of the steps and filters.
        held_out: file of an :class:`NgramFilter`: leave out texts that share an n-gram with it.
    """

    def __init__(self, options: PreprocessOptions, held_out: Path | None = None) -> None:
        self._steps, self._filters = text_steps(options), text_filters(options, held_out)

    @property
    def active(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._steps or self._filters)

    def cleaned(self, text: str) -> str:
        """Return the text after the steps that change it, whether or not it is left out."""
        for step in self._steps:
            text = step.whole(text)
        return text

    def clean(self, text: str) -> tuple[str, str | None]:
        """Return the cleaned text, and the reason to leave it out or None. :meth:`clean_batch` is faster."""
        return self.clean_batch([text])[0]

    def clean_batch(
        self, texts: Sequence[str], on_change: Callable[[str], None] = _ignore
    ) -> list[tuple[str, str | None]]:
        """Return for each text the cleaned text, and the reason to leave it out or None.

        Args:
            on_change: called with the option of each step that changed a text, for each text that is not left out.
        """
        changed: list[list[str]] = [[] for _ in texts]
        for step in self._steps:
            after = list(map(step.whole, texts))
            for names, old, new in zip(changed, texts, after, strict=True):
                if old is not new and old != new:
                    names.append(step.name)
            texts = after
        reasons = self._reasons(texts)
        for names, reason in zip(changed, reasons, strict=True):
            for name in names if reason is None else ():
                on_change(name)
        return list(zip(texts, reasons, strict=True))

    def _reasons(self, texts: Sequence[str]) -> list[str | None]:
        """Return for each text the reason of the first filter that leaves it out, or None."""
        reasons: list[str | None] = [None] * len(texts)
        for rule in self._filters:
            kept = [place for place, reason in enumerate(reasons) if reason is None]
            found = rule.reasons([texts[place] for place in kept])
            for place, reason in zip(kept, found, strict=True):
                reasons[place] = reason
        return reasons

    def clean_pieces(
        self, pieces: Iterable[str], on_change: Callable[[str], None] = _ignore
    ) -> Iterator[tuple[str, str | None]]:
        """Clean one long text that comes in pieces, cut anywhere, in memory of a few pieces.

        The joined pieces are the cleaned text, and the filters see it as a whole. The iteration ends at a reason.
        """
        comparisons = [_Comparison(step) for step in self._steps]
        for comparison in comparisons:
            pieces = comparison.pieces(pieces)
        watches = [rule.watch() for rule in self._filters]
        for piece in pieces:
            for watch in watches:
                watch.add(piece)
            if reason := _certain_reason(watches):
                yield piece, reason
                return
            yield piece, None
        for watch in watches:
            watch.end()
        if reason := next((watch.reason for watch in watches if watch.reason), None):
            yield "", reason
            return
        for comparison in comparisons:
            if comparison.has_changed:
                on_change(comparison.name)


def _certain_reason(watches: Sequence[Watch]) -> str | None:
    """Return the reason of the first watch that has one, if those before it cannot get one any more."""
    for watch in watches:
        if watch.reason or not watch.is_settled:
            return watch.reason
    return None


class _Comparison:
    """Notices whether a step changes a long text, by hashes of the text before and after it."""

    def __init__(self, step: TextStep) -> None:
        self.name = step.name
        self._step = step
        self._before, self._after = xxhash.xxh3_128(), xxhash.xxh3_128()

    @property
    def has_changed(self) -> bool:
        """Whether the step has changed the text, when all of it is read."""
        return self._before.digest() != self._after.digest()

    def pieces(self, pieces: Iterable[str]) -> Iterator[str]:
        """Yield the changed text."""
        for piece in self._step.pieces(_hashed(pieces, self._before)):
            self._after.update(piece.encode("utf-8", "surrogatepass"))
            yield piece


def _hashed(pieces: Iterable[str], digest: xxhash.xxh3_128) -> Iterator[str]:
    for piece in pieces:
        digest.update(piece.encode("utf-8", "surrogatepass"))
        yield piece
