"""Models with a table of positions: no document can be longer, as transformers itself shows."""

import pytest
import torch
from model_table import TYPES, tiny_config, tiny_model

from retemper.engine.errors import UserError
from retemper.engine.model.architecture import Architecture
from retemper.engine.model.implementations import parse_architecture


def parsed(model_type: str) -> tuple[object, Architecture] | None:
    """The configuration of a tiny model with few positions, and its architecture; None if it cannot be trained."""
    made = tiny_config(model_type)
    limit = getattr(made, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit > 4096:
        return None
    try:
        return made, parse_architecture(made.to_dict(), "config.json")
    except UserError:
        return None


def fails_beyond(made: object) -> bool:
    """Whether transformers cannot compute one token more than the configured positions."""
    tokens = torch.full((1, made.max_position_embeddings + 1), 3)
    try:
        with torch.no_grad():
            tiny_model(made).eval()(input_ids=tokens, use_cache=False)
    except (IndexError, RuntimeError):
        return True
    return False


@pytest.mark.parametrize(
    ("model_type", "has_table"), [("gpt2", True), ("opt", True), ("xglm", False), ("olmoe", False)]
)
def test_a_table_is_found_where_transformers_has_one(model_type, has_table):
    made, architecture = parsed(model_type)
    assert fails_beyond(made) is has_table
    assert architecture.position_table == (made.max_position_embeddings if has_table else None)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_type_with_a_table_is_found():
    checked = 0
    for model_type in TYPES:
        if (found := parsed(model_type)) is not None:
            made, architecture = found
            assert fails_beyond(made) is (architecture.position_table is not None), model_type
            checked += 1
    assert checked > 50
