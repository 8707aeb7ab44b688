"""Build the two corpora of the demo from text in every Python installation.

- *general*: prose. The language reference's topics (``pydoc_data``) and the docstrings of the standard library, of
  numpy and of ``torch.nn`` and ``torch.optim``. The standard library alone has under 2 MB of prose, so two
  dependencies add to it.
- *domain*: source code. The standard library's modules without their docstrings.

So the corpora share no text: the domain corpus does not contain the general validation text. Files are parsed, never
imported. The same Python and dependencies give the same bytes: order and split come from SHA-256, not from the file
system or from Python's salted ``hash()``.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

MAX_CORPUS_BYTES = 4_000_000
"""Maximum size of a corpus, training and validation text together."""

VALIDATION_ONE_IN = 20
"""One document in this many, chosen by its hash, is held out for validation (5 %)."""

MIN_DOCUMENT_CHARACTERS = 400
"""Shorter documents, such as an empty ``__init__.py`` or a one-line docstring, are left out."""

MAX_CODE_CHARACTERS = 64_000
"""Longer modules are left out of the domain corpus: one could be a third of the validation text."""

MIN_REPEATED_CHARACTERS = 60
"""Paragraphs of at least this length are kept once; shorter ones ("Examples", "See Also") may repeat."""

SKIPPED_FOLDERS = frozenset(
    (
        *("encodings", "pydoc_data", "test", "tests"),
        *("dist-packages", "site-packages"),
        *("distutils", "ensurepip", "idlelib", "lib2to3"),
    )
)
"""Generated tables, tests, other packages, and parts that some distributions of Python lack."""

SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")
"""Modules that differ between two machines with the same Python."""

DEPENDENCY_FOLDERS = ("numpy", "torch/nn", "torch/optim")
"""Packages outside the standard library whose docstrings are in the general corpus."""


@dataclass(frozen=True)
class CorpusPart:
    """One JSONL file, each line ``{"text": ..., "source": ...}``."""

    path: Path
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of text, without JSON."""


@dataclass(frozen=True)
class Module:
    """A parsed Python source file."""

    source: str
    text: str
    tree: ast.Module


@dataclass
class _Collector:
    """Collects different documents up to a number of UTF-8 bytes."""

    max_bytes: int
    documents: dict[str, str] = field(default_factory=dict)
    """Source of each text."""
    num_bytes: int = 0
    full: bool = False

    def add(self, text: str, source: str) -> None:
        """Keep ``text`` unless it is too short; the first text over the limit ends the collection."""
        size = len(text.encode("utf-8", "replace"))
        self.full = self.full or self.num_bytes + size > self.max_bytes
        if len(text) >= MIN_DOCUMENT_CHARACTERS and not self.full:
            self.documents[text] = source
            self.num_bytes += size


def build_corpora(folder: Path, max_bytes: int = MAX_CORPUS_BYTES) -> dict[str, CorpusPart]:
    """Write ``{general,domain}.{train,validation}.jsonl`` into ``folder``; return the parts by name.

    ``max_bytes`` limits the text of each corpus. Existing files are replaced. A source is ``package/path``, without any
    path of this machine.
    """
    general, domain = _Collector(max_bytes), _Collector(max_bytes)
    prose = ProseFilter()
    # The longest first: if a topic contains another, the longer one stays whole.
    for name, text in sorted(language_topics().items(), key=lambda topic: (-len(topic[1]), topic[0])):
        general.add(prose.unseen(text), f"pydoc_data/topics/{name}")

    folders = {"stdlib": Path(sysconfig.get_path("stdlib"))} | {
        name: _package_folder(name) for name in DEPENDENCY_FOLDERS
    }
    for name, root in folders.items():
        for module in parse_modules(root, name):
            if general.full and (domain.full or name != "stdlib"):
                break
            general.add(prose.unseen("\n\n".join(docstrings(module.tree))), module.source)
            if name == "stdlib" and len(module.text) <= MAX_CODE_CHARACTERS:
                domain.add(strip_docstrings(module), module.source)

    folder.mkdir(parents=True, exist_ok=True)
    return {
        f"{name}.{side}": _write_split(
            folder / f"{name}.{side}.jsonl",
            {
                text: source
                for text, source in corpus.documents.items()
                if is_validation(text) == (side == "validation")
            },
        )
        for name, corpus in (("general", general), ("domain", domain))
        for side in ("train", "validation")
    }


def language_topics() -> dict[str, str]:
    """Return the sections of the Python language reference that ``help()`` shows, by name."""
    from pydoc_data.topics import topics  # only a dictionary of strings

    return dict(topics)


def parse_modules(root: Path, name: str) -> Iterator[Module]:
    """Parse the ``.py`` files below ``root``, as ``name/path``, in the order of the hash of that name.

    With hash order, a limited corpus is a sample of the whole tree. Files that are not UTF-8 or do not parse are
    skipped.
    """
    files = {f"{name}/{path.relative_to(root).as_posix()}": path for path in _python_files(root)}
    for source in sorted(files, key=_digest):
        try:
            text = files[source].read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escape sequences in other people's strings
                tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        yield Module(source, text, tree)


def docstrings(tree: ast.Module) -> list[str]:
    """Return the docstrings of a module, its classes and its functions in order, without indentation."""
    return [ast.get_docstring(owner) or "" for owner in _documented(tree)]


def strip_docstrings(module: Module) -> str:
    """Return the module's source without docstrings: valid code, all other characters unchanged.

    The lines of a docstring are removed. A docstring that is the whole body, or shares a line with code, becomes
    ``pass``.
    """
    # ``ast`` counts lines by "\n" (a form feed is no line end, unlike in str.splitlines) and columns in UTF-8 bytes.
    lines = [line.encode("utf-8") for line in module.text.split("\n")]
    for owner in reversed(list(_documented(module.tree))):  # from the end, so that earlier positions stay valid
        node = owner.body[0]
        assert node.end_lineno is not None and node.end_col_offset is not None
        first, last = node.lineno - 1, node.end_lineno - 1
        before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        alone = not before.strip() and not after.strip()
        lines[first : last + 1] = [] if alone and len(owner.body) > 1 else [before + b"pass" + after]
    return b"\n".join(lines).decode("utf-8").lstrip("\n")


class ProseFilter:
    """Selects the paragraphs of a text that are prose and have not occurred before.

    Topics of the reference contain each other (``compound`` contains ``if`` and ``for``), and docstrings are copied
    between classes. A repeated paragraph could be in both training and validation text.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def unseen(self, text: str) -> str:
        """Return the paragraphs of ``text`` that are not doctest examples and, if long, are new."""
        kept = []
        for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
            words = " ".join(paragraph.split())
            if not words or words.startswith(">>>") or words in self._seen:
                continue
            if len(words) >= MIN_REPEATED_CHARACTERS:
                self._seen.add(words)
            kept.append(paragraph)
        return "\n\n".join(kept)


def is_validation(text: str) -> bool:
    """Return whether a document is held out, which depends only on its text."""
    return int(_digest(text), 16) % VALIDATION_ONE_IN == 0


_Owner = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(tree: ast.Module) -> Iterator[_Owner]:
    """Yield the nodes below ``tree`` that have a docstring, in source order.

    Visits only statements, which is several times faster than :func:`ast.walk`: expressions contain no docstrings.
    """
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, _Owner) and ast.get_docstring(node, clean=False):
            yield node
        blocks = [getattr(node, name, []) for name in ("body", "handlers", "orelse", "finalbody", "cases")]
        stack.extend(reversed([child for block in blocks for child in block]))


def _python_files(root: Path) -> Iterable[Path]:
    for path in root.rglob("*.py"):
        skipped = SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
        if not skipped and not path.name.startswith(SKIPPED_PREFIXES):
            yield path


def _package_folder(name: str) -> Path:
    """Return the folder of a part of an installed package, such as ``torch/nn``, without importing the package."""
    package, _, part = name.partition("/")
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} is a dependency of this project"
    return Path(spec.submodule_search_locations[0], part)


def _write_split(path: Path, documents: dict[str, str]) -> CorpusPart:
    # A docstring may contain an escaped lone surrogate, which UTF-8 cannot encode: it becomes "?".
    with path.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
        for text, source in documents.items():
            file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
    return CorpusPart(path, len(documents), sum(len(text.encode("utf-8", "replace")) for text in documents))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
