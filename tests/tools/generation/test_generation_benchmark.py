"""The benchmark of generation: its rows, and what it refuses before it measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retemper.engine.errors import UserError
from retemper.tools import benchmark_generate

TINY = [
    *("--hidden-size", "64", "--layers", "1", "--vocab-size", "100"),
    *("--repeats", "1", "--new-tokens", "2", "--batch-sizes", "1,2", "--lengths", "8"),
]


def test_every_way_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    benchmark_generate.main([*TINY, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    ways = {row["way"] for row in rows}
    assert len(ways) == 4 and len(rows) == 8 and {row["batch_size"] for row in rows} == {1, 2}
    assert all(row["token_ms"] > 0 and row["prompt_ms"] > 0 for row in rows)
    shown = capsys.readouterr().out
    assert all(way in shown for way in ways)


@pytest.mark.parametrize(("option", "value"), [("--plot", "plot.foo"), ("--plot", "plot"), ("--new-tokens", "0")])
def test_bad_options_are_refused_before_measurements(option: str, value: str, tmp_path: Path) -> None:
    value = str(tmp_path / value) if option == "--plot" else value
    with pytest.raises(UserError, match=option):
        benchmark_generate.main([*TINY, option, value])
    assert not list(tmp_path.iterdir())
