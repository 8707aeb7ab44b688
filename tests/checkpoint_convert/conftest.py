"""Fixtures of these tests."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import ModuleType

import pytest
import torch
from forked import Program, fork_server
from tiny_models import FAMILIES, SHAPE, TOKENIZER, Command

from retemper.engine.errors import run_command


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face folder of each family; not to be changed."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, family in FAMILIES.items():
        model = family.model(family.config(**SHAPE, **family.settings)).to(family.dtype)
        model.save_pretrained(root / name, max_shard_size=family.shard_size)
        # Spaced unlike anything that our code writes, so that only a copy is the same.
        config = root / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()), indent=5))
        for file, content in TOKENIZER.items():
            (root / name / file).write_bytes(content)
    return {name: root / name for name in FAMILIES}


@pytest.fixture
def copy_model(saved_models: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Gives a copy of a family's folder to spoil."""
    return lambda name: Path(shutil.copytree(saved_models[name], tmp_path / name))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Command]]:
    """Runs a command's module with arguments, as its file would."""

    def run_module(module: ModuleType, *arguments: object) -> Command:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_command(module.main)
        out, err = capfd.readouterr()
        return Command(int(exit_.value.code or 0), out, err)

    before = signal.getsignal(signal.SIGTERM)
    yield run_module
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="package")
def server() -> Iterator[ForkServerContext]:
    """Has imported the converters."""
    names = ("conversion.hf_to_dcp", "conversion.dcp_to_hf", "hugging_face.model", "weights.parts")
    with fork_server(*(f"retemper.engine.{name}" for name in names)) as context:
        yield context


@pytest.fixture
def start(server: ForkServerContext) -> Iterator[Callable[..., Program]]:
    """Starts a program with arguments in a process of its own."""
    started: list[Program] = []
    with tempfile.TemporaryDirectory() as logs:

        def begin(text: str, *arguments: object, folder: Path | None = None) -> Program:
            log = Path(logs) / f"{len(started)}.log"
            started.append(Program(server, text, log, *arguments, folder=folder))
            return started[-1]

        yield begin
        for program in started:
            program.close()
