"""Configurations by URL: what arrives is used, and all that may go wrong is a line with the remedy."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import huggingface_hub
import pytest
from fake_hub import COMMIT, TOKEN, FakeHub
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from tiny_run import write_config

from retemper.engine.config import remote_file
from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import to_yaml
from retemper.engine.errors import UserError

URL = "https://configs.example/run.yaml"
HTTP = sys.modules[type(get_session()).__module__.partition(".")[0]]
"""The HTTP client of huggingface_hub: httpx, or its successor."""


@pytest.fixture
def text(tmp_path) -> str:
    return write_config(tmp_path).read_text(encoding="utf-8")


@pytest.fixture
def serve(monkeypatch) -> Iterator:
    """Answer all requests with a function, through the real client."""

    def use(answer) -> list:
        asked = []

        def handle(request):
            asked.append(str(request.url))
            return answer(request)

        huggingface_hub.set_client_factory(
            lambda: HTTP.Client(transport=HTTP.MockTransport(handle), follow_redirects=True)
        )
        return asked

    yield use
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def disconnect(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(hub.url, "http://127.0.0.1:1"))


def refusal(url: str) -> str:
    with pytest.raises(UserError) as error:
        parse_config(["--config", url])
    [line] = error.value.args
    assert "\n" not in line and line.startswith("--config "), line
    return line


def test_a_file_of_a_server_is_read_like_a_local_one(text, serve, tmp_path):
    asked = serve(lambda request: HTTP.Response(200, text=text))
    found = parse_config(["--config", f"{URL}?token=secret", "--seed", "7"])
    (tmp_path / "local.yaml").write_text(text)
    local = parse_config(["--config", str(tmp_path / "local.yaml"), "--seed", "7"])
    assert to_yaml(found) == to_yaml(local) and asked == [f"{URL}?token=secret"]


@pytest.mark.parametrize(
    ("response", "part"),
    [
        ({"status_code": 404}, "404: it does not exist there; check the address"),
        ({"status_code": 503}, "503: it cannot be read"),
        ({"status_code": 200, "text": "\n<!DOCTYPE html><html></html>"}, "a web page, not a YAML file"),
        ({"status_code": 200, "content": b"#" * (2**22 + 1)}, "larger than 4,194,304 bytes"),
        ({"status_code": 200, "content": b"\xff\xfe\x00"}, "not a UTF-8 text file but UTF-16"),
    ],
)
def test_answers_that_are_no_configuration(response, part, serve):
    serve(lambda request: HTTP.Response(**response))
    line = refusal(f"{URL}?token=secret")
    assert part in line and "secret" not in line


def test_no_network_and_slow_servers(serve, monkeypatch):
    def unreachable(request):
        raise HTTP.ConnectError("Name or service not known")

    serve(unreachable)
    assert "ConnectError" in refusal(URL) and "download it and name the file" in refusal(URL)
    serve(lambda request: HTTP.Response(200, text="seed: 1"))
    monkeypatch.setattr(remote_file, "_SECONDS", 0.0)
    assert "not complete after 0 s" in refusal(URL)


def test_what_does_not_protect_the_file_is_refused(serve):
    asked = serve(lambda request: HTTP.Response(302, headers={"location": "http://elsewhere.example/run.yaml"}))
    assert "write https://" in refusal(URL.replace("https", "http")) and not asked

    def redirect(request):
        if request.url.scheme == "https":
            return HTTP.Response(302, headers={"location": "http://elsewhere.example/run.yaml"})
        return HTTP.Response(200, text="seed: 1")

    serve(redirect)
    assert "redirects to http" in refusal(URL)
    assert "only https:// and hf://" in refusal("ftp://configs.example/run.yaml")


def test_a_page_about_a_file_is_answered_with_the_raw_address(serve):
    serve(lambda request: HTTP.Response(200, text="<html>"))
    line = refusal("https://github.com/org/name/blob/main/run.yaml")
    assert line.endswith(": https://raw.githubusercontent.com/org/name/main/run.yaml")
    assert refusal("https://huggingface.co/org/name/blob/main/x.yaml").endswith("/org/name/resolve/main/x.yaml")


@pytest.mark.parametrize("where", ["{}/sub/run.yaml", "{}/sub/run.yaml@main", "{}@" + COMMIT + "/sub/run.yaml"])
def test_a_file_of_the_hub(where, hub, text, tmp_path, monkeypatch):
    hub.repositories["org/name"] = {"sub/run.yaml": text.encode()}
    local = to_yaml(parse_config(["--config", str(tmp_path / "run.yaml")]))
    assert to_yaml(parse_config(["--config", f"hf://{where.format('org/name')}"])) == local
    disconnect(hub, monkeypatch)  # then the cache has it
    assert to_yaml(parse_config(["--config", f"hf://{where.format('org/name')}"])) == local


def test_what_the_hub_does_not_have(hub, monkeypatch):
    hub.repositories["org/name"] = {"run.yaml": b"#" * (2**22 + 1)}
    hub.repositories["org/gated"] = {"run.yaml": b""}
    hub.gated.add("org/gated")
    assert "larger than" in refusal("hf://org/name/run.yaml")
    assert "GET" not in {request.method for request in hub.requests}
    assert "no file other.yaml" in refusal("hf://org/name/other.yaml")
    assert "no revision v9" in refusal("hf://org/name/run.yaml@v9")
    assert "no model repository org/none" in refusal("hf://org/none/run.yaml")
    assert "accept a licence" in refusal("hf://org/gated/run.yaml")
    for wrong in ("hf://org/name", "hf://run.yaml", "hf://org/name@a/run.yaml@b"):
        assert "not an address of a file on the Hub" in refusal(wrong)
    disconnect(hub, monkeypatch)
    assert "the Hub cannot be reached" in refusal("hf://org/name/run.yaml")
