"""Processes that see only the Python packages of the GPU machine (machine_packages.txt in benchmarks/gpu_stages), what
these require, and the carried ones (wheels.json). Nothing else that is installed here can be imported."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement

from retemper.benchmarks.gpu_stages.packages import carried, machine_packages, normalized

HIDE = """
import importlib.machinery, sys
MODULES, DISTRIBUTIONS = {modules!r}, {distributions!r}

class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if path is None and fullname in MODULES:  # setuptools has copies of some packages in a folder of its own
            path = [entry for entry in sys.path if not entry.endswith("site-packages")]
        spec = super().find_spec(fullname, path, target)
        # Ours is found by the module next to a script, not where it is installed.
        installed = fullname == "retemper" and spec and not spec.origin.endswith("retemper.py")
        return None if path is None and installed else spec

    @classmethod
    def find_distributions(cls, *arguments, **options):
        for found in super().find_distributions(*arguments, **options):
            if found.metadata["Name"].lower() not in DISTRIBUTIONS:
                yield found

finders = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
sys.meta_path = [Hiding if finder is importlib.machinery.PathFinder else finder for finder in finders]
"""


def visible() -> set[str]:
    """The distributions that are visible, by their normalized names."""
    return required(machine_packages()) | {normalized(wheel.name) for wheel in carried()}


def required(names: Iterable[str]) -> set[str]:
    """Distributions with all that they require without extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        requirements = [one for one in map(Requirement, lines) if not one.marker or one.marker.evaluate({"extra": ""})]
        waiting += [normalized(one.name) for one in requirements]
    return found


def environment(folder: Path, hidden: Iterable[str] = (), more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of such processes, whose start-up file is written to ``folder``.

    ``hidden``: further distributions that are not visible.
    """
    seen = visible() - set(hidden)
    modules, distributions = set(), set()
    for module, names in packages_distributions().items():
        hides = {name for name in names if normalized(name) not in seen}
        distributions |= {name.lower() for name in hides}
        if len(hides) == len(set(names)):
            modules.add(module)
    folder.mkdir(parents=True, exist_ok=True)
    text = HIDE.format(modules=sorted(modules - {"retemper"}), distributions=sorted(distributions))
    (folder / "sitecustomize.py").write_text(text, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", **(more or {})}
