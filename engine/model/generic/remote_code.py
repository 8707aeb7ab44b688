"""Register the Python code that comes with a model, so that transformers knows its type.

Published models of types that transformers does not know bring their own modules: files next to ``config.json``, which
names their classes under ``auto_map``. They run only with ``model.trust_remote_code: true``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import UserError

SETTING = "model.trust_remote_code"
_CONFIG, _MODEL = "AutoConfig", "AutoModelForCausalLM"


def register_remote_code(config: dict[str, Any], folder: Path) -> None:
    """Import the classes that ``config``, of the model in ``folder``, names, and register them with transformers.

    Nothing is imported if transformers knows the type itself.

    Raises:
        UserError: the code is missing or cannot be imported, or is of another type.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    classes, model_type = config.get("auto_map"), config.get("model_type")
    if not isinstance(classes, dict) or not isinstance(model_type, str) or model_type in CONFIG_MAPPING:
        return
    missing = [name for name in (_CONFIG, _MODEL) if not isinstance(classes.get(name), str)]
    if missing:
        raise UserError(f"{folder}: auto_map of config.json names no {missing[0]}, which training needs")
    try:
        # The part before "--" names another repository, from which nothing is fetched.
        found = [get_class_from_dynamic_module(classes[name].split("--")[-1], folder) for name in (_CONFIG, _MODEL)]
        AutoConfig.register(model_type, found[0])
        AutoModelForCausalLM.register(found[0], found[1])
    except Exception as error:  # whatever the code raises
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{folder}: the code of the model cannot be used ({SETTING}): {problem}") from None
