"""A web server on this machine that serves bytes with HTTP ranges, and fails where a test asks for it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from local_server import LocalServer


@dataclass
class RangeServer(LocalServer):
    """Serves ``files`` by path. To be entered; ``url`` is its address then."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    """Whether it answers with the range that is asked for, else with the whole file."""
    fail: Callable[[str, str, int], int] = lambda method, path, number: 0
    """Status with which request ``number`` of all is refused; 0: answered, 1: the connection breaks in the middle, 2:
    half of the range is sent as if it were all."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and range of each request."""

    def handler(self) -> type[BaseHTTPRequestHandler]:
        return _Handler


class _Handler(BaseHTTPRequestHandler):
    serving: RangeServer
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        path, asked = self.path.partition("?")[0], self.headers.get("Range", "")
        self.serving.requests.append((self.command, path, asked))
        status = self.serving.fail(self.command, path, len(self.serving.requests))
        content = self.serving.files.get(path)
        if content is None or status > 2:
            self.send_response(status if status > 2 else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        part = content
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked) if self.serving.ranges else None
        self.send_response(206 if found else 200)
        if found:
            part = content[int(found[1]) : int(found[2]) + 1]
            part = part[: len(part) // 2] if status == 2 else part
            self.send_header("Content-Range", f"bytes {found[1]}-{int(found[1]) + len(part) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes" if self.serving.ranges else "none")
        self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part[: len(part) // 2] if status == 1 else part)
            self.close_connection = status == 1

    do_GET = do_HEAD = _answer

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""
