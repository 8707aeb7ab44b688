"""Check that transformers' ``AutoTokenizer`` gives the same ids when the model is served as in training.

Training follows tokenizer.json. Many tokenizer classes of transformers 5 use only its vocabulary, merges and
post-processor. They build the normalizer and the pre-tokenizer from fixed rules and tokenizer_config.json. Which class
is used depends on ``tokenizer_class`` and on the ``model_type`` in config.json.

Importing transformers takes seconds. :func:`is_known_alike` therefore first compares the file's rules with those that
the class would build. Ids are compared only if they differ, or if the class is not in the table.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...engine.tokenizer.auto_class import declared_class, loaded_class
from ...engine.tokenizer.backends import one_line
from ...engine.tokenizer.files import CONFIG_FILES, MODEL_CONFIG, SENTENCEPIECE_FILE, TOKENIZER_FILE, read_config
from ...engine.tokenizer.json_file import deterministic
from ...engine.tokenizer.probes import EDGES, PROBES
from .fast import EXACT, rule_steps

_SHOWN_IDS = 6
_WORD_START = "\u2581"

Rules = tuple[list[dict[str, Any]], list[dict[str, Any]], bool]
"""Steps of the normalizer, steps of the pre-tokenizer, and whether unknown characters become byte tokens."""
Encode = Callable[[str], list[int]]


def auto_tokenizer(folder: Path) -> Any:
    """Return the tokenizer that ``AutoTokenizer`` loads from ``folder``, without dropout; or the error as a string."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        return f"transformers cannot be imported: {error}"
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its tokenizer classes raise many kinds
        return f"{auto_tokenizer_name()} cannot load the tokenizer: {one_line(error)[:200]}"
    if getattr(loaded, "is_fast", False):
        deterministic(loaded.backend_tokenizer)
    return loaded


def auto_tokenizer_name() -> str:
    """Return a name for messages, with the version."""
    return f"AutoTokenizer of transformers {version('transformers')}"


def is_known_alike(file: Path, library_tokenizer: Any | None) -> bool:
    """Return whether the files show that ``AutoTokenizer`` gives the same ids, or that it does not read ``file``.

    Args:
        file: of the tokenizer.
        library_tokenizer: the ``tokenizers.Tokenizer`` of a tokenizer.json; None for a sentencepiece model.
    """
    # AutoTokenizer looks for these names. For another file name it would load a neighbouring file.
    if file.name != (SENTENCEPIECE_FILE if library_tokenizer is None else TOKENIZER_FILE):
        return True
    return library_tokenizer is not None and built_alike(file.parent, library_tokenizer)


def serving_note(file: Path, encode: Encode) -> str | None:
    """Return how the ids of ``AutoTokenizer`` differ from ours for texts without added tokens; None if they do not.

    This is a note and not an error, unlike in chat mode, where the comparison shows that the chat template is handled
    correctly. Here the file may be right. A model that was trained with its rules must be continued with them, and
    servers that read tokenizer.json themselves follow it as well.

    Args:
        file: of the tokenizer.
        encode: ids of a text, without special tokens.
    """
    theirs = auto_tokenizer(file.parent)
    if isinstance(theirs, str):  # transformers itself reports this when the model is served
        return None

    def differs(text: str) -> bool:
        other = _ids(theirs, text)
        return other is not None and other != encode(text)

    texts = [text for text in (*EDGES, *PROBES) if differs(text)]
    if not texts:
        return None
    others = [text for text in texts if differs(unicodedata.normalize("NFC", text))]
    text = min(others or texts, key=len)
    limit = "" if others else " (this concerns only text outside Unicode's normalization form C)"
    return _difference(file, text, encode(text), _ids(theirs, text) or [], theirs) + limit


def _ids(theirs: Any, text: str) -> list[int] | None:
    """Return the ids of transformers; None for a text that its class fails on, as some classes in Python do."""
    try:
        return list(theirs.encode(text, add_special_tokens=False))
    except Exception:
        return None


def built_alike(folder: Path, tokenizer: Any) -> bool:
    """Return whether the classes that transformers may use for ``folder`` build the rules of its tokenizer.json.

    Args:
        folder: of tokenizer.json.
        tokenizer: the ``tokenizers.Tokenizer`` of that file.
    """
    config, model_config = read_config(folder / CONFIG_FILES[0]), read_config(folder / MODEL_CONFIG)
    if "fast_tokenizer_files" in config or (folder / "tekken.json").exists():
        return False  # transformers may use another file than tokenizer.json
    # The declared class too: older versions of transformers use it for every model type.
    names = {loaded_class(config, model_config), declared_class(config, model_config)}
    return all(_builds(name, config, tokenizer) for name in names)


def _builds(name: str, config: Mapping[str, Any], tokenizer: Any) -> bool:
    """Return whether the class ``name`` would give ``tokenizer`` the rules that it has."""
    if name in _PLAIN:
        return True
    normalizer, pre_tokenizer = _steps(tokenizer.normalizer), _steps(tokenizer.pre_tokenizer)
    if name == "LlamaTokenizer" and any(step["type"] == "ByteLevel" for step in pre_tokenizer):
        return True  # the plain class is loaded instead, as for Llama 3
    build, model = _BUILDERS.get(name), tokenizer.model
    if build is None or type(model).__name__ != "BPE":
        return False
    rules = build(config)
    if rules is None or rules[:2] != (normalizer, pre_tokenizer) or model.byte_fallback != rules[2]:
        return False
    if model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    # Without byte tokens, or with all of them, no character is unknown.
    if not model.byte_fallback:
        return model.unk_token is None
    return all(tokenizer.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))


def _steps(part: Any) -> list[dict[str, Any]]:
    return rule_steps(None if part is None else json.loads(part.__getstate__()))


def _prefix_space(config: Mapping[str, Any], default: bool) -> bool:
    value = config.get("add_prefix_space")
    return default if value is None else bool(value)


def _byte_level(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": _prefix_space(config, False), "use_regex": True}


def _qwen2(config: Mapping[str, Any]) -> Rules:
    normalizer, (split, byte_level) = EXACT["Qwen2"]
    return normalizer, [split, {**byte_level, "add_prefix_space": _prefix_space(config, False)}], False


def _gpt2(config: Mapping[str, Any]) -> Rules:
    return [], [_byte_level(config)], False


def _gpt_neox(config: Mapping[str, Any]) -> Rules:
    return [{"type": "NFC"}], [_byte_level(config)], False


def _llama(config: Mapping[str, Any]) -> Rules:
    # The class sets legacy=False if the key is absent. A null value is passed on and counts as false.
    scheme = "never" if not _prefix_space(config, True) else "always" if config.get("legacy") else "first"
    metaspace = {"type": "Metaspace", "replacement": _WORD_START, "prepend_scheme": scheme, "split": False}
    return [], [metaspace], True


def _gemma(config: Mapping[str, Any]) -> Rules:
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": _WORD_START}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    return [escape], [split], True


_PLAIN = frozenset({"TokenizersBackend", "PreTrainedTokenizer", "PythonBackend"})
"""Classes that use tokenizer.json unchanged."""
_BUILDERS: dict[str, Callable[[Mapping[str, Any]], Rules]] = {
    "Qwen2Tokenizer": _qwen2,
    "GPT2Tokenizer": _gpt2,
    "GPTNeoXTokenizer": _gpt_neox,
    "LlamaTokenizer": _llama,
    "GemmaTokenizer": _gemma,
}
"""Rules that classes build from tokenizer_config.json. Tests compare each with the class of transformers."""


def _difference(file: Path, text: str, ours: list[int], theirs: list[int], tokenizer: Any) -> str:
    pairs = zip(ours, theirs, strict=False)
    at = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(theirs)))
    at = max(at - 1, 0)
    remedy = (
        "if transformers is right, save the tokenizer with it "
        "(AutoTokenizer.from_pretrained(folder).save_pretrained(other)) and name that folder"
    )
    if file.name == TOKENIZER_FILE:
        remedy += "; if the file is right, serve the model with PreTrainedTokenizerFast.from_pretrained(folder)"
    return (
        f"{file}: the text {_short(text)} becomes {_shown(ours, at)} here and {_shown(theirs, at)} with "
        f"{type(tokenizer).__name__}, the class that AutoTokenizer of transformers uses for this folder, so the served "
        f"model would get other ids than those of its training; {remedy}"
    )


def _short(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:40] + "...")


def _shown(ids: list[int], at: int) -> str:
    """Return the ids from ``at`` on, shortened."""
    shown = [*(["..."] if at else []), *map(str, ids[at : at + _SHOWN_IDS])]
    return f"[{', '.join([*shown, *(['...'] if len(ids) > at + _SHOWN_IDS else [])])}]"
