"""Prepares a run: its input files, its tokenizer, and the tokens around documents. Writes nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...engine.errors import UserError
from ...engine.tokenizer.frame import Token, TokenizerFrame, ids_of
from ..tokenizer.document_frame import DocumentFrame
from ..tokenizer.finding import find_tokenizer_file
from ..tokenizer.handle import TokenizerHandle, TokenizerSpec
from .cleaning.held_out import held_out_files
from .cleaning.languages import check_languages
from .dataset.checks import output_files, require_free, what_is_read
from .dataset_writer import best_dtype
from .fim import FimRule, fim_rule
from .inputs.files import expand_inputs
from .options import PreprocessOptions
from .tokenizer_choice import check_vocabulary, choose_tokenizer
from .windows import Windows, windows_of
from .workers.no_tokenizer import NoTokenizer
from .workers.pool import may_fork, start_early
from .workers.shared_tokenizer import use_one_thread
from .workers.tasks import are_small


class RunSetup:
    """The files and the tokenizer of a run that writes the dataset ``prefix``.

    Raises:
        UserError: wrong input or tokenizer, or the output exists.
    """

    def __init__(self, options: PreprocessOptions, prefix: str) -> None:
        self.options, self.prefix = options, prefix
        if options.languages:
            check_languages(options.languages)
        self.files = expand_inputs(options.input, options.inputs)
        self.held_out_files = held_out_files(options.held_out, options.text_choice) if options.held_out else []
        self.eod: Token | None = None
        self.begin: tuple[Token, ...] = ()
        """Tokens that documents begin with. Of conversations known when the chat template has been read."""
        self.end: tuple[Token, ...] = ()
        """Tokens that documents end with; the end-of-document token is the last."""
        self.named_bos: tuple[Token, ...] = ()
        self.fim: FimRule | None = None
        self.windows: Windows | None = None
        use_one_thread()
        if options.to_jsonl:
            self._check_outputs(None)
            self.tokenizer: TokenizerHandle = NoTokenizer()
            self.dtype = np.dtype(np.uint16)
        else:
            self._open_tokenizer()

    def _check_outputs(self, tokenizer_file: Path | None) -> None:
        """Check that the outputs replace no input, before any file is written or process started."""
        options = self.options
        self.works_here = options.encoder != "fast" and are_small(self.files, tokenizer_file)
        """Whether tasks run in this process."""
        self.reads = what_is_read(options, self.files, self.held_out_files, tokenizer_file)
        """All files that the run reads."""
        require_free({self.prefix: output_files(options, self.prefix)}, self.reads, options.overwrite, rejects=True)

    def _open_tokenizer(self) -> None:
        options = self.options
        choice = choose_tokenizer(options)
        print_notes(choice.notes)
        file = find_tokenizer_file(choice.name)
        self._check_outputs(file)
        spec = TokenizerSpec(choice.name, file, options.allow_special_tokens, self._backend, options.eod_token)
        # The templates of conversations need transformers, which starts threads.
        if not self.works_here and (options.chat or not may_fork()):
            start_early(spec)
        self.tokenizer, self.eod = _load_with_document_end(spec, options)
        if self.works_here and self.tokenizer.kind == "tokenizer.json" and options.encoder == "auto":
            self.tokenizer.use_reference("loading a faster one takes longer than encoding this input")
        self.dtype = best_dtype(self.tokenizer.vocab_size)
        frame = self.tokenizer.frame(choice.model_config)
        self.begin = frame.documents_begin_with(options.bos)
        self.end = self._document_end(frame)
        self.named_bos = frame.prefix or ((frame.bos,) if frame.bos else ())
        self.fim = fim_rule(options, self.tokenizer)
        self.windows = windows_of(options, ids_of(self.begin))
        inserted = (*self.begin, *self.end, *(self.fim.tokens if self.fim else ()))
        print_notes(check_vocabulary(self.tokenizer, choice, inserted))
        if frame.remark and options.bos == "auto" and not options.chat:
            print_notes([frame.remark])

    @property
    def spec(self) -> TokenizerSpec | None:
        """How worker processes load the tokenizer; None if the run writes text."""
        return None if self.options.to_jsonl else self.tokenizer.spec

    def compare_with_serving(self) -> None:
        """Print a note if transformers would serve the model with other ids.

        RunPlan does this for conversations.
        """
        if self.options.chat or self.tokenizer.is_served_alike:
            return
        if not self.works_here:
            start_early(self.tokenizer.spec)  # while transformers is imported, which starts threads
        if note := self.tokenizer.serving_note():
            print_notes([note])

    @property
    def frame(self) -> DocumentFrame:
        """The ids of ``begin`` and ``end``."""
        return DocumentFrame(ids_of(self.begin), ids_of(self.end))

    @property
    def _backend(self) -> str:
        """Of the tokenizer: one of ``BACKENDS``."""
        # The reference returns the position of each token in the text, which conversations need.
        if self.options.chat or (self.works_here and self.options.encoder == "auto"):
            return "reference"
        return "auto" if self.options.encoder == "fast" else self.options.encoder

    def _document_end(self, frame: TokenizerFrame) -> tuple[Token, ...]:
        if self.eod is None or not self.options.append_eod:
            return ()
        # A chat template itself writes what the tokenizer would add after a text.
        suffix = () if self.options.chat else frame.suffix
        return suffix if suffix and suffix[-1][1] == self.eod[1] else (*suffix, self.eod)


def print_notes(notes: Iterable[str]) -> None:
    """Print remarks for the user on stderr."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)


def _load_with_document_end(spec: TokenizerSpec, options: PreprocessOptions) -> tuple[TokenizerHandle, Token | None]:
    """Load a tokenizer and find its end-of-document token, which is optional only if none is appended."""
    tokenizer = replace(spec, eod_token=None).load()
    try:
        return tokenizer, tokenizer.eod(spec.eod_token)
    except UserError:
        if options.append_eod or options.eod_token is not None:
            raise
        return replace(spec, eod_token=None).load(), None  # in the first one the refused token may be ordinary text
