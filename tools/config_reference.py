"""Write docs/configuration_reference.md: every setting of a run with its type, default, allowed values and docstring.

    make docs

Everything comes from :mod:`retemper.engine.config.settings` and the table of ranges in
:mod:`retemper.engine.config.checks`, so that the page cannot contradict the program. A test compares the page with what
this file renders.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from retemper.engine.config.checks import RANGES
from retemper.engine.config.command_line import CommandParser
from retemper.engine.config.settings import RunConfig
from retemper.engine.config.types_check import (
    bare,
    hints_of,
    is_path,
    is_section,
    item_hint,
    show,
    switch_of,
    type_in_words,
)
from retemper.engine.errors import run_command

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration_reference.md"
WIDTH = 120
_BEGINNING = """\
# Configuration reference

This page is generated from `engine/config/settings/` by `make docs`.
[configuration.md](configuration.md) explains how files and options are read. `training.precision`
below is the key `precision` in the section `training` of a YAML file, and the option `--training.precision`.
"""


def render() -> str:
    """Return the page."""
    return "\n".join([_BEGINNING, *_section(RunConfig, "", "The run", {})])


def field_docs(kind: type) -> dict[str, str]:
    """Return the docstring below each field of the dataclass ``kind``."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _section(kind: type, prefix: str, title: str, entries: dict[type, str]) -> Iterator[str]:
    """Yield the keys of the dataclass ``kind``, then its sections and the entries of its lists.

    Args:
        kind: a section, or what a list holds.
        prefix: of the keys.
        title: of the section in the page.
        entries: the name of each dataclass that a list above holds; such entries are written once.
    """
    docs, hints = field_docs(kind), hints_of(kind)
    yield f"## {title}\n"
    yield from _wrapped(inspect.getdoc(kind) or "")
    plain = [field for field in dataclasses.fields(kind) if not is_section(hints[field.name])]
    lists: dict[type, str] = {}
    for field in plain:
        key, item = prefix + field.name, item_hint(hints[field.name])
        if is_section(item) and bare(item) not in entries:
            lists[bare(item)] = entries[bare(item)] = f"{key}[]"
        yield f"### `{key}`\n"
        yield f"{_facts(key, field, hints[field.name], entries)}\n"
        yield from _wrapped(docs[field.name])
    for item, name in lists.items():
        yield from _section(item, f"{name}.", f"`{name}`: an entry of `{name.removesuffix('[]')}`", entries)
    for field in dataclasses.fields(kind):
        if field not in plain:
            key = prefix + field.name
            yield from _section(bare(hints[field.name]), f"{key}.", f"`{key}`", entries)


def _facts(key: str, field: dataclasses.Field[Any], hint: Any, entries: dict[type, str]) -> str:
    """Return one line: type, default, allowed range, and what true and false mean."""
    words = re.sub(r"'(\w+)'", r"`\1`", type_in_words(hint))
    item = item_hint(hint)
    if words == "a list":
        words = f"a list of {f'entries `{entries[bare(item)]}`' if is_section(item) else type_in_words(item)}"
    facts = [words + (" (a path)" if is_path(hint) or is_path(item) else ""), _default(field)]
    if (allowed := RANGES.get(key)) is not None:
        facts.append(allowed.words)
    if switch := switch_of(hint):
        facts.append(f"`true` means `{switch.true}`, `false` means `{switch.false}`")
    return "; ".join(facts)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"default `{field.default_factory()}`"
    if field.default is dataclasses.MISSING:
        return "required"
    return f"default `{field.default if isinstance(field.default, str) else show(field.default)}`"


def _wrapped(docstring: str) -> Iterator[str]:
    """Yield the Markdown of a docstring: its paragraphs and lists, with single backticks."""
    for paragraph in docstring.replace("``", "`").split("\n\n"):
        items = re.split(r"\n(?=- )", paragraph)
        for item in items:
            yield textwrap.fill(" ".join(item.split()), WIDTH, subsequent_indent="  " if item.startswith("- ") else "")
        yield ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = CommandParser(prog="config_reference.py", description="Write the reference of all settings of a run.")
    parser.add_argument("--output", type=Path, default=PAGE, help="file to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.output.write_text(render(), encoding="utf-8")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    run_command(main)
