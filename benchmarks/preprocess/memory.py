"""Check that memory is bounded: run the preprocess command on one very long document, and on a large corpus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..process_tree import Cost
from .corpora import BenchmarkCorpus, write_documents, write_long_document

FIXED_MB = 1000
MB_A_WORKER = 300


@dataclass(frozen=True)
class MemoryUse:
    """The peak memory of one run."""

    what: str
    text_mb: float
    peak_mb: float
    """Peak of the whole process tree, without pages of mapped files, which the system reclaims when it needs memory."""
    peak_with_files_mb: float
    allowed_mb: float
    """Limit: 1 GB, and 300 MB for each worker."""
    seconds: float


def check_memory(
    run: Callable[[BenchmarkCorpus, Path], Cost], key: str, megabytes: tuple[float, float], workers: int, folder: Path
) -> list[MemoryUse]:
    """Run the command on synthetic text.

    Args:
        run: runs the command on a corpus, with the prefix of its output.
        megabytes: size of the one document, and of the corpus of many.
        workers: of the command.
        folder: for corpus and output, which are removed at once.
    """
    found = []
    corpora = (("one document", write_long_document), ("many documents", write_documents))
    for (what, write), size in zip(corpora, megabytes, strict=True):
        corpus = write(folder / "memory.jsonl", key, int(size * 1e6))
        cost = run(corpus, folder / "memory")
        for path in folder.glob("memory.*"):
            path.unlink()
        allowed = FIXED_MB + MB_A_WORKER * workers
        peaks = cost.peak_mb, cost.peak_with_files_mb
        found.append(MemoryUse(what, corpus.text_bytes / 1e6, *peaks, allowed, cost.wall_seconds))
    return found
