"""Stages, caps and mixtures: against a reference that counts sample by sample, and through changes of a run's mind."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.engine.data import mixture as mixture_module
from retemper.engine.data.curriculum import Curriculum, CurriculumStage, SourceWeight
from retemper.engine.data.mixture import Mixture
from retemper.engine.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def short_blends() -> Iterator[None]:
    """Mixtures of at most 60 slots, which are quick to build and whose periods end often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture_module, "MIXTURE_RESOLUTION", 60)
        yield


SHARES = st.builds(
    SourceWeight,
    st.sampled_from(["web", "code", "books", "news"]),
    st.sampled_from([0.5, 1.0, 2.0, 3.0, 0.7]),
    st.none() | st.integers(1, 60),
)
MIXTURES = st.lists(SHARES, min_size=1, max_size=4, unique_by=lambda share: share.name).map(tuple)


@st.composite
def stage_lists(draw) -> list[CurriculumStage]:
    mixtures = draw(st.lists(MIXTURES, min_size=1, max_size=3))
    stops: list[int | None] = list(draw(st.lists(st.integers(1, 150), min_size=3, max_size=3).map(sorted)))
    stops[len(mixtures) - 1] = draw(st.sampled_from([None, stops[len(mixtures) - 1]]))
    return [CurriculumStage(mixture, stop) for mixture, stop in zip(mixtures, stops, strict=False)]


def slow_run(
    stages: list[CurriculumStage], limit: int, start: int = 0, cursors: dict | None = None
) -> list[tuple[str, int]]:
    """(source, samples given before) of the samples from ``start``, until the data ends or ``limit``: one sample at a
    time, by counting. Whenever the list of sources changes, and at every stage, a new mixture begins."""
    given = Counter(cursors or {})
    drawn: list[tuple[str, int]] = []
    mixture, active, began, current = None, None, 0, None
    for index in range(start, limit):
        inside = [number for number, stage in enumerate(stages) if stage.stop is None or index < stage.stop]
        if not inside:
            break
        shares = stages[inside[0]].sources
        left = [share for share in shares if share.max_samples is None or given[share.name] < share.max_samples]
        if not left:
            break
        if (inside[0], left) != (current, active):
            mixture, active, began, current = Mixture([share.weight for share in left]), left, index, inside[0]
        name = active[mixture.source(index - began)].name
        drawn.append((name, given[name]))
        given[name] += 1
    return drawn


LIMIT = 300


def run_of(schedule: Curriculum, start: int, limit: int = LIMIT) -> list[tuple[str, int]]:
    stop = limit if schedule.end is None else min(limit, schedule.end)
    return [schedule.lookup(index) for index in range(start, stop)]


@settings(deadline=None, max_examples=300)
@given(stages=stage_lists())
def test_a_schedule_equals_counting_sample_by_sample(stages):
    schedule, expected = Curriculum(stages), slow_run(stages, LIMIT)
    assert run_of(schedule, 0) == expected
    assert schedule.end is None or min(schedule.end, LIMIT) == len(expected)
    assert schedule.end is not None or len(expected) == LIMIT
    for index in range(0, len(expected) + 1, 7):
        counted = Counter(name for name, _ in expected[:index])
        assert schedule.cursors(index) == {name: counted[name] for name in schedule.names}


@settings(deadline=None, max_examples=100)
@given(mixture=MIXTURES)
def test_no_source_gives_more_than_its_cap_and_all_give_all_of_it(mixture):
    schedule = Curriculum([CurriculumStage(mixture)])
    caps = {share.name: share.max_samples for share in mixture}
    if None in caps.values():
        given_then = schedule.cursors(10**6)
        assert schedule.end is None
        assert all(cap is None or given_then[name] == cap for name, cap in caps.items())
    else:
        assert schedule.end == sum(caps.values())
        assert schedule.cursors(schedule.end) == caps


@settings(deadline=None, max_examples=100)
@given(weights=st.lists(st.integers(1, 6), min_size=2, max_size=4), cap=st.integers(1, 500))
def test_the_share_of_a_source_that_is_done_goes_to_the_others_in_proportion(weights, cap):
    """In the 60 x n samples that follow, each of the others has its exact part of what is left (to a slot in 60)."""
    shares = (SourceWeight("capped", weights[0], cap), *(SourceWeight(f"s{i}", w) for i, w in enumerate(weights[1:])))
    schedule = Curriculum([CurriculumStage(shares)])
    [_, second] = schedule.phases
    before, after = schedule.cursors(second.start), schedule.cursors(second.start + 6000)
    assert before["capped"] == after["capped"] == cap
    assert schedule.cursors(second.start - 1)["capped"] == cap - 1
    for share in shares[1:]:
        wanted = Fraction(int(share.weight), sum(weights[1:]))
        assert abs(Fraction(after[share.name] - before[share.name], 6000) - wanted) <= Fraction(1, 60)


def test_an_example_by_hand():
    """Two of a and one of b, until a has given 5: then b alone, until the stage ends at 12. Then a may give 6."""
    stages = [
        CurriculumStage((SourceWeight("a", 2.0, 5), SourceWeight("b")), 12),
        CurriculumStage((SourceWeight("a", 1.0, 6), SourceWeight("b"), SourceWeight("c"))),
    ]
    schedule = Curriculum(stages)
    names = "".join(schedule.lookup(index)[0] for index in range(22))
    assert names == "abaabaabbbbbabcbcbcbcb"[:7] + names[7:]
    assert names[7:12] == "bbbbb"
    assert [phase.start for phase in schedule.phases] == [0, 7, 12, 13]
    assert names[12] == "a" and names[13:] == "bcbcbcbcb"
    assert schedule.cursors(13) == {"a": 6, "b": 7, "c": 0}


def test_huge_caps_and_stages_need_no_counting():
    """Phases of 10^13 samples: found at once, or this test would not end."""
    stages = [
        CurriculumStage((SourceWeight("a", 0.7, 10**13), SourceWeight("b", 0.3)), 2 * 10**13),
        CurriculumStage((SourceWeight("a", 1.0, 2 * 10**13),)),
    ]
    schedule = Curriculum(stages)
    assert schedule.end == 3 * 10**13
    assert schedule.cursors(schedule.end) == {"a": 2 * 10**13, "b": 10**13}
    assert schedule.lookup(2 * 10**13) == ("a", 10**13)


def slow_spread(quotas: list[int]) -> list[int]:
    """The greedy rule, slot by slot, in whole numbers."""
    taken, slots = [0] * len(quotas), []
    for slot in range(sum(quotas)):
        behind = [
            quota * (slot + 1) - sum(quotas) * count if count < quota else -(10**18)
            for quota, count in zip(quotas, taken, strict=True)
        ]
        slots.append(behind.index(max(behind)))
        taken[slots[-1]] += 1
    return slots


@settings(deadline=None, max_examples=100)
@given(quotas=st.lists(st.integers(1, 80), min_size=1, max_size=8))
def test_slots_are_spread_by_the_greedy_rule(quotas):
    assert mixture_module._spread(quotas).tolist() == slow_spread(quotas)


@settings(deadline=None, max_examples=100)
@given(weights=st.lists(st.integers(1, 12), min_size=1, max_size=5), data=st.data())
def test_a_blend_finds_the_sample_at_which_a_source_has_given_so_many(weights, data):
    mixture = Mixture(weights)
    source, count = data.draw(st.integers(0, len(weights) - 1)), data.draw(st.integers(1, 200))
    seen = np.cumsum([mixture.source(index) == source for index in range(count * mixture.period)])
    assert mixture.samples_until(source, count) == int(np.argmax(seen == count)) + 1


# --------------------------------------------------------------------------------------------------------------------
# Resuming


def stored(schedule: Curriculum) -> dict:
    """The state as a checkpoint keeps it."""
    return json.loads(json.dumps(schedule.state()))


@settings(deadline=None, max_examples=100)
@given(stages=stage_lists(), cuts=st.lists(st.integers(0, LIMIT), min_size=1, max_size=3).map(sorted))
def test_a_resumed_schedule_is_the_uninterrupted_one(stages, cuts):
    whole = schedule = Curriculum(stages)
    for cut in cuts:
        cut = cut if whole.end is None else min(cut, whole.end)
        schedule = Curriculum(stages).resumed(stored(schedule), cut)
        assert run_of(schedule, cut) == run_of(whole, cut)
        assert schedule.end == whole.end
    assert schedule.state() == whole.state()


@settings(deadline=None, max_examples=200)
@given(former=stage_lists(), other=stage_lists(), data=st.data())
def test_changed_stages_keep_every_sources_cursor(former, other, data):
    """Whatever changes, each source goes on from the count of what it has given; and the run is that of the new stages
    counted sample by sample, from the start where that makes no difference so far, else from the change."""
    before = Curriculum(former)
    cut = data.draw(st.integers(0, LIMIT if before.end is None else min(LIMIT, before.end)))
    resumed = Curriculum(other).resumed(stored(before), cut)
    taken = run_of(before, 0)[:cut]
    given_before = Counter(name for name, _ in taken)
    counts = Counter(given_before)
    drawn = run_of(resumed, cut)
    for name, former_samples in drawn:
        assert former_samples == counts[name]
        counts[name] += 1
    if resumed.start == 0:
        assert run_of(resumed, 0)[:cut] == taken
        assert drawn == slow_run(other, LIMIT)[cut:]
    else:
        assert resumed.start == cut
        assert drawn == slow_run(other, LIMIT, cut, dict(given_before))


@settings(deadline=None, max_examples=100)
@given(stages=stage_lists(), later=MIXTURES, data=st.data())
def test_what_lies_ahead_may_change_without_a_trace(stages, later, data):
    """Until the end of the first stage, the stages behind it may become any others, and it may become longer."""
    if stages[0].stop is None:
        return
    before = Curriculum(stages)
    cut = data.draw(st.integers(0, stages[0].stop if before.end is None else min(before.end, stages[0].stop)))
    for stop in (stages[0].stop, stages[0].stop + 10):
        changed = [CurriculumStage(stages[0].sources, stop), CurriculumStage(later)]
        resumed = Curriculum(changed).resumed(stored(before), cut)
        assert resumed.start == 0
        assert run_of(resumed, 0) == slow_run(changed, LIMIT)


def test_a_cap_may_be_raised_before_and_after_it_was_reached():
    capped, raised = (
        CurriculumStage((SourceWeight("a", 1.0, 5), SourceWeight("b"))),
        CurriculumStage((SourceWeight("a", 1.0, 20), SourceWeight("b"))),
    )
    before = Curriculum([capped])
    assert before.phases[1].start == 9
    early = Curriculum([raised]).resumed(stored(before), 8)
    assert (early.start, run_of(early, 0, 40)) == (0, run_of(Curriculum([raised]), 0, 40))
    late = Curriculum([raised]).resumed(stored(before), 30)
    assert (late.start, late.cursors(30)) == (30, {"a": 5, "b": 25})
    assert [late.lookup(index) for index in range(30, 34)] == [("a", 5), ("b", 25), ("a", 6), ("b", 26)]


# --------------------------------------------------------------------------------------------------------------------
# What does not suffice


def refusal(stages: list[CurriculumStage], samples: int) -> str:
    with pytest.raises(UserError) as caught:
        Curriculum(stages).require(samples, 100)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_longer_than_its_data_is_refused_with_the_arithmetic():
    capped = (SourceWeight("a", 1.0, 30), SourceWeight("b", 2.0, 10))
    Curriculum([CurriculumStage(capped)]).require(40, 100)
    message = refusal([CurriculumStage(capped)], 41)
    assert "needs 41 samples x 100 = 4,100 tokens" in message
    assert "ends after 40 samples = 4,000 tokens" in message
    assert "(a 30 samples, b 10 samples)" in message
    assert "raise max_epochs or max_tokens" in message
    with pytest.raises(UserError, match=r"^training.train_steps needs 41 .* or lower training.train_steps$"):
        Curriculum([CurriculumStage(capped)]).require(41, 100, "training.train_steps")
    assert "data.stages ends" in refusal(
        [CurriculumStage(capped[:1], 20), CurriculumStage((SourceWeight("c"),), 50)], 51
    )
    # A later stage whose sources the first has used up, and a stage in the middle that runs dry.
    assert "ends after 20 samples" in refusal(
        [CurriculumStage((SourceWeight("a"),), 20), CurriculumStage((SourceWeight("a", 1.0, 20),))], 21
    )
    middle = [
        CurriculumStage((SourceWeight("a"),), 20),
        CurriculumStage((SourceWeight("b", 1.0, 5),), 40),
        CurriculumStage((SourceWeight("a"),)),
    ]
    assert "ends after 25 samples = 2,500 tokens, because all its sources" in refusal(middle, 26)
    Curriculum([CurriculumStage((SourceWeight("a"), SourceWeight("b", 1.0, 1)))]).require(10**15, 100)
