"""Documents laid out anew: every window against a reference of lists and loops, and what must hold of any layout."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.engine.data.curriculum import Schedule, Share, Stage
from retemper.engine.data.document_packing import GROUP_WINDOWS, DocumentLayout
from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.data.packing import pack
from retemper.engine.data.sample_order import OrderedSource, SampleOrder
from retemper.engine.data.source import Source, split_source
from retemper.engine.data.truncation import count_cuts
from retemper.engine.errors import UserError
from retemper.kernels.linear_cross_entropy import IGNORE_INDEX
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter

MODES = [("concat", "documents"), ("best_fit", "windows"), ("best_fit", "documents")]
VOCAB = 10**6


def make_source(folder: Path, lengths: list[int], length: int, mask: list[bool] | None = None) -> Source:
    """A source whose token at position p of the dataset is p: a window shows where it was read."""
    prefix = folder / "numbered"
    with IndexedDatasetWriter(prefix, np.int32, overwrite=True, mask=mask is not None) as writer:
        writer.add_documents(np.arange(sum(lengths)), lengths, mask=mask)
    dataset = IndexedDataset(prefix)
    return Source("s", dataset, length, 0, dataset.num_tokens)


def laid_out(source: Source, mode: tuple[str, str], seed: int = 1, group_windows: int = 4) -> Source:
    """``source`` in groups of so few windows that small datasets have several."""
    layout = source.laid_out(*mode, seed).layout
    small = DocumentLayout(
        layout.dataset,
        layout.start,
        layout.num_windows,
        layout.sequence_length,
        layout.key,
        layout.packing,
        layout.every_epoch,
        group_windows,
    )
    return dataclasses.replace(source, layout=small)


# --------------------------------------------------------------------------------------------------------------------
# The reference: a piece is a list of positions, a window a list of pieces

Piece = list[int]


class SlowLayout:
    """All windows of an epoch, made token by token."""

    def __init__(self, lengths: list[int], start: int, length: int, num_windows: int, group_windows: int):
        self.document = [number for number, size in enumerate(lengths) for _ in range(size)]
        self.start, self.length, self.num_windows, self.group_windows = start, length, num_windows, group_windows

    def is_whole(self, piece: Piece) -> bool:
        number = self.document[piece[0]]
        return [p for p, owner in enumerate(self.document) if owner == number] == piece

    def num_whole(self, windows: list[list[Piece]]) -> int:
        return sum(self.is_whole(piece) for window in windows for piece in window)

    def windows(self, packing: str, key: str, epoch: int) -> list[list[Piece]]:
        result = []
        for number, first in enumerate(range(0, self.num_windows, self.group_windows)):
            count = min(self.group_windows, self.num_windows - first)
            start = self.start + first * self.length
            documents = self.pieces(list(range(start, start + count * self.length)))
            group_key = f"{key}/{epoch}/{number}"
            if packing == "best_fit":
                result += self.best_fit(documents, count, group_key)
            else:
                values = slow_random(f"{group_key}/documents", len(documents))
                order = sorted(range(len(documents)), key=values.__getitem__)
                result += self.cut([documents[i] for i in order], [self.length] * count)
        return result

    def pieces(self, positions: list[int]) -> list[Piece]:
        pieces: list[Piece] = []
        for p in positions:
            if pieces and self.document[p] == self.document[pieces[-1][-1]]:
                pieces[-1].append(p)
            else:
                pieces.append([p])
        return pieces

    def cut(self, pieces: list[Piece], rooms: list[int]) -> list[list[Piece]]:
        """Pieces end to end, through bins with so much room."""
        waiting = [list(piece) for piece in pieces]
        bins: list[list[Piece]] = []
        for room in rooms:
            bins.append([])
            while room:
                taken, waiting[0] = waiting[0][:room], waiting[0][room:]
                bins[-1].append(taken)
                room -= len(taken)
                if not waiting[0]:
                    waiting.pop(0)
        assert not waiting
        return bins

    def best_fit(self, documents: list[Piece], count: int, key: str) -> list[list[Piece]]:
        full, rest = [], []
        for piece in documents:
            while len(piece) >= self.length:
                full.append(piece[: self.length])
                piece = piece[self.length :]
            if piece:
                rest.append(piece)
        values = slow_random(f"{key}/documents", len(rest))
        order = sorted(range(len(rest)), key=lambda i: (not self.is_whole(rest[i]), -len(rest[i]), values[i]))
        num_open = count - len(full)
        room = [self.length] * num_open
        fitted, unplaced = [], []
        for piece in (rest[i] for i in order):
            able = [b for b in range(num_open) if room[b] >= len(piece)]
            if not able:
                unplaced.append(piece)
                continue
            best = min(able, key=lambda b: (room[b], b))
            room[best] -= len(piece)
            fitted.append((best, piece))
        holes = sorted((b for b in range(num_open) if room[b]), key=lambda b: (room[b], b), reverse=True)
        filling = self.cut(unplaced, [room[b] for b in holes])
        placed = [(num_open + i, piece) for i, piece in enumerate(full)]
        placed += fitted
        placed += [(b, piece) for b, pieces in zip(holes, filling, strict=True) for piece in pieces]
        plain = self.cut(documents, [self.length] * count)
        if self.num_whole([[piece for _, piece in placed]]) < self.num_whole(plain):
            return plain
        window_values = slow_random(f"{key}/windows", count)
        place_values = slow_random(f"{key}/places", len(placed))
        windows = []
        for b in sorted(range(count), key=window_values.__getitem__):
            mine = [i for i in range(len(placed)) if placed[i][0] == b]
            windows.append([placed[i][1] for i in sorted(mine, key=place_values.__getitem__)])
        return windows


def slow_random(key: str, count: int) -> list[int]:
    """Splitmix64 as it is published, one number at a time."""
    mask = 2**64 - 1
    state = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    values = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        values.append(z ^ (z >> 31))
    return values


def slow_batch(
    windows: list[list[Piece]], reference: SlowLayout, mask: list[bool], across: bool
) -> dict[str, list[int]]:
    """What :func:`pack` must make of windows, token by token."""
    tokens, targets, positions, starts = [], [], [], []
    for window in windows:
        stream = [p for piece in window for p in piece]
        begins = {piece[0] for piece in window} if not across else {stream[0]}
        for place, p in enumerate(stream):
            if p in begins:
                starts.append(len(tokens))
            tokens.append(p)
            positions.append(len(tokens) - 1 - starts[-1])
            following: int | None = p + 1
            if reference.document[p + 1] != reference.document[p]:
                following = stream[place + 1] if across and place + 1 < len(stream) else None
            targets.append(following if following is not None and mask[following] else IGNORE_INDEX)
    return {
        "tokens": tokens,
        "targets": targets,
        "position_ids": positions,
        "cu_seqlens": [*starts, len(tokens)],
    }


# Documents of one to some tokens, some of them longer than a window or than a group.
CORPORA = st.lists(st.integers(1, 9) | st.sampled_from([1, 1, 8, 16, 17, 40]), min_size=4, max_size=40)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@settings(deadline=None, max_examples=60)
@given(lengths=CORPORA, length=st.sampled_from([1, 2, 5, 8, 16]), width=st.integers(1, 6), data=st.data())
def test_every_window_equals_the_reference(tmp_path_factory, mode, lengths, length, width, data):
    """Tokens, targets, positions and document boundaries of all windows of an epoch, of the whole dataset or a part of
    it, with and without a loss mask, in both conventions."""
    folder = tmp_path_factory.getbasetemp()
    mask = data.draw(st.none() | st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)), label="mask")
    whole = make_source(folder, lengths, length, mask)
    source = data.draw(st.sampled_from([whole, *split_source("s", whole.dataset, length, 0.4)]), label="part")
    epoch, across = data.draw(st.integers(0, 2), label="epoch"), data.draw(st.booleans(), label="across")
    if not source.num_windows:
        return
    source = laid_out(source, mode, group_windows=width)
    reference = SlowLayout(lengths, source.start, length, source.num_windows, width)
    drawn = epoch if mode[1] == "documents" else 0
    windows = reference.windows(mode[0], f"1/{length}/s/layout", drawn)
    read = [source.window(index, VOCAB, epoch) for index in range(source.num_windows)]
    batch = pack(read, length, across)
    for name, values in slow_batch(windows, reference, mask or [True] * sum(lengths), across).items():
        assert getattr(batch, name).tolist() == values, name
    assert batch.num_targets == int((batch.targets != IGNORE_INDEX).sum())


# --------------------------------------------------------------------------------------------------------------------
# What must hold of any layout, said without the reference


def whole_documents(source: Source, epoch: int, lengths: list[int]) -> set[int]:
    """Documents all of whose tokens stand one behind the other in one window."""
    begins = dict(zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False))
    whole = set()
    for index in range(source.num_windows):
        tokens = source.window(index, VOCAB, epoch).tokens.tolist()
        for place, p in enumerate(tokens):
            if p in begins and tokens[place : place + begins[p]] == list(range(p, p + begins[p])):
                whole.add(p)
    return whole


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@settings(deadline=None, max_examples=60)
@given(lengths=CORPORA, length=st.integers(1, 16), width=st.integers(1, 6), epoch=st.integers(0, 3))
def test_every_token_once_in_an_epoch(tmp_path_factory, mode, lengths, length, width, epoch):
    """Through the sample order: what it draws in one epoch is every token of the whole windows, once, as an input, and
    as its target the token that follows in the dataset, or none where that is of another document."""
    plain = make_source(tmp_path_factory.getbasetemp(), lengths, length)
    count = plain.num_windows
    if not count:
        return
    source = laid_out(plain, mode, group_windows=width)
    order = SampleOrder([OrderedSource("s", count)], Schedule([Stage((Share("s"),))]), 1, length)
    seen: Counter[tuple[int, int]] = Counter()
    for index in range(epoch * count, (epoch + 1) * count):
        sample = order.sample(index)
        batch = pack([source.window(sample.window, VOCAB, sample.epoch)], length, False)
        seen.update(zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True))
    ends = set((np.cumsum(lengths) - 1).tolist())
    assert seen == Counter((p, IGNORE_INDEX if p in ends else p + 1) for p in range(count * length))


@pytest.mark.parametrize("shuffle", ["windows", "documents"])
@settings(deadline=None, max_examples=100)
@given(lengths=CORPORA, length=st.integers(1, 16), width=st.integers(1, 6), epoch=st.integers(0, 1))
def test_best_fit_never_keeps_fewer_documents_whole_than_concat(
    tmp_path_factory, shuffle, lengths, length, width, epoch
):
    plain = make_source(tmp_path_factory.getbasetemp(), lengths, length)
    best = laid_out(plain, ("best_fit", shuffle), group_windows=width)
    # Documents of one length are counted, since layouts may keep others of them.
    assert len(whole_documents(best, epoch, lengths)) >= len(whole_documents(plain, epoch, lengths))


def test_best_fit_keeps_nearly_all_that_fit_whole(tmp_path):
    """Lengths as of web pages, groups as large as they are: what is cut are the documents at the groups' edges."""
    lengths = np.random.default_rng(0).lognormal(4.0, 1.0, size=12_000).astype(int).clip(1).tolist()
    plain = make_source(tmp_path, lengths, 512)
    best, shuffled = plain.laid_out("best_fit", "documents", 1), plain.laid_out("concat", "documents", 1)
    groups = -(-plain.num_windows // GROUP_WINDOWS)
    assert groups > 10
    assert count_cuts(plain).cut > 1_500
    assert count_cuts(shuffled).cut > 1_500
    for epoch in (0, 1):
        assert count_cuts(best, epoch).cut <= 2 * groups


@pytest.mark.parametrize("mode", [("concat", "windows"), *MODES], ids="-".join)
@settings(deadline=None, max_examples=60)
@given(lengths=CORPORA, length=st.integers(1, 16), width=st.integers(1, 6), held_out=st.sampled_from([0.0, 0.4]))
def test_counted_cuts_are_the_cuts(tmp_path_factory, mode, lengths, length, width, held_out):
    dataset = make_source(tmp_path_factory.getbasetemp(), lengths, length).dataset
    part, _ = split_source("s", dataset, length, held_out)
    if not part.num_windows:
        return
    source = part if mode == ("concat", "windows") else laid_out(part, mode, group_windows=width)
    counted = count_cuts(source, epoch=1)
    covered = part.num_windows * length
    starts = np.cumsum([0, *lengths[:-1]])
    begun = [size for first, size in zip(starts, lengths, strict=True) if first < covered]
    assert (counted.documents, counted.longer) == (len(begun), sum(size > length for size in begun))
    assert counted.cut == len(begun) - counted.longer - len(whole_pieces(source, 1))
    assert counted.tokens_lost == part.stop - covered
    groups = range(-(-part.num_windows // (width if source.layout else GROUP_WINDOWS)))
    parts = [count_cuts(source, epoch=1, groups=[group]) for group in groups]
    assert [sum(values) for values in zip(*(part[:3] for part in parts), strict=True)] == list(counted[:3])


def whole_pieces(source: Source, epoch: int) -> list[int]:
    """Documents that lie whole in a window, by what the windows say of starts and ends."""
    starts = set(source.dataset.boundaries(0, source.dataset.num_tokens).tolist()) | {0}
    found = []
    for index in range(source.num_windows):
        window = source.window(index, VOCAB, epoch)
        begins = {0, *window.starts.tolist()}
        for end in window.ends.tolist():
            begin = max(place for place in begins if place <= end)
            if int(window.tokens[begin]) in starts:
                found.append(int(window.tokens[begin]))
    assert len(set(found)) == len(found)
    return found


def test_a_part_of_a_document_comes_with_its_true_next_token(tmp_path):
    """One document of 100 tokens: every piece of it ends with the token that follows in the document."""
    source = laid_out(make_source(tmp_path, [100, 5], 8), ("best_fit", "documents"), group_windows=3)
    for index in range(11):
        window = source.window(index, VOCAB)
        assert window.targets.tolist() == (window.tokens + 1).tolist()


# --------------------------------------------------------------------------------------------------------------------
# What it depends on

LENGTHS = np.random.default_rng(3).integers(1, 30, size=400).tolist()


def all_windows(source: Source, epoch: int) -> list[list[int]]:
    return [source.window(index, VOCAB, epoch).tokens.tolist() for index in range(source.num_windows)]


def test_epochs_seeds_and_names_have_layouts_of_their_own(tmp_path):
    plain = make_source(tmp_path, LENGTHS, 32)
    for mode in MODES:
        layouts = [
            all_windows(laid_out(plain, mode), 0),
            all_windows(laid_out(plain, mode), 1),
            all_windows(laid_out(plain, mode, seed=2), 0),
            all_windows(laid_out(dataclasses.replace(plain, name="t"), mode), 0),
        ]
        if mode[1] == "windows":
            assert layouts[0] == layouts.pop(1)
        assert all(layouts.count(layout) == 1 for layout in layouts)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_windows_may_be_asked_for_in_any_order_from_any_thread(tmp_path, mode):
    plain = make_source(tmp_path, LENGTHS[:150], 16)
    expected = [all_windows(laid_out(plain, mode, group_windows=2), epoch) for epoch in range(3)]
    shared = laid_out(plain, mode, group_windows=2)  # more groups than it remembers
    asked = [(epoch, index) for index in reversed(range(plain.num_windows)) for epoch in range(3)] * 3
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda item: shared.window(item[1], VOCAB, item[0]).tokens.tolist(), asked))
    assert found == [expected[epoch][index] for epoch, index in asked]


GOLDEN = {
    "concat-documents": "97d6f8c7cf03d41b",
    "best_fit-windows": "4aee9863158c67a1",
    "best_fit-documents": "a077d971a80f88fe",
}


def test_layouts_are_those_of_former_releases(tmp_path):
    """A run that is resumed after an update must go on in the same windows."""
    plain = make_source(tmp_path, LENGTHS, 32)
    digests = {}
    for mode in MODES:
        windows = all_windows(plain.laid_out(*mode, 1234), 2)
        digests["-".join(mode)] = hashlib.sha256(json.dumps(windows).encode()).hexdigest()[:16]
    assert digests == GOLDEN


def test_a_bad_token_is_named_with_its_place(tmp_path):
    source = laid_out(make_source(tmp_path, [7] * 20, 8), ("concat", "documents"))
    with pytest.raises(UserError, match=r"numbered\.bin: token id (\d+) at token \1 is outside .* vocabulary of 100;"):
        for index in range(source.num_windows):
            source.window(index, 100)
