"""Download a configuration from ``https://`` or from the Hugging Face Hub (``hf://``), with bounds on size and time.

huggingface_hub is the client: its settings apply (proxies, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_TOKEN`` for ``hf://``).
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..files.hub_errors import call_hub
from ..files.regular import read_regular

_SECONDS = 30.0
"""Limit for one file."""
_HUB_ADDRESS = re.compile(
    r"hf://(?P<kind>models/|datasets/|spaces/)?(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<before>[^/@]+))?/"
    r"(?P<path>[^@]+?)(?:@(?P<after>[^@]+))?",
    re.ASCII,
)
_EXAMPLE = "hf://my-organization/my-configs/run.yaml, with @REVISION at the end if it is not the newest"
_OTHERWISE = "; or download it and name the file"


class _Address(NamedTuple):
    """A file on the Hub."""

    kind: str
    """model, dataset or space."""
    name: str
    path: str
    revision: str | None


def download(url: str, key: str, most_bytes: int) -> bytes:
    """Return the content of the file at ``url``.

    Args:
        url: ``https://...``, or ``hf://namespace/name/path`` with ``@revision`` after the name or at the end.
        key: the option that gives the URL, for errors.
        most_bytes: larger files are refused.

    Raises:
        UserError: the scheme is another one, the file does not exist or is too large, its server cannot be reached or
            is too slow, or a web page was received instead.
    """
    said = f"{key} {without_query(url)}"
    if url.startswith("hf://"):
        data = _from_hub(url, said, most_bytes)
    elif url.startswith("https://"):
        data = _from_server(url, said, most_bytes)
    elif url.startswith("http://"):
        raise UserError(f"{said}: http does not protect the file on its way; write https://, or name a local file")
    else:
        raise UserError(f"{said}: only https:// and hf:// are supported; download it and name the file")
    if data.lstrip()[:1] == b"<":
        raise UserError(f"{said}: a web page, not a YAML file; use the address of the raw file{_raw_address(url)}")
    return data


def without_query(url: str) -> str:
    """Return the URL without what follows ``?``, which may be a token, for messages."""
    return url.partition("?")[0]


def _from_server(url: str, said: str, most_bytes: int) -> bytes:
    from huggingface_hub.utils import get_session

    deadline = time.monotonic() + _SECONDS

    def fetch() -> bytes:
        with get_session().stream("GET", url, timeout=_SECONDS / 3, follow_redirects=True) as response:
            if any(each.url.scheme != "https" for each in (*response.history, response)):
                raise UserError(f"{said}: the server redirects to http, which does not protect the file{_OTHERWISE}")
            if response.status_code != 200:
                reason = "it does not exist there" if response.status_code == 404 else "it cannot be read"
                raise UserError(f"{said}: the server answered {response.status_code}: {reason}; check the address")
            data = bytearray()
            for block in response.iter_bytes():
                data += block
                _require_size(len(data), said, most_bytes)
                if time.monotonic() > deadline:
                    raise UserError(f"{said}: not complete after {_SECONDS:g} s{_OTHERWISE}")
            return bytes(data)

    return call_hub(fetch, f"{said}: cannot be downloaded", _OTHERWISE, "")


def _from_hub(url: str, said: str, most_bytes: int) -> bytes:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    address = _parse(url, said)
    file: dict[str, Any] = {"repo_id": address.name, "filename": address.path}
    file |= {"repo_type": address.kind, "revision": address.revision}

    def fetch() -> Path:
        # Asked first, because the download has no limit of size, and tries again for half a minute without a network.
        try:
            size = get_hf_file_metadata(hf_hub_url(**file)).size
        except GatedRepoError:
            raise UserError(f"{said}: the Hub requires you to accept a licence first (`hf auth login`)") from None
        except RepositoryNotFoundError:
            raise UserError(f"{said}: the Hub has no {address.kind} repository {address.name}; check it") from None
        except RevisionNotFoundError:
            raise UserError(f"{said}: {address.name} has no revision {address.revision}; check it") from None
        except EntryNotFoundError:
            raise UserError(f"{said}: {address.name} has no file {address.path}; check the path") from None
        except HfHubHTTPError:
            raise
        except Exception:  # HTTP errors, whose types differ between versions of the Hub client
            if isinstance(cached := try_to_load_from_cache(**file), str):
                return Path(cached)
            raise UserError(f"{said}: not in the cache, and the Hub cannot be reached{_OTHERWISE}") from None
        _require_size(size or 0, said, most_bytes)
        return Path(hf_hub_download(**file))

    path = call_hub(fetch, f"{said}: cannot be downloaded", _OTHERWISE, "the token may not read it (403)")
    return read_regular(path.resolve(), most_bytes)


def _parse(url: str, said: str) -> _Address:
    found = _HUB_ADDRESS.fullmatch(url)
    if found is None or (found["before"] and found["after"]):
        raise UserError(f"{said}: not an address of a file on the Hub; write {_EXAMPLE}")
    kind = (found["kind"] or "models/").removesuffix("s/")
    return _Address(kind, found["name"], found["path"], found["before"] or found["after"])


def _require_size(size: int, said: str, most_bytes: int) -> None:
    if size > most_bytes:
        raise UserError(f"{said}: larger than {most_bytes:,} bytes, so not a configuration; check the address")


def _raw_address(url: str) -> str:
    """Return a hint with the raw address of a file that a well-known server shows as a page."""
    found = re.fullmatch(r"https://github\.com/([^/]+/[^/]+)/blob/(.+)", url)
    if found:
        return f": https://raw.githubusercontent.com/{found[1]}/{found[2]}"
    found = re.fullmatch(r"(https://huggingface\.co/.+)/blob/(.+)", url)
    return f": {found[1]}/resolve/{found[2]}" if found else ""
