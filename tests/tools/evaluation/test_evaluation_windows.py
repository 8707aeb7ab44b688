"""Windows predict every token of a document once, with as much context as they promise."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from evaluating import write_dataset
from hypothesis import given
from hypothesis import strategies as st

from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.data.loader import validation_batches
from retemper.engine.data.source import Source
from retemper.engine.errors import UserError
from retemper.engine.schedule import BatchPlan
from retemper.kernels.linear_cross_entropy import IGNORE_INDEX
from retemper.tools.evaluation.windows import WindowPlan, divide

LENGTHS = [1, 2, 40, 7, 16, 17, 33, 1, 64, 5]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    """Every token of a document has its own id, so that a target identifies its place."""
    ids = iter(range(1, sum(LENGTHS) + 1))
    documents = [[next(ids) for _ in range(length)] for length in LENGTHS]
    return IndexedDataset(write_dataset(tmp_path_factory.mktemp("windows") / "set", documents))


def source_of(dataset: IndexedDataset, length: int, stop: int | None = None) -> Source:
    return Source("set", dataset, length, 0, dataset.num_tokens if stop is None else stop)


@given(st.integers(2, 50), st.data())
def test_sliding_windows(dataset: IndexedDataset, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    ranks, micro = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    plan = WindowPlan(BatchPlan(length, ranks * micro, micro, ranks), stride)
    scored: Counter[int] = Counter()
    numbers = set()
    for rank in range(ranks):
        windows = divide(source_of(dataset, length), plan, rank, 1000)
        batches = list(windows)
        numbers.add(len(batches))
        assert len(batches) == windows.num_batches
        for batch, documents, places in batches:
            assert len(batch.tokens) == length * micro and int(batch.cu_seqlens[-1]) == length * micro
            assert batch.max_seqlen <= length  # of padding too
            for at in np.flatnonzero(batch.targets.numpy() != IGNORE_INDEX):
                target, document, place = int(batch.targets[at]), int(documents[at]), int(places[at])
                scored[target] += 1
                assert target == sum(LENGTHS[:document]) + place + 1
                context = int(batch.position_ids[at]) + 1  # tokens of this window before the target
                assert place == context or context > length - stride
                window = batch.tokens[at - context + 1 : at + 1].tolist()
                assert window == list(range(target - context, target))
    assert len(numbers) == 1  # ranks compute together
    first = {sum(LENGTHS[:document]) + 1 for document in range(len(LENGTHS))}
    assert scored == Counter(target for target in range(1, sum(LENGTHS) + 1) if target not in first)


@pytest.mark.parametrize("max_tokens", [None, 48])
@pytest.mark.parametrize("across", [True, False])
def test_packed_windows_are_the_batches_of_validation(
    across: bool, max_tokens: int | None, dataset: IndexedDataset
) -> None:
    batches, source = BatchPlan(16, 4, 2, 2), source_of(dataset, 16)
    limit = source.num_targets if max_tokens is None else max_tokens
    for rank in range(2):
        windows = divide(source, WindowPlan(batches, None, max_tokens, across), rank, 1000)
        expected = [one.batch for one in validation_batches([source], batches, rank, 1000, across, limit)]
        found = list(windows)
        assert len(found) == len(expected) == windows.num_batches
        for (batch, documents, places), other in zip(found, expected, strict=True):
            assert all(
                (ours == theirs).all()
                for ours, theirs in zip(batch[:4], other[:4], strict=True)  # tensors
            )
            for at in np.flatnonzero(batch.targets.numpy() != IGNORE_INDEX):
                assert int(batch.targets[at]) == sum(LENGTHS[: documents[at]]) + places[at] + 1


def test_limits(dataset: IndexedDataset) -> None:
    batches = BatchPlan(16, 1, 1, 1)
    some = divide(source_of(dataset, 16), WindowPlan(batches, 8, 60), 0, 1000)
    assert some.num_tokens <= 100 and some.num_tokens < dataset.num_tokens
    first = divide(source_of(dataset, 16, stop=sum(LENGTHS[:3])), WindowPlan(batches, 8), 0, 1000)
    found = {int(one) for batch, _, _ in first for one in batch.targets if one != IGNORE_INDEX}
    assert found == {3, *range(5, 44)} and first.num_tokens == 43


def test_a_token_outside_the_vocabulary(dataset: IndexedDataset) -> None:
    windows = divide(source_of(dataset, 16), WindowPlan(BatchPlan(16, 1, 1, 1), 8), 0, 100)
    with pytest.raises(UserError, match=f"{Path(dataset.prefix).name}.*vocabulary of 100"):
        list(windows)
