"""The table in docs/models.md has every tiny model, and says what the engine says."""

from __future__ import annotations

import pytest
from check import check_all
from model_table import TYPES, tiny_config
from models_page import Row, read_table, row_of

from retemper.engine.errors import UserError
from retemper.engine.model.family_table import FAMILIES
from retemper.engine.model.implementations import checked, parse_architecture

TABLE = {row.model_type: row for row in read_table()}
TRAINED = [row for row in TABLE.values() if row.implementation in ("native", "transformers")]


def test_the_page_has_a_row_for_each_type():
    assert tuple(TABLE) == TYPES
    assert not [row for row in TABLE.values() if row.implementation == "not exact"]
    assert len(TRAINED) >= 120


@pytest.mark.parametrize("row", [row for row in TABLE.values() if row.implementation != "transformers"], ids=str)
def test_native_and_refused_types_are_those_of_the_engine(row: Row):
    config = tiny_config(row.model_type).to_dict()
    if row.implementation == "native":
        assert parse_architecture(config).implementation == "native"
    elif row.model_type not in REFUSED_WITH_THEIR_FILES:
        with pytest.raises(UserError):
            checked(parse_architecture(config))


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name in TABLE])
def test_native_families_have_the_implementation_of_the_engine(model_type: str):
    """With the options of the tiny model: the native decoder may not have all of a family's."""
    chosen = parse_architecture(tiny_config(model_type).to_dict()).implementation
    assert TABLE[model_type].implementation == chosen


REFUSED_WITH_THEIR_FILES = ("deepseek_v4",)
"""Their config.json alone is no reason: tensors in their files are integers."""


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_the_page_is_what_the_check_finds(tmp_path):
    """For every sixth type, in some minutes; ``make check-models`` checks all."""
    wrong = []
    for found in check_all(TYPES[::6], tmp_path, "auto", 1):
        row = row_of(found)
        expected = TABLE[found.model_type]
        if row != expected and (row.implementation, expected.implementation) != ("refused", "refused"):
            wrong.append(row)
    assert not wrong
