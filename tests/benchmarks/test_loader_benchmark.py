"""benchmarks/loader.py works: on tiny corpora, for every way of reading; its figures are not looked at."""

from __future__ import annotations

import pytest

from retemper.benchmarks import loader as benchmark


@pytest.mark.parametrize("sparse", [True, False])
def test_every_mode_is_measured(tmp_path, sparse):
    prefix = tmp_path / "corpus"
    tokens = benchmark.make_corpus(prefix, 600, sparse)
    rows = [
        {"loader": name, **benchmark.measure(name, prefix, tokens, tmp_path / "cache", 5)} for name in benchmark.MODES
    ]
    assert all(row["start_seconds"] > 0 and row["again_us"] > 0 and row["cache_bytes"] == 0 for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx", "corpus.json"]
    tables = benchmark.tables([{"documents": 600, "tokens": tokens, "sparse": sparse, **row} for row in rows])
    lines = tables.splitlines()
    assert len(lines) == 5 and all(name in line for name, line in zip(benchmark.MODES, lines[2:], strict=True))
