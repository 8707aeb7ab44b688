"""Types of transformers that draw random numbers in their forward pass: all of them are known, and can be told not to.

Runs compute them as in evaluation. So a positive probability in a config would be ignored, if it were not refused.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from model_table import TYPES, tiny_config
from transformers.models.auto.configuration_auto import model_type_to_module_name

from retemper.engine.config.settings import ModelConfig
from retemper.engine.errors import UserError
from retemper.engine.model.changed_config import dropouts, with_settings
from retemper.engine.model.implementations import parse_architecture

MODELS = Path(transformers.__file__).parent / "models"
RANDOM = re.compile(
    r"torch\.(rand|randn|rand_like|randn_like|bernoulli|multinomial|normal|randint|randperm)\("
    r"|\.(uniform|normal|bernoulli|exponential|geometric|random)_\(|gumbel|np\.random|(?<!\.)random\.\w+\("
)
SWITCHES = {
    ("biogpt", "BioGptModel.forward"): "layerdrop",
    ("dbrx", "DbrxRouter.forward"): "ffn_config.moe_jitter_eps",
    ("minimax", "MiniMaxSparseMoeBlock.forward"): "router_jitter_noise",
    ("minimax_m2", "MiniMaxM2SparseMoeBlock.forward"): "router_jitter_noise",
    ("mixtral", "MixtralSparseMoeBlock.forward"): "router_jitter_noise",
    ("opt", "OPTDecoder.forward"): "layerdrop",
    ("phimoe", "PhimoeTopKRouter.forward"): "input_jitter_noise",
    ("phimoe", "PhimoeSparseMoeBlock.forward"): "input_jitter_noise",
    ("phimoe", "sparsemixer"): None,  # samples experts when it trains; see docs/models.md
    ("xglm", "XGLMModel.forward"): "layerdrop",
}
"""The key of each function that draws random numbers, 0 of which makes it draw none."""
SECTIONS = {"dbrx": "attn_config.attn_pdrop"}
"""Dropout in a section of the config."""


def drawing_functions(source: str) -> Iterator[str]:
    """The functions of a module, with their classes, that draw random numbers, without those that make weights."""

    def visit(node: ast.AST, names: tuple[str, ...]) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from visit(child, (*names, child.name))
            elif isinstance(child, ast.FunctionDef) and not re.search("init", child.name):
                body = child.body[1:] if ast.get_docstring(child) else child.body
                if any(RANDOM.search(ast.unparse(line)) for line in body):
                    yield ".".join((*names, child.name))

    return visit(ast.parse(source), ())


def test_all_functions_that_draw_random_numbers_are_known():
    found = {
        (module, function)
        for module in {model_type_to_module_name(model_type) for model_type in TYPES}
        for path in (MODELS / module).glob("modeling_*.py")
        for function in drawing_functions(path.read_text(encoding="utf-8"))
        if not re.match("\\w*(Audio|Vision|Speech|ConditionalGeneration)", function)
    }
    assert found == SWITCHES.keys()


def test_the_search_finds_what_it_looks_for():
    source = '''
class Router:
    def __init__(self):
        self.weight = torch.rand(3)
    def forward(self, x):
        """See torch.rand(3)."""
        return x
    def noisy(self, x):
        return x * torch.empty_like(x).uniform_(0.9, 1.1)
'''
    assert list(drawing_functions(source)) == ["Router.noisy"]


def config_with(model_type: str, key: str, value: float) -> dict:
    """A tiny config in which a key, perhaps of a section, has a value."""
    config = tiny_config(model_type).to_dict()
    *sections, name = key.split(".")
    section = config
    for part in sections:
        section = section[part]
    section[name] = value
    return config


@pytest.mark.parametrize(
    ("model_type", "key"), [*((module, key) for (module, _), key in SWITCHES.items() if key), *SECTIONS.items()]
)
def test_noise_is_refused_unless_it_is_switched_off(model_type, key):
    config = config_with(model_type, key, 0.01)
    assert dropouts(config, "config.json")[key] == 0.01
    with pytest.raises(UserError, match=rf"{key} is 0\.01; dropout is not implemented: set model\.dropout to 0"):
        parse_architecture(config, "config.json")
    changed = with_settings(config, ModelConfig(dropout=0.0), "config.json")
    assert not dropouts(changed, "config.json")
    assert changed == config_with(model_type, key, 0.0)
    parse_architecture(changed, "config.json")
