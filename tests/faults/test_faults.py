"""Some faults of the harness (``make faults`` runs 200 and more): real launches of the real command."""

from __future__ import annotations

import pytest
from fault_cases import Case, catalogue, draw
from fault_lineage import Lineage
from fault_report import WRONG, describe, lineages
from fault_setup import set_up

_TEMPORARY = r"/\.step-\d+\.[0-9a-f]{32}\.tmp"


def _killed(name, op, pattern, nth, rest=None):
    spec = {"rank": 0, "op": op, "pattern": _TEMPORARY + pattern, "nth": nth, "action": "kill node"}
    return Case(name, name.partition(".")[0], rest, {"by": "hook", "spec": spec, "then": {"wait": True}})


def _verdicts(workshop, chains):
    results = [r for n, chain in enumerate(chains) for r in Lineage(workshop, f"lineage{n}", chain).run()]
    problems = [describe(result) for result in results if result.verdict in WRONG]
    assert not problems, "\n".join(problems)
    return {result.case.name: result.verdict for result in results}


@pytest.mark.slow
def test_a_torn_manifest_a_damaged_file_and_a_torn_shard(tmp_path):
    cases = [
        _killed("manifest.x", "write", r"/manifest\.json$", 4),
        Case("damage.x", "damage", {"do": "file", "name": "rank-00001.safetensors", "form": "flip", "place": 0.5}),
        _killed("shard.x", "write", r"/rank-00000\.safetensors$", 40),
    ]
    assert set(_verdicts(set_up(tmp_path, once_more=False), [cases]).values()) == {"exact"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_subset_of_the_harness(tmp_path):
    cases = [case for case in catalogue(23, seed=3) if not case.options][:11]
    verdicts = _verdicts(set_up(tmp_path, once_more=False), lineages([*cases, draw("pickle", 1, seed=3)]))
    assert verdicts["pickle.1"] == "refused" and len(verdicts) == 12
