"""Map the names of parameters in files of other programs, as transformers does.

transformers loads weights that were saved from the base model (without ``model.``), and adds or removes that prefix
name by name. Compiled modules add ``_orig_mod.`` to names, which is not part of a model either. Other prefixes may mean
another model: they are refused, with the remedy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from ...errors import UserError

_PREFIX = "model."
_COMPILED = "_orig_mod"
_OF_BASE_MODEL = ("embed_tokens.", "layers.", "norm.", "rotary_emb.")
_TELLING = "layers.0.input_layernorm.weight"
"""A parameter of every supported model: the text before it is the prefix of all names."""
_REMEDIES = {
    "module.": "they were saved from a DistributedDataParallel wrapper: save model.module",
    "base_model.": "they were saved from a PEFT model: save model.merge_and_unload()",
    "language_model.": "they are part of a multimodal model: save its language model alone",
}


def parameter_names(stored: Iterable[str], folder: Path) -> dict[str, str]:
    """Return the stored name of every parameter, in the order of ``stored``.

    Args:
        stored: names in the files.
        folder: named in errors.

    Raises:
        UserError: two stored names are one parameter.
    """
    names: dict[str, str] = {}
    for name in stored:
        parameter = _parameter_name(name)
        if parameter in names:
            raise UserError(
                f"{folder}: {names[parameter]} and {name} are the same parameter of a model; remove one of them"
            )
        names[parameter] = name
    return names


def _parameter_name(stored: str) -> str:
    name = ".".join(part for part in stored.split(".") if part != _COMPILED)
    while name.startswith(2 * _PREFIX):
        name = name.removeprefix(_PREFIX)
    return _PREFIX + name if name.startswith(_OF_BASE_MODEL) else name


def describe_renamed(names: dict[str, str]) -> list[str]:
    """Return a note about the parameters that have another name in the files, if there are any."""
    renamed = {parameter: stored for parameter, stored in names.items() if parameter != stored}
    if not renamed:
        return []
    parameter, stored = next(iter(renamed.items()))
    return [
        f"note: {len(renamed)} of {len(names)} tensors have other names in the files: {stored} is read as {parameter}"
    ]


def renaming_hint(unexpected: Collection[str]) -> str:
    """Return the remedy for names that no parameter has, if it is known; else empty."""
    lora = next((name for name in unexpected if ".lora_" in name or ".base_layer." in name), None)
    if lora is not None:
        return f"; {lora} belongs to an adapter that is not merged: save model.merge_and_unload() with PEFT"
    telling = next((name for name in unexpected if name.endswith(f".{_TELLING}")), None)
    if telling is None:
        return ""
    prefix = telling.removesuffix(_TELLING)
    if prefix.endswith(f".{_PREFIX}"):
        prefix = prefix.removesuffix(_PREFIX)
    remedy = next((said for known, said in _REMEDIES.items() if prefix.startswith(known)), "save the model itself")
    return f"; names begin with {prefix!r}: {remedy} with save_pretrained, or rename the tensors without it"
