"""What one task leaves: files in the run's work folder that a later stage, or a restarted run, finds again.

A shard is named by a key that is computed from everything that decides its contents, so that a restart takes what it
finds under a task's key and nothing else. ``{key}.json`` is written last: without it a shard is not finished.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ....engine.errors import UserError
from ..records.errors import UNREADABLE

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


@dataclass
class TaskResult:
    """What went into a shard, and what did not. Kept as JSON beside it."""

    key: str
    documents: int = 0
    tokens: int = 0
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    """By source (its number as a string) and reason."""
    first_bad: str | None = None
    """``file:line: reason`` of the first record that was skipped."""
    notes: list[str] = field(default_factory=list)
    """What is worth knowing about files that were read without errors, and which ones are damaged."""
    fast_path_failures: int = 0
    """Batches that the reference encoded because the fast path failed on them."""
    encoder: str = ""
    """The library that encoded, and why it was not a faster one."""
    tokens_xxh3_128: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each file of the shard: a machine that lost power may keep a file's name without its end."""

    def count(self, source: int, reason: str, number: int = 1) -> None:
        """Note ``number`` documents that are left out."""
        reasons = self.left_out.setdefault(str(source), {})
        reasons[reason] = reasons.get(reason, 0) + number

    def count_note(self, source: int, note: str, number: int) -> None:
        """Count something of the documents kept that is not trained on. Of rare names the first ones are told apart."""
        known = self.left_out.get(str(source), {})
        if KEPT_NOTE + note not in known and sum(name.startswith(KEPT_NOTE) for name in known) >= _MOST_NOTES:
            note = "other keys not used"
        self.count(source, KEPT_NOTE + note, number)

    @property
    def bad(self) -> int:
        """Records that are no documents."""
        return sum(n for reasons in self.left_out.values() for name, n in reasons.items() if name in BAD_KINDS)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def read(path: Path) -> TaskResult:
        """From the file that :meth:`to_json` made.

        Raises:
            UserError: it is damaged.
        """
        try:
            return TaskResult(**json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); remove it") from None


BAD_KINDS = ("malformed", "invalid UTF-8", UNREADABLE)
DROPPED_TURNS = "turns beyond --max-tokens"
"""A count of messages of conversations that were kept, not of documents."""
KEPT_NOTE = "in kept conversations: "
"""Begins the other counts that are not of documents."""
_MOST_NOTES = 40
"""Kinds that are told apart in a task."""
