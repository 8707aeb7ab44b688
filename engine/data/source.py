"""A dataset, or a part of one, cut into windows of equal length: what the sample order numbers.

Window ``w`` covers the tokens ``[w * S, w * S + S)`` of its part, and the one after each as its target. Documents lie
behind one another without padding, so no token is lost but the last partial window. With a :class:`DocumentLayout` the
windows hold the same tokens in all, the documents of each group of windows laid out anew (layout.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from .indexed_dataset import IndexedDataset
from .layout import DocumentLayout, Group, Pieces, in_windows, pieces_between


class Window(NamedTuple):
    """One sample before packing. S is the sequence length, or less in the last window of a validation set."""

    tokens: npt.NDArray[np.int64]
    """[S] token ids."""
    targets: npt.NDArray[np.int64]
    """[S] token ids: what follows each token in its document, also where a window's edge cuts the document; behind a
    document's last token, what is laid there."""
    starts: npt.NDArray[np.int64]
    """Positions in 1..S-1 at which another document, or a piece of one, begins."""
    ends: npt.NDArray[np.int64]
    """Positions in 0..S-1 of documents' last tokens."""
    predicted: npt.NDArray[np.bool_] | None = None
    """[S] whether the target counts, by the dataset's loss mask. None: all do."""
    bos_id: int | None = None
    """What documents begin with, where that is a BOS: it is no target, not even behind the document before it."""


@dataclass(frozen=True)
class Source:
    """The tokens ``[start, stop)`` of a dataset, in windows of ``sequence_length``."""

    name: str
    dataset: IndexedDataset
    sequence_length: int
    start: int
    stop: int
    layout: DocumentLayout | None = None
    """How documents are laid out anew. None: windows are read as they lie in the file, the same in all epochs."""
    bos_id: int | None = None
    """See :attr:`Window.bos_id`."""

    @property
    def num_windows(self) -> int:
        """Whole windows in this part: what is trained on."""
        return self.num_targets // self.sequence_length

    @property
    def num_targets(self) -> int:
        """Tokens in this part that follow another, before any masking."""
        return max(0, self.stop - self.start - 1)

    @property
    def num_windows_with_tail(self) -> int:
        """Windows in this part, the last of which may be shorter: what is evaluated."""
        return -(-self.num_targets // self.sequence_length)

    def laid_out(
        self, packing: Literal["concat", "best_fit"], shuffle: Literal["windows", "documents"], seed: int
    ) -> Source:
        """This source as ``data.packing`` and ``data.shuffle`` want its windows made."""
        if (packing, shuffle) == ("concat", "windows"):
            return self
        layout = DocumentLayout(
            self.dataset,
            self.start,
            self.num_windows,
            self.sequence_length,
            f"{seed}/{self.sequence_length}/{self.name}/layout",
            packing,
            every_epoch=shuffle == "documents",
        )
        return dataclasses.replace(self, layout=layout)

    def group(self, number: int, epoch: int, group_windows: int) -> Group:
        """The pieces of documents in the windows ``[number * group_windows, ...)`` of ``epoch``, for counting."""
        if self.layout is not None:
            assert group_windows == self.layout.group_windows
            return self.layout.group(number, epoch)
        first = number * group_windows
        count = min(group_windows, self.num_windows - first)
        start = self.start + first * self.sequence_length
        documents = pieces_between(self.dataset, start, start + count * self.sequence_length)
        return in_windows(documents, count, self.sequence_length)

    def window(self, index: int, vocab_size: int, epoch: int = 0) -> Window:
        """Read window ``index`` as it is in ``epoch``; without a layout there may be a last one that is shorter.

        Raises:
            UserError: a token id is outside ``[0, vocab_size)``.
        """
        if self.layout is not None:
            assert 0 <= index < self.num_windows
            return self._read_pieces(self.layout.window(index, epoch), vocab_size)
        assert 0 <= index < self.num_windows_with_tail
        start = self.start + index * self.sequence_length
        stop = min(start + self.sequence_length + 1, self.stop)
        ids = self.dataset.tokens(start, stop)
        self._check(ids, vocab_size, lambda place: start + place)
        boundaries = self.dataset.boundaries(start, stop) - start
        mask = self.dataset.loss_mask(start, stop)
        return Window(
            ids[:-1],
            ids[1:],
            boundaries[boundaries < len(ids) - 1],
            boundaries - 1,
            None if mask is None else mask[1:],
            self.bos_id,
        )

    def _read_pieces(self, pieces: Pieces, vocab_size: int) -> Window:
        tokens, targets = (np.empty(self.sequence_length, dtype=np.int64) for _ in range(2))
        may_count, counts = (np.ones(self.sequence_length, dtype=np.bool_) for _ in range(2))
        at = 0
        for start, length in zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True):
            here = slice(at, at + length)
            ids = self.dataset.tokens(start, start + length + 1)
            tokens[here], targets[here] = ids[:-1], ids[1:]
            if self.dataset.has_loss_mask:
                mask = self.dataset.loss_mask(start, start + length + 1)
                assert mask is not None
                may_count[here], counts[here] = mask[:-1], mask[1:]
            at += length
        stops = np.cumsum(pieces.lengths)

        def position(place: int) -> int:
            piece = int(np.searchsorted(stops, place, side="right"))
            return int(pieces.starts[piece] + place - (stops[piece] - pieces.lengths[piece]))

        self._check(tokens, vocab_size, position)
        self._check(targets, vocab_size, lambda place: position(place) + 1)
        ends = stops[pieces.ends] - 1
        # What is laid behind a document's last token; behind the window's last token that is nothing.
        inner = ends[ends < self.sequence_length - 1]
        targets[inner], counts[inner] = tokens[inner + 1], may_count[inner + 1]
        counts[ends[len(inner) :]] = False
        return Window(tokens, targets, stops[:-1], ends, counts, self.bos_id)

    def _check(self, ids: npt.NDArray[np.int64], vocab_size: int, position: Callable[[int], int]) -> None:
        """Refuse token ``ids`` outside the vocabulary; ``position`` says where in the dataset the n-th of them lies."""
        if int(ids.view(np.uint64).max()) >= vocab_size:  # so read, negative ids are huge
            index = int(((ids < 0) | (ids >= vocab_size)).argmax())
            bad, place = int(ids[index]), position(index)
            raise UserError(
                f"{self.dataset.prefix}.bin: token id {bad} at token {place:,} is outside the model's vocabulary of "
                f"{vocab_size:,}; preprocess the corpus with the model's own tokenizer"
            )


def split_source(name: str, dataset: IndexedDataset, sequence_length: int, held_out: float) -> tuple[Source, Source]:
    """(training part, held-out part): the last share ``held_out`` of the tokens, cut where a document begins so that
    no document is on both sides."""
    cut = dataset.next_boundary(round(dataset.num_tokens * (1 - held_out)))
    return (
        Source(name, dataset, sequence_length, 0, cut),
        Source(name, dataset, sequence_length, cut, dataset.num_tokens),
    )
