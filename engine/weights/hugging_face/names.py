"""Map the names of parameters in files of other programs, as transformers does.

transformers loads weights that were saved from the base model (without ``model.``), and adds or removes that prefix
name by name. Compiled modules add ``_orig_mod.`` to names, which is not part of a model either. Other prefixes may mean
another model: they are refused, with the remedy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from ...errors import UserError

_COMPILED = "_orig_mod"
_ROTARY = "rotary_emb"
"""Module of a buffer that old versions of transformers saved."""
_REMEDIES = {
    "module.": "they were saved from a DistributedDataParallel wrapper: save model.module",
    "base_model.": "they were saved from a PEFT model: save model.merge_and_unload()",
    "language_model.": "they are part of a multimodal model: save its language model alone",
}


def parameter_names(stored: Iterable[str], expected: Collection[str], prefix: str, folder: Path) -> dict[str, str]:
    """Return the name in the files of every tensor, in the order of ``stored``.

    Args:
        stored: names in the files.
        expected: names of the model's tensors as transformers saves them.
        prefix: of the names of the base model, such as ``model.``
        folder: named in errors.

    Raises:
        UserError: two stored names are one parameter.
    """
    modules = {_ROTARY, *(name.removeprefix(prefix).split(".")[0] for name in expected if name.startswith(prefix))}
    names: dict[str, str] = {}
    for name in stored:
        parameter = _parameter_name(name, prefix)
        if parameter not in expected and parameter.split(".")[0] in modules:
            parameter = prefix + parameter
        if parameter in names:
            raise UserError(
                f"{folder}: {names[parameter]} and {name} are the same parameter of a model; remove one of them"
            )
        names[parameter] = name
    return names


def _parameter_name(stored: str, prefix: str) -> str:
    name = ".".join(part for part in stored.split(".") if part != _COMPILED)
    while name.startswith(2 * prefix):
        name = name.removeprefix(prefix)
    return name


def describe_renamed(names: dict[str, str]) -> list[str]:
    """Return a note about the parameters that have another name in the files, if there are any."""
    renamed = {parameter: stored for parameter, stored in names.items() if parameter != stored}
    if not renamed:
        return []
    parameter, stored = next(iter(renamed.items()))
    return [
        f"note: {len(renamed)} of {len(names)} tensors have other names in the files: {stored} is read as {parameter}"
    ]


def renaming_hint(unexpected: Collection[str], missing: Collection[str], prefix: str) -> str:
    """Return the remedy for names that no parameter has, if it is known; else empty.

    Args:
        unexpected: names in the files.
        missing: names of tensors that the model needs.
        prefix: of the names of the base model.
    """
    lora = next((name for name in unexpected if ".lora_" in name or ".base_layer." in name), None)
    if lora is not None:
        return f"; {lora} belongs to an adapter that is not merged: save model.merge_and_unload() with PEFT"
    telling = next((name.removeprefix(prefix) for name in missing), "")
    found = next((name for name in unexpected if telling and name.endswith(f".{telling}")), None)
    if found is None:
        return ""
    begin = found.removesuffix(telling)
    if begin.endswith(f".{prefix}"):
        begin = begin.removesuffix(prefix)
    remedy = next((said for known, said in _REMEDIES.items() if begin.startswith(known)), "save the model itself")
    return f"; names begin with {begin!r}: {remedy} with save_pretrained, or rename the tensors without it"
