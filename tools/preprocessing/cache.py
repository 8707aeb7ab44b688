"""Keep datasets in a folder under names that say what they are made from, so that a text is tokenized once.

The name is a hash of the contents of the input files, of the tokenizer's files, and of the options that decide the
documents and their tokens. Names and times of the files do not matter, and no dataset is ever replaced by another one.
Nothing is removed: delete folders of the cache that are no longer needed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ... import __version__
from ...engine.data.sidecar import Sidecar
from ...engine.errors import UserError
from ...engine.files.atomic import replace_file
from ...engine.files.hashing import hash_file, record_file
from ...engine.files.paths import is_url
from ...engine.files.regular import read_regular
from ...engine.system import usable_cores
from ...engine.tokenizer.files import ADDED_TOKENS_FILE, CONFIG_FILES
from ..tokenizer.finding import find_tokenizer_file
from .inputs.files import STDIN, InputFile, expand_inputs
from .inputs.hub import pin_revisions
from .merging.merge import MergeOptions, merge
from .option_rules import check_options
from .options import NOT_CONTENTS, PreprocessOptions
from .pipeline import preprocess
from .progress import ProgressReport
from .tokenizer_choice import choose_tokenizer

_DATASET = "dataset"
_COMPLETE = "complete.json"
_HASHES = "hashes"
_REMEMBERED_BYTES = 16 << 20
"""Hashes of files of at least this size are remembered; smaller ones are read again in no time."""
_MODEL_KEYS = ("model_type", "vocab_size", "bos_token_id", "eos_token_id")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_OF_A_RUN = frozenset(["shard", "skip_bad_lines", "max_expansion"])
"""Options that say how a dataset is made, and whether an error ends it, but not which one."""


def preprocess_into_cache(options: PreprocessOptions) -> dict[str, Sidecar]:
    """Tokenize a corpus into ``options.cache_folder``, unless it is there; return its sidecars by prefix.

    With ``options.shard``, only that part is made. Without it, the complete parts of an earlier call are joined.

    Raises:
        UserError: as :func:`preprocess`.
    """
    options = replace(options, input=pin_revisions(options.input))
    options = replace(options, input=pin_revisions(options.input))
    entry = cache_entry(options)
    complete = _Completion(entry, options.shard)
    if found := complete.read():
        return found
    inside = replace(options, output_prefix=str(entry / _DATASET), cache_folder=None, overwrite=True)
    try:
        entry.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache-folder {options.cache_folder}: {error.filename}: {error.strerror}") from error
    prefixes = _joined_parts(entry) if options.shard is None else []
    if not prefixes:
        prefixes = list(preprocess(inside).sidecars)
    complete.write(prefixes)
    return complete.read()


def find_in_cache(options: PreprocessOptions) -> dict[str, Sidecar]:
    """Return the sidecars of the dataset by prefix if the cache has it; empty otherwise."""
    return _Completion(cache_entry(options), options.shard).read()


def cache_entry(options: PreprocessOptions) -> Path:
    """Return the folder of the dataset that ``options`` describe, which may not exist yet."""
    check_options(options)
    if STDIN in options.input:
        raise UserError("--input -: standard input cannot be cached; write it to a file, or leave --cache-folder out")
    folder = Path(str(options.cache_folder))
    files = expand_inputs(options.input, options.inputs)
    facts = {
        "program": __version__,
        "files": [
            [file.source, file.format, file.compression, content]
            for file, content in zip(files, _contents(files, folder / _HASHES), strict=True)
        ],
        "tokenizer": _tokenizer_facts(options),
        "options": _options_facts(options),
    }
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=10).hexdigest()
    made = sorted((folder / "datasets").glob(f"*-{digest}"))  # perhaps when the text had another name
    return made[0] if made else folder / "datasets" / f"{_readable(options.input[0])}-{digest}"


class _Completion:
    """The record that a dataset of the cache, or a part of it, is complete: ``complete.json`` in its folder."""

    def __init__(self, entry: Path, shard: str | None) -> None:
        part = f"part-{shard.replace('/', '-of-')}-" if shard else ""
        self._path = entry / f"{part}{_COMPLETE}"

    def read(self) -> dict[str, Sidecar]:
        """Return the sidecars by prefix; empty if the dataset is not complete."""
        try:
            names = json.loads(read_regular(self._path))["datasets"]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._path}: cannot be read ({error}); remove its folder") from None
        found = {str(self._path.with_name(name)): Sidecar.read(self._path.with_name(name)) for name in names}
        return {prefix: sidecar for prefix, sidecar in found.items() if sidecar} if all(found.values()) else {}

    def write(self, prefixes: Sequence[str]) -> None:
        record = {"datasets": [os.path.basename(prefix) for prefix in prefixes]}
        replace_file(self._path, [json.dumps(record, indent=1).encode() + b"\n"])


def _joined_parts(entry: Path) -> list[str]:
    """Join the parts that several calls with ``--shard`` have made, if all are complete; return the prefixes."""
    for first in sorted(entry.glob(f"part-0-of-*-{_COMPLETE}")):
        count = int(first.name.split("-")[3])
        parts = [_Completion(entry, f"{index}/{count}").read() for index in range(count)]
        if all(parts):
            prefixes = []
            for names in zip(*parts, strict=True):
                prefix = re.sub(rf"\.shard-0-of-{count}(?=$|\.)", "", names[0])
                merge(MergeOptions(names, prefix, overwrite=True))
                prefixes.append(prefix)
            _remove_parts(entry, count)
            return prefixes
    return []


def _remove_parts(entry: Path, count: int) -> None:
    for path in entry.glob(f"part-*-of-{count}-{_COMPLETE}"):
        path.unlink()
    for name in glob.glob(f"{glob.escape(str(entry / _DATASET))}.shard-*-of-{count}.*"):
        os.unlink(name)


def _contents(files: Sequence[InputFile], hashes: Path) -> list[str]:
    """Return a hash of the content of every file; of a URL, what the server says of its version."""
    total = sum(file.size for file in files if not is_url(file.path))
    with ProgressReport("reading the input", total) as progress, ThreadPoolExecutor(usable_cores()) as pool:
        done = 0
        contents = []
        for file, content in zip(files, pool.map(lambda file: _content(file, hashes), files), strict=True):
            contents.append(content)
            done += 0 if is_url(file.path) else file.size
            progress.show(done)
    return contents


def _content(file: InputFile, hashes: Path) -> str:
    path = os.path.abspath(file.path)
    if is_url(file.path):
        # A version need not be a hash of the content. A commit changes the paths of files that it does not change.
        return f"{re.sub('@[0-9a-f]{40}/', '/', file.path)} {file.size} {file.version}"
    try:
        if file.size < _REMEMBERED_BYTES:
            return hash_file(path)
        facts = f"{path}\0{file.size}\0{file.version}\0{os.stat(path).st_ino}".encode("utf-8", "surrogateescape")
        known = hashes / hashlib.blake2b(facts, digest_size=16).hexdigest()
        if not known.exists():
            known.parent.mkdir(parents=True, exist_ok=True)
            replace_file(known, [record_file(path).xxh3_128.encode()])
        return known.read_text()
    except OSError as error:
        raise UserError(f"--input {file.path}: {error.strerror or error}") from error


def _tokenizer_facts(options: PreprocessOptions) -> dict[str, Any]:
    """Return hashes of the files that decide how text is encoded, and what the model's config says about it."""
    choice = choose_tokenizer(options)
    file = find_tokenizer_file(choice.name)
    names = [file.name, file.with_suffix(".json").name, *CONFIG_FILES, ADDED_TOKENS_FILE, *_TEMPLATES]
    paths = [file.with_name(name) for name in dict.fromkeys(names)]
    model: Mapping[str, Any] = choice.model_config
    return {
        "files": {path.name: hash_file(path) for path in paths if path.is_file()},
        "model": {key: model[key] for key in _MODEL_KEYS if key in model},
    }


def _options_facts(options: PreprocessOptions) -> dict[str, Any]:
    """Return the options that differ from their defaults and decide the contents; files by their hashes."""
    kept = {"append_eod", "eod_token", "bos"}
    given = asdict(options)
    facts = {
        field.name: given[field.name]
        for field in fields(options)
        if (field.name not in NOT_CONTENTS | _OF_A_RUN or field.name in kept) and given[field.name] != field.default
    }
    for name in ("held_out", "chat_template"):
        if name in facts:
            paths = facts[name] if isinstance(facts[name], list | tuple) else [facts[name]]
            facts[name] = [_hash_named(name, path) for path in paths]
    return facts


def _hash_named(option: str, path: str) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise UserError(f"--{option.replace('_', '-')} {path}: {error.strerror or error}") from error


def _readable(argument: str) -> str:
    """Return the last part of an ``--input`` argument that can be part of a file name."""
    parts = [part for part in re.split(r"[/\\]", argument) if part and not re.search(r"[*?\[]", part)]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", parts[-1] if parts else "text")[:40]
