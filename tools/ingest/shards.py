"""What one task leaves: files in the run's work folder that a later stage, or a restarted run, finds again.

A shard is named by a key that is computed from everything that decides its contents, so that a restart takes what it
finds under a task's key and nothing else. ``{key}.json`` is written last: without it a shard is not finished.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

DOCUMENT = np.dtype(
    [
        ("tokens", "<i8"),  # the end-of-document token included
        ("characters", "<i8"),
        ("text_bytes", "<i8"),  # in UTF-8
        ("metadata_bytes", "<i8"),  # of its line in {key}.metadata, line feed included; 0 where none is kept
        ("source", "<i4"),  # index of the --input argument
        ("digest", "<u8", (2,)),  # xxh3-128 of the text; zeros where nothing asked for it
    ]
)
"""One document of a shard: the records of ``{key}.npy``."""


@dataclass(frozen=True)
class Shard:
    """The files of one task."""

    folder: Path
    key: str

    @property
    def tokens(self) -> Path:
        """Tokens of all documents end to end, in the dataset's dtype."""
        return self.folder / f"{self.key}.tokens"

    @property
    def documents(self) -> Path:
        """``DOCUMENT`` records in .npy format."""
        return self.folder / f"{self.key}.npy"

    @property
    def mask(self) -> Path:
        """uint8, one for each token; only for data that has a loss mask."""
        return self.folder / f"{self.key}.mask"

    @property
    def metadata(self) -> Path:
        """A line of JSON for each document; only where metadata was asked for."""
        return self.folder / f"{self.key}.metadata"

    @property
    def bands(self) -> Path:
        """uint64[documents, bands] of MinHash in .npy format; only for --dedup minhash."""
        return self.folder / f"{self.key}.bands.npy"

    @property
    def rejects(self) -> Path:
        """A line of JSON for each record that is no document; only where the user opted in to skipping."""
        return self.folder / f"{self.key}.rejects"

    @property
    def result(self) -> Path:
        """Counts and hashes; its existence says that the shard is finished."""
        return self.folder / f"{self.key}.json"

    def sizes(self) -> dict[str, int]:
        """Bytes of each of its files but ``result``, by name."""
        paths = (self.tokens, self.documents, self.mask, self.metadata, self.bands, self.rejects)
        return {path.name: path.stat().st_size for path in paths if path.exists()}

    def remove(self) -> None:
        """Remove all files."""
        for path in self.folder.glob(f"{self.key}.*"):
            path.unlink()
