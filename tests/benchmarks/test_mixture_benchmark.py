"""benchmarks/mixture.py: its report, and that layers with other results are not measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from retemper.benchmarks import mixture
from retemper.benchmarks.gpu_stages.results import headline
from retemper.engine.errors import UserError

SIZES = {"tokens": 48, "hidden": 32, "experts": 6, "per_token": 2, "width": 16}
LAYERS = ["native", "transformers grouped_mm", "transformers eager"]
CPU = torch.device("cpu")


def options(**changes: int) -> list[str]:
    named = {**SIZES, "rounds": 1, **changes}
    return [word for name, size in named.items() for word in (f"--{name.replace('_', '-')}", str(size))]


def test_the_report_has_times_and_memory_of_each_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    mixture.main([*options(), "--dtype", "fp32,bf16", "--json", str(path)])
    report = json.loads(path.read_text())
    assert report["settings"] == {**SIZES, "dtype": "fp32,bf16", "rounds": 1}
    rows = report["rows"]
    dtypes = ["float32", "bfloat16"]
    assert [(row["dtype"], row["layer"]) for row in rows] == [(dtype, name) for dtype in dtypes for name in LAYERS]
    for number, row in enumerate(rows):
        native = rows[number // 3 * 3]
        assert row["seconds"] > 0 and row["tokens_per_second"] > 0
        # The report rounds to 1e-4 seconds.
        assert row["relative_time"] == pytest.approx(row["seconds"] / native["seconds"], rel=0.2)
        assert row["tokens_per_second"] == pytest.approx(SIZES["tokens"] / row["seconds"], rel=0.1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) and all(row["layer"] in line for row, line in zip(rows, lines, strict=True))
    found = headline("mixture", report, "")
    assert found.count("; ") == len(rows) - 1 and found.startswith(f"native {1e3 * rows[0]['seconds']:.3g} ms, ")
    assert found.count("(1.00 x)") >= 2


def test_memory_is_at_least_that_of_the_gradients() -> None:
    """A pass leaves gradients of all matrices in fp32, and has no more than a few times as much."""
    shape = mixture.Shape(8, 64, 6, 2, 128)
    [layer, *_] = mixture.make_layers(shape, torch.float32, CPU).values()
    x = torch.randn(shape.tokens, shape.hidden)
    gradients = 4 * sum(parameter.numel() for parameter in layer.parameters())
    run = mixture._pass(layer, x, x)
    first, second = (mixture.peak_bytes(run, layer, CPU) for _ in range(2))
    assert gradients <= first == second <= 3 * gradients


@pytest.mark.parametrize("dtype", list(mixture.DTYPES.values()), ids=list(mixture.DTYPES))
def test_a_layer_that_computes_something_else_is_not_measured(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = mixture.make_layers

    def make_wrong(*arguments):
        layers = make(*arguments)
        with torch.no_grad():
            layers["transformers eager"].get_parameter("experts.down_proj")[0] *= 2
        return layers

    monkeypatch.setattr(mixture, "make_layers", make_wrong)
    with pytest.raises(UserError, match="transformers eager differs from native by"):
        mixture.compare(mixture.Shape(**SIZES), dtype, CPU, rounds=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "fp8"], "--dtype fp8: fp8 is unknown; use fp32, bf16"),
        (options(per_token=7), "--per-token 7: there are 6 experts"),
        (options(rounds=0), "--rounds 0: must be at least 1"),
    ],
)
def test_impossible_options_are_refused_in_a_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        mixture.main(arguments)
    assert "\n" not in str(caught.value)
