"""Remove passwords, tokens and signatures from texts that are printed or recorded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

_SECRET_NAME = re.compile(r"KEY|TOKEN(?!I[ZS])|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.I)
_SIGNS = re.compile(
    r"sig|key|token|secret|passw|pwd|credential|auth|policy|expires|x-amz|x-goog|^code$|^s[aeprtv]$", re.I
)
"""Names of parameters that sign a URL, or belong to a signature: of S3, Google, Azure and others."""
_PARAMETERS = re.compile(r"(https?://[^\s?#]+)\?(\S*)", re.I)
_SHORTEST = 8
"""Minimum length of a secret in the environment: shorter values, such as ``1``, occur in any text."""
_USER = re.compile(r"(?<=://)[^/\s@]+@")
_QUERY = re.compile(r"(https?://[^\s?#]+)\?\S+", re.I)


def without_signature(text: str) -> str:
    """Return ``text`` without user and password of its URLs, and without parameters that sign them.

    Other parameters stay: they may name the file.
    """
    return _PARAMETERS.sub(_unsigned, _USER.sub("", text))


def _unsigned(query: re.Match[str]) -> str:
    kept = [one for one in query[2].split("&") if not _SIGNS.search(one.partition("=")[0])]
    return query[1] + ("?" + "&".join(kept) if kept else "")


def without_url_secrets(text: str) -> str:
    """Return ``text`` without user and password of its URLs, and without queries of HTTP URLs, which may sign them."""
    return _QUERY.sub(r"\1", _USER.sub("", text))


def without_secrets(text: str) -> str:
    """Return ``text`` without secrets of URLs, and without the values of environment variables that hold secrets."""
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return without_url_secrets(text)


def masked(tree: Any, clean: Callable[[str], str] = without_secrets) -> Any:
    """Return nested plain values with ``clean`` applied to every string and key."""
    if isinstance(tree, str):
        return clean(tree)
    if isinstance(tree, dict):
        return {masked(key, clean): masked(value, clean) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [masked(value, clean) for value in tree]
    return tree
