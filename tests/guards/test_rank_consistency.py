"""Ranks agree on configuration, code and PyTorch before the run begins."""

from __future__ import annotations

import pytest
from launched_ranks import AGREE, agreeing

from retemper.engine.files.code import PACKAGE, code_files
from retemper.engine.guards.rank_consistency import flatten


def test_ranks_that_run_the_same_agree(launch):
    run = launch(agreeing(), agreeing(), agreeing())
    assert run.wait() == [0, 0, 0], [run.say(rank) for rank in range(3)]
    assert "agreed with ['host0', 'host1', 'host2']" in run.say(1)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (
            agreeing(seed=7, data=[{"path": "y"}]),
            "the configuration differs on rank 1 (host1) from rank 0's: seed is 7, not 1, data[0].path is "
            '"y", not "x"; start every node with the same files and the same command',
        ),
        (
            agreeing(extra=1, files="{'engine/step.py': 'b', 'engine/new.py': 'c'}"),
            "the configuration differs on rank 1 (host1) from rank 0's: extra is 1, not unset; the code differs on "
            "rank 1 (host1) from rank 0's: engine/step.py, engine/new.py; start every",
        ),
        (agreeing(torch="2.11.0"), "PyTorch is 2.11.0 on rank 1 (host1), not 2.13.0 as on rank 0; start every"),
    ],
    ids=["config", "config and code", "torch"],
)
def test_a_node_that_differs_is_refused_by_every_rank_and_printed_once(launch, odd, message):
    run = launch(agreeing(), odd, agreeing())
    assert run.wait() == [1, 1, 1]
    assert [run.say(rank) for rank in (1, 2)] == ["", ""]
    assert run.say(0).count("\n") == 1
    [line] = run.errors(0)
    assert line.startswith(message)


def test_a_config_that_one_node_cannot_read_is_said_by_the_first_rank(launch):
    wrong = AGREE.format(read="raise UserError('run.yaml: unknown key x')", files={}, torch="2.13.0")
    run = launch(agreeing(), wrong)
    assert run.wait() == [1, 1]
    assert run.say(1) == ""
    assert run.say(0) == "[rank 0] error: rank 1: run.yaml: unknown key x\n"


def test_hashes_cover_the_code_and_every_setting():
    files = code_files(PACKAGE)
    assert {"__init__.py", "engine/step.py", "kernels/rope.py", "tools/preprocess.py"} <= files.keys()
    assert not any(name.startswith(("tests/", ".venv/", "build/")) for name in files)
    nested = {"a": {"b": [1, {"c": None}], "d": {}}, "e": []}
    assert flatten(nested) == {"a.b[0]": "1", "a.b[1].c": "null", "a.d": "{}", "e": "[]"}
