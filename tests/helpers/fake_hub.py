"""A Hub on this machine: as much of its interface as uploading and downloading takes, and a note of every request.

The paths and bodies are those of the Hub's HTTP interface (https://huggingface.co/docs/hub/api) and of Git LFS
(https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md), for which huggingface_hub is the client.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import PurePosixPath

from local_server import LocalServer

TOKEN = "hf_oNlyForThisTest"
COMMIT = "4" * 40
"""The only commit of every repository that is read."""


@dataclass
class Request:
    """One that the Hub got."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class FakeHub(LocalServer):
    """What the Hub knows. To be entered; ``url`` is its address then."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files of each, by name."""
    private: bool = False
    gated: set[str] = field(default_factory=set)
    """Repositories that may not be downloaded."""
    read_only: bool = False
    """Whether the token may only read."""
    refusals: dict[str, int] = field(default_factory=dict)
    """Status of the answer to requests whose method and path match a pattern."""
    requests: list[Request] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    """Files sent through LFS, by the sha256 that they have."""
    commits: int = 0
    messages: list[str] = field(default_factory=list)
    """Of the commits."""

    def handler(self) -> type[BaseHTTPRequestHandler]:
        return _Handler

    def answer(self, request: Request) -> tuple[int, object] | tuple[int, object, dict[str, str]]:
        """Status, content (bytes, or plain values for JSON) and headers of the answer to ``request``."""
        said = f"{request.method} {request.path}"
        for pattern, status in self.refusals.items():
            if re.search(pattern, said):
                return status, {"error": "planted"}
        if re.match(r"PUT /upload/", said):
            self.large[hashlib.sha256(request.body).hexdigest()] = request.body
            return 200, {}
        if found := re.fullmatch(r"(GET|HEAD) /([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", said):
            return self._file(*found.groups()[1:])
        if found := re.fullmatch(r"GET /api/models/([\w.-]+/[\w.-]+)/revision/([^/]+)", said):
            return self._listing(*found.groups())
        if found := re.fullmatch(rf"GET /api/models/([\w.-]+/[\w.-]+)/tree/{COMMIT}", said):
            return 200, _tree(self.repositories[found[1]])
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        return self._answer_to_user(request, said)

    def _file(self, name: str, revision: str, path: str) -> tuple[int, object, dict[str, str]]:
        if (lack := self._lack(name, revision)) is not None:
            return lack
        content = self.repositories[name].get(path)
        if content is None:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return 200, content, {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}

    def _listing(self, name: str, revision: str) -> tuple[int, object, dict[str, str]]:
        if (lack := self._lack(name, revision)) is not None:
            return lack
        files = [{"rfilename": file} for file in self.repositories[name]]
        return 200, {"id": name, "private": self.private, "sha": COMMIT, "siblings": files}, {}

    def _lack(self, name: str, revision: str) -> tuple[int, object, dict[str, str]] | None:
        if name in self.gated:
            return 403, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"}
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if revision not in ("main", COMMIT):
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        return None

    def _answer_to_user(self, request: Request, said: str) -> tuple[int, object]:
        if said == "GET /api/whoami-v2":
            return 200, {"name": "somebody", "type": "user"}
        if said == "POST /api/validate-yaml":  # of a README.md
            return 200, {"errors": [], "warnings": []}
        if said == "POST /api/repos/create":
            asked = json.loads(request.body)
            name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            if self.read_only:
                return 403, {"error": "You don't have the rights to create a model"}
            self.repositories[name] = {}
            self.private = asked.get("private", False) or asked.get("visibility") == "private"
            return 200, {"url": f"{self.url}/{name}"}
        found = re.search(r"/(?:api/(?:models|datasets)/|datasets/)?([\w.-]+/[\w.-]+?)(?:\.git)?(/.*)?$", request.path)
        if found is None or found[1] not in self.repositories:
            return 404, {"error": "Repository not found"}
        return self._answer_about(self.repositories[found[1]], found[1], found[2] or "", request)

    def _answer_about(self, files: dict[str, bytes], name: str, rest: str, request: Request) -> tuple[int, object]:
        if rest == "":
            return 200, {"id": name, "private": self.private, "sha": "0" * 40, "siblings": []}
        if rest == "/tree/main":
            return 200, _tree(files)
        if self.read_only:
            return 403, {"error": "Forbidden"}
        if rest == "/auth-check/write":
            return 200, {}
        if rest == "/preupload/main":
            asked = json.loads(request.body)["files"]
            mode = {True: "lfs", False: "regular"}
            return 200, {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": mode[file["path"].endswith((".safetensors", ".parquet"))],
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in asked
                ]
            }
        if rest == "/info/lfs/objects/batch":
            asked = json.loads(request.body)["objects"]
            return 200, {"transfer": "basic", "objects": [self._place(item) for item in asked]}
        if rest == "/commit/main":
            items = [json.loads(line) for line in request.body.decode().splitlines()]
            if any(item["key"] == "deletedFile" and item["value"]["path"] not in files for item in items):
                return 404, {"error": "A file with this name doesn't exist"}
            for item in items:
                if item["key"] == "file":
                    files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                if item["key"] == "lfsFile":
                    files[item["value"]["path"]] = self.large[item["value"]["oid"]]
                if item["key"] == "deletedFile":
                    del files[item["value"]["path"]]
            self.commits += 1
            self.messages += [item["value"]["summary"] for item in items if item["key"] == "header"]
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}
        return 404, {"error": f"not known to this Hub: {rest}"}

    def _place(self, item: dict) -> dict:
        if item["oid"] in self.large:
            return {"oid": item["oid"], "size": item["size"]}
        action = {"upload": {"href": f"{self.url}/upload/{item['oid']}?X-Amz-Signature=secret", "header": {}}}
        return {"oid": item["oid"], "size": item["size"], "authenticated": True, "actions": action}


def _tree(files: dict[str, bytes]) -> list[dict]:
    """Files and folders, as a recursive listing has them."""
    folders = {parent.as_posix() for file in files for parent in PurePosixPath(file).parents} - {"."}
    return [
        *({"type": "directory", "oid": "2" * 40, "size": 0, "path": folder} for folder in sorted(folders)),
        *({"type": "file", "oid": "3" * 40, "size": len(files[file]), "path": file} for file in sorted(files)),
    ]


class _Handler(BaseHTTPRequestHandler):
    serving: FakeHub
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path.split("?")[0], headers, self._body(headers))
        self.serving.requests.append(request)
        status, content, *more = self.serving.answer(request)
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (more[0] if more else {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(headers.get("content-length", "0")))
        body = b""
        while length := int(self.rfile.readline(), 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""
