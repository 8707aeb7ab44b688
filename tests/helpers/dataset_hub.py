"""A Hub on this machine with datasets: as much of its interface as listing and reading them takes.

The paths and answers are those of the Hub's HTTP interface (https://huggingface.co/docs/hub/api), for which
huggingface_hub and datasets are the clients.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from local_server import LocalServer


@dataclass
class DatasetHub(LocalServer):
    """Serves ``commits`` of datasets. To be entered; ``url`` is its address then."""

    commits: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    """For each dataset its commits, oldest first: the hash of 40 digits, and the files. ``main`` is the last one."""
    requests: list[str] = field(default_factory=list)
    """Method, path and range of each request."""

    def handler(self) -> type[BaseHTTPRequestHandler]:
        return _Handler

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        """Add a commit with exactly ``files``; return its hash."""
        before = self.commits.setdefault(name, [])
        sha = hashlib.sha1(f"{name} {len(before)}".encode()).hexdigest()
        before.append((sha, files))
        return sha

    def found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return hash and files of a revision."""
        commits = self.commits[name]
        return commits[-1] if revision == "main" else next((each for each in commits if each[0] == revision), None)

    def use(self, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
        """Let huggingface_hub and datasets of this process, and of processes that it starts, use this Hub."""
        import datasets
        from huggingface_hub import constants

        from retemper.tools.preprocessing import storage

        for name, value in {"HF_ENDPOINT": self.url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{home}/hub")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", self.url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", f"{home}/datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(storage, "_instances", {})
        monkeypatch.setattr(storage, "_WAITS", ())


class _Handler(BaseHTTPRequestHandler):
    serving: DatasetHub
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.serving.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if found := re.fullmatch(r"/(api/)?datasets/([\w.-]+/[\w.-]+)(?:/(\w[\w-]*)(?:/([^/]+)(?:/(.*))?)?)?", path):
            is_api, name, action, revision, rest = found.groups()
            if name not in self.serving.commits:
                return self._refuse("RepoNotFound", "Repository not found")
            commit = self.serving.found(name, revision or "main")
            if commit is None:
                return self._refuse("RevisionNotFound", "Invalid rev id")
            return self._about(bool(is_api), name, commit, action or "", rest or "", query, body)
        return self._refuse("", "not known to this Hub")

    def _about(
        self,
        is_api: bool,
        name: str,
        commit: tuple[str, dict[str, bytes]],
        action: str,
        rest: str,
        query: dict[str, list[str]],
        body: bytes,
    ) -> None:
        sha, files = commit
        if is_api and action in ("", "revision"):
            siblings = [{"rfilename": path} for path in sorted(files)]
            return self._json({"id": name, "sha": sha, "private": False, "siblings": siblings, "tags": []})
        if is_api and action == "tree":
            entries = _tree(files, rest, query.get("recursive", ["false"])[0].lower() == "true")
            return self._json(entries) if entries or not rest else self._refuse("EntryNotFound", "Not found")
        if is_api and action == "paths-info":
            paths = parse_qs(body.decode()).get("paths", [])
            entries = {entry["path"]: entry for entry in _tree(files, "", True)}
            return self._json([entries[path] for path in paths if path in entries])
        if action == "resolve" and rest in files:
            return self._content(files[rest], sha)
        return self._refuse("EntryNotFound", "Entry not found")

    def _content(self, content: bytes, sha: str) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        part = content[int(asked[1]) : int(asked[2] or len(content)) + 1] if asked else content
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(content)}")
        self._finish(part, {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"})

    def _json(self, content: object) -> None:
        self.send_response(200)
        self._finish(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, code: str, message: str) -> None:
        self.send_response(404)
        self._finish(json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def _finish(self, content: bytes, headers: dict[str, str]) -> None:
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = _answer

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


def _blob(content: bytes) -> str:
    """Return git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, object]]:
    """Return the entries below ``folder`` as the Hub lists them."""
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    below = {path: content for path, content in files.items() if path.startswith(prefix)}
    folders = {
        path[: match.start()] for path in below for match in re.finditer("/", path) if match.start() >= len(prefix)
    }
    entries: list[dict[str, object]] = [
        {"type": "directory", "oid": _blob(path.encode()), "size": 0, "path": path} for path in sorted(folders)
    ]
    entries += [
        {"type": "file", "oid": _blob(content), "size": len(content), "path": path}
        for path, content in sorted(below.items())
    ]
    return [entry for entry in entries if recursive or "/" not in str(entry["path"])[len(prefix) :]]
