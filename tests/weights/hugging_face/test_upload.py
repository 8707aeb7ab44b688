"""Uploads to a Hub on this machine: what arrives, who may see the token, and a line for all that is wrong."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import hf_starts
import pytest
import torch
from fake_hub import TOKEN, FakeHub
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from retemper.checkpoint_convert import dcp_to_hf
from retemper.engine.errors import UserError
from retemper.engine.weights.conversion import hf_to_dcp
from retemper.engine.weights.hugging_face.folder import HfWeights
from retemper.engine.weights.hugging_face.upload import open_repository, upload_folder

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
    where = open_repository(NAME, KEY)
    assert where.startswith(f"{hub.url}/{NAME} (public, which it was before") and where.endswith(", as somebody")
    assert hub.repositories[NAME] == {}


def test_only_a_new_repository_gets_the_visibility_that_is_asked_for(hub):
    assert "(public), as" in open_repository(NAME, KEY, private=False)
    assert "(public, which it was before" in open_repository(NAME, KEY)
    assert "this repository is public" in refused(lambda: open_repository(NAME, KEY, only_private=True))
    hub.private = True
    assert "(private, which it was before" in open_repository(NAME, KEY, private=False) and hub.private
    assert "(private), as" in open_repository(NAME, KEY, only_private=True)
    changes = [request for request in hub.requests if request.method == "PUT"]
    assert not changes


def test_the_message_of_a_commit(hub, folder):
    open_repository(NAME, KEY)
    upload_folder(folder, NAME, KEY)
    upload_folder(folder, NAME, KEY, message="Trained on \u00e9t\u00e9")
    assert hub.messages == [f"Upload {folder.name}", "Trained on \u00e9t\u00e9"]
    hub.refusals["/commit/main"] = 501
    words = shlex.split(refused(lambda: upload_folder(folder, NAME, KEY, message="it's new")))
    assert words[words.index("--commit-message") + 1] == "it's new"


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
    before, old = contents(folder), {"model.safetensors": b"old", "model-00001-of-00002.safetensors": b"old"}
    hub.repositories[NAME] = dict(old)
    hub.refusals[where] = status
    message = refused(upload_folder, folder, NAME, KEY, ["conversion.json"])
    assert said in message and "Amz" not in message
    assert f"upload it with: hf upload {NAME} {folder} . --exclude conversion.json --delete" in message
    assert contents(folder) == before and hub.repositories[NAME] == old
    hub.refusals.clear()
    upload_folder(folder, NAME, KEY)
    assert hub.repositories[NAME] == before


@pytest.mark.parametrize("name", ["tiny", "https://huggingface.co/somebody/tiny", "../x/y", "a/b/c", ""])
def test_what_is_no_repository_is_refused_before_anybody_is_asked(hub, name):
    with pytest.raises(UserError, match="expected a repository on the Hub"):
        open_repository(name, KEY)
    assert hub.requests == []


OTHERS = {
    ".gitattributes": b"",
    "README.md": b"# Ours",
    "pytorch_model.bin": b"pickled",
    "consolidated.safetensors": b"of another program",
    "adapter_model.safetensors": b"an adapter",
    "model.fp16.safetensors": b"a variant",
    "model-00001-of-00002.safetensors.md": b"notes",
    "older/model.safetensors": b"older",
    "older/model-00001-of-00002.safetensors": b"older",
    "older/model.safetensors.index.json": b"{}",
    "model-0/001-of-00002.safetensors": b"older",
}
"""Files of a repository that no export of ours is made of."""


def saved(folder: Path, value: float, max_shard_size: str) -> Path:
    """A folder that transformers has written, all of whose weights are ``value``."""
    model = Qwen2ForCausalLM(Qwen2Config(**hf_starts.ARCHITECTURE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def published(hub: FakeHub, folder: Path) -> Path:
    """What the repository holds, as a folder."""
    for name, content in hub.repositories[NAME].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


SIZES = {
    "several files, then one": ("12KB", "5GB"),
    "one, then several": ("5GB", "12KB"),
    "several, then more": ("25KB", "12KB"),
    "as many": ("12KB", "12KB"),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("by_hand", [False, True])
def test_readers_find_the_weights_that_came_last_and_other_files_stay(hub, tmp_path, sizes, by_hand):
    """Also where the upload is made with the command that is named after a failed one."""
    old, new = (saved(tmp_path / f"v {v}", v, size) for v, size in zip((1.0, 2.0), SIZES[sizes], strict=True))
    open_repository(NAME, KEY)
    upload_folder(old, NAME, KEY)
    hub.repositories[NAME] |= OTHERS
    if by_hand:
        hub.refusals["/commit/main"] = 501
        command = refused(upload_folder, new, NAME, KEY).partition("upload it with: ")[2]
        hub.refusals.clear()
        run_hf(hub, shlex.split(command), tmp_path)
    else:
        stale = sorted(set(contents(old)) - set(contents(new)))
        more = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
        deleted = f", and deleted the weights that were there before ({stale[0]}{more})" if stale else ""
        assert upload_folder(new, NAME, KEY) == f"{hub.url}/{NAME}/commit/{'1' * 40}{deleted}"
    assert hub.repositories[NAME] == contents(new) | OTHERS
    assert hub.commits == 2
    copy = published(hub, tmp_path / "copy")
    assert all(bool((parameter == 2).all()) for parameter in AutoModelForCausalLM.from_pretrained(copy).parameters())
    weights = HfWeights(copy)
    assert weights.tensors and all(bool((weights.read(name) == 2).all()) for name in weights.tensors)


def run_hf(hub: FakeHub, command: list[str], home: Path) -> None:
    """The command line of huggingface_hub, in a process of its own."""
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    assert command.pop(0) == "hf"
    subprocess.run(
        [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()", *command],
        env={"PATH": os.environ["PATH"], "HF_HUB_DISABLE_UPDATE_CHECK": "1", **places},
        capture_output=True,
        check=True,
    )


def test_many_files_arrive_in_one_commit_through_xet_as_well(hub, tmp_path, monkeypatch):
    """Of so many, HfApi.upload_folder makes several commits where there is Xet, which takes only the large ones."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    for index in range(300):
        (tmp_path / f"{index}.json").write_text("{}")
    open_repository(NAME, KEY)
    upload_folder(tmp_path, NAME, KEY)
    assert hub.commits == 1 and hub.repositories[NAME] == contents(tmp_path)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """``dcp_to_hf.py --push-to-hub`` of a converted checkpoint, with other options."""
    hf_to_dcp.convert(str(hf_starts.save_model(tmp_path / "hf")), tmp_path / "checkpoint", say=lambda line: None)

    def run(**changes: str | None) -> None:
        options = {"checkpoint": tmp_path / "checkpoint", "output": tmp_path / "output", "push-to-hub": NAME, **changes}
        arguments = [word for name, value in options.items() for word in (f"--{name}", value) if word]
        dcp_to_hf.main([*map(str, arguments)])

    return run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"output": "."}, r"--output \.: exists already"),
        ({"output": "checkpoint/x"}, "it is inside --checkpoint"),
        ({"vocab-size": "0"}, "--vocab-size"),
        ({"workers": "0"}, "--workers 0"),
        ({"workers": "1", "public": None, "private": None}, "--private"),
    ],
)
def test_no_repository_is_made_for_what_cannot_be_converted(hub, command, monkeypatch, tmp_path, options, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        command(**options)
    assert hub.requests == [] and not (tmp_path / "output").exists()


def test_a_token_is_looked_for_before_anything_is_converted(hub, command, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="no token"):
        command()
    assert not (tmp_path / "output").exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    command()
    assert contents(tmp_path / "output") == hub.repositories[NAME] | {
        "conversion.json": (tmp_path / "output/conversion.json").read_bytes()
    }


def test_visibility_and_message_of_the_command(hub, command):
    command(public=None, **{"commit-message": "First"})
    assert not hub.private and hub.messages == ["First"]


@pytest.mark.parametrize("option", ["--private", "--public", "--commit-message=x"])
def test_options_of_an_upload_need_one(option, tmp_path):
    with pytest.raises(UserError, match=f"{option.partition('=')[0]} has no effect without --push-to-hub"):
        dcp_to_hf.main(["--checkpoint", str(tmp_path), "--output", str(tmp_path / "new"), option])
