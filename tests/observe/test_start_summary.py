"""The lines at the start and end of a run: sections, aligned columns, notes last."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from helpers import tiny_run

from retemper.engine import pretrain
from retemper.engine.observe.end_summary import describe_end
from retemper.engine.observe.start_summary import _has_replicas, describe_outputs, describe_start
from retemper.engine.parallel.layout import Layout
from retemper.engine.run_folder import open_run_folder

HEADING = re.compile(r"-- (.+) -+")


def sections(lines: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in lines:
        if heading := HEADING.fullmatch(line):
            assert len(line) == 72 and heading[1] not in found
            title = heading[1]
            found[title] = []
        else:
            found[title].append(line)
    return found


def is_aligned(line: str) -> bool:
    """Whether it is a key and, from the 13th column on, its value."""
    return line[11] == " " and line[12] not in " " and line[:11].strip() == line[:11].rstrip()


def test_sections_have_aligned_columns_and_notes_are_last(one_rank, tmp_path):
    path = tiny_run.write_config(tmp_path)
    run = pretrain.build(tiny_run.configure(path), one_rank)
    with open_run_folder(run, None):
        start, end = sections(describe_start(run)), sections(describe_end(run))
    *facts, notes, training = start
    assert (notes, training) == ("Notes", "Training") and start[training] == []
    assert all(line.startswith("note: ") for line in start["Notes"]) and len(start["Notes"]) == 2
    lines = [line for title in facts for line in start[title]] + end["Result"]
    assert len(lines) > 15 and all(is_aligned(line) for line in lines)
    assert not any(line.startswith("note") for line in lines)
    keys = {title: [line[:11].rstrip() for line in start[title]] for title in facts}
    assert keys["Model"] == ["model", "computed by", "attention", "FLOPs/token"]
    assert keys["Data"] == ["data", "mixture", "packing", "validation"]


def test_outputs_are_those_of_the_settings(tmp_path):
    path = tiny_run.write_config(tmp_path)
    options = {
        "tensorboard": ["--logging.tensorboard", "true"],
        "prometheus": ["--logging.metrics_port", "9400"],
        "callbacks": ["--callbacks", "[my_callbacks.StopWhenGood]"],
        "trackers": ["--logging.trackers", "[csv]"],
    }
    for key, words in options.items():
        first, *more = describe_outputs(tiny_run.configure(path, *words))
        assert str(tmp_path / "run") in first and [line[:11].rstrip() for line in more] == [key]
        assert all(is_aligned(line) for line in (first, *more))


BIAS = frozenset({"model.layers.3.mlp.gate.e_score_correction_bias"})


@pytest.mark.parametrize(
    ("layout", "mine", "of_the_model", "expected"),
    [
        (Layout(shard=2), frozenset(), frozenset(), False),
        (Layout(shard=2), BIAS, BIAS, True),  # every rank holds the biases
        (Layout(), BIAS, BIAS, False),
        (Layout(pipeline=2), BIAS, BIAS, False),
        (Layout(pipeline=2, shard=2), frozenset(), BIAS, True),  # those of the other stage
        (Layout(shard=2), frozenset(), BIAS, False),  # of a model of transformers: kept in fp32, and sharded
        (Layout(tensor=2), frozenset(), frozenset(), True),
        (Layout(replicate=2), frozenset(), frozenset(), True),
    ],
)
def test_replicas_are_copies_norms_and_constants(layout, mine, of_the_model, expected):
    run = SimpleNamespace(
        mesh=SimpleNamespace(layout=layout),
        model=SimpleNamespace(constants=mine),
        start=SimpleNamespace(architecture=SimpleNamespace(float32_tensors=of_the_model)),
    )
    assert _has_replicas(run) is expected
