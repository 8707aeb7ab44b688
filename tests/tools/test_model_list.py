"""The lists of presets and families, compared with the files, parsed configurations and docs/models.md."""

from __future__ import annotations

import json

import pytest
from models_page import read_table

from retemper.engine.config.files import SHIPPED
from retemper.engine.config.parser import parse_config
from retemper.engine.errors import UserError
from retemper.engine.parallel.layout import plan_layout
from retemper.engine.schedule import plan_batches
from retemper.tools import models
from retemper.tools.model_list.families import find_family, list_families
from retemper.tools.model_list.presets import Preset, read_presets

PRESETS = read_presets()


def test_every_preset_is_listed_and_says_what_to_change_first():
    assert sorted(preset.name for preset in PRESETS) == sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    heads = {path.read_text().partition("# Change first")[2].partition("run_folder: ")[0] for path in SHIPPED.iterdir()}
    [head] = heads
    for key in ("run_folder", "data.train", "initialize_from", "train_tokens", "learning_rate", "micro_batch_size"):
        assert key in head


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_what_a_preset_needs_is_what_its_configuration_says(preset: Preset):
    config = parse_config(["--config", preset.name])
    assert (preset.sequence_length, preset.train_tokens) == (
        config.training.sequence_length,
        config.training.train_tokens,
    )
    if preset.name.startswith("demo"):
        assert not preset.gpus_per_node
        return
    # The layout and the batch fit the machines that the first line names.
    layout = plan_layout(config.parallel, preset.nodes * preset.gpus_per_node)
    assert plan_batches(config.training, layout.data_parallel).num_micro_batches >= 1
    assert preset.parameters is not None and preset.states_gb is not None and preset.checkpoint_gb is not None
    bytes_each = {("fp32", "fp32"): (16, 12), ("fp32", "bf16"): (12, 8)}
    whole, saved = bytes_each[config.training.weight_dtype, config.optimizer.state_dtype]
    assert preset.states_gb == pytest.approx(preset.parameters * whole / 1e9)
    assert preset.checkpoint_gb == pytest.approx(preset.parameters * saved / 1e9)
    if preset.gpu_memory_gb is not None:
        assert preset.states_gb / (preset.nodes * preset.gpus_per_node) < preset.gpu_memory_gb


def test_the_families_are_those_of_the_page():
    listed = {each.model_type: each for each in list_families()}
    for row in read_table():
        family = listed.pop(row.model_type)
        if row.implementation == "refused":
            assert family.implementation == "refused"
        elif family.implementation == "transformers":  # a row about a native family may be of a config that it lacks
            assert (row.implementation, row.documents) == ("transformers", family.documents)
            assert {*row.axes.split(", ")} == {*family.axes}
        elif row.implementation == "native":
            assert {*row.axes.split(", ")} == {*family.axes}
    assert not listed


def test_one_preset_one_family_and_json(capsys):
    models.main(["qwen2_72b.yaml"])
    assert (SHIPPED / "qwen2_72b.yaml").read_text().rstrip() in capsys.readouterr().out
    models.main(["lfm2"])
    assert "one at a time" in capsys.readouterr().out
    models.main(["zamba", "--json"])
    assert json.loads(capsys.readouterr().out)["implementation"] == "refused"
    models.main(["--json"])
    content = json.loads(capsys.readouterr().out)
    assert len(content["presets"]) == len(PRESETS) and len(content["families"]) == len(list_families())
    models.main([])
    shown = capsys.readouterr().out
    assert all(preset.name in shown for preset in PRESETS) and find_family("gemma3_text") and "gemma3_text" in shown


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(UserError, match="did you mean qwen2_72b"):
        models.main(["qwen2-72b"])
