"""Runs that the launch tests disturb, and what they must come to all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRETRAIN = str(ROOT / "engine" / "pretrain.py")
NUM_STEPS = 60
"""Long enough that a run cannot end between its being seen at a step and what is done to it then."""


def has_step(run_folder: Path, step: int) -> bool:
    """Whether the run has recorded ``step``."""
    metrics = run_folder / "metrics.jsonl"
    return metrics.exists() and f'"step": {step},' in metrics.read_text()


def assert_same_curve(actual: list[tuple], expected: list[tuple]) -> None:
    """The records of :func:`tiny_run.curve`, equal but for the order of sums."""
    assert [record[:2] for record in actual] == [record[:2] for record in expected]
    for (*_, loss, norm, rate), (*_, expected_loss, expected_norm, expected_rate) in zip(actual, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
        assert rate == expected_rate
