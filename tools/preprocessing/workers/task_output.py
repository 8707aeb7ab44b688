"""What a task leaves in the run's work folder: files that a later stage, or a restarted run, finds again.

Their names begin with a key, a hash of everything that decides their contents: a restart reuses exactly the outputs
that are still right. ``{key}.json`` is written last; an output without it is unfinished.
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
        ("tokens", "<i8"),  # BOS, end-of-document token and what windows repeat included
        ("characters", "<i8"),
        ("text_bytes", "<i8"),  # in UTF-8
        ("metadata_bytes", "<i8"),  # of its line in {key}.metadata, line feed included; 0 without metadata
        ("source", "<i4"),  # index of the --input argument
        ("bin", "<i4"),  # index in TaskResult.bins; 0 without --bins
        ("digest", "<u8", (2,)),  # xxh3-128 of the text; zeros if no option needs it
    ]
)
"""A document of an output: the records of ``{key}.npy``."""


class TaskOutput:
    """The files of one task."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.tokens = folder / f"{key}.tokens"
        """Tokens of all documents end to end, in the dataset's dtype."""
        self.documents = folder / f"{key}.npy"
        """``DOCUMENT`` records in .npy format."""
        self.mask = folder / f"{key}.mask"
        """uint8 per token; only with ``--chat`` or ``--window-overlap``."""
        self.metadata = folder / f"{key}.metadata"
        """A line of JSON per document; only with ``--metadata``."""
        self.bands = folder / f"{key}.bands.npy"
        """uint64[documents, bands] of MinHash in .npy format; only with ``--dedup minhash``."""
        self.rejects = folder / f"{key}.rejects"
        """A line of JSON per skipped record, if there are any."""
        self.result = folder / f"{key}.json"
        """A :class:`TaskResult`; it exists if the output is finished."""

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file except ``result``, by name."""
        paths = (self.tokens, self.documents, self.mask, self.metadata, self.bands, self.rejects)
        return {path.name: path.stat().st_size for path in paths if path.exists()}

    def remove(self) -> None:
        """Remove all files."""
        for path in self.folder.glob(f"{self.key}.*"):
            path.unlink()


@dataclass
class TaskResult:
    """What an output holds, and what was left out."""

    key: str
    documents: int = 0
    tokens: int = 0
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    """Counts by source (its number as a string) and reason."""
    changed: dict[str, dict[str, int]] = field(default_factory=dict)
    """Documents that a step changed and did not leave out, by source (as above) and option."""
    bins: list[str] = field(default_factory=list)
    """Values of the key of ``--bins``, in the order in which they came."""
    first_bad: str | None = None
    """``file:line: reason`` of the first skipped record."""
    notes: list[str] = field(default_factory=list)
    """Remarks of the readers, and the damaged files."""
    fast_path_failures: int = 0
    """Batches that the reference tokenizer encoded because the fast one failed on them."""
    encoder: str = ""
    """The library that encoded, and why it was not a faster one."""
    tokens_xxh3_128: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each file: after a power failure a file may be shorter than it was."""

    def count(self, source: int, reason: str, number: int = 1) -> None:
        """Count ``number`` documents that are left out."""
        reasons = self.left_out.setdefault(str(source), {})
        reasons[reason] = reasons.get(reason, 0) + number

    def count_change(self, source: int, option: str, number: int = 1) -> None:
        """Count ``number`` documents that a step changed."""
        options = self.changed.setdefault(str(source), {})
        options[option] = options.get(option, 0) + number

    def count_note(self, source: int, note: str, number: int) -> None:
        """Count a part of kept documents that is not trained on. Rare names share one count."""
        known = self.left_out.get(str(source), {})
        if KEPT_NOTE + note not in known and sum(name.startswith(KEPT_NOTE) for name in known) >= _MAX_NOTES:
            note = "other keys not used"
        self.count(source, KEPT_NOTE + note, number)

    @property
    def bad(self) -> int:
        """Number of skipped records."""
        return sum(n for reasons in self.left_out.values() for name, n in reasons.items() if name in BAD_KINDS)

    @staticmethod
    def read(path: Path) -> TaskResult:
        """Read the JSON that :meth:`to_json` made. Raise UserError if it is damaged."""
        try:
            return TaskResult(**json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); remove it") from None

    def to_json(self) -> str:
        """Return the record as JSON."""
        return json.dumps(asdict(self))


BAD_KINDS = ("malformed", "invalid UTF-8", UNREADABLE)
DROPPED_TURNS = "turns beyond --max-tokens"
"""Counts messages of kept conversations, not documents."""
KEPT_NOTE = "in kept conversations: "
"""Prefix of the other counts that are not of documents."""
_MAX_NOTES = 40
