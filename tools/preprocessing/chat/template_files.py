"""Chooses the chat template of a tokenizer folder, as transformers' tokenizers do.

A folder may have several: ``chat_template.jinja``, ``additional_chat_templates/*.jinja``, and in tokenizer_config.json
a text or named templates. Template files replace all templates of the config. Of named templates ``default`` is used,
and ``tool_use``, if it exists, for conversations with tools. ``chat_template.json`` is for processors of images and
audio; tokenizers do not read it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ....engine.errors import UserError
from ....engine.files.regular import read_regular

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_MOST_BYTES = 64 << 20
"""Of a file with a template. Templates have some KB, a tokenizer_config.json with one some MB."""
_FOLDER, _PROCESSOR_FILE = "additional_chat_templates", "chat_template.json"
_DEFAULT, _FOR_TOOLS = "default", "tool_use"

Template = tuple[str, str]
"""Text, and where it comes from."""


def load_template(folder: Path, config: dict[str, Any], file: Path | None, tools: bool = False) -> Template:
    """Return text and origin of the chat template: ``file``, else the one that transformers would use.

    Args:
        folder, config: of the tokenizer.
        file: given by the user.
        tools: for conversations with tools.

    Raises:
        UserError: there is no template, or it cannot be read.
    """
    if file is not None:
        return _read(file), str(file)
    named = _named_templates(folder, config)
    if tools and _FOR_TOOLS in named:
        return named[_FOR_TOOLS]
    if _DEFAULT in named:
        return named[_DEFAULT]
    if named:
        raise UserError(
            f"{folder}: no chat template is called {_DEFAULT} (there: {', '.join(sorted(named))}); give "
            "--chat-template FILE"
        )
    other = folder / _PROCESSOR_FILE
    unread = f"; transformers' tokenizers do not read {other}, use it by --chat-template" if other.is_file() else ""
    raise UserError(
        f"{folder}: the tokenizer has no chat template, often so with base models (neither {TEMPLATE_FILE}, nor "
        f"chat_template in {CONFIG_FILE}); give one with --chat-template FILE{unread}"
    )


def has_template_for_tools(folder: Path, config: dict[str, Any]) -> bool:
    """Return whether conversations with tools have a template of their own."""
    return _FOR_TOOLS in _named_templates(folder, config)


def _named_templates(folder: Path, config: dict[str, Any]) -> dict[str, Template]:
    files = {_DEFAULT: folder / TEMPLATE_FILE} if (folder / TEMPLATE_FILE).is_file() else {}
    # default.jinja of this folder has precedence over chat_template.jinja, as in transformers.
    files |= {path.name.removesuffix(".jinja"): path for path in sorted((folder / _FOLDER).glob("*.jinja"))}
    if files:
        return {name: (_read(path), str(path)) for name, path in files.items()}
    origin = str(folder / CONFIG_FILE)
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
    if template is None:
        return {}
    named = template if isinstance(template, dict) else {_DEFAULT: template}
    if not isinstance(named.get(_DEFAULT, ""), str):
        raise UserError(f"{origin}: chat_template is not a string; give --chat-template FILE")
    return {name: (text, origin) for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}


def _read(file: Path) -> str:
    try:
        text = read_regular(file, _MOST_BYTES).decode("utf-8")
        if file.suffix != ".json":
            return text
        template = json.loads(text).get("chat_template")
    except (OSError, ValueError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{file}: cannot be read as a chat template: {reason}") from None
    if not isinstance(template, str):
        raise UserError(f"{file}: cannot be read as a chat template: chat_template is not a string")
    return template
