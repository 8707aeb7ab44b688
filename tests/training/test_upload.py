"""Uploads to a Hub on this machine: what arrives, who may see the token, and a line for all that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub
from huggingface_hub import constants

from retemper.engine.errors import UserError
from retemper.engine.hugging_face.upload import open_repository, upload_folder

NAME, KEY = "somebody/tiny", "checkpoint.push_to_hub"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process talks to, logged in. Xet, which the real one prefers, has servers of its own."""
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def folder(tmp_path):
    """Small and large files."""
    folder = tmp_path / "step-00000004"
    folder.mkdir()
    files = {"config.json": b"{}", "model.safetensors": b"weights" * 1000, "empty.txt": b"", "conversion.json": b"{}"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files below ``folder``."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def require_token_in_its_place(hub: FakeHub) -> None:
    """The token went to the Hub alone, not to its storage, and in no other header."""
    assert sum(request.headers.get("authorization") == f"Bearer {TOKEN}" for request in hub.requests) >= 4
    for request in hub.requests:
        others = {name: value for name, value in request.headers.items() if name != "authorization"}
        assert TOKEN not in f"{request.path} {others}" and TOKEN.encode() not in request.body
        assert not (request.path.startswith("/upload/") and "authorization" in request.headers)


def refused(action, *arguments) -> str:
    with pytest.raises(UserError) as refusal:
        action(*arguments)
    message = str(refusal.value)
    assert TOKEN not in message and "\n" not in message and message.startswith(f"{KEY} {NAME}: ")
    return message


def test_what_arrives_are_the_folders_bytes_in_one_commit(hub, folder):
    before = contents(folder)
    assert open_repository(NAME, KEY) == f"{hub.url}/{NAME} (private), as somebody"
    assert upload_folder(folder, NAME, KEY, ["conversion.json"]) == f"{hub.url}/{NAME}/commit/{'1' * 40}"
    assert contents(folder) == before and hub.commits == 1
    del before["conversion.json"]
    assert hub.repositories[NAME] == before
    require_token_in_its_place(hub)


def test_a_repository_that_is_there_is_used(hub):
    hub.repositories[NAME] = {}
    assert open_repository(NAME, KEY) == f"{hub.url}/{NAME} (public), as somebody"
    assert hub.repositories[NAME] == {}


@pytest.mark.parametrize("exists", [True, False])
def test_a_token_that_may_only_read_is_found_out_before(hub, exists):
    hub.read_only = True
    if exists:
        hub.repositories[NAME] = {}
    assert "the token may not write there (403)" in refused(open_repository, NAME, KEY)


def test_no_token(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert refused(open_repository, NAME, KEY).endswith("no token; set HF_TOKEN, or log in with `hf auth login`")
    assert hub.requests == []


def test_a_token_of_the_login_is_used(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "none").write_text(TOKEN)
    assert open_repository(NAME, KEY).endswith("as somebody")


def test_a_wrong_token_is_not_shown(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refused(open_repository, NAME, KEY)
    assert "hf_wrong" not in message and "check HF_TOKEN" in message


def test_an_error_that_quotes_the_token_is_shown_without(hub, monkeypatch):
    """As HTTP clients do of headers that they do not like."""

    def failing(api):
        raise ValueError(f"Illegal header value b'Bearer {TOKEN}'")

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", failing)
    assert refused(open_repository, NAME, KEY).endswith("ValueError: Illegal header value b'Bearer ***'")


def test_no_hub(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "Connect" in refused(open_repository, NAME, KEY)


@pytest.mark.parametrize(
    ("where", "status", "said"),
    [
        (r"PUT /upload/", 403, "may not write there (403)"),
        (r"PUT /upload/", 501, "the Hub answered 501"),
        (r"/commit/main", 501, "the Hub answered 501"),
        (r"/preupload/", 401, "does not accept the token (401)"),
    ],
)
def test_an_upload_that_fails_names_the_command_that_makes_it(hub, folder, where, status, said):
    open_repository(NAME, KEY)
    before = contents(folder)
    hub.refusals[where] = status
    message = refused(upload_folder, folder, NAME, KEY, ["conversion.json"])
    assert said in message and "Amz" not in message
    assert message.endswith(f"upload it with: hf upload {NAME} {folder} . --exclude conversion.json")
    assert contents(folder) == before and hub.repositories[NAME] == {}
    hub.refusals.clear()
    upload_folder(folder, NAME, KEY)
    assert hub.repositories[NAME] == before


@pytest.mark.parametrize("name", ["tiny", "https://huggingface.co/somebody/tiny", "../x/y", "a/b/c", ""])
def test_what_is_no_repository_is_refused_before_anybody_is_asked(hub, name):
    with pytest.raises(UserError, match="expected a repository on the Hub"):
        open_repository(name, KEY)
    assert hub.requests == []
