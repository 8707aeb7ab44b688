"""Read prompts from files and standard input, and write their continuations. No PyTorch is needed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...engine.errors import UserError
from ...engine.files.atomic import replace_file, require_absent
from ...engine.files.outputs import Use, require_separate

NOT_UTF_8 = "stdin is not UTF-8; convert it first, such as with iconv"
_PROMPT = "prompt"


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: objects with the key ``prompt`` in a ``.jsonl``, else one prompt a line.

    Raises:
        UserError: the file cannot be read, has no prompts, or a line has none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"--input {path}: cannot be read: {reason}") from None
    parse = _prompt_of_record if path.suffix == ".jsonl" else _prompt_of_line
    return _prompts(text, f"--input {path}", parse)


def piped_prompts() -> list[str]:
    """Return the lines of stdin.

    Raises:
        UserError: there are no lines, one is empty, or they are not UTF-8.
    """
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError:
        raise UserError(NOT_UTF_8) from None
    return _prompts(text, "stdin", _prompt_of_line)


def _prompts(text: str, source: str, parse: Any) -> list[str]:
    # Not splitlines: JSON may contain other line separators of Unicode.
    lines = text.removesuffix("\n").split("\n") if text else []
    if not lines:
        raise UserError(f"{source} is empty; give one prompt per line")
    return [parse(line.removesuffix("\r"), f"{source}, line {number}") for number, line in enumerate(lines, 1)]


def _prompt_of_line(line: str, place: str) -> str:
    if not line:
        raise UserError(f"{place}: the prompt is empty; give one prompt per line")
    return line


def _prompt_of_record(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON ({error}); give one object per line") from None
    prompt = record.get(_PROMPT) if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise UserError(
            f'{place}: expected an object with a text under "{_PROMPT}", such as {{"{_PROMPT}": "The sea"}}'
        )
    return prompt


def require_output(path: Path, reads: Iterable[Use]) -> None:
    """Refuse an output that exists, or could not be written.

    Raises:
        UserError: names the option.
    """
    require_separate(reads, [Use("--output", path)])
    require_absent(path)
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"--output {path}: the folder {folder} does not exist; create it, or name another file")


def write_results(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line. The file appears when it is complete.

    Raises:
        UserError: it cannot be written.
    """
    try:
        replace_file(path, (f"{json.dumps(record, ensure_ascii=False)}\n".encode() for record in records))
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written: {error.strerror or error}") from error
