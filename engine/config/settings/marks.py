"""Types of settings that are more than a plain value: paths, and switches with more than two values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

PATH_MARK = "a path: ~ and $VARIABLE are expanded when the configuration is read"
FilePath = Annotated[str, PATH_MARK]
"""Type of every setting that is the name of a file or folder, or can be one."""
URL_MARK = "a URL is also possible"
DataPath = Annotated[str, PATH_MARK, URL_MARK]
"""Type of every setting that is the path of data, or its URL (hf://, s3://, gs://)."""


@dataclass(frozen=True)
class Switch:
    """The values that ``true`` (``yes``, ``on``) and ``false`` (``no``, ``off``) select in a setting with more than two
    values.
    """

    true: str
    false: str
