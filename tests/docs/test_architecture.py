"""The diagrams in docs/architecture.md show the imports of the code, and no module imports itself through others."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("benchmarks", "checkpoint_convert", "engine", "kernels", "tools")
FOR_ALL = {"batch", "config", "errors", "files", "kernels", "schedule", "system"}
"""What every package of the engine may import, and the diagram omits."""
Edges = set[tuple[str, str]]


def test_the_first_diagram_shows_the_imports_between_the_packages() -> None:
    assert drawn(0) == edges(package, lambda name: True)


def test_the_second_diagram_shows_the_imports_inside_the_engine() -> None:
    found = edges(part_of_engine, lambda name: name.startswith("engine."))
    assert drawn(1) == {(here, there) for here, there in found if there not in FOR_ALL | {"recipe"}}
    assert {here for here, there in found if there == "recipe"} <= {"guards", "observe"}  # they act on a Run


def test_modules_import_without_cycles() -> None:
    TopologicalSorter(imports()).prepare()


def drawn(number: int) -> Edges:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    diagram = re.findall(r"```mermaid\n(.*?)```", text, re.DOTALL)[number]
    return set(re.findall(r"^  (\w+) (?:-->|-\.->) (\w+)", diagram, re.MULTILINE))


def package(name: str) -> str:
    return "tokenizer_tools" if name.startswith("tools.tokenizer.") else name.split(".")[0]


def part_of_engine(name: str) -> str:
    part = name.split(".")[1]
    return part if (ROOT / "engine" / part).is_dir() or part in FOR_ALL else "recipe"


def edges(part: Callable[[str], str], included: Callable[[str], bool]) -> Edges:
    found = {
        (part(here), part(there))
        for here, all_ in imports().items()
        for there in all_
        if included(here) and included(there)
    }
    return {(here, there) for here, there in found if here != there}


@cache
def imports() -> dict[str, set[str]]:
    paths = {
        dotted(path): path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py") if not path.is_symlink()
    }
    return {name: set(imported(name, path, paths)) - {name} for name, path in paths.items()}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of ours that a file imports, also inside of functions."""
    folder = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            parents = folder.split(".")[: len(folder.split(".")) - node.level + 1]
            base = ".".join([*parents, *([node.module] if node.module else [])])
        else:
            base = (node.module or "").removeprefix("retemper.")
        for alias in node.names:
            yield from [target for target in (f"{base}.{alias.name}", base) if target in known][:1]
