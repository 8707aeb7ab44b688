"""Read prompts from files and standard input, and write their continuations. No PyTorch is needed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    if os.path.lexists(partial_path(path)):
        raise UserError(
            f"--output {path}: {partial_path(path)} has the texts of an interrupted command; rename or remove it"
        )
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"--output {path}: the folder {folder} does not exist; create it, or name another file")


class ResultFile:
    """A file of JSON lines that appears when it is complete; until then its lines are in ``FILE.partial``.

    Lines are there as soon as they are known, so an interruption of any kind, also a SIGKILL, loses none of them.

    Args:
        path: of the file, which :func:`require_output` has accepted.
        total: number of lines of the complete file.
        remark: prints a line.
    """

    def __init__(self, path: Path, total: int, remark: Callable[[str], object]):
        self._path, self._total, self._remark = path, total, remark
        self._partial = partial_path(path)
        self._lines: dict[int, bytes] = {}

    def __enter__(self) -> ResultFile:
        """Create the partial file.

        Raises:
            UserError: it cannot be created.
        """
        with self._named_errors():
            self._file = open(self._partial, "xb", buffering=0)
        return self

    def add(self, number: int, record: Mapping[str, Any]) -> None:
        """Write the line ``number``, counted from 0; lines may come in any order.

        Raises:
            UserError: it cannot be written.
        """
        line = f"{json.dumps(record, ensure_ascii=False)}\n".encode()
        with self._named_errors():
            self._file.write(line)
        self._lines[number] = line

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Write the complete file in order, and remove the partial one; or keep that, and say so.

        Raises:
            UserError: the file cannot be written. The partial one stays.
        """
        self._file.close()
        if kind is None:
            with self._named_errors():
                replace_file(self._path, (self._lines[number] for number in sorted(self._lines)))
        if kind is None or not self._lines:
            self._partial.unlink()
        else:
            self._remark(f"{len(self._lines)} of {self._total} texts are in {self._partial}")

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"--output {self._path}: cannot be written: {error.strerror or error}") from error


def partial_path(path: Path) -> Path:
    """Return the file with the results so far of the output ``path``."""
    return path.with_name(f"{path.name}.partial")
