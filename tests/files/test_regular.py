"""FIFOs, devices and links out of a folder in place of files: refused at once, in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from retemper.engine.config.files import read_config
from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.data.sidecar import Sidecar
from retemper.engine.errors import UserError
from retemper.engine.files.regular import IrregularFile, open_regular, read_regular
from retemper.engine.model.config_file import read_hf_config
from retemper.engine.weights.checkpoint.assets import HfAssets
from retemper.engine.weights.checkpoint.manifest import read_manifest
from retemper.engine.weights.dcp_metadata import read_metadata
from retemper.engine.weights.hugging_face.folder import HfWeights
from retemper.tools.preprocessing.chat.template_files import load_template
from retemper.tools.tokenizer.handle import load_tokenizer
from retemper.tools.vocabulary.token_list import read_list

SECONDS = 20


@pytest.fixture
def tokenizer_folder(tmp_path) -> Path:
    """A folder with the smallest tokenizer.json there is."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    (tmp_path / "saved").mkdir()
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "saved" / "tokenizer.json"))
    return tmp_path / "saved"


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a run's configuration": ("run.yaml", lambda p: read_config(p / "run.yaml")),
    "config.json": ("config.json", read_hf_config),
    "config.json of assets": ("config.json", lambda p: HfAssets.read(p).config or read_hf_config(p)),
    "a list of tokens": ("words", lambda p: read_list(str(p / "words"))),
    "a chat template": ("t.jinja", lambda p: load_template(p, {}, p / "t.jinja")),
    "tokenizer.json": ("tokenizer.json", lambda p: load_tokenizer(p / "tokenizer.json")),
    "an index": ("d.idx", lambda p: IndexedDataset(p / "d")),
    "a sidecar": ("d.json", lambda p: Sidecar.read(p / "d")),
    "a manifest": ("manifest.json", read_manifest),
    "DCP's metadata": (".metadata", read_metadata),
    "weights": ("model.safetensors", HfWeights),
}


def within_seconds(call: Callable[[], object]) -> BaseException | None:
    """What ``call`` raises; the test fails where it hangs."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive(), "it waits for the other end of the FIFO"
    return raised[0] if raised else None


@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_are_read(tmp_path, reader, kind):
    name, read = READERS[reader]
    path = tmp_path / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as server:
            os.chdir(tmp_path)  # the path of a socket may have 108 bytes
            server.bind(name)
    error = within_seconds(lambda: read(tmp_path))
    assert isinstance(error, UserError) and name in str(error) and len(error.problems) == 1


def test_regular_files_and_pipes_of_the_shell(tmp_path):
    (tmp_path / "a").write_bytes(b"text")
    assert read_regular(tmp_path / "a", 4) == b"text"
    with pytest.raises(IrregularFile, match="4 bytes, at most 3 are read"):
        read_regular(tmp_path / "a", 3)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "b")
    reading, writing = os.pipe()
    os.write(writing, b"word")
    os.close(writing)
    with pytest.raises(IrregularFile):
        read_regular(f"/dev/fd/{reading}")
    assert read_regular(f"/dev/fd/{reading}", pipe=True) == b"word"
    os.close(reading)


def test_links_that_lead_out_of_a_model_folder_are_not_copied(tmp_path, tokenizer_folder, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("{}")
    model = tmp_path / "model"
    shutil.copytree(tokenizer_folder, model)
    whole = HfAssets.read(model).files
    (model / "notes.md").symlink_to(secret)  # a name that is never copied
    (model / "merges.txt").symlink_to("tokenizer.json")
    assert HfAssets.read(model).files == {**whole, "merges.txt": whole["tokenizer.json"]}
    for name in ("vocab.json", "chat_template.jinja", "generation_config.json"):
        (model / name).symlink_to(os.path.relpath(secret, model))
        with pytest.raises(UserError, match=f"{name}: a link to {secret}, outside its folder"):
            HfAssets.read(model)
        (model / name).unlink()
    (tmp_path / "link").symlink_to(model)
    assert HfAssets.read(tmp_path / "link").files == HfAssets.read(model).files


def test_links_of_the_hubs_cache_are_followed(tmp_path, tokenizer_folder, monkeypatch):
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copy(tokenizer_folder / "tokenizer.json", repository / "blobs" / "abc")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    expected = {"tokenizer.json": (tokenizer_folder / "tokenizer.json").read_bytes()}
    assert HfAssets.read(snapshot).files == expected
    # What the Hub's client once made of local_dir: links into the cache.
    local = tmp_path / "local"
    local.mkdir()
    (local / "tokenizer.json").symlink_to(repository / "blobs" / "abc")
    with pytest.raises(UserError, match="outside its folder"):
        HfAssets.read(local)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert HfAssets.read(local).files == expected


ECHO = """
from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import run_command

def main():
    parser = CommandParser()
    parser.add_argument("word")
    print(parser.parse_args().word)

run_command(main)
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("argument", ["--help", "word"])
def test_a_full_standard_output_is_one_line(argument, unbuffered):
    # The folder of the tests has the module by which scripts find their own clone.
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(Path(__file__).parents[1])}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", ECHO, argument],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: standard output") and "No space left on device" in done.stderr
