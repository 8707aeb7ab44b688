"""Downloads from a Hub on this machine: what arrives, where, and a line for all that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_hub import COMMIT, TOKEN, FakeHub
from huggingface_hub import constants
from tiny_run import ARCHITECTURE

from retemper.engine.errors import UserError
from retemper.engine.files import disk_space
from retemper.tools import download
from retemper.tools.generation.model_loading import find_model
from retemper.tools.tokenizer.finding import find_tokenizer_file

NAME = "org/tiny"


@pytest.fixture
def hub(monkeypatch, tmp_path, tiny_tokenizer):
    """A Hub with a tiny model."""
    files = {path.name: path.read_bytes() for path in tiny_tokenizer.iterdir()}
    files |= {"config.json": json.dumps(ARCHITECTURE).encode(), "model.safetensors": b"weights" * 100}
    files |= {"pytorch_model.bin": b"pickle", "original/model.safetensors": b"a copy", "README.md": b"about"}
    monkeypatch.chdir(tmp_path)
    with FakeHub({NAME: files}) as server:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def run(capsys, *arguments: str) -> Path:
    """The folder that the command prints."""
    download.main([NAME, *arguments])
    [line] = capsys.readouterr().out.splitlines()
    return Path(line)


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        download.main([*arguments])
    [line] = error.value.args
    assert "\n" not in line and TOKEN not in line
    return line


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def wanted(hub: FakeHub) -> dict[str, bytes]:
    left_out = {"pytorch_model.bin", "original/model.safetensors", "README.md"}
    return {name: content for name, content in hub.repositories[NAME].items() if name not in left_out}


def test_a_model_arrives_in_the_cache_once(hub, capsys):
    folder = run(capsys)
    assert folder.name == COMMIT and contents(folder) == wanted(hub)
    before = len([request for request in hub.requests if request.method == "GET" and "/resolve/" in request.path])
    assert before == len(wanted(hub))
    assert run(capsys) == folder
    assert (
        len([request for request in hub.requests if request.method == "GET" and "/resolve/" in request.path]) == before
    )
    # Other commands find it by its name.
    assert find_tokenizer_file(NAME).parent == folder


def test_a_folder_of_its_own_and_a_revision(hub, capsys, tmp_path):
    folder = run(capsys, "--output", str(tmp_path / "here"), "--revision", COMMIT)
    assert folder == tmp_path / "here" and contents(folder) == wanted(hub)
    assert run(capsys, "--output", str(tmp_path / "here")) == folder  # goes on where it was interrupted
    assert "no such revision" in refusal(NAME, "--revision", "v9")


def test_the_tokenizer_without_weights(hub, capsys, tmp_path):
    folder = run(capsys, "--tokenizer-only", "--output", str(tmp_path / "tokenizer"))
    found = contents(folder)
    assert "model.safetensors" not in found and found["tokenizer.json"] == hub.repositories[NAME]["tokenizer.json"]
    for name in [name for name in hub.repositories[NAME] if "token" in name]:
        del hub.repositories[NAME][name]
    assert refusal(NAME, "--tokenizer-only", "--output", str(tmp_path / "none")).startswith(f"download {NAME}: ")


def test_what_the_hub_does_not_give(hub, monkeypatch):
    assert "no such model on the Hub" in refusal("org/none")
    hub.gated.add(NAME)
    assert "accept a licence" in refusal(NAME)
    hub.repositories["org/odd"] = {"config.json": b'{"model_type": "no_such_type"}', "model.safetensors": b"w"}
    assert "no_such_type" in refusal("org/odd")
    assert not [request for request in hub.requests if request.path.endswith(".safetensors")]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "the Hub cannot be reached" in refusal("org/other")


def test_a_cached_model_needs_no_network(hub, capsys, monkeypatch):
    folder = run(capsys)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert run(capsys) == folder


def test_too_little_space_is_found_before_the_weights_are_sent(hub, monkeypatch):
    monkeypatch.setattr(disk_space, "free_bytes", lambda folder: 100)
    line = refusal(NAME)
    assert "no space left" in line and "--output" in line
    assert not [request for request in hub.requests if request.method == "GET" and "safetensors" in request.path]


def test_names_and_folders_that_cannot_be_used(hub, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "holds other files" in refusal(NAME, "--output", str(tmp_path / "full"))
    assert "is a file" in refusal(NAME, "--output", str(tmp_path / "full" / "file"))
    assert "is here already" in refusal(str(tmp_path / "full"))
    assert "no such folder" in refusal("../somewhere")
    assert not hub.requests


def test_other_commands_take_a_model_on_the_hub_by_its_name(hub):
    found = find_model(NAME)
    assert not found.is_checkpoint and contents(found.path) == wanted(hub)
