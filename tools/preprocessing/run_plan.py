"""Divides a run into tasks, each with the key of its output, and prepares what the workers need."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import date
from pathlib import Path

from ... import __version__
from ...engine.files.paths import is_url
from ...engine.tokenizer.frame import ids_of
from .chat.conversation import ChatBos
from .cleaning.cleaner import Cleaner
from .cleaning.held_out import read_held_out
from .cleaning.libraries import cleaning_libraries
from .dedup.minhash import MinHasher
from .inputs.files import with_stdin_copied
from .options import PreprocessOptions, contents_of, task_key
from .records.errors import UNREADABLE
from .run_setup import RunSetup
from .workers.tasks import Span, choose_task_bytes, plan_tasks, shard_of_tasks
from .workers.worker import WorkerSettings


class RunPlan:
    """The tasks of a run.

    Args:
        setup: with ``--chat``, its ``begin`` is set here.
        work: folder of outputs and temporary files.
    """

    def __init__(self, setup: RunSetup, work: Path) -> None:
        self.setup, self.work = setup, work
        self.options = setup.options
        """For the sidecar: with the day of the run if a chat template writes the date."""
        self._dated_options = replace(self.options, chat_date=self.options.chat_date or date.today().isoformat())
        if setup.fim is not None:  # the sidecar records the tokens
            self.options = replace(self.options, fim_tokens=[name for name, _ in setup.fim.tokens])
        self._chat_bos = ChatBos(self.options.bos, ids_of(setup.named_bos))
        self._held_out: Path | None = None
        self.files = with_stdin_copied(setup.files, work / "stdin")
        index, count = self.options.shard_place or (0, 1)
        task_bytes = self.options.task_bytes or choose_task_bytes(self.files, count)
        tasks = shard_of_tasks(plan_tasks(self.files, task_bytes), index, count)
        chat = self._prepare_chat()
        contents = contents_of(
            self.options,
            version=__version__,
            tokenizer=setup.tokenizer.sha256,
            # The token affects how text is encoded, the ids what documents begin and end with.
            eod_token=setup.eod[0] if setup.eod else None,
            frame=f"{setup.frame.prefix} {setup.frame.suffix}",
            chat=chat,
            held_out=self._prepare_held_out(),
            minhash=_minhash_fingerprint(self.options),
            cleaning=cleaning_libraries(self.options),
            fim=repr(setup.fim),
        )
        self.tasks = {task_key([_facts(span) for span in task.spans], contents): task for task in tasks}
        """By the key of their output."""

    @property
    def settings(self) -> WorkerSettings:
        """What every worker process needs to know."""
        setup = self.setup
        return WorkerSettings(
            self._dated_options,
            setup.spec,
            setup.tokenizer.sha256,
            setup.dtype.str,
            self.work,
            setup.frame,
            self._chat_bos,
            self._held_out,
            setup.fim,
            setup.windows,
        )

    @property
    def refused(self) -> set[str]:
        """Reasons for which no record may be skipped."""
        skip = self.options.skip_bad_lines
        allowed = {"malformed": skip, UNREADABLE: skip, "invalid UTF-8": skip or self.options.drop_invalid_utf8}
        return {kind for kind, yes in allowed.items() if not yes}

    def _prepare_chat(self) -> str | None:
        """Check the encoder of conversations against transformers; return its fingerprint."""
        if not self.options.chat:
            return None
        from .chat.encoder import chat_encoder

        encoder = chat_encoder(self._dated_options, self.setup.tokenizer.file, self.setup.frame, self._chat_bos)
        encoder.check_against_transformers()
        self.setup.begin = self.setup.named_bos if encoder.begins_with_bos else ()
        if encoder.tells_date:
            # Recorded in the sidecar, so that shards of different days are not joined.
            self.options = self._dated_options
        return encoder.fingerprint

    def _prepare_held_out(self) -> str | None:
        """Write the n-grams of the ``--held-out`` files to a file for the workers; return their fingerprint."""
        options = self.options
        if not options.held_out:
            return None
        # What is left out of the corpus, such as short texts, is held out nevertheless.
        cleaner = Cleaner(replace(options, min_chars=0, min_letter_ratio=0.0, languages=(), quality="none"))
        ngrams = read_held_out(self.setup.held_out_files, options.text_choice, cleaner, self.work, options.reading)
        self._held_out = self.work / "held-out.npz"
        ngrams.save(self._held_out)
        return ngrams.fingerprint


def _minhash_fingerprint(options: PreprocessOptions) -> str | None:
    threshold = options.minhash_threshold
    return None if threshold is None else MinHasher(threshold).fingerprint


def _facts(span: Span) -> dict[str, object]:
    """Return what decides the contents of a span."""
    file = span.file
    return {
        "path": file.path if is_url(file.path) else os.path.abspath(file.path),
        "size": file.size,
        "version": file.version,
        "format": file.format,
        "source": file.source,
        "start": span.start,
        "stop": span.stop,
    }
