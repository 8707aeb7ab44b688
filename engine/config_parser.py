"""From the command line and the YAML files that it names to a :class:`RunConfig`, or one line that says what is wrong.

``jsonargparse`` makes the options, the help and the objects. Before it sees them, files and values are checked here
against the declared types, so that an error names the file or key, the value and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from .config import RunConfig, SourceConfig, StageConfig, to_dict
from .config_checks import validate
from .config_yaml import dump_yaml, load_yaml
from .errors import UserError

jsonargparse.set_loader("strict_yaml", load_yaml, exceptions=(yaml.YAMLError,))
jsonargparse.set_dumper("strict_yaml", dump_yaml)
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of ``engine/pretrain.py``: ``--config FILE`` plus one option for every field of :class:`RunConfig`."""
    parser = jsonargparse.ArgumentParser(
        prog="pretrain.py",
        description="Continue the pretraining of a language model. Describe the run in a YAML file; override on the "
        "command line.",
        parser_mode="strict_yaml",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file that describes the run")
    parser.add_class_arguments(RunConfig)
    return parser


def parse_config(arguments: Sequence[str] | None = None) -> RunConfig:
    """Read a run's configuration from the command line (default ``sys.argv[1:]``) and the YAML files that it names.

    Raises:
        UserError: unknown or duplicate keys, wrong types, missing values or impossible arithmetic, in one line.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    arguments = list(_checked(arguments))
    parser = build_parser()
    try:
        config = parser.instantiate(parser.parse_args(arguments))
    except (ArgumentError, jsonargparse.ArgumentError) as error:
        raise UserError(_explain(str(error))) from None
    run = RunConfig(**{item.name: config[item.name] for item in dataclasses.fields(RunConfig)})
    validate(run)
    return run


def _checked(arguments: Sequence[str]) -> Iterator[str]:
    """``arguments`` with the files and lists in them read, checked and written out in full.

    In full, because the parser would fill what an item of a list leaves out from the item that stood there before, in
    a former file. What is no option at all is left to the parser.

    Raises:
        UserError: an unreadable file, bad YAML, duplicate or unknown keys, wrong types.
    """
    hints = dict(_known_keys())
    dictionaries: dict[str, Any] = {name: None for name, hint in hints.items() if _is_dictionary(hint)}
    waiting = list(reversed(arguments))
    while waiting:
        argument = waiting.pop()
        option, equals, value = argument.removeprefix("--").partition("=")
        key = option.removesuffix("+")  # --data.train+ {path: ...} appends one item
        owner, _, entry = key.rpartition(".")  # --model.architecture.vocab_size 1000 sets one entry
        known = key == "config" or key in hints or owner in dictionaries
        if not argument.startswith("--") or not known or not (equals or waiting):
            yield argument
            continue
        value = value if equals else waiting.pop()
        if key == "config":
            run = _checked_file(Path(value))
            for name in dictionaries:
                section, leaf = name.split(".")
                dictionaries[name] = run.get(section, {}).get(leaf, dictionaries[name])
            value = dump_yaml(_complete(run, RunConfig))
        elif owner in dictionaries:
            kind = (*get_args(hints[owner]), Any)[1] if get_origin(hints[owner]) is dict else Any
            former = dictionaries[owner] if isinstance(dictionaries[owner], dict) else {}
            dictionaries[owner] = {**former, entry: value if kind is str else _checked_value(value, kind, key)}
            option, value = owner, dump_yaml(dictionaries[owner])
        else:
            content: Any = value  # text is taken as it is, all else is YAML
            if not _accepts(value, hints[key]) or _is_dictionary(hints[key]):
                content = _checked_value(value, hints[key], key, append=option != key)
            if key in dictionaries:
                dictionaries[key] = content
            value = dump_yaml(_complete(content, hints[key])) if isinstance(content, list) else value
        yield f"--{option}={value}"


def _is_dictionary(hint: Any) -> bool:
    """Whether a key of this type may hold entries of the user's choice."""
    return _accepts({}, hint) and not dataclasses.is_dataclass(hint)


def _checked_file(path: Path) -> dict:
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not a UTF-8 text file") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # Besides its own errors, PyYAML lets those of wrong explicit tags (!!int abc) through.
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found {_show(content)}")
    for problem in _problems(content, RunConfig, ""):
        raise UserError(f"{path}: {problem}")
    return content


def _checked_value(text: str, hint: Any, key: str, append: bool = False) -> Any:
    try:
        content = load_yaml(text)
    except UserError as error:
        raise UserError(f"--{key}: {error}") from None
    except yaml.YAMLError:
        content = text
    if append and not isinstance(content, list):
        content = [content]
    for problem in _problems(content, hint, key):
        raise UserError(problem)
    return content


def _complete(value: Any, hint: Any) -> Any:
    """``value`` with every dataclass in a list given all its fields."""
    if isinstance(value, dict) and dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return {key: _complete(item, hints[key]) for key, item in value.items()}
    if isinstance(value, list) and dataclasses.is_dataclass(kind := (*get_args(hint), None)[0]):
        return [to_dict(kind(**_complete(item, kind))) for item in value]  # type: ignore[operator]
    return value


def _problems(value: Any, hint: Any, name: str) -> Iterator[str]:
    """What is wrong with the plain ``value`` of the key ``name`` that is declared as ``hint``, one line for each."""
    if isinstance(value, dict) and dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        for key, item in value.items():
            full = f"{name}.{key}" if name else str(key)
            if key in hints:
                yield from _problems(item, hints[key], full)
            else:
                yield f"unknown key '{full}'{_did_you_mean(full, section=isinstance(item, dict))}"
    elif isinstance(value, list) and get_origin(hint) is list:
        [kind] = get_args(hint)
        for position, item in enumerate(value):
            full = f"{name}[{position}]"
            yield from _problems(item, kind, full)
            if isinstance(item, dict) and dataclasses.is_dataclass(kind):
                for missing in sorted(_required(kind) - item.keys()):
                    yield f"{full}.{missing} is missing; every item of {name} needs it"
    elif isinstance(value, dict) and get_origin(hint) is dict:
        key_kind, kind = get_args(hint)
        for key, item in value.items():
            yield from _problems(key, key_kind, f"a name in {name}")
            yield from _problems(item, kind, f"{name}.{key}")
    elif not _accepts(value, hint):
        whole = isinstance(value, float) and value.is_integer() and _accepts(int(value), hint)
        remedy = f"a whole number is needed: write {int(value):_}" if whole else f"expected {_expected(hint)}"
        yield f"{name} is {_show(value)}; {remedy}"


def _accepts(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the type ``hint``, as far as its outermost layer tells."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return any(_accepts(value, member) for member in get_args(hint))
    if kind is Literal:
        return value in get_args(hint)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    return kind is Any or type(value) is kind or (kind is float and type(value) is int)


def _expected(hint: Any) -> str:
    """The type ``hint`` in words."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return " or ".join(_expected(member) for member in get_args(hint))
    if kind is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    words = {bool: "true or false", str: "text", NoneType: "null", list: "a list"}
    return words.get(kind, kind.__name__ if kind in (int, float) else "'key: value' lines")


def _show(value: Any) -> str:
    """``value`` as it would be written in YAML, shortened."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _required(kind: Any) -> set[str]:
    """The fields of a dataclass that have no default."""
    return {
        item.name
        for item in dataclasses.fields(kind)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    }


def _known_keys(kind: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every key, sections included; the keys of a list's items are not options and left out."""
    for key, hint in get_type_hints(kind).items():
        yield f"{prefix}{key}", hint
        if dataclasses.is_dataclass(hint):
            yield from _known_keys(hint, f"{prefix}{key}.")  # type: ignore[arg-type]


def _did_you_mean(key: str, section: bool = False) -> str:
    """A hint for a misspelt, abbreviated or misplaced key. Sections are proposed for sections, else never."""
    if "[" in key:  # an item of data.train or data.stages
        item = key.rsplit(".", 1)[0]
        kind = StageConfig if re.search(r"stages\[\d+\]$", item) else SourceConfig
        known = [f"{item}.{name}" for name in get_type_hints(kind)]
    else:
        known = [name for name, hint in _known_keys() if dataclasses.is_dataclass(hint) == section]
    if key in known:
        nested = f", as {key.replace('.', ': {')}: ...{'}' * key.count('.')}" if "[" not in key else ""
        return f"; set it in a file{nested}"
    # Names in the same (or the most similar) section come first, so that they win between equally good ones.
    home = key.rpartition(".")[0]
    known.sort(key=lambda name: -difflib.SequenceMatcher(None, home, name.rpartition(".")[0]).ratio())
    last = key.rpartition(".")[2].replace("-", "_")
    leaves = {name: name.rpartition(".")[2] for name in known}
    near = (
        [name for name in known if leaves[name] == last]
        or [name for name in known if len(last) > 1 and _abbreviates(last.replace("_", ""), leaves[name].split("_"))]
        or difflib.get_close_matches(last, leaves.values(), n=1, cutoff=0.7)
    )
    match = next((name for name in known if near and near[0] in (name, leaves[name])), None)
    return f"; did you mean '{match}'?" if match else "; see --help for all keys"


def _abbreviates(short: str, words: Sequence[str]) -> bool:
    """Whether ``short`` is made of beginnings of the ``words``, in order and without a gap: lr, seqlen, warmup."""
    if not short or not words:
        return not short
    return any(
        short.startswith(words[0][:length]) and _abbreviates(short[length:], words[1:])
        for length in range(1, len(words[0]) + 1)
    )


def _explain(message: str) -> str:
    """One line with a remedy out of jsonargparse's message."""
    message = " ".join(message.split())
    unknown = re.match(r"unrecognized arguments: (--)?([^\s=]+)", message, re.IGNORECASE)
    if unknown:
        if not unknown[1]:
            return f"unexpected argument '{unknown[2]}'; every value follows its option, as in --seed 1"
        return f"unknown option --{unknown[2]}{_did_you_mean(unknown[2])}"
    missing = re.search(r"arguments? (?:is|are) required: (.+)$", message)
    if missing:
        return f"missing: {missing[1]}; set it in the file given with --config or as --{missing[1].split(', ')[0]}"
    return message
