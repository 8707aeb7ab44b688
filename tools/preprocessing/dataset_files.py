"""Name the files of an indexed dataset, and check whether existing ones may be replaced."""

from __future__ import annotations

import os
import re

from ...engine.data.index_format import MAGIC, dataset_prefix
from ...engine.errors import UserError

BIN, MASK, METADATA, JSON, IDX = ".bin", ".mask.bin", ".metadata.jsonl", ".json", ".idx"
"""Suffixes of a dataset's files, in the order in which they are published: a dataset without .idx cannot be opened."""
TEXT, COMPRESSED = ".jsonl", ".zst"
"""Suffixes of the text that ``--to-jsonl`` writes. ``{prefix}.jsonl.json`` is its record."""
REJECTS = ".rejects.jsonl"
"""Suffix of the records that the preprocess command skipped."""
_SIDECAR = re.compile(rb'\s*\{\s*"format_version":\s*\d+,\s*"tokenizer":\s*"')
_REJECT = re.compile(rb'\{"where": "(?:[^"\\]|\\.)*", "reason": "')
_HEAD_BYTES = 1 << 16


def dataset_files(prefix: str | os.PathLike[str]) -> list[str]:
    """Return the paths of all files that a dataset of ``prefix`` may have."""
    return [f"{dataset_prefix(prefix)}{end}" for end in (BIN, MASK, METADATA, JSON, IDX)]


def existing_outputs(prefix: str | os.PathLike[str]) -> list[str]:
    """Return the existing files of a dataset, including dangling links."""
    return _existing(dataset_files(prefix))


def text_files(prefix: str) -> list[str]:
    """Return the paths of all files that a run with ``--to-jsonl`` may write."""
    return [f"{prefix}{TEXT}{COMPRESSED}", f"{prefix}{TEXT}", f"{prefix}{TEXT}{JSON}"]


def refuse_existing_outputs(prefix: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Refuse to write the dataset ``prefix`` over files of other kinds, or over any file without ``overwrite``.

    Raises:
        UserError: names the files.
    """
    refuse_existing(dataset_files(prefix), overwrite)


def refuse_existing(paths: list[str], overwrite: bool = False) -> None:
    """Refuse to write ``paths`` over files of other kinds, or over any file without ``overwrite``.

    Raises:
        UserError: names the files.
    """
    existing = _existing(paths)
    if others := [path for path in existing if not is_of_dataset(path)]:
        raise UserError(
            f"{', '.join(others)}: exists and is not recognised as part of a dataset, so it is never replaced; "
            "move it away, or choose another --output-prefix"
        )
    if existing and not overwrite:
        raise UserError(
            f"{', '.join(existing)}: already there; pass --overwrite to replace, or choose another --output-prefix"
        )


def _existing(paths: list[str]) -> list[str]:
    return [path for path in paths if os.path.lexists(path)]


def is_of_dataset(path: str) -> bool:
    """Return whether the file ``path`` belongs to a dataset of this program or of Megatron-LM, by its content.

    An index, a sidecar and rejects are recognised by their first bytes. Tokens, masks, metadata and text need the index
    or the sidecar next to them, which records whether there are a mask, metadata and text.
    """
    if path.endswith(IDX):
        return _head(path).startswith(MAGIC)
    if path.endswith(JSON):
        return bool(_SIDECAR.match(_head(path)))
    if path.endswith(REJECTS):
        return bool(_REJECT.match(_head(path)))
    suffix = next((end for end in (MASK, METADATA, BIN) if path.endswith(end)), None)
    if suffix is None and path.removesuffix(COMPRESSED).endswith(TEXT):
        return bool(_recorded(path.removesuffix(COMPRESSED), TEXT))
    if suffix is None or not os.path.isfile(path):
        return False
    prefix = path.removesuffix(suffix)
    has_sidecar = is_of_dataset(f"{prefix}{JSON}")
    if has_sidecar and suffix in (MASK, METADATA) and _recorded(prefix, suffix) == "":
        return False
    return has_sidecar or is_of_dataset(f"{prefix}{IDX}")


def _recorded(prefix: str, suffix: str) -> str | None:
    """Return the hash of the file ``suffix`` in the sidecar; empty if there is no such file, None if the sidecar is
    damaged.
    """
    from ...engine.data.sidecar import Sidecar

    try:
        sidecar = Sidecar.read(prefix)
    except UserError:
        return None
    if sidecar is None:
        return None
    return {
        MASK: sidecar.mask_xxh3_128,
        METADATA: sidecar.metadata_xxh3_128,
        TEXT: sidecar.text_xxh3_128,
    }[suffix]


def _head(path: str) -> bytes:
    """Return the first bytes of a regular file; nothing for other kinds of files."""
    if not os.path.isfile(path):
        return b""
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError:
        return b""
