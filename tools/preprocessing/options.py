"""The options of the preprocess command, and which of them decide the contents of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...engine.errors import UserError
from .inputs.files import InputOptions
from .readers.expansion_limit import DEFAULT_EXPANSION
from .records.reading import ReadOptions
from .records.text_choice import TextChoice

TEXT_KEY = "text"
"""Key of the text in what ``--to-jsonl`` writes."""
BATCH_CHARACTERS = 512 << 10
"""Text encoded at once: large enough to make batches cheap, small enough to stay in cache with its ids."""


@dataclass(frozen=True)
class PreprocessOptions:
    """The fields are the command's flags, under the same names."""

    input: Sequence[str]
    tokenizer: str | None = None
    """None: that of ``model``, or Qwen2's without one."""
    output_prefix: str = "dataset"
    json_key: Sequence[str] = ("text",)
    metadata: Sequence[str] = ()
    txt_mode: str = "file"
    stdin_format: str = "jsonl"
    input_format: str | None = None
    """None: by name and content."""
    hf_subset: str | None = None
    """Subset of a dataset of the Hugging Face Hub; None: the default one."""
    hf_split: str | None = None
    """Split of a dataset of the Hugging Face Hub; None: the only one, or train."""
    quoting: str = "auto"
    sheet: Sequence[str] = ()
    """Empty: sheets with the text's column."""
    pdf_pages: bool = False
    max_expansion: int = DEFAULT_EXPANSION
    chat: bool = False
    chat_template: str | None = None
    chat_date: str | None = None
    """YYYY-MM-DD, the date for templates; None: the day of the run."""
    model: str | None = None
    """Folder, checkpoint or Hub name of a model; its tokenizer is used."""
    append_eod: bool = True
    eod_token: str | None = None
    """None: the tokenizer's document end."""
    bos: str = "auto"
    """Whether documents begin with the BOS: one of ``BOS_CHOICES``; auto: as the tokenizer begins texts."""
    allow_special_tokens: bool = False
    fim_rate: float = 0.0
    """Share of the documents that are rearranged for fill-in-the-middle."""
    fim_spm_rate: float = 0.5
    """Share of these that begin with the suffix."""
    fim_tokens: Sequence[str] = ()
    """Tokens before prefix, suffix and middle, and perhaps one after the middle; empty: the tokenizer's, by name."""
    window: int | None = None
    """Tokens in the windows into which longer documents are cut; None: they stay whole."""
    window_overlap: int = 0
    """Tokens that a window repeats of the one before it."""
    window_loss: str = "new"
    """Targets in a window: "new": the tokens that it does not repeat; "all": all of them."""
    encoder: str = "auto"
    """auto: reference for small inputs, in this process; else fast, in workers. Both give the same ids."""
    workers: int | None = None
    """None: the usable cores."""
    overwrite: bool = False
    skip_bad_lines: bool = False
    drop_invalid_utf8: bool = False
    fix_text: bool = False
    strip_control: bool = False
    normalize: str = "none"
    remove_urls: bool = False
    collapse_whitespace: bool = False
    min_chars: int = 0
    min_letter_ratio: float = 0.0
    languages: Sequence[str] = ()
    """ISO 639 codes; empty: all languages."""
    min_language_score: float = 0.65
    quality: str = "none"
    to_jsonl: str | None = None
    """Write text instead of tokens: "plain" to .jsonl, "zst" to .jsonl.zst."""
    min_tokens: int = 0
    max_tokens: int | None = None
    max_documents: int | None = None
    dedup: str = "none"
    dedup_threshold: float = 0.8
    held_out: Sequence[str] = ()
    shuffle: bool = False
    seed: int = 0
    split: str | None = None
    bins: str | None = None
    """Key whose values divide the documents into datasets."""
    bin_weights: str = "balanced"
    shard: str | None = None
    cache_folder: str | None = None
    """Folder in which the dataset is named by its content, instead of ``output_prefix``."""
    report: str | None = None
    """File for the prefixes and counts of the datasets, in JSON."""
    signatures: str | None = None
    """Folder: write the signatures of a part's documents there, instead of the dataset."""
    exclude_documents: str | None = None
    """File with the duplicates of a part that were found in all parts; None: find them within the part."""
    list_inputs: bool = False
    """Print the input files instead of preprocessing them."""
    task_bytes: int | None = None
    """Input bytes in a task; None: by the corpus. No flag."""
    batch_characters: int = BATCH_CHARACTERS
    """Text encoded at once; no flag."""

    @property
    def text_choice(self) -> TextChoice:
        """The parsed ``json_key``."""
        return TextChoice.parse(self.json_key)

    @property
    def shard_place(self) -> tuple[int, int] | None:
        """(I, N) of ``--shard I/N``. Raises UserError for other forms."""
        if self.shard is None:
            return None
        index, slash, count = self.shard.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise UserError(f"--shard {self.shard}: write I/N, with I from 0 to N - 1, as in --shard 3/16")
        return int(index), int(count)

    @property
    def inputs(self) -> InputOptions:
        """How the files of ``input`` are interpreted."""
        keys = None if self.chat else self.text_choice.roots
        return InputOptions(
            txt_mode=self.txt_mode,
            stdin_format=self.stdin_format,
            input_format=self.input_format,
            keys=keys,
            skip_damage=self.skip_bad_lines,
            hf_subset=self.hf_subset,
            hf_split=self.hf_split,
        )

    @property
    def reading(self) -> ReadOptions:
        """How they are read."""
        return ReadOptions(
            quoting=self.quoting,
            sheets=tuple(self.sheet),
            max_expansion=self.max_expansion,
            pdf_pages=self.pdf_pages,
            skip_damage=self.skip_bad_lines,
        )

    @property
    def minhash_threshold(self) -> float | None:
        """Similarity of near-duplicates; None: keep them."""
        return self.dedup_threshold if self.dedup == "minhash" else None

    @property
    def needs_digests(self) -> bool:
        """Whether the outputs need a hash of each document."""
        return self.dedup == "exact" or self.split is not None

    @property
    def masks_overlap(self) -> bool:
        """Whether the tokens that windows repeat get loss mask 0."""
        return self.window is not None and self.window_overlap > 0 and self.window_loss == "new"

    @property
    def writes_mask(self) -> bool:
        """Whether the dataset has a loss mask."""
        return self.chat or self.masks_overlap

    @property
    def writes_lines(self) -> bool:
        """Whether the outputs have a line of JSON for each document."""
        return bool(self.metadata or self.to_jsonl)

    @property
    def text_suffix(self) -> str:
        """Suffix of the files of ``to_jsonl``."""
        return {"plain": ".jsonl", "zst": ".jsonl.zst"}[self.to_jsonl or "plain"]

    def record(self) -> dict[str, Any]:
        """Return what the sidecar keeps: the non-default options that decide the dataset's contents."""
        kept = {}
        for field in fields(self):
            value = getattr(self, field.name)
            value = list(value) if isinstance(value, tuple | list) else value
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            if field.name not in NOT_CONTENTS and value != default:
                kept[field.name] = value
        if self.exclude_documents is not None:
            kept["exclude_documents"] = True  # the file is of one part and temporary
        return kept


NOT_CONTENTS = frozenset(
    [
        "input",
        "list_inputs",
        "signatures",
        "cache_folder",
        "report",
        "tokenizer",
        "model",
        "output_prefix",
        "append_eod",
        "eod_token",
        "bos",
        "encoder",
        "workers",
        "overwrite",
        "bin_weights",
        "task_bytes",
        "batch_characters",
    ]
)
"""Options that the sidecar records elsewhere, or on which no document depends."""
_NOT_IN_OUTPUTS = frozenset(
    [
        "max_expansion",
        "max_documents",
        "shuffle",
        "seed",
        "shard",
        "skip_bad_lines",
        "split",
        "dedup",
        "dedup_threshold",
        "held_out",
        "chat_template",
        "to_jsonl",
        "encoder",
        "hf_subset",
        "hf_split",
        "exclude_documents",
    ]
)
"""Options that are applied after tokenization, that only decide whether an error ends the run, or that name files."""


def task_key(span_facts: Sequence[Mapping[str, Any]], contents: Mapping[str, Any]) -> str:
    """Return the key of a task's output: a hash of the facts of its spans and of :func:`contents_of`."""
    text = json.dumps([list(span_facts), dict(contents)], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def contents_of(options: PreprocessOptions, **others: str | int | None) -> dict[str, Any]:
    """Return everything besides the input that decides what the outputs of a run's tasks contain.

    Args:
        others: hashes and versions that represent files and libraries.
    """
    kept = {name: value for name, value in asdict(options).items() if name not in _NOT_IN_OUTPUTS | NOT_CONTENTS}
    return {**kept, "encoder": options.encoder, "digests": options.needs_digests, **others}
