"""A conversion that was ended goes on from what it had finished, and from nothing else."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from converting import SINGLE, Run, Start, convert_back, convert_there
from forked import Program
from tiny_models import assert_refused, read_folder

from retemper.checkpoint_convert import dcp_to_hf, hf_to_dcp
from retemper.engine.errors import UserError
from retemper.engine.weights import partial_folder
from retemper.engine.weights.checkpoint.manifest import read_manifest
from retemper.engine.weights.conversion import logits
from retemper.engine.weights.parts import TensorParts
from retemper.engine.weights.tensor_source import ReadRows

Source = type[TensorParts]
# A process of its own: the real command, in which reading the ninth tensor ends it.
KILLED = """
import os, signal, sys, time
from retemper.checkpoint_convert import {module}
from retemper.engine.errors import run_command
from retemper.engine.weights.parts import TensorParts

calls, rows = [], {source}.rows
def counted(self, name):
    calls.append(name)
    if len(calls) > 8:
        {end}
    return rows(self, name)
{source}.rows = counted
run_command({module}.main)
"""


def interrupt_after(
    monkeypatch: pytest.MonkeyPatch, source: Source, count: int, error: BaseException | type[BaseException] | None
) -> list[str]:
    """Make reading of tensor number ``count`` raise ``error``; gives the list of names that are read from now on."""
    read: list[str] = []
    rows: Callable[..., AbstractContextManager[ReadRows]] = source.rows

    def counted(self: object, name: str) -> AbstractContextManager[ReadRows]:
        if error is not None and len(read) >= count:
            raise error
        read.append(name)
        return rows(self, name)

    monkeypatch.setattr(source, "rows", counted)
    return read


def command_for(direction: str, saved_models: dict[str, Path], tmp_path: Path) -> tuple[list[object], Path]:
    """Arguments of a conversion of the llama model into many files, and its output."""
    if direction == "there":
        return ["--hf", saved_models["llama"], "--output", tmp_path / "out", "--workers", 1], tmp_path / "out"
    if not (tmp_path / "input" / "checkpoint").exists():
        convert_there(saved_models["llama"], tmp_path / "input" / "checkpoint")
    source = ["--checkpoint", tmp_path / "input" / "checkpoint", "--max-shard-size", "4KB"]
    return [*source, "--output", tmp_path / "out", "--workers", 1], tmp_path / "out"


MODULES = {"there": (hf_to_dcp, TensorParts), "back": (dcp_to_hf, TensorParts)}


def hidden(tmp_path: Path) -> list[Path]:
    return sorted(path for path in tmp_path.iterdir() if path.name.startswith(".out."))


def assert_whole(direction: str, output: Path, saved_models: dict[str, Path], tmp_path: Path) -> None:
    if direction == "there":
        read_manifest(output)
        convert_back(output, tmp_path / "whole")
        output = tmp_path / "whole"
    assert read_folder(output) == read_folder(saved_models["llama"])


@pytest.mark.parametrize("direction", MODULES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
def test_the_same_command_goes_on(
    saved_models: dict[str, Path],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    direction: str,
    error: type[BaseException] | BaseException,
) -> None:
    arguments, output = command_for(direction, saved_models, tmp_path)
    module, source = MODULES[direction]
    with monkeypatch.context() as patch:
        before = interrupt_after(patch, source, 9, error)
        result = run(module, *arguments)
    [folder] = hidden(tmp_path)
    assert result.status == (130 if error is KeyboardInterrupt else 1) and not output.exists()
    if error is KeyboardInterrupt:
        assert result.stderr == "interrupted\n" and f"finished files are kept in {folder}" in result.stdout
    else:
        assert_refused(result, "cannot be written: No space left on device", f"finished files are kept in {folder}")
    done = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    finished = {name for entry in done for name in entry["tensors"]}
    assert finished and finished <= set(before)

    after = interrupt_after(monkeypatch, source, 0, None)
    result = run(module, *arguments)
    assert result.status == 0, result.stderr
    assert f"continuing from {len(done)} finished files in {folder}" in result.stdout
    assert not finished & set(after), "what was finished is not read again"
    monkeypatch.undo()
    assert hidden(tmp_path) == []
    record = json.loads((output / "conversion.json").read_text())["tensors"]
    assert set(after) | finished == record.keys()
    assert_whole(direction, output, saved_models, tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
def test_nothing_is_kept_where_nothing_was_finished(
    saved_models: dict[str, Path],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException] | BaseException,
) -> None:
    interrupt_after(monkeypatch, TensorParts, 0, error)
    result = run(hf_to_dcp, "--hf", saved_models["llama"], "--output", tmp_path / "out")
    assert result.status == (130 if error is KeyboardInterrupt else 1)
    assert "interrupted" in result.stderr or "No space left on device" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("direction", MODULES)
def test_after_a_kill_damaged_and_unfinished_files_are_made_anew(
    saved_models: dict[str, Path],
    tmp_path: Path,
    run: Run,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    direction: str,
) -> None:
    arguments, output = command_for(direction, saved_models, tmp_path)
    module, source = MODULES[direction]
    end = "os.kill(os.getpid(), signal.SIGKILL)"
    script = KILLED.format(module=module.__name__.rsplit(".", 1)[1], source=source.__name__, end=end)
    killed = start(script, *arguments)
    assert killed.wait() == -signal.SIGKILL, killed.err
    [folder] = hidden(tmp_path)
    journal = folder / "journal.jsonl"
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len(entries) >= 3 and not output.exists()
    # One of the files is damaged since, one is gone, and the journal ends in the middle of a line.
    damaged, gone = (folder / "content" / entry["name"] for entry in entries[:2])
    content = bytearray(damaged.read_bytes())
    content[-1000] ^= 1
    damaged.write_bytes(content)
    gone.unlink()
    with open(journal, "ab") as file:
        file.write(b'\xff\n{"name": "x", "rec')

    read = interrupt_after(monkeypatch, source, 0, None)
    result = run(module, *arguments)
    assert result.status == 0, result.stderr
    kept = {name for entry in entries[2:] for name in entry["tensors"]}
    again = {name for entry in entries[:2] for name in entry["tensors"]}
    assert not kept & set(read) and again <= set(read)
    monkeypatch.undo()
    assert_whole(direction, output, saved_models, tmp_path)


def until_something_is_finished(program: Program, tmp_path: Path) -> None:
    while program.process.is_alive() and not any((folder / "journal.jsonl").is_file() for folder in hidden(tmp_path)):
        time.sleep(0.01)


def test_sigterm_keeps_what_is_finished(saved_models: dict[str, Path], tmp_path: Path, start: Start) -> None:
    script = KILLED.format(module="hf_to_dcp", source="TensorParts", end="time.sleep(0.2)")
    arguments, output = command_for("there", saved_models, tmp_path)
    program = start(script, *arguments)
    until_something_is_finished(program, tmp_path)
    program.process.terminate()
    assert (program.wait(), program.err) == (130, "interrupted\n")
    assert "the same command continues from them" in program.out
    assert not output.exists() and len(hidden(tmp_path)) == 1


def test_another_command_takes_nothing(
    saved_models: dict[str, Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, output = command_for("there", saved_models, tmp_path)
    with monkeypatch.context() as patch:
        interrupt_after(patch, TensorParts, 9, KeyboardInterrupt)
        run(hf_to_dcp, *arguments)
    [left] = hidden(tmp_path)
    read = interrupt_after(monkeypatch, TensorParts, 0, None)
    result = run(hf_to_dcp, *arguments, "--dtype", "float32")
    assert result.status == 0 and f"{left} is the unfinished output of another command" in result.stdout
    assert len(read) == len(json.loads((output / "conversion.json").read_text())["tensors"])
    assert hidden(tmp_path) == [left]


def test_another_input_takes_nothing(
    copy_model: Callable[[str], Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_model("qwen3")
    arguments = ["--hf", folder, "--output", tmp_path / "out", "--workers", 1]
    with monkeypatch.context() as patch:
        interrupt_after(patch, TensorParts, 9, KeyboardInterrupt)
        run(hf_to_dcp, *arguments)
    assert len(hidden(tmp_path)) == 1
    # Of the same size, and changed: fetched again, or trained further.
    weights = bytearray((folder / SINGLE).read_bytes())
    weights[-1] ^= 1
    (folder / SINGLE).write_bytes(weights)
    result = run(hf_to_dcp, *arguments)
    assert result.status == 0 and "continuing from" not in result.stdout
    convert_back(tmp_path / "out", tmp_path / "back")
    assert read_folder(tmp_path / "back") == read_folder(folder)


def interrupted(folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> tuple[list[object], Path]:
    """Arguments of a conversion that Ctrl-C has ended after some files, and the folder that it has left."""
    arguments = ["--hf", folder, "--output", tmp_path / "out", "--workers", 1]
    with monkeypatch.context() as patch:
        interrupt_after(patch, TensorParts, 9, KeyboardInterrupt)
        assert run(hf_to_dcp, *arguments).status == 130
    [left] = hidden(tmp_path)
    return arguments, left


def test_only_what_the_journal_names_is_taken_up(
    copy_model: Callable[[str], Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, left = interrupted(copy_model("qwen3"), tmp_path, run, monkeypatch)
    (left / "content" / "hf" / "sub").mkdir(parents=True)
    for stale in ("hf/chat_template.jinja", "hf/sub/x", "tensor-00099.safetensors", "tensors.json"):
        (left / "content" / stale).write_text("of the try before")
    assert run(hf_to_dcp, *arguments).status == 0
    assert not (tmp_path / "out" / "hf" / "sub").exists()
    manifest = read_manifest(tmp_path / "out")
    assert "hf/config.json" in manifest.files
    assert not {"hf/chat_template.jinja", "hf/sub/x", "tensor-00099.safetensors"} & manifest.files.keys()


def test_a_file_of_other_tensors_is_made_anew(
    copy_model: Callable[[str], Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_model("qwen3")
    arguments, left = interrupted(folder, tmp_path, run, monkeypatch)
    journal = left / "journal.jsonl"
    first, *others = journal.read_text().splitlines()
    entry = json.loads(first)
    entry["tensors"] = {f"not {name}": hashes for name, hashes in entry["tensors"].items()}
    journal.write_text("\n".join([json.dumps(entry), *others]) + "\n")
    assert run(hf_to_dcp, *arguments).status == 0
    convert_back(tmp_path / "out", tmp_path / "back")
    assert read_folder(tmp_path / "back") == read_folder(folder)


@pytest.mark.parametrize("failing", ["source", "verify"])
def test_what_is_finished_outlives_an_error(
    copy_model: Callable[[str], Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """A file server that does not answer for a moment, or transformers that cannot load the folder."""
    arguments, left = interrupted(copy_model("qwen3"), tmp_path, run, monkeypatch)
    error = UserError("model.safetensors: cannot be read: Stale file handle")
    with monkeypatch.context() as patch:
        if failing == "source":
            interrupt_after(patch, TensorParts, 2, error)
            result = run(hf_to_dcp, *arguments)
        else:
            patch.setattr(logits, "_theirs", raising(error))
            result = run(hf_to_dcp, *arguments, "--verify")
    assert_refused(result, "Stale file handle; ", f"finished files are kept in {left}: the same command continues")
    read = interrupt_after(monkeypatch, TensorParts, 0, None)
    result = run(hf_to_dcp, *arguments)
    assert result.status == 0 and "continuing from" in result.stdout and hidden(tmp_path) == []
    assert len(read) == (0 if failing == "verify" else len(read_folder(tmp_path / "qwen3")) - 11)


def raising(error: BaseException) -> Callable[..., object]:
    def function(*arguments: object) -> object:
        raise error

    return function


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")], ids=["ctrl-c", "EIO"])
def test_an_error_after_the_rename_leaves_the_output(
    saved_models: dict[str, Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    arguments, output = command_for("there", saved_models, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(partial_folder, "sync_path", raising(error))
        result = run(hf_to_dcp, *arguments)
    assert result.status != 0 and "kept" not in result.stdout + result.stderr and hidden(tmp_path) == []
    if isinstance(error, OSError):
        assert_refused(result, "is complete, but its name could not be flushed to the disk: Input/output error")
    assert_whole("there", output, saved_models, tmp_path)


def test_bad_input_found_late_leaves_nothing(
    copy_model: Callable[[str], Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_model("qwen3")
    rows = TensorParts.rows

    def cut(self: TensorParts, name: str) -> AbstractContextManager[ReadRows]:
        os.truncate(folder / SINGLE, 3000)
        return rows(self, name)

    monkeypatch.setattr(TensorParts, "rows", cut)
    assert_refused(run(hf_to_dcp, "--hf", folder, "--output", tmp_path / "out"), "model.safetensors: ends before byte")
    assert [path.name for path in tmp_path.iterdir()] == ["qwen3"]


def test_one_at_a_time(saved_models: dict[str, Path], tmp_path: Path, run: Run, start: Start) -> None:
    go_on = tmp_path / "go on"
    wait = f"while not os.path.exists({str(go_on)!r}): time.sleep(0.01)"
    script = KILLED.format(module="hf_to_dcp", source="TensorParts", end=wait)
    arguments, output = command_for("there", saved_models, tmp_path)
    program = start(script, *arguments)
    until_something_is_finished(program, tmp_path)
    assert_refused(run(hf_to_dcp, *arguments), f"--output {output}", "is writing it with the same command")
    assert len(hidden(tmp_path)) == 1
    go_on.touch()
    assert program.wait() == 0, program.err
    assert_whole("there", output, saved_models, tmp_path)
