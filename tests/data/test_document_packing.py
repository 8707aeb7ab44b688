"""Documents laid out anew: every chunk against a reference of lists and loops, and what must hold of any layout."""

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

from retemper.engine.data.curriculum import Curriculum, CurriculumStage, SourceWeight
from retemper.engine.data.document_packing import CHUNKS_PER_GROUP
from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.data.packing import pack
from retemper.engine.data.sample_order import SampleOrder, SourceSize
from retemper.engine.data.source import Source, split_source
from retemper.engine.data.truncation import count_truncated
from retemper.engine.errors import UserError
from retemper.kernels.linear_cross_entropy import IGNORE_INDEX
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter

MODES = [("concat", "documents"), ("best_fit", "windows"), ("best_fit", "documents")]
VOCAB = 10**6


def make_source(folder: Path, lengths: list[int], length: int, mask: list[bool] | None = None) -> Source:
    """A source whose token at position p of the dataset is p: a chunk shows where it was read."""
    prefix = folder / "numbered"
    with IndexedDatasetWriter(prefix, np.int32, overwrite=True, mask=mask is not None) as writer:
        writer.add_documents(np.arange(sum(lengths)), lengths, mask=mask)
    dataset = IndexedDataset(prefix)
    return Source("s", dataset, length, 0, dataset.num_tokens)


def with_packing(source: Source, mode: tuple[str, str], seed: int = 1, chunks_per_group: int = 4) -> Source:
    """``source`` in groups of so few chunks that small datasets have several."""
    packer = source.with_packing(*mode, seed).packer
    return dataclasses.replace(source, packer=dataclasses.replace(packer, chunks_per_group=chunks_per_group))


# --------------------------------------------------------------------------------------------------------------------
# The reference: a span is a list of positions, a chunk a list of spans

Span = list[int]


class SlowPacker:
    """All chunks of an epoch, made token by token."""

    def __init__(self, lengths: list[int], start: int, length: int, num_chunks: int, chunks_per_group: int):
        self.document = [number for number, size in enumerate(lengths) for _ in range(size)]
        self.start, self.length, self.num_chunks, self.chunks_per_group = start, length, num_chunks, chunks_per_group

    def is_whole(self, span: Span) -> bool:
        number = self.document[span[0]]
        return [p for p, owner in enumerate(self.document) if owner == number] == span

    def num_whole(self, chunks: list[list[Span]]) -> int:
        return sum(self.is_whole(span) for chunk in chunks for span in chunk)

    def chunks(self, packing: str, key: str, epoch: int) -> list[list[Span]]:
        result = []
        for number, first in enumerate(range(0, self.num_chunks, self.chunks_per_group)):
            count = min(self.chunks_per_group, self.num_chunks - first)
            start = self.start + first * self.length
            documents = self.spans(list(range(start, start + count * self.length)))
            group_key = f"{key}/{epoch}/{number}"
            if packing == "best_fit":
                result += self.best_fit(documents, count, group_key)
            else:
                values = slow_random(f"{group_key}/documents", len(documents))
                order = sorted(range(len(documents)), key=values.__getitem__)
                result += self.cut([documents[i] for i in order], [self.length] * count)
        return result

    def spans(self, positions: list[int]) -> list[Span]:
        spans: list[Span] = []
        for p in positions:
            if spans and self.document[p] == self.document[spans[-1][-1]]:
                spans[-1].append(p)
            else:
                spans.append([p])
        return spans

    def cut(self, spans: list[Span], rooms: list[int]) -> list[list[Span]]:
        """Spans end to end, through bins with so much room."""
        waiting = [list(span) for span in spans]
        bins: list[list[Span]] = []
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

    def best_fit(self, documents: list[Span], count: int, key: str) -> list[list[Span]]:
        full, rest = [], []
        for span in documents:
            while len(span) >= self.length:
                full.append(span[: self.length])
                span = span[self.length :]
            if span:
                rest.append(span)
        values = slow_random(f"{key}/documents", len(rest))
        order = sorted(range(len(rest)), key=lambda i: (not self.is_whole(rest[i]), -len(rest[i]), values[i]))
        num_open = count - len(full)
        room = [self.length] * num_open
        fitted, unplaced = [], []
        for span in (rest[i] for i in order):
            able = [b for b in range(num_open) if room[b] >= len(span)]
            if not able:
                unplaced.append(span)
                continue
            best = min(able, key=lambda b: (room[b], b))
            room[best] -= len(span)
            fitted.append((best, span))
        holes = sorted((b for b in range(num_open) if room[b]), key=lambda b: (room[b], b), reverse=True)
        filling = self.cut(unplaced, [room[b] for b in holes])
        placed = [(num_open + i, span) for i, span in enumerate(full)]
        placed += fitted
        placed += [(b, span) for b, spans in zip(holes, filling, strict=True) for span in spans]
        plain = self.cut(documents, [self.length] * count)
        if self.num_whole([[span for _, span in placed]]) < self.num_whole(plain):
            return plain
        chunk_values = slow_random(f"{key}/windows", count)
        place_values = slow_random(f"{key}/places", len(placed))
        chunks = []
        for b in sorted(range(count), key=chunk_values.__getitem__):
            mine = [i for i in range(len(placed)) if placed[i][0] == b]
            chunks.append([placed[i][1] for i in sorted(mine, key=place_values.__getitem__)])
        return chunks


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


def slow_batch(chunks: list[list[Span]], reference: SlowPacker, mask: list[bool], across: bool) -> dict[str, list[int]]:
    """What :func:`pack` must make of chunks, token by token."""
    tokens, targets, positions, starts = [], [], [], []
    for chunk in chunks:
        stream = [p for span in chunk for p in span]
        begins = {span[0] for span in chunk} if not across else {stream[0]}
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


# Documents of one to some tokens, some of them longer than a chunk or than a group.
CORPORA = st.lists(st.integers(1, 9) | st.sampled_from([1, 1, 8, 16, 17, 40]), min_size=4, max_size=40)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@settings(deadline=None, max_examples=60)
@given(lengths=CORPORA, length=st.sampled_from([1, 2, 5, 8, 16]), width=st.integers(1, 6), data=st.data())
def test_every_chunk_equals_the_reference(tmp_path_factory, mode, lengths, length, width, data):
    """Tokens, targets, positions and document boundaries of all chunks of an epoch, of the whole dataset or a part of
    it, with and without a loss mask, in both conventions."""
    folder = tmp_path_factory.getbasetemp()
    mask = data.draw(st.none() | st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)), label="mask")
    whole = make_source(folder, lengths, length, mask)
    source = data.draw(st.sampled_from([whole, *split_source("s", whole.dataset, length, 0.4)]), label="part")
    epoch, across = data.draw(st.integers(0, 2), label="epoch"), data.draw(st.booleans(), label="across")
    if not source.num_chunks:
        return
    source = with_packing(source, mode, chunks_per_group=width)
    reference = SlowPacker(lengths, source.start, length, source.num_chunks, width)
    drawn = epoch if mode[1] == "documents" else 0
    chunks = reference.chunks(mode[0], f"1/{length}/s/layout", drawn)
    read = [source.chunk(index, VOCAB, epoch) for index in range(source.num_chunks)]
    batch = pack(read, length, across)
    for name, values in slow_batch(chunks, reference, mask or [True] * sum(lengths), across).items():
        assert getattr(batch, name).tolist() == values, name
    assert batch.num_targets == int((batch.targets != IGNORE_INDEX).sum())


# --------------------------------------------------------------------------------------------------------------------
# What must hold of any layout, said without the reference


def whole_documents(source: Source, epoch: int, lengths: list[int]) -> set[int]:
    """Documents all of whose tokens stand one behind the other in one chunk."""
    begins = dict(zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False))
    whole = set()
    for index in range(source.num_chunks):
        tokens = source.chunk(index, VOCAB, epoch).tokens.tolist()
        for place, p in enumerate(tokens):
            if p in begins and tokens[place : place + begins[p]] == list(range(p, p + begins[p])):
                whole.add(p)
    return whole


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@settings(deadline=None, max_examples=60)
@given(lengths=CORPORA, length=st.integers(1, 16), width=st.integers(1, 6), epoch=st.integers(0, 3))
def test_every_token_once_in_an_epoch(tmp_path_factory, mode, lengths, length, width, epoch):
    """Through the sample order: what it draws in one epoch is every token of the whole chunks, once, as an input, and
    as its target the token that follows in the dataset, or none where that is of another document."""
    plain = make_source(tmp_path_factory.getbasetemp(), lengths, length)
    count = plain.num_chunks
    if not count:
        return
    source = with_packing(plain, mode, chunks_per_group=width)
    order = SampleOrder([SourceSize("s", count)], Curriculum([CurriculumStage((SourceWeight("s"),))]), 1, length)
    seen: Counter[tuple[int, int]] = Counter()
    for index in range(epoch * count, (epoch + 1) * count):
        sample = order.sample(index)
        batch = pack([source.chunk(sample.chunk, VOCAB, sample.epoch)], length, False)
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
    best = with_packing(plain, ("best_fit", shuffle), chunks_per_group=width)
    # Documents of one length are counted, since layouts may keep others of them.
    assert len(whole_documents(best, epoch, lengths)) >= len(whole_documents(plain, epoch, lengths))


def test_best_fit_keeps_nearly_all_that_fit_whole(tmp_path):
    """Lengths as of web pages, groups as large as they are: what is cut are the documents at the groups' edges."""
    lengths = np.random.default_rng(0).lognormal(4.0, 1.0, size=12_000).astype(int).clip(1).tolist()
    plain = make_source(tmp_path, lengths, 512)
    best, shuffled = plain.with_packing("best_fit", "documents", 1), plain.with_packing("concat", "documents", 1)
    groups = -(-plain.num_chunks // CHUNKS_PER_GROUP)
    assert groups > 10
    assert count_truncated(plain).truncated > 1_500
    assert count_truncated(shuffled).truncated > 1_500
    for epoch in (0, 1):
        assert count_truncated(best, epoch).truncated <= 2 * groups


@pytest.mark.parametrize("mode", [("concat", "windows"), *MODES], ids="-".join)
@settings(deadline=None, max_examples=60)
@given(lengths=CORPORA, length=st.integers(1, 16), width=st.integers(1, 6), held_out=st.sampled_from([0.0, 0.4]))
def test_counted_cuts_are_the_cuts(tmp_path_factory, mode, lengths, length, width, held_out):
    dataset = make_source(tmp_path_factory.getbasetemp(), lengths, length).dataset
    part, _ = split_source("s", dataset, length, held_out)
    if not part.num_chunks:
        return
    source = part if mode == ("concat", "windows") else with_packing(part, mode, chunks_per_group=width)
    counted = count_truncated(source, epoch=1)
    covered = part.num_chunks * length
    starts = np.cumsum([0, *lengths[:-1]])
    begun = [size for first, size in zip(starts, lengths, strict=True) if first < covered]
    assert (counted.documents, counted.longer) == (len(begun), sum(size > length for size in begun))
    assert counted.truncated == len(begun) - counted.longer - len(whole_pieces(source, 1))
    assert counted.tokens_dropped == part.stop - covered
    groups = range(-(-part.num_chunks // (width if source.packer else CHUNKS_PER_GROUP)))
    parts = [count_truncated(source, epoch=1, groups=[group]) for group in groups]
    for name in ("documents", "longer", "truncated"):
        assert sum(getattr(part, name) for part in parts) == getattr(counted, name)
    assert counted.exact and all(part.exact == (len(groups) == 1) for part in parts)


def whole_pieces(source: Source, epoch: int) -> list[int]:
    """Documents that lie whole in a chunk, by what the chunks say of starts and ends."""
    starts = set(source.dataset.boundaries(0, source.dataset.num_tokens).tolist()) | {0}
    found = []
    for index in range(source.num_chunks):
        chunk = source.chunk(index, VOCAB, epoch)
        begins = {0, *chunk.starts.tolist()}
        for end in chunk.ends.tolist():
            begin = max(place for place in begins if place <= end)
            if int(chunk.tokens[begin]) in starts:
                found.append(int(chunk.tokens[begin]))
    assert len(set(found)) == len(found)
    return found


def test_a_part_of_a_document_comes_with_its_true_next_token(tmp_path):
    """One document of 100 tokens: every span of it ends with the token that follows in the document."""
    source = with_packing(make_source(tmp_path, [100, 5], 8), ("best_fit", "documents"), chunks_per_group=3)
    for index in range(11):
        chunk = source.chunk(index, VOCAB)
        assert chunk.targets.tolist() == (chunk.tokens + 1).tolist()


# --------------------------------------------------------------------------------------------------------------------
# What it depends on

LENGTHS = np.random.default_rng(3).integers(1, 30, size=400).tolist()


def all_chunks(source: Source, epoch: int) -> list[list[int]]:
    return [source.chunk(index, VOCAB, epoch).tokens.tolist() for index in range(source.num_chunks)]


def test_epochs_seeds_and_names_have_layouts_of_their_own(tmp_path):
    plain = make_source(tmp_path, LENGTHS, 32)
    for mode in MODES:
        layouts = [
            all_chunks(with_packing(plain, mode), 0),
            all_chunks(with_packing(plain, mode), 1),
            all_chunks(with_packing(plain, mode, seed=2), 0),
            all_chunks(with_packing(dataclasses.replace(plain, name="t"), mode), 0),
        ]
        if mode[1] == "windows":
            assert layouts[0] == layouts.pop(1)
        assert all(layouts.count(layout) == 1 for layout in layouts)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_chunks_may_be_asked_for_in_any_order_from_any_thread(tmp_path, mode):
    plain = make_source(tmp_path, LENGTHS[:150], 16)
    expected = [all_chunks(with_packing(plain, mode, chunks_per_group=2), epoch) for epoch in range(3)]
    shared = with_packing(plain, mode, chunks_per_group=2)  # more groups than it remembers
    asked = [(epoch, index) for index in reversed(range(plain.num_chunks)) for epoch in range(3)] * 3
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda item: shared.chunk(item[1], VOCAB, item[0]).tokens.tolist(), asked))
    assert found == [expected[epoch][index] for epoch, index in asked]


GOLDEN = {
    "concat-documents": "97d6f8c7cf03d41b",
    "best_fit-windows": "4aee9863158c67a1",
    "best_fit-documents": "a077d971a80f88fe",
}


def test_layouts_are_those_of_former_releases(tmp_path):
    """A run that is resumed after an update must go on in the same chunks."""
    plain = make_source(tmp_path, LENGTHS, 32)
    digests = {}
    for mode in MODES:
        chunks = all_chunks(plain.with_packing(*mode, 1234), 2)
        digests["-".join(mode)] = hashlib.sha256(json.dumps(chunks).encode()).hexdigest()[:16]
    assert digests == GOLDEN


def test_a_bad_token_is_named_with_its_place(tmp_path):
    source = with_packing(make_source(tmp_path, [7] * 20, 8), ("concat", "documents"))
    with pytest.raises(UserError, match=r"numbered\.bin: token id (\d+) at token \1 is outside .* vocabulary of 100;"):
        for index in range(source.num_chunks):
            source.chunk(index, 100)
