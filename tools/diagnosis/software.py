"""Check Python, PyTorch and the other packages against what Retemper's metadata require."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from .finding import Finding, note, ok, problem
from .gpus import driver_version

GROUP = "Software"
_DISTRIBUTION = "retemper"
_TESTED_PYTHON = "3.10 to 3.13"
_PURPOSES = {
    "gpu": "faster attention on NVIDIA GPUs",
    "fp8": "training.float8",
    "formats": "parquet, xlsx, pdf and html as input",
    "chat": "chat templates",
    "dedup": "near-duplicate removal",
    "clean": "repair of text and language filters",
    "tiktoken": "tiktoken tokenizers",
    "fast": "faster tokenization",
    "hub": "datasets of the Hub (hf://)",
    "cloud": "s3:// and gs:// as input",
    "trackers": "wandb, mlflow and trackio",
    "swanlab": "the tracker SwanLab",
    "comet": "the tracker Comet",
    "eval": "evaluation with lm-eval",
}
"""What the extras of setup.py are for."""
_NOT_REPORTED = frozenset({"all", "benchmarks", "demo", "dev", "docs", "wandb", "mlflow", "trackio"})
"""Extras that repeat others, or are for developers."""
_GPU_EXTRAS = ("gpu", "fp8")
"""Reported only on a machine with an NVIDIA driver."""


def check_software() -> list[Finding]:
    """Return findings on Python, required packages and optional packages."""
    try:
        metadata = distribution(_DISTRIBUTION)
    except PackageNotFoundError:
        remedy = f"install it: {install_command(['.'])} in its folder"
        return [_python(">=3.10"), note(GROUP, "packages", "retemper runs from a clone that is not installed", remedy)]
    requirements = [Requirement(text) for text in metadata.requires or []]
    return [
        _python(metadata.metadata["Requires-Python"] or ""),
        *_required(requirements),
        *_extras(requirements, metadata.metadata.get_all("Provides-Extra") or []),
    ]


def install_command(requirements: Iterable[str]) -> str:
    """Return the command that installs packages for the running interpreter."""
    return shlex.join([sys.executable, "-m", "pip", "install", *requirements])


def _python(required: str, running: str | None = None) -> Finding:
    running = running or platform.python_version()
    if not SpecifierSet(required).contains(running, prereleases=True):
        return problem(GROUP, "python", f"{running}, but {required} is needed", "install another Python")
    if sys.version_info >= (3, 14):
        return note(GROUP, "python", f"{running}; tested with {_TESTED_PYTHON}")
    return ok(GROUP, "python", f"{running} ({sys.executable})")


def _required(requirements: Iterable[Requirement]) -> list[Finding]:
    """Return a finding for PyTorch and transformers each, and one for each other package that is missing or too old."""
    findings, others = [], 0
    for requirement in requirements:
        if not _applies(requirement, ""):
            continue
        lack = lack_of(requirement)
        if lack is not None:
            findings.append(problem(GROUP, requirement.name, lack, install_command([str(_bare(requirement))])))
        elif requirement.name in ("torch", "transformers"):
            findings.append(ok(GROUP, requirement.name, version(requirement.name)))
        else:
            others += 1
    return [*findings, ok(GROUP, "other packages", f"{others} that are required are installed")]


def _extras(requirements: Sequence[Requirement], extras: Iterable[str]) -> list[Finding]:
    """Return a finding for each extra: a note with the command that installs what is missing."""
    findings = []
    for extra in extras:
        if extra in _NOT_REPORTED or (extra in _GPU_EXTRAS and driver_version() is None):
            continue
        purpose = f" (for {_PURPOSES[extra]})" if extra in _PURPOSES else ""
        members = [each for each in requirements if not _applies(each, "") and _applies(each, extra)]
        missing = {str(_bare(each)): lack for each in members if (lack := lack_of(each)) is not None}
        if missing:
            lacks = ", ".join(f"{Requirement(name).name} {lack}" for name, lack in missing.items())
            findings.append(note(GROUP, f"extra {extra}", f"{lacks}{purpose}", install_command(missing)))
        elif members:
            findings.append(ok(GROUP, f"extra {extra}", f"installed{purpose}"))
    return findings


def lack_of(requirement: Requirement, installed: Mapping[str, str] | None = None) -> str | None:
    """Return what is wrong with the installed version of a package; None if it is as required."""
    try:
        found = version(requirement.name) if installed is None else installed[requirement.name]
    except (PackageNotFoundError, KeyError):
        return "is not installed"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{found} is installed, but {requirement.specifier} is needed"
    return None


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _bare(requirement: Requirement) -> Requirement:
    """Return the requirement without its marker, for pip's command line."""
    bare = Requirement(str(requirement))
    bare.marker = None
    return bare
