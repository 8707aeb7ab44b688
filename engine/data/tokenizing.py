"""Run tools/preprocess.py as a process that tokenizes a text of a run into the cache of datasets."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..system import environment_of_tool
from .text_sources import TRAIN, VALID, TextSource

PREPROCESS = Path(__file__).resolve().parents[2] / "tools" / "preprocess.py"


@dataclass(frozen=True)
class CachedDataset:
    """A dataset in the cache."""

    prefix: str
    documents: int
    tokens: int


class TokenizingJob:
    """The process that makes the datasets of one text.

    Args:
        text: the text.
        tokenizer: options of tools/preprocess.py that name the tokenizer.
        cache: folder of the datasets.
    """

    def __init__(self, text: TextSource, tokenizer: Sequence[str], cache: Path) -> None:
        self._text = text
        self._words = [*text.arguments(), *tokenizer, "--cache-folder", str(cache)]
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, part: str | None = None) -> dict[str, CachedDataset]:
        """Make the datasets unless the cache has them; return them by side: ``train`` and ``valid``, or "" for all.

        Args:
            part: ``I/N``: make only part I of N. A later call without it joins the parts.

        Raises:
            UserError: the text cannot be tokenized. After :meth:`stop` the result is empty instead.
        """
        with tempfile.TemporaryDirectory(prefix="retemper-") as folder:
            report, problem = Path(folder, "report.json"), Path(folder, "error")
            words = [*self._words, "--report", str(report), *(["--shard", part] if part else [])]
            self._process = subprocess.Popen(
                [sys.executable, str(PREPROCESS), *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment_of_tool(problem),
            )
            try:
                status = self._process.wait()
            except BaseException:  # such as Ctrl-C
                self._process.terminate()
                self._process.wait()
                raise
            if self._stopped:
                return {}
            if status:
                reason = problem.read_text(encoding="utf-8") if problem.exists() else f"ended with status {status}"
                raise UserError(f"{self._text.key}: {reason}")
            found = json.loads(report.read_text(encoding="utf-8"))["datasets"]
        datasets = [CachedDataset(one["prefix"], one["documents"], one["tokens"]) for one in found]
        return {side_of(one.prefix): one for one in datasets}

    def stop(self) -> None:
        """End the process soon. Its finished work is kept, and the next run continues from it."""
        if self._stopped:  # a second signal would interrupt its cleanup
            return
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()


def side_of(prefix: str) -> str:
    """Return ``train`` or ``valid``, with which the prefix of a side ends, or "" for a dataset that is not split."""
    ending = prefix.rpartition(".")[2]
    return ending if ending in (TRAIN, VALID) else ""
