"""From datasets on disk to micro-batches: packing, dealing to ranks, prefetching, and the refusals of the catalog."""

import threading
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.engine.batch import Batch
from retemper.engine.config.settings import DataConfig, SourceConfig
from retemper.engine.data.catalog import Catalog, open_catalog
from retemper.engine.data.curriculum import CurriculumStage, SourceWeight
from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.data.loader import Prefetcher, TrainingData, validation_batches
from retemper.engine.data.packing import pack
from retemper.engine.data.sample_order import SourceSize
from retemper.engine.data.sidecar import Sidecar
from retemper.engine.data.source import Chunk, Source, split_source
from retemper.engine.data.tokenizer_identity import TokenizerIdentity
from retemper.engine.errors import UserError
from retemper.engine.schedule import BatchPlan
from retemper.kernels.linear_cross_entropy import IGNORE_INDEX
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter

VOCAB = 1000
SIDECAR = Sidecar("tok", "a" * 64, VOCAB, True, "<eod>", 0, (), {})


def write(prefix: Path, documents: list[list[int]], sidecar: Sidecar | None = None) -> str:
    with IndexedDatasetWriter(prefix, np.uint16, overwrite=True) as writer:
        for document in documents:
            writer.add_document(document)
        writer.sidecar = sidecar
    return str(prefix)


def documents_of(lengths: list[int]) -> list[list[int]]:
    """Documents of these lengths whose tokens tell where they come from: ids count up without end (modulo VOCAB)."""
    ids = iter(range(sum(lengths)))
    return [[next(ids) % VOCAB for _ in range(length)] for length in lengths]


def make_source(prefix: Path, lengths: list[int], sequence_length: int, name: str = "s") -> Source:
    dataset = IndexedDataset(write(prefix, documents_of(lengths)))
    return Source(name, dataset, sequence_length, 0, dataset.num_tokens)


# --------------------------------------------------------------------------------------------------------------------
# Packing


def slow_pack(documents: list[list[int]], chunks: list[int | None], length: int, across: bool) -> dict[str, list[int]]:
    """Token by token: every token of the stream knows its document; a chunk's token begins a new piece when its
    document is not that of the token before it in the same chunk."""
    stream = [(token, number) for number, document in enumerate(documents) for token in document]
    tokens, targets, positions, offsets = [], [], [], []
    for chunk in chunks:
        for place in range(length):
            if chunk is None:
                begins = place == 0
                token, target = 0, IGNORE_INDEX
            else:
                at = chunk * length + place
                token, document = stream[at]
                begins = place == 0 or (not across and stream[at - 1][1] != document)
                target = stream[at + 1][0] if across or stream[at + 1][1] == document else IGNORE_INDEX
            if begins:
                offsets.append(len(tokens))
            positions.append(len(tokens) - offsets[-1])
            tokens.append(token)
            targets.append(target)
    return {
        "tokens": tokens,
        "targets": targets,
        "position_ids": positions,
        "cu_seqlens": [*offsets, len(tokens)],
    }


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    sequence_length=st.integers(1, 16),
    across=st.booleans(),
    data=st.data(),
)
def test_packing_equals_a_reference_that_goes_token_by_token(tmp_path_factory, lengths, sequence_length, across, data):
    source = make_source(tmp_path_factory.getbasetemp() / "packing", lengths, sequence_length)
    assert source.num_chunks == max(0, (sum(lengths) - 1) // sequence_length)
    choices = st.none() if source.num_chunks == 0 else st.none() | st.integers(0, source.num_chunks - 1)
    chosen = data.draw(st.lists(choices, min_size=1, max_size=5))
    chunks = [None if index is None else source.chunk(index, VOCAB) for index in chosen]
    batch = pack(chunks, sequence_length, across)
    expected = slow_pack(documents_of(lengths), chosen, sequence_length, across)
    for name, values in expected.items():
        assert getattr(batch, name).tolist() == values, name
    assert batch.max_seqlen == max(np.diff(expected["cu_seqlens"]))
    assert batch.num_targets == sum(target != IGNORE_INDEX for target in expected["targets"])
    assert [batch.tokens.dtype, batch.targets.dtype, batch.position_ids.dtype] == [torch.int64] * 3
    assert batch.cu_seqlens.dtype == torch.int32


def test_an_example_by_hand():
    """Documents [1 2 3] [4] [5 6 7 8] in chunks of 4: the boundaries after 3 and 4 mask their targets, the one between
    the chunks does not touch the first chunk's last target."""
    first = Chunk(np.array([1, 2, 3, 4]), np.array([2, 3, 4, 5]), np.array([3]), np.array([2, 3]))
    second = Chunk(np.array([5, 6, 7, 8]), np.array([6, 7, 8, 9]), np.array([], int), np.array([3]))
    ignored = IGNORE_INDEX
    batch = pack([first, second, None], 4, False)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0]
    assert batch.targets.tolist() == [2, 3, ignored, ignored, 6, 7, 8, ignored, *[ignored] * 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 8, 12]
    assert (batch.max_seqlen, batch.num_targets) == (4, 5)
    across = pack([first, second, None], 4, True)
    assert across.targets.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, *[ignored] * 4]
    assert across.cu_seqlens.tolist() == [0, 4, 8, 12]


def test_to_cpu_changes_nothing():
    batch = pack([None], 4, False)
    assert batch.to(torch.device("cpu")) is batch
    assert isinstance(batch.to(torch.device("meta")), Batch)
    assert batch.to(torch.device("meta")).targets.device.type == "meta"


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=15), held_out=st.floats(0, 0.99))
def test_held_out_documents_are_whole_and_last(tmp_path_factory, lengths, held_out):
    dataset = IndexedDataset(write(tmp_path_factory.getbasetemp() / "split", documents_of(lengths)))
    kept, left = split_source("s", dataset, 4, held_out)
    starts = {0, *np.cumsum(lengths).tolist()}
    assert (kept.start, kept.stop, left.stop) == (0, left.start, sum(lengths))
    assert left.start in starts
    # The share is exact to the document in which it falls, and never more is held out than asked (but for rounding).
    assert left.stop - left.start <= sum(lengths) * held_out + 0.5
    assert left.stop - left.start > sum(lengths) * held_out - max(lengths) - 0.5


# --------------------------------------------------------------------------------------------------------------------
# Dealing to ranks

LAYOUTS = [(1, 1), (1, 12), (2, 3), (3, 2), (4, 1), (12, 1)]


def cut(batches: list[Batch], length: int) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """The chunks of micro-batches, one by one: (tokens, targets, positions)."""
    parts = []
    for batch in batches:
        rows = zip(*(x.view(-1, length).tolist() for x in batch[:3]), strict=True)
        parts += [tuple(tuple(values) for values in row) for row in rows]
    return parts


@pytest.mark.parametrize(("ranks", "micro"), LAYOUTS)
def test_all_ranks_together_read_the_global_batch(tmp_path, ranks, micro):
    length = 8
    sources = [
        make_source(tmp_path / "a", [5] * 40, length, "a"),
        make_source(tmp_path / "b", [30, 1, 70], length, "b"),
    ]
    catalog = Catalog(sources, [CurriculumStage((SourceWeight("a", 2.0), SourceWeight("b")))], {}, {})
    order = catalog.sample_order(7)
    plan = BatchPlan(length, 12, micro, ranks)
    stride = 12
    for first in (0, stride, 5 * stride):
        dealt = []
        for rank in range(ranks):
            batches = TrainingData(sources, order, plan, rank, VOCAB, False).micro_batches(first)
            assert len(batches) == plan.num_micro_batches
            assert all(len(batch.tokens) == micro * length for batch in batches)
            dealt += cut(batches, length)
        expected = []
        for index in range(first, first + stride):
            sample = order.sample(index)
            expected += cut([pack([sources[sample.source].chunk(sample.chunk, VOCAB)], length, False)], length)
        assert Counter(dealt) == Counter(expected)


@pytest.mark.parametrize(("ranks", "micro"), LAYOUTS)
@pytest.mark.parametrize("max_tokens", [1, 80, 100, 10**6])
def test_validation_covers_each_chunk_once_and_ranks_stay_in_step(tmp_path, ranks, micro, max_tokens):
    length = 8
    sources = [
        make_source(tmp_path / "a", [5] * 20, length, "a"),
        make_source(tmp_path / "b", [30, 1, 70], length, "b"),
    ]
    plan = BatchPlan(length, 12, micro, ranks)
    made = [list(validation_batches(sources, plan, rank, VOCAB, False, max_tokens)) for rank in range(ranks)]
    per_rank = [[batch for _, batch in batches] for batches in made]
    assert len({len(batches) for batches in per_rank}) == 1
    # Of a set that fits, the shorter last chunk of each source as well.
    with_tails = max_tokens >= sum(source.num_targets for source in sources)
    numbers = [source.num_chunks_with_tail if with_tails else source.num_chunks for source in sources]
    chunks = [
        pack([source.chunk(i, VOCAB)], length, False)
        for source, count in zip(sources, numbers, strict=True)
        for i in range(count)
    ]
    count = min(len(chunks), max(1, max_tokens // length))
    # Spread evenly: the i-th of count chunks is at i / count of the way, over all sources.
    chunks = [chunks[int(Fraction(i * len(chunks), count))] for i in range(count)]
    seen = Counter(part for batches in per_rank for part in cut(batches, length))
    for part in list(seen):
        if set(part[1]) == {IGNORE_INDEX}:  # a filled place: must not count
            del seen[part]
    assert seen == Counter(part for chunk in chunks for part in cut([chunk], length))
    targets = sum(batch.num_targets for batches in per_rank for batch in batches)
    assert targets == sum(chunk.num_targets for chunk in chunks)
    of_sources = [
        {part for i in range(n) for part in cut([pack([source.chunk(i, VOCAB)], length, False)], length)}
        for source, n in zip(sources, numbers, strict=True)
    ]
    for source, batch in (one for batches in made for one in batches):
        assert {part for part in cut([batch], length) if set(part[1]) != {IGNORE_INDEX}} <= of_sources[source]
    if with_tails:  # every token but the first of its document
        assert targets == (200 - 40 - 20) - 60 + (101 - 3)


# --------------------------------------------------------------------------------------------------------------------
# Prefetching


def no_thread_left() -> bool:
    return not any(thread.name == "data-prefetch" for thread in threading.enumerate())


def test_prefetching_gives_the_steps_in_order():
    with Prefetcher(lambda step: [step], range(3, 50, 4), 2) as prefetcher:
        assert [prefetcher.get() for _ in range(3, 50, 4)] == [[step] for step in range(3, 50, 4)]
    assert no_thread_left()


@pytest.mark.timeout(20)
def test_at_most_depth_steps_ahead():
    made: list[int] = []
    with Prefetcher(made.append, range(100), 3) as prefetcher:
        prefetcher.get()
        while len(made) < 5:  # one taken, three waiting, one in hand
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(made) == 5


@pytest.mark.timeout(20)
def test_an_error_is_raised_by_the_get_whose_step_failed():
    def make(step: int) -> list[int]:
        if step == 2:
            raise UserError("bad token")
        return [step]

    with Prefetcher(make, range(10), 4) as prefetcher:
        time.sleep(0.1)  # the thread has met the error before it is due
        assert prefetcher.get() == [0]
        assert prefetcher.get() == [1]
        with pytest.raises(UserError, match="bad token"):
            prefetcher.get()
    assert no_thread_left()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("gets", [0, 1, 3])
def test_leaving_early_does_not_hang(gets):
    with Prefetcher(lambda step: [step], range(10**9), 2) as prefetcher:
        for _ in range(gets):
            prefetcher.get()
    assert no_thread_left()


@pytest.mark.timeout(20)
def test_an_error_in_the_loop_gets_out():
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        Prefetcher(lambda step: [step], range(10**9), 2) as prefetcher,
    ):
        prefetcher.get()
        raise RuntimeError("out of memory")
    assert no_thread_left()


# --------------------------------------------------------------------------------------------------------------------
# The catalog

PLAN = BatchPlan(sequence_length=8, global_batch_size=4, micro_batch_size=1, data_parallel_size=1)


def catalog_of(path: str, vocab_size: int = VOCAB, tokenizer: str | None = None, **changes) -> Catalog:
    identity = None if tokenizer is None else TokenizerIdentity(tokenizer, lambda: "1:BPE:other:tokenizer")
    return open_catalog(DataConfig(train=[SourceConfig(path)], **changes), PLAN, vocab_size, identity, 7)


def refusal(*arguments, **changes) -> str:
    with pytest.raises(UserError) as caught:
        catalog_of(*arguments, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_open_catalog(tmp_path):
    path = write(tmp_path / "web", documents_of([10] * 20), SIDECAR)
    news = write(tmp_path / "other", documents_of([40]))
    catalog = catalog_of(path, tokenizer="a" * 64, validation={"news": news}, validation_fraction=0.25)
    assert [source.name for source in catalog.train] == ["web"]
    assert catalog.sample_order(7).sources == [SourceSize("web", (150 - 1) // 8)]
    assert {name: sum(s.num_chunks for s in sets) for name, sets in catalog.validation.items()} == {
        "held_out": (50 - 1) // 8,
        "news": (40 - 1) // 8,
    }
    assert catalog.fingerprints["web"]["tokens"] == 200
    assert len(catalog.fingerprints["web"]["hash"]) == 32


def test_missing_dataset(tmp_path):
    path = str(tmp_path / "absent")
    assert path in refusal(path)
    present = write(tmp_path / "web", documents_of([100]))
    assert path in refusal(present, validation={"news": path})


def test_token_ids_outside_the_vocabulary(tmp_path):
    """With a sidecar by that; without one in a sample of chunks, or when a chunk is read: naming the place."""
    documents = [[1] * 30, [1, 2, 999, 3] + [1] * 30]
    path = write(tmp_path / "known", documents, SIDECAR)
    message = refusal(path, 999)
    assert path in message
    assert "token id 999" in message
    assert "vocabulary of 999" in message
    assert catalog_of(path, 1000).train[0].num_chunks == 7

    path = write(tmp_path / "unknown", documents)
    assert "unknown.bin: token id 999 at token 32 is outside the model's vocabulary of 999" in refusal(path, 999)
    source = catalog_of(path, 1000).train[0]
    source.chunk(0, 999)
    with pytest.raises(UserError, match=r"token id 999 at token 32 is outside the model's vocabulary of 999") as caught:
        source.chunk(4, 999)
    assert f"{path}.bin" in str(caught.value)


def test_wrong_tokenizer(tmp_path):
    path = write(tmp_path / "web", documents_of([100]), SIDECAR)
    message = refusal(path, VOCAB, "b" * 64)
    assert path in message
    assert "aaaaaaaaaaaa..." in message
    assert "bbbbbbbbbbbb..." in message
    catalog_of(path, VOCAB, "a" * 64)
    catalog_of(path, VOCAB, None)
    catalog_of(write(tmp_path / "foreign", documents_of([100])), VOCAB, "b" * 64)


@pytest.mark.parametrize(
    ("lengths", "changes", "expected"),
    [
        ([8], {}, "8 tokens are too few to train on: one chunk needs 9"),
        ([32], {}, "data.train holds 3 chunks of 8 tokens, fewer than one global batch of 4"),
        (
            [100, 1],
            {"validation_fraction": 0.01},
            "data.validation_fraction 0.01 holds out 1 tokens",
        ),
        ([100], {"validation_fraction": 0.5}, "data.validation_fraction 0.5 holds out 0 tokens"),
    ],
)
def test_too_few_chunks(tmp_path, lengths, changes, expected):
    assert expected in refusal(write(tmp_path / "web", documents_of(lengths)), **changes)


def test_the_smallest_dataset_that_will_do(tmp_path):
    assert catalog_of(write(tmp_path / "web", documents_of([33]))).train[0].num_chunks == 4


def test_too_small_a_validation_set(tmp_path):
    path = write(tmp_path / "web", documents_of([100]))
    small = write(tmp_path / "small", documents_of([1]))
    assert "small: the set has 1 tokens, but an evaluation needs" in refusal(path, validation={"small": small})
    shorter_than_a_chunk = write(tmp_path / "short", documents_of([3]))
    [source] = catalog_of(path, validation={"short": shorter_than_a_chunk}).validation["short"]
    assert source.chunk(0, VOCAB).targets.tolist() == source.dataset.tokens(1, 3).tolist()


def test_changed_data_is_refused_on_resume(tmp_path):
    former = catalog_of(write(tmp_path / "web", documents_of([100]), SIDECAR))
    former.require_unchanged(former.fingerprints, "step-1")
    grown = catalog_of(write(tmp_path / "web", documents_of([101]), SIDECAR))
    with pytest.raises(UserError, match=r"'web'.*step-1.*101 tokens.*instead of 100 tokens"):
        grown.require_unchanged(former.fingerprints, "step-1")
    edited = catalog_of(write(tmp_path / "web", [[7] * 100], SIDECAR))
    with pytest.raises(UserError, match="restore it, or give the new data another name"):
        edited.require_unchanged(former.fingerprints, "step-1")
    # Without a sidecar there is no hash to compare; another name is another source.
    catalog_of(write(tmp_path / "web", [[7] * 100])).require_unchanged(former.fingerprints, "step-1")
    other = write(tmp_path / "x", [[7] * 99])
    renamed = open_catalog(DataConfig(train=[SourceConfig(other)]), PLAN, VOCAB, None, 7)
    renamed.require_unchanged(former.fingerprints, "step-1")


def test_a_damaged_index_or_another_datasets_sidecar_is_refused(tmp_path):
    write(tmp_path / "web", documents_of([10] * 30), SIDECAR)
    index = tmp_path / "web.idx"
    whole = index.read_bytes()
    index.write_bytes(whole[:58] + bytes([whole[58] ^ 4]) + whole[59:])  # the length of a document in the middle
    with pytest.raises(
        UserError, match=r"web\.idx: .* end of the previous one .*; .*web\.json shows that it was written by"
    ):
        catalog_of(str(tmp_path / "web"))
    index.write_bytes(whole[:26] + bytes([whole[26] - 1]) + whole[27:-8])  # without its last document
    with pytest.raises(UserError, match=r"web\.idx: its list of documents runs .*; .*web\.json shows"):
        catalog_of(str(tmp_path / "web"))
    index.write_bytes(whole)
    write(tmp_path / "other", documents_of([10] * 31), SIDECAR)
    (tmp_path / "web.json").write_bytes((tmp_path / "other.json").read_bytes())
    with pytest.raises(UserError, match=r"web\.json: says documents: 31, but the dataset's files say 30"):
        catalog_of(str(tmp_path / "web"))


def test_a_sidecar_knows_its_largest_token(tmp_path):
    write(tmp_path / "web", [[3, 5, 4] * 20], replace(SIDECAR, tokenizer="other"))
    sidecar = Sidecar.read(tmp_path / "web")
    assert sidecar is not None
    assert (sidecar.tokenizer, sidecar.max_token_id, sidecar.tokens) == ("other", 5, 60)
