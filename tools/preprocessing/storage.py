"""Opens, describes and lists the files of a corpus: local paths, and URLs of any file system that fsspec knows.

All modules that read the input open it here. A remote file is read in blocks while it is used, and is not copied to the
disk. Options of a file system, such as another endpoint or anonymous access, come from its usual environment variables
and from those of fsspec (``FSSPEC_S3_ANON=true``).
"""

from __future__ import annotations

import io
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeVar

from ...engine.errors import UserError, install_command
from ...engine.files.paths import is_url

_BLOCK_BYTES = 2 << 20
"""Of one request: its latency matters little, and so does what is read after the end of a worker's part."""
_NUM_BLOCKS = 16
"""Blocks of a table in memory. Columns of Parquet are read in turns, each from its own block."""
Access = Literal["stream", "table", "part"]
"""How a file is read: "stream": from one position to another; "table": in many places; "part": little of it."""
_CACHES: dict[Access, dict[str, Any]] = {
    "stream": {"cache_type": "readahead"},
    "table": {"cache_type": "blockcache", "cache_options": {"maxblocks": _NUM_BLOCKS}},
    "part": {"cache_type": "none"},
}
_WAITS = (0.5, 1, 2, 4, 8)
"""Seconds before each new attempt after an error that may pass."""
_MAX_REASON = 200
_VERSION_KEYS = (
    *("blob_id", "md5Hash", "crc32c", "ETag", "etag", "Content-MD5", "Digest"),
    *("mtime", "LastModified", "Last-Modified", "updated", "created"),
)
"""What file systems call a checksum or else the time of the last change, the more reliable first."""
_LIBRARIES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_CREDENTIALS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket FSSPEC_S3_ANON=true",
    "gs": "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS; for a public bucket "
    "FSSPEC_GCS_TOKEN=anon",
    "hf": "run hf auth login, or set HF_TOKEN",
}
_NOT_ALLOWED = re.compile(r"credential|forbidden|unauthorized|access ?denied|\b40[13]\b|anonymous|permission", re.I)
_PERMANENT = (
    *(FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError),
    *(ValueError, NotImplementedError, ImportError),
)
_TOO_MANY_REQUESTS, _TIMED_OUT = 429, 408

_LOGGERS = ("fsspec", "s3fs", "aiobotocore", "gcsfs")
_instances: dict[tuple[object, ...], Any] = {}
_Result = TypeVar("_Result")


class FileFacts(NamedTuple):
    """What identifies the contents of a file without reading them."""

    size: int
    """Bytes."""
    version: str
    """A checksum or, of local files and where there is none, the time of the last change. Empty: unknown."""


def same_path(path: str) -> str:
    """Return one spelling for all spellings of a path: absolute, without links; a URL unchanged."""
    return path if is_url(path) else os.path.realpath(path)


def open_file(path: str, access: Access = "stream") -> io.RawIOBase:
    """Open a file for reading: unbuffered and seekable.

    Args:
        access: decides how many bytes of a remote file one request asks for. All others work too, but cost more.

    Raises:
        OSError: a local file cannot be opened.
        UserError: a remote file cannot be opened. Reading it raises UserError after several attempts.
    """
    return _RemoteFile(path, access) if is_url(path) else io.FileIO(path, "rb")


def facts(path: str) -> FileFacts:
    """Return the facts of a file. Raise OSError for a local one, UserError for a remote one that cannot be read."""
    if not is_url(path):
        status = os.stat(path)
        return FileFacts(status.st_size, str(status.st_mtime_ns))
    with errors_of(path):
        files, name = _file_system(path)
        return _facts(path, files.info(name))


def is_file(path: str) -> bool:
    """Return whether a file exists."""
    if not is_url(path):
        return os.path.isfile(path)
    with errors_of(path):
        files, name = _file_system(path)
        return bool(files.isfile(name))


def read_start(path: str, count: int) -> bytes:
    """Return the first ``count`` bytes of a file, fewer if it is shorter. Errors are those of :func:`open_file`."""
    with open_file(path, "part") as file:
        return file.read(count) or b""


def forget_listings(url: str) -> None:
    """Forget what was listed before in the file system of ``url``."""
    with errors_of(url):
        _file_system(url)[0].invalidate_cache()


def is_folder(url: str) -> bool:
    """Return whether a URL names a folder. An address of a web page does only if it ends with a slash."""
    if _scheme(url) in ("http", "https"):
        return url.endswith("/")
    with errors_of(url):
        files, name = _file_system(url)
        return bool(files.isdir(name))


def full_url(url: str) -> str:
    """Return the one spelling of a URL that listings use."""
    with errors_of(url):
        files, name = _file_system(url)
        return files.unstrip_protocol(name)


def files_below(url: str) -> list[str]:
    """Return the files below a remote folder at any depth by path, except hidden ones."""
    with errors_of(url):
        files, root = _file_system(url)
        return _visible(files, root, files.find(root))


def matches(pattern: str) -> dict[str, bool]:
    """Return the URLs that match a pattern (``*``, ``?``, ``[...]``, ``**``), each with whether it is a folder."""
    with errors_of(pattern):
        files, name = _file_system(pattern)
        found: Mapping[str, Mapping[str, Any]] = files.glob(name, detail=True)
        root = re.split(r"[*?\[]", name)[0].rpartition("/")[0]
        folders = {files.unstrip_protocol(each): entry.get("type") == "directory" for each, entry in found.items()}
        return {url: folders[url] for url in _visible(files, root, found)}


def has_pattern(url: str) -> bool:
    """Return whether a URL is a pattern. In an address of the web, ``?`` begins a query."""
    return re.search(r"[*\[]" if _scheme(url) in ("http", "https") else r"[*?\[]", url) is not None


def short_reason(error: BaseException) -> str:
    """Return a library's message in one line of moderate length."""
    return " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__


@contextmanager
def errors_of(url: str) -> Iterator[None]:
    """Turn any error of a file system into a UserError of one line about ``url``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{without_secrets(url)}: {without_secrets(_explain(url, error), url)}") from error


class _RemoteFile(io.RawIOBase):
    """A remote file, read in blocks. After an error that may pass, it is opened again at the same position."""

    def __init__(self, url: str, access: Access) -> None:
        super().__init__()
        self._url, self._access, self._position = url, access, 0
        self._handle: Any = None
        self._size = int(self._attempt(lambda: self._open().seek(0, os.SEEK_END)))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(min(len(view), self._size - self._position), 0)
        if wanted:
            view[:wanted] = self._attempt(lambda: self._read(wanted))
            self._position += wanted
        return wanted

    def close(self) -> None:
        if self._handle is not None and not self.closed:
            self._handle.close()
        super().close()

    def _open(self) -> Any:
        if self._handle is None:
            files, name = _file_system(self._url)
            self._handle = files.open(name, "rb", block_size=_BLOCK_BYTES, **_CACHES[self._access])
        return self._handle

    def _read(self, count: int) -> bytes:
        handle = self._open()
        handle.seek(self._position)
        content: bytes = handle.read(count)
        if len(content) != count:
            raise OSError(f"{len(content)} bytes arrived at byte {self._position}, not {count}")
        return content

    def _attempt(self, step: Callable[[], _Result]) -> _Result:
        with errors_of(self._url):
            # Before the work begins, a wrong address or a missing network should not take minutes to be reported.
            for wait in _WAITS[:2] if self._access == "part" else _WAITS:
                try:
                    return step()
                except Exception as error:
                    if not _may_pass(error):
                        raise
                self._handle = None  # its cache may contain a part that arrived incomplete
                time.sleep(wait)
            return step()


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


def _file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of ``url``, and the name of the file in it."""
    from fsspec.core import url_to_fs

    for library in _LOGGERS:  # they also log, with a traceback, what they raise or try again
        logging.getLogger(library).setLevel(logging.CRITICAL + 1)
    files, name = url_to_fs(url)
    # fsspec has an instance for each thread, each with its own cache of listings.
    key = (os.getpid(), type(files), str(sorted(files.storage_options.items())))
    return _instances.setdefault(key, files), name


def _facts(url: str, entry: Mapping[str, Any]) -> FileFacts:
    if entry.get("type") == "directory":
        raise UserError(f"{url}: a folder, not a file")
    if entry.get("size") is None:
        raise UserError(f"{url}: the server does not tell the size of the file; download it and name the file")
    key = next((key for key in _VERSION_KEYS if entry.get(key) is not None), None)
    return FileFacts(int(entry["size"]), f"{key} {entry[key]}" if key else "")


def _visible(files: Any, root: str, names: Any) -> list[str]:
    """Return the sorted URLs of ``names`` that are not hidden below ``root``."""
    below = {name: name.removeprefix(root).lstrip("/") for name in names}
    kept = [name for name, rest in below.items() if not re.search(r"(^|/)\.", rest)]
    return sorted(files.unstrip_protocol(name) for name in kept)


def without_secrets(text: str, url: str | None = None) -> str:
    """Return ``text`` without the user, password and query of the ``url`` in it; by default ``text`` is the URL."""
    url = text if url is None else url
    scheme, colon, rest = url.partition("://")
    if not colon:
        return text
    host, slash, path = rest.partition("/")
    plain = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    if scheme in ("http", "https"):
        plain = plain.partition("?")[0]
    return text.replace(url, plain)


def _may_pass(error: BaseException) -> bool:
    """Return whether a new attempt may succeed."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        # fsspec's HTTP reports every error this way.
        return isinstance(cause, OSError) and _may_pass(cause) if _status(cause) is None else _may_pass(cause)
    status = _status(error)
    if status is not None and 400 <= status < 500:
        return status in (_TOO_MANY_REQUESTS, _TIMED_OUT)
    return not isinstance(error, _PERMANENT) and not _NOT_ALLOWED.search(_message(error))


def _status(error: BaseException) -> int | None:
    """Return the status of the HTTP answer that an error is about."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _message(error: BaseException) -> str:
    cause = f" ({short_reason(error.__cause__)})" if error.__cause__ is not None else ""
    return f"{type(error).__name__}: {short_reason(error)}{cause}"


def _explain(url: str, error: Exception) -> str:
    """Return in one line why ``url`` cannot be read, and the remedy."""
    scheme = _scheme(url)
    if isinstance(error, ImportError):
        library = _LIBRARIES.get(scheme)
        return f"reading it needs {library}: {install_command(library)}" if library else short_reason(error)
    if isinstance(error, ValueError) and "Protocol not known" in str(error):
        return f"{scheme}:// is not a file system that fsspec knows; use s3://, gs://, hf:// or https://"
    if _NOT_ALLOWED.search(_message(error)):
        remedy = _CREDENTIALS.get({"s3a": "s3", "gcs": "gs"}.get(scheme, scheme))
        return f"no permission to read it ({_message(error)})" + (f"; {remedy}" if remedy else "")
    if isinstance(error, FileNotFoundError) and not _may_pass(error):
        return f"no such file or folder ({_message(error)})"
    return f"cannot be read ({_message(error)})"
