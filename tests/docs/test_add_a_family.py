"""The example of docs/add_a_family.md, run as written."""

import re
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from retemper.engine.model.config_keys import unread_keys
from retemper.engine.model.family_table import FAMILIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add_a_family.md"


def test_the_example_adds_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text("utf-8")
    row, comparison = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(row.splitlines()) <= 30
    monkeypatch.setitem(FAMILIES, "gemma", FAMILIES["llama"])
    with pytest.raises(AssertionError):  # as a Llama it computes something else
        exec(comparison, {})
    exec(row, {})
    exec(comparison, {})
    assert unread_keys(CONFIG_MAPPING["gemma"]().to_dict()) == []
