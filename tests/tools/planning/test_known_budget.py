"""A plan, the report of a dataset and the export of sequences know the tokens of a budget in epochs."""

from dataclasses import replace

import pytest
import tiny_run

from retemper.engine.config.settings import SourceConfig
from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.errors import UserError
from retemper.tools.packed.samples import open_run
from retemper.tools.planning.known_budget import with_planned_budget
from retemper.tools.reports.dataset.training_plan import plan_training


@pytest.fixture(scope="module")
def run_in_epochs(tmp_path_factory):
    file = tiny_run.write_config(tmp_path_factory.mktemp("epochs"))
    file.write_text(file.read_text().replace("  train_tokens: 5120\n", "  train_epochs: 1.5\n"))
    return file


def expected_tokens(file) -> int:
    chunks = sum((IndexedDataset(str(file.parent / name)).num_tokens - 1) // 32 for name in ("first", "second"))
    return -(-3 * chunks * 32 // 2)


def test_it_is_that_of_the_datasets(run_in_epochs):
    tokens = expected_tokens(run_in_epochs)
    config = tiny_run.configure(run_in_epochs)
    assert config.training.train_tokens is None
    assert with_planned_budget(config).training.budget == tokens
    steps = -(-tokens // 256)
    assert plan_training(str(run_in_epochs), str(run_in_epochs.parent / "first")).steps == steps
    assert open_run(str(run_in_epochs)).num_rows == 8 * steps


def test_without_the_data_a_number_of_tokens_is_asked_for(run_in_epochs, tmp_path):
    config = tiny_run.configure(run_in_epochs)
    missing = replace(config, data=replace(config.data, train=[SourceConfig(str(tmp_path / "nothing"))]))
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    text = replace(config, data=replace(config.data, train=[SourceConfig(str(tmp_path / "text.jsonl"))]))
    for unknown in (missing, text):
        with pytest.raises(UserError) as caught:
            with_planned_budget(unknown)
        message = str(caught.value)
        assert message.startswith("training.train_epochs is 1.5, but the size of the data is not known here: ")
        assert message.endswith("; add --training.train_tokens N for the plan") and "\n" not in message
