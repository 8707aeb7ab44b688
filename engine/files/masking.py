"""Remove passwords, tokens and signatures from texts that are printed or recorded."""

from __future__ import annotations

import os
import re
from typing import Any

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.I)
_SHORTEST = 8
"""Minimum length of a secret in the environment: shorter values, such as ``1``, occur in any text."""
_USER = re.compile(r"(?<=://)[^/\s@]+@")
_QUERY = re.compile(r"(https?://[^\s?#]+)\?\S+", re.I)


def without_url_secrets(text: str) -> str:
    """Return ``text`` without user and password of its URLs, and without queries of HTTP URLs, which may sign them."""
    return _QUERY.sub(r"\1", _USER.sub("", text))


def without_secrets(text: str) -> str:
    """Return ``text`` without secrets of URLs, and without the values of environment variables that hold secrets."""
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return without_url_secrets(text)


def masked(tree: Any) -> Any:
    """Return nested plain values with :func:`without_secrets` applied to every string and key."""
    if isinstance(tree, str):
        return without_secrets(tree)
    if isinstance(tree, dict):
        return {masked(key): masked(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [masked(value) for value in tree]
    return tree
