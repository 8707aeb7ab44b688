"""What the configuration says of stages, caps, weights and masks, as the catalog opens it and the loader deals it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from retemper.engine.batch import Batch
from retemper.engine.config.settings import DataConfig, SourceConfig, StageConfig
from retemper.engine.data.catalog import Catalog, open_catalog
from retemper.engine.data.curriculum import CurriculumStage, SourceWeight
from retemper.engine.data.loader import TrainingData
from retemper.engine.data.sample_order import Permutation
from retemper.engine.data.sidecar import Sidecar
from retemper.engine.errors import UserError
from retemper.engine.schedule import BatchPlan
from retemper.kernels.linear_cross_entropy import IGNORE_INDEX
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter

VOCAB = 50_000
LENGTH = 10
PLAN = BatchPlan(LENGTH, global_batch_size=12, micro_batch_size=1, data_parallel_size=1)
SIDECAR = Sidecar("tok", "a" * 64, VOCAB, True, "<eod>", 0, (), {})


def write(prefix: Path, lengths: list[int], first: int = 0, mask: bool = False, sidecar: bool = False) -> str:
    """Documents of these lengths whose tokens count up from ``first``; with a mask, every third token counts not."""
    tokens = np.arange(first, first + sum(lengths))
    with IndexedDatasetWriter(prefix, np.uint16, overwrite=True, mask=mask) as writer:
        writer.add_documents(tokens, lengths, mask=tokens % 3 != 0 if mask else None)
        writer.sidecar = SIDECAR if sidecar else None
    return str(prefix)


def catalog_of(config: DataConfig, plan: BatchPlan = PLAN) -> Catalog:
    return open_catalog(config, plan, VOCAB, None, 7)


def refusal(config: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        catalog_of(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# Stages, caps, weights


def test_budgets_and_caps_become_samples(tmp_path):
    """1001 tokens are 100 chunks. Caps are rounded down, of two the smaller counts; stages end with the sample that
    reaches their sum, the last one never."""
    a, b = (write(tmp_path / name, [13] * 77) for name in "ab")
    stages = [
        StageConfig([SourceConfig(a, max_epochs=0.29), SourceConfig(b, 2.0)], 25),
        StageConfig([SourceConfig(b, max_tokens=59, max_epochs=3.0)], 12),
        StageConfig([SourceConfig(a, max_epochs=2.5), SourceConfig(b, max_tokens=10**6, max_epochs=1.0)], 40),
    ]
    catalog = catalog_of(DataConfig(stages=stages))
    assert catalog.stages == [
        CurriculumStage((SourceWeight("a", 1.0, 29), SourceWeight("b", 2.0)), 3),
        CurriculumStage((SourceWeight("b", 1.0, 5),), 4),
        CurriculumStage((SourceWeight("a", 1.0, 250), SourceWeight("b", 1.0, 100)), None),
    ]
    assert [source.name for source in catalog.train] == ["a", "b"]
    assert list(catalog.fingerprints) == ["a", "b"]
    plain = catalog_of(DataConfig(train=[SourceConfig(a)]))
    assert plain.stages == [CurriculumStage((SourceWeight("a"),), None)]


def test_a_cap_of_less_than_a_sample_is_refused(tmp_path):
    path = write(tmp_path / "a", [13] * 77)
    message = refusal(DataConfig(train=[SourceConfig(path, max_epochs=0.0099)]))
    assert "max_epochs 0.0099 of data source 'a' is less than one sample" in message
    assert "raise it to at least 0.01," in message
    catalog_of(DataConfig(train=[SourceConfig(path, max_epochs=0.01)]))


def test_weights_by_documents_draw_as_many_documents(tmp_path):
    """Equal weights, documents of 5 and of 20 tokens: as many documents of each, so four times the tokens."""
    short, long = write(tmp_path / "short", [5] * 200), write(tmp_path / "long", [20] * 100)
    sources = [SourceConfig(short), SourceConfig(long)]
    for weights, expected in (("tokens", {"short": 50, "long": 50}), ("documents", {"short": 20, "long": 80})):
        order = catalog_of(DataConfig(train=sources, weights=weights)).sample_order(1)  # type: ignore[arg-type]
        assert order.cursors(100) == expected


# --------------------------------------------------------------------------------------------------------------------
# All of it at once, against iterators


def drawn_one_by_one(catalog: Catalog, stops: list[int], limit: int) -> list[tuple[str, int, int]]:
    """(source, epoch, chunk) of the samples, each source being a shuffled pile of chunks that is refilled when it is
    empty, and each mixture a list of names gone through again and again."""
    sizes = {source.name: source.num_chunks for source in catalog.train}
    piles: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    epochs, given = Counter[str](), Counter[str]()
    result: list[tuple[str, int, int]] = []
    for stage, stop in zip(catalog.stages, [*stops, limit], strict=True):
        names: list[str] = []
        queue: list[str] = []
        while len(result) < stop:
            left = [s for s in stage.sources if s.max_samples is None or given[s.name] < s.max_samples]
            if names != [share.name for share in left]:
                names, queue = [share.name for share in left], []
            # Weights here are whole numbers, so the greedy rule can be told in fractions of one short round.
            queue = queue or one_round({share.name: int(share.weight) for share in left})
            name = queue.pop(0)
            if not piles[name]:
                shuffle = Permutation(sizes[name], f"7/{LENGTH}/{name}/{epochs[name]}")
                piles[name] = [(epochs[name], shuffle(i)) for i in range(sizes[name])]
                epochs[name] += 1
            result.append((name, *piles[name].pop(0)))
            given[name] += 1
    return result


def one_round(weights: dict[str, int]) -> list[str]:
    total, taken = sum(weights.values()), Counter[str]()
    slots: list[str] = []
    while len(slots) < total:
        open_ = [name for name in weights if taken[name] < weights[name]]
        slots.append(max(open_, key=lambda name: weights[name] * (len(slots) + 1) - total * taken[name]))
        taken[slots[-1]] += 1
    return slots


def rows(batches: list[Batch]) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """The chunks of micro-batches: (tokens, targets, positions)."""
    cut = [zip(*(values.view(-1, LENGTH).tolist() for values in batch[:3]), strict=True) for batch in batches]
    return [tuple(tuple(values) for values in row) for batch in cut for row in batch]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("packing", "shuffle"), [("concat", "windows"), ("concat", "documents"), ("best_fit", "documents")]
)
def test_stages_caps_and_epochs_on_any_ranks_are_the_piles_drawn_one_by_one(tmp_path, packing, shuffle):
    """Stage 1 runs b's cap out, stage 2 brings c in and a back, sources begin second and third epochs; every layout of
    ranks and micro-batches reads the samples of each step, all ranks together, in the order's place."""
    generator = np.random.default_rng(0)
    paths = {
        name: write(tmp_path / name, generator.integers(1, 25, size=size).tolist(), 10_000 * place, mask=name == "c")
        for place, (name, size) in enumerate({"a": 12, "b": 30, "c": 15}.items())
    }
    config = DataConfig(
        stages=[
            StageConfig([SourceConfig(paths["a"], 3.0), SourceConfig(paths["b"], 2.0, max_tokens=150)], 600),
            StageConfig([SourceConfig(paths["c"], 2.0), SourceConfig(paths["a"]), SourceConfig(paths["b"])], 400),
        ],
        packing=packing,
        shuffle=shuffle,
    )
    steps = 12
    catalog = catalog_of(config)
    expected = drawn_one_by_one(catalog, [60], steps * 12)
    last_epochs = {name: epoch for name, epoch, _ in expected}
    assert last_epochs["a"] >= 2 and last_epochs["c"] >= 1
    order = catalog.sample_order(7)
    samples = [order.sample(index) for index in range(steps * 12)]
    assert [(catalog.train[s.source].name, s.epoch, s.chunk) for s in samples] == expected

    sources = {source.name: source for source in catalog.train}
    whole = TrainingData(catalog.train, order, PLAN, 0, VOCAB, False)
    layouts = []
    for ranks, micro in ((1, 4), (2, 3), (3, 2), (4, 1), (12, 1)):
        again = catalog_of(config)  # as every rank opens it for itself
        plan = BatchPlan(LENGTH, 12, micro, ranks)
        layouts.append([TrainingData(again.train, again.sample_order(7), plan, r, VOCAB, False) for r in range(ranks)])
    for step in range(steps):
        expected_rows = rows(whole.micro_batches(step * 12))
        chunks = [sources[name].chunk(chunk, VOCAB, epoch) for name, epoch, chunk in expected[step * 12 :][:12]]
        assert [row[0] for row in expected_rows] == [tuple(chunk.tokens.tolist()) for chunk in chunks]
        for data in layouts:
            assert Counter(row for d in data for row in rows(d.micro_batches(step * 12))) == Counter(expected_rows)


# --------------------------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize(("packing", "shuffle"), [("concat", "windows"), ("best_fit", "documents")])
def test_a_mask_takes_targets_out_and_nothing_else(tmp_path, packing, shuffle):
    lengths = np.random.default_rng(1).integers(1, 25, size=60).tolist()
    config = DataConfig(
        train=[SourceConfig(write(tmp_path / "x", lengths, mask=True))], packing=packing, shuffle=shuffle
    )
    masked = catalog_of(config)
    (tmp_path / "x.mask.bin").unlink()
    plain = catalog_of(config)
    taken_out = 0
    for first in range(0, 120, 12):
        one, other = (TrainingData(c.train, c.sample_order(7), PLAN, 0, VOCAB, False) for c in (masked, plain))
        for ours, full in zip(one.micro_batches(first), other.micro_batches(first), strict=True):
            counts = (full.targets % 3 != 0) & (full.targets != IGNORE_INDEX)
            assert ours.targets.tolist() == full.targets.where(counts, IGNORE_INDEX).tolist()
            assert ours.num_targets == int(counts.sum()) < full.num_targets
            assert all(ours[i].equal(full[i]) for i in (0, 2, 3))
            taken_out += full.num_targets - ours.num_targets
    assert taken_out > 200


def test_a_mask_that_does_not_belong_is_refused(tmp_path):
    config = DataConfig(train=[SourceConfig(write(tmp_path / "x", [13] * 77, mask=True, sidecar=True))])
    assert len(catalog_of(config).fingerprints["x"]["mask"]) == 32
    mask = tmp_path / "x.mask.bin"
    content = mask.read_bytes()
    mask.unlink()
    message = refusal(config)
    assert f"{tmp_path}/x.json: says a loss mask: True, but the dataset's files say False" in message
    assert "build or copy all files of the dataset again" in message
    mask.write_bytes(content[:-1])
    assert f"{mask}: 1000 bytes, but {tmp_path}/x.bin holds 1001 tokens" in refusal(config)
    write(tmp_path / "x", [13] * 77, sidecar=True)
    mask.write_bytes(content)
    assert f"{tmp_path}/x.json: says a loss mask: False, but the dataset's files say True" in refusal(config)


def test_another_mask_is_refused_on_resume(tmp_path):
    def opened(**options) -> Catalog:
        for path in tmp_path.iterdir():
            path.unlink()
        return catalog_of(DataConfig(train=[SourceConfig(write(tmp_path / "x", [13] * 77, **options))]))

    plain, masked, unknown = (opened(mask=m, sidecar=s) for m, s in ((False, True), (True, True), (True, False)))
    for one, other, message in (
        (plain, masked, r"'x' .* has no loss mask, but step-1 was trained with a loss mask of hash [0-9a-f]{32};"),
        (masked, plain, r"'x' .* has a loss mask of hash [0-9a-f]{32}, but step-1 was trained with no loss mask;"),
        (unknown, plain, r"'x' .* has a loss mask of hash \?, but"),
    ):
        with pytest.raises(UserError, match=message):
            one.require_unchanged(other.fingerprints, "step-1")
    for one, other in ((plain, plain), (masked, masked), (unknown, masked), (masked, unknown)):
        one.require_unchanged(other.fingerprints, "step-1")
    # Before there were masks, fingerprints said nothing of them.
    former = {"x": {key: value for key, value in plain.fingerprints["x"].items() if key != "mask"}}
    plain.require_unchanged(former, "step-1")
    with pytest.raises(UserError, match="was trained with no loss mask"):
        masked.require_unchanged(former, "step-1")
