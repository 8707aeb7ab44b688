"""The sample order: permutations, mixtures, and what a resume must not change."""

import contextlib
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.engine.data import mixture as mixture_module
from retemper.engine.data.curriculum import Curriculum, CurriculumStage, SourceWeight
from retemper.engine.data.mixture import MIXTURE_RESOLUTION, Mixture
from retemper.engine.data.sample_order import Permutation, Sample, SampleOrder, SourceSize
from retemper.engine.schedule import BatchPlan

WeightedSource = tuple[str, int, float]
"""Name, chunks, weight."""
SOURCES: list[WeightedSource] = [("web", 13, 3.0), ("code", 5, 1.0), ("books", 1, 0.5)]
weights_of_few = st.lists(st.integers(1, 12), min_size=1, max_size=5)


def order_of(sources: list[WeightedSource], seed: int, sequence_length: int) -> SampleOrder:
    """The order of a run with one mixture and no caps."""
    schedule = Curriculum([CurriculumStage(tuple(SourceWeight(name, weight) for name, _, weight in sources))])
    ordered = [SourceSize(name, num_chunks) for name, num_chunks, _ in sources]
    return SampleOrder(ordered, schedule, seed, sequence_length)


# --------------------------------------------------------------------------------------------------------------------
# Permutation


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 5000), key=st.text(max_size=5))
def test_a_permutation_is_a_bijection(size, key):
    permutation = Permutation(size, key)
    assert sorted(permutation(index) for index in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2**k + d for k in range(1, 13) for d in (-1, 0, 1)])
def test_bijection_around_powers_of_two(size):
    permutation = Permutation(size, "key")
    assert {permutation(index) for index in range(size)} == set(range(size))


def test_keys_give_different_orders():
    orders = {tuple(map(Permutation(100, str(key)), range(100))) for key in range(50)}
    assert len(orders) == 50


@pytest.mark.parametrize("size", [64, 100, 1000, 4096])
def test_first_places_are_uniform(size):
    """Over many keys every element comes first about equally often: chi-square over eight bins, 7 degrees of freedom;
    29.9 is exceeded once in 10,000 times."""
    keys = 2000
    for place in (0, 1, size - 1):
        bins = Counter(Permutation(size, f"{key}")(place) * 8 // size for key in range(keys))
        widths = Counter(element * 8 // size for element in range(size))
        statistic = sum((bins[b] - keys * widths[b] / size) ** 2 / (keys * widths[b] / size) for b in range(8))
        assert statistic < 29.9, (place, statistic)


@pytest.mark.parametrize("size", [1000, 4096, 5000])
def test_one_order_looks_shuffled(size):
    """Displacement, fixed points, rises and correlation of one order are those of a random one."""
    order = [Permutation(size, "one")(index) for index in range(size)]
    displacement = sum(abs(place - element) for place, element in enumerate(order)) / size
    assert displacement / size == pytest.approx(1 / 3, abs=0.03)
    assert sum(place == element for place, element in enumerate(order)) < 8
    rises = sum(a < b for a, b in itertools.pairwise(order)) / (size - 1)
    assert rises == pytest.approx(0.5, abs=0.03)
    neighbours = sum(abs(a - b) == 1 for a, b in itertools.pairwise(order))
    assert neighbours < 12


def test_two_epochs_are_independent():
    """Elements that stand on the same place under two keys: about one of them."""
    size = 4096
    first, second = Permutation(size, "s/0"), Permutation(size, "s/1")
    assert sum(first(index) == second(index) for index in range(size)) < 8


# --------------------------------------------------------------------------------------------------------------------
# Mixture


@settings(deadline=None, max_examples=50)
@given(weights=weights_of_few)
def test_every_period_holds_each_source_in_exact_proportion(weights):
    """Whole-number weights whose sum divides the resolution are met exactly, all others to 1 / resolution."""
    mixture = Mixture(weights)
    drawn = Counter(mixture.source(index) for index in range(mixture.period))
    for source, weight in enumerate(weights):
        share = Fraction(weight, sum(weights))
        error = abs(Fraction(drawn[source], mixture.period) - share)
        assert error < Fraction(1, MIXTURE_RESOLUTION)
        if MIXTURE_RESOLUTION % sum(weights) == 0:
            assert error == 0


@pytest.mark.parametrize(("weights", "period"), [([1], 1), ([2, 2], 2), ([3, 1], 4), ([0.7, 0.2, 0.1], 10)])
def test_simple_blends_have_short_periods(weights, period):
    assert Mixture(weights).period == period


def test_a_minute_weight_still_has_a_slot():
    mixture = Mixture([1.0, 1e-9])
    assert mixture.counts(mixture.period)[1] == 1


@settings(deadline=None, max_examples=40)
@given(weights=weights_of_few, data=st.data())
def test_counts_equal_counting(weights, data):
    mixture = Mixture(weights)
    stop = data.draw(st.integers(0, 2 * mixture.period + 5).filter(lambda n: n < 4000) | st.integers(0, 500))
    drawn = Counter(mixture.source(index) for index in range(stop))
    assert mixture.counts(stop) == [drawn[source] for source in range(len(weights))]
    # Far away, where nobody can count: whole periods add up.
    periods = 10**12
    assert mixture.counts(periods * mixture.period + stop) == [
        periods * whole + rest for whole, rest in zip(mixture.counts(mixture.period), mixture.counts(stop), strict=True)
    ]


@settings(deadline=None, max_examples=30)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_no_source_strays_from_its_share(weights):
    """At every prefix each source is less than one sample ahead of its share of the period, and less than
    (number of sources - 1) behind: what the others are ahead is what it lacks."""
    mixture = Mixture(weights)
    totals = mixture.counts(mixture.period)
    sources = len(weights)
    for index in range(1, mixture.period + 1, max(1, mixture.period // 500)):
        for count, total in zip(mixture.counts(index), totals, strict=True):
            ahead = count * mixture.period - index * total
            assert ahead < mixture.period
            assert -ahead < max(1, sources - 1) * mixture.period


# --------------------------------------------------------------------------------------------------------------------
# Order


@contextlib.contextmanager
def short_blends() -> Iterator[None]:
    """Mixtures of at most 60 slots, which are quick to build and whose periods end often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture_module, "MIXTURE_RESOLUTION", 60)
        yield


def flat(order: SampleOrder, start: int, stop: int) -> list[tuple[str, int, int]]:
    """(source name, epoch, chunk) of the samples in [start, stop)."""
    samples = (order.sample(index) for index in range(start, stop))
    return [(order.sources[sample.source].name, sample.epoch, sample.chunk) for sample in samples]


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=st.integers(0, 2**62))
@short_blends()
def test_every_chunk_once_per_epoch(sizes, seed):
    sources = [(f"s{i}", size, 1.0 + i) for i, size in enumerate(sizes)]
    seen = flat(order_of(sources, seed, 128), 0, 400)
    for source, num_chunks, _ in sources:
        visits = [(epoch, chunk) for name, epoch, chunk in seen if name == source]
        assert len(set(visits)) == len(visits)
        assert [epoch for epoch, _ in visits] == [place // num_chunks for place in range(len(visits))]
        for epoch in range(len(visits) // num_chunks):
            assert {chunk for e, chunk in visits if e == epoch} == set(range(num_chunks))


def test_each_epoch_seed_length_and_name_has_an_order_of_its_own():
    def epoch(number: int, name: str = "s", seed: int = 1, length: int = 128) -> list[int]:
        order = order_of([(name, 50, 1.0)], seed, length)
        return [chunk for _, _, chunk in flat(order, 50 * number, 50 * number + 50)]

    orders = [epoch(0), epoch(1), epoch(2), epoch(0, name="t"), epoch(0, seed=2), epoch(0, length=64)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert epoch(0) == epoch(0)


def test_a_source_keeps_its_order_whatever_it_is_blended_with():
    alone = order_of([SOURCES[0]], 1, 128)
    blended = [item for item in flat(order_of(SOURCES, 1, 128), 0, 200) if item[0] == "web"]
    assert blended == flat(alone, 0, len(blended))


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 24), (2, 3), (4, 2), (8, 3), (24, 1)])
def test_the_order_does_not_depend_on_how_batches_are_dealt(ranks, micro):
    """The samples of three steps over all ranks are the first 72 of the order, for every layout; each step its own."""
    order, plan = order_of(SOURCES, 1, 128), BatchPlan(128, 24, micro, ranks)
    for step in range(3):
        dealt = sorted(
            step * 24 + offset for rank in range(ranks) for part in plan.sample_offsets(rank) for offset in part
        )
        assert [order.sample(index) for index in dealt] == [order.sample(step * 24 + i) for i in range(24)]


def test_it_may_be_asked_in_any_order():
    order = order_of(SOURCES, 1, 128)
    forwards = [order.sample(index) for index in range(300)]
    assert [order.sample(index) for index in reversed(range(300))] == forwards[::-1]


def test_huge_sources_need_no_tables():
    """Sample 10^12 of 10^9 chunks: a table of the order would need 8 GB, and the test's time would show it."""
    order = order_of([("a", 10**9, 2.0), ("b", 10**9 + 7, 1.0)], 1, 4096)
    samples = [order.sample(10**12 + index) for index in range(1000)]
    assert len(set(samples)) == 1000
    assert Counter(sample.source for sample in samples)[0] in (666, 667, 668)
    assert {sample.epoch for sample in samples} == {666, 333}
    assert all(0 <= sample.chunk < 10**9 + 7 for sample in samples)
    assert samples[0] != Sample(0, 666, 0)


@pytest.mark.parametrize(
    ("sources", "digest"),
    [
        ([("web", 1000, 1.0)], "29e4609512ec02e3"),
        (SOURCES, "b1df99e2ccab8edc"),
        ([("a", 10**9, 0.7312), ("b", 10**9 + 7, 0.2), ("c", 77, 1e-4), ("d", 5000, 1 / 3)], "afb1c7c0ed220613"),
    ],
)
def test_the_order_is_that_of_former_releases(sources, digest):
    """A run that is resumed after an update must go on with the same samples. From release 0.1.0."""
    order = order_of(sources, 1234, 4096)
    samples = [order.sample(index) for index in [*range(3000), *range(10**12, 10**12 + 500)]]
    text = json.dumps([(sample.source, sample.epoch, sample.chunk) for sample in samples])
    assert hashlib.sha256(text.encode()).hexdigest().startswith(digest)


# --------------------------------------------------------------------------------------------------------------------
# Resuming


@settings(deadline=None, max_examples=50)
@given(cuts=st.lists(st.integers(0, 300), min_size=1, max_size=3).map(sorted))
@short_blends()
def test_a_resumed_order_is_the_uninterrupted_one(cuts):
    whole = order_of(SOURCES, 1, 128)
    order = whole
    for cut in cuts:
        order = order_of(SOURCES, 1, 128).resumed(order.state(), cut)
        assert flat(order, cut, cut + 60) == flat(whole, cut, cut + 60)
    assert order.state() == whole.state()


MIXTURES = st.lists(
    st.tuples(st.sampled_from(["web", "code", "books", "news"]), st.sampled_from([0.5, 1.0, 2.0, 3.0])),
    min_size=1,
    max_size=4,
    unique_by=lambda item: item[0],
)
SIZES = {"web": 13, "code": 5, "books": 1, "news": 7}


def ordered(mixture: list[tuple[str, float]]) -> list[WeightedSource]:
    return [(name, SIZES[name], weight) for name, weight in mixture]


@settings(deadline=None, max_examples=50)
@given(mixtures=st.lists(MIXTURES, min_size=2, max_size=4), steps=st.lists(st.integers(0, 80), min_size=3, max_size=3))
@short_blends()
def test_every_source_goes_on_from_its_own_cursor_through_changes_of_the_blend(mixtures, steps):
    """A chain of runs, each with its own mixture and resumed from the state of the one before. The reference counts
    what each source has given so far and asks a run of that source alone what comes next."""
    given_so_far: Counter = Counter()
    position, state = 0, None
    for mixture, steps_taken in zip(mixtures, [*steps, 40], strict=False):
        order = order_of(ordered(mixture), 1, 128)
        if state is not None:
            order = order.resumed(state, position)
        fresh = Mixture([weight for _, weight in mixture])
        taken = flat(order, position, position + steps_taken)
        for name, epoch, chunk in taken:
            alone = order_of([(name, SIZES[name], 1.0)], 1, 128)
            assert (name, epoch, chunk) == flat(alone, given_so_far[name], given_so_far[name] + 1)[0]
            given_so_far[name] += 1
        if state is None or [(s["name"], s["weight"]) for s in state["stages"][0]["shares"]] != mixture:
            # A changed mixture begins its period where it takes over.
            names = [mixture[fresh.source(index)][0] for index in range(steps_taken)]
            assert [name for name, _, _ in taken] == names
        position += steps_taken
        state = order.state()
        assert {name: count for name, count in order.cursors(position).items() if count} == dict(given_so_far)


def test_a_changed_blend_resumed_twice_goes_on_unbroken():
    """Changed at 37, then resumed at 50 and 61 with the new mixture: as if the new mixture had run on from 37."""
    changed = [("code", 5, 2.0), ("news", 7, 1.0)]
    first = order_of(changed, 1, 128).resumed(order_of(SOURCES, 1, 128).state(), 37)
    second = order_of(changed, 1, 128).resumed(first.state(), 50)
    third = order_of(changed, 1, 128).resumed(second.state(), 61)
    assert flat(third, 61, 200) == flat(first, 61, 200)


def test_a_source_that_left_and_came_back_goes_on_where_it_was():
    start = order_of(SOURCES, 1, 128)
    without = order_of(SOURCES[1:], 1, 128).resumed(start.state(), 20)
    back = order_of(SOURCES, 1, 128).resumed(without.state(), 30)
    web = [item for item in flat(back, 30, 60) if item[0] == "web"]
    seen = sum(name == "web" for name, _, _ in flat(start, 0, 20))
    assert web == flat(order_of(SOURCES[:1], 1, 128), seen, seen + len(web))


def test_a_state_from_before_there_were_stages_is_read():
    """As release 0.1.0 wrote it after a change of the mixture at sample 37."""
    former = {"start": 37, "cursors": {"web": 25, "code": 8, "books": 4}, "weights": {"code": 2.0, "news": 1.0}}
    changed = [("code", 5, 2.0), ("news", 7, 1.0)]
    same = order_of(changed, 1, 128).resumed(former, 50)
    assert same.curriculum.start == 37
    assert same.cursors(37) == {"web": 25, "code": 8, "books": 4, "news": 0}
    first = order_of(changed, 1, 128).resumed(order_of(SOURCES, 1, 128).state(), 37)
    assert first.cursors(37) == same.cursors(37)
    assert flat(same, 50, 100) == flat(first, 50, 100)
    other = order_of(SOURCES, 1, 128).resumed(former, 50)
    assert (other.curriculum.start, other.cursors(50)) == (50, same.cursors(50))


def test_the_state_survives_json():
    state = order_of(SOURCES[::-1], 1, 128).resumed(order_of(SOURCES, 1, 128).state(), 37).state()
    assert json.loads(json.dumps(state)) == state
