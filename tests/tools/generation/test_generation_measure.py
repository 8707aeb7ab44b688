"""The benchmark of generation: the same model in all ways, the right number of moments, a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from retemper.engine.errors import UserError
from retemper.tools import benchmark_generate
from retemper.tools.generation.measure import MeasureOptions, _random_backends

CPU = torch.device("cpu")
SMALL = ["--hidden-size", "32", "--layers", "2", "--vocab-size", "50", "--device", "cpu", "--repeats", "1"]


def test_all_ways_compute_the_same_model() -> None:
    options = MeasureOptions(None, 64, 2, 97, (2,), (9,), 3, 1, "auto", "cpu")
    own, library = _random_backends(options, CPU)
    prompts = [[5, 6, 7, 8], [9, 1, 2, 3]]
    with torch.inference_mode():
        ours, theirs = own.open(9).append(prompts), library.open(9).append(prompts)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert not torch.equal(theirs[0], theirs[1])


def test_the_command_writes_its_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "generate.json"
    sizes = ["--batch-sizes", "1,3", "--lengths", "4,8", "--new-tokens", "4"]
    benchmark_generate.main([*SMALL, *sizes, "--json", str(path), "--plot", str(tmp_path / "generate.png")])
    report = json.loads(path.read_text())
    rows = {(row["way"], row["batch_size"], row["length"]): row for row in report["rows"]}
    ways = {way for way, _, _ in rows}
    assert len(rows) == len(ways) * 4 == 16
    for (way, batch_size, _), row in rows.items():
        assert [len(tokens) for tokens in row["seconds"]] == [3 if way == "without a cache" else 5]
        assert row["tokens_per_second"] == pytest.approx(batch_size / row["token_ms"] * 1e3)
        peer = rows["transformers.generate", batch_size, row["length"]]
        assert row["speed_ratio"] == pytest.approx(peer["token_ms"] / row["token_ms"])
    assert capsys.readouterr().out.count("| own cache ") == 4
    assert (tmp_path / "generate.png").stat().st_size > 1000


def test_a_checkpoint_has_no_peer(chat_models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batch-sizes", "1", "--lengths", "4", "--new-tokens", "2"]
    benchmark_generate.main(["--model", str(chat_models["checkpoint"]), *SMALL[-4:], *sizes])
    table = capsys.readouterr().out
    assert "own cache" in table and "transformers.generate |" not in table.partition("\n|--")[2]


@pytest.mark.parametrize("options", [["--lengths", "1,x"], ["--batch-sizes", "0"], ["--repeats", "0"]])
def test_refuses_impossible_sizes(options: list[str]) -> None:
    with pytest.raises(UserError, match=options[0]):
        benchmark_generate.main(options)
