"""The options of the preprocess command, and which of them decide the contents of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from typing import Any

from ...engine.errors import UserError
from .formats import FORMATS
from .inputs.files import InputOptions
from .inputs.hub import parse_hub_dataset
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
    def writes_lines(self) -> bool:
        """Whether the outputs have a line of JSON for each document."""
        return bool(self.metadata or self.to_jsonl)

    @property
    def text_suffix(self) -> str:
        """Suffix of the files of ``to_jsonl``."""
        return {"plain": ".jsonl", "zst": ".jsonl.zst"}[self.to_jsonl or "plain"]

    def check(self) -> None:
        """Refuse meaningless values and combinations.

        Raises:
            UserError: naming the flag, its value and the remedy.
        """
        for is_wrong, message in self._problems():
            if is_wrong:
                raise UserError(message)
        _ = self.text_choice, self.shard_place

    def _problems(self) -> Iterator[tuple[object, str]]:
        """Yield (whether it is wrong, message) for each rule."""
        yield (
            self.tokenizer is not None and self.model is not None,
            f"--tokenizer {self.tokenizer} and --model {self.model} both name a tokenizer; remove one of them",
        )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            flag = f"--{name.replace('_', '-')}"
            yield value is not None and value < least, f"{flag} {value}: must be at least {least}"
        yield (
            self.max_tokens is not None and self.max_tokens < self.min_tokens,
            f"--max-tokens {self.max_tokens} is below --min-tokens {self.min_tokens}; no document fits",
        )
        threshold = self.dedup_threshold
        yield not 0 < threshold < 1, f"--dedup-threshold {threshold}: must be between 0 and 1"
        for name, value in (("template", self.chat_template), ("date", self.chat_date)):
            yield (
                value is not None and not self.chat,
                f"--chat-{name} is for --chat; add it, or leave the {name} out",
            )
        day = self.chat_date
        yield day is not None and not _is_day(day), f"--chat-date {day}: not a day; write it as in 2026-01-31"
        yield (
            self.chat and tuple(self.json_key) != ("text",),
            "--json-key names a text, --chat reads conversations; remove one of them",
        )
        for name, share in (
            ("min-letter-ratio", self.min_letter_ratio),
            ("min-language-score", self.min_language_score),
        ):
            yield not 0 <= share <= 1, f"--{name} {share}: must be between 0 and 1"
        for name, given in (
            ("fix-text", self.fix_text),
            ("strip-control", self.strip_control),
            ("normalize", self.normalize != "none"),
            ("remove-urls", self.remove_urls),
            ("collapse-whitespace", self.collapse_whitespace),
            ("min-chars", self.min_chars),
            ("min-letter-ratio", self.min_letter_ratio),
            ("languages", self.languages),
            ("quality", self.quality != "none"),
            ("held-out", self.held_out),
        ):
            yield self.chat and given, f"--{name} is for texts, not for --chat; remove one of them"
        yield (
            self.cache_folder is not None and self.output_prefix != "dataset",
            f"--output-prefix {self.output_prefix} and --cache-folder {self.cache_folder} both name the output; remove "
            "one of them",
        )
        yield from self._problems_of_text()
        yield from self._problems_of_parts()
        yield list(self.input).count("-") > 1, "--input -: standard input can be read only once"
        for name, form in (("stdin", self.stdin_format), ("input", self.input_format)):
            yield (
                form is not None and form not in FORMATS,
                f"--{name}-format {form}: unknown; choose from {', '.join(FORMATS)}",
            )

    def _problems_of_text(self) -> Iterator[tuple[object, str]]:
        """Yield the rules of ``--to-jsonl``, which needs no tokenizer."""
        for name, given in (
            ("tokenizer", self.tokenizer),
            ("model", self.model),
            ("chat", self.chat),
            ("no-append-eod", not self.append_eod),
            ("eod-token", self.eod_token),
            ("bos", self.bos != "auto"),
            ("allow-special-tokens", self.allow_special_tokens),
            ("min-tokens", self.min_tokens),
            ("max-tokens", self.max_tokens),
            ("cache-folder", self.cache_folder),
        ):
            yield self.to_jsonl and given, f"--{name} is for tokens, --to-jsonl writes text; remove one of them"
        yield (
            self.to_jsonl and TEXT_KEY in self.metadata,
            f"--metadata {TEXT_KEY}: --to-jsonl writes the text under this key; leave it out",
        )

    def _problems_of_parts(self) -> Iterator[tuple[object, str]]:
        """Yield the rules of options for datasets of the Hub, and for the parts of a run."""
        whole = [dataset for each in self.input if (dataset := parse_hub_dataset(each)) and not dataset.path]
        for name, part in (("subset", self.hf_subset), ("split", self.hf_split)):
            yield (
                part is not None and not whole,
                f"--hf-{name} {part}: is for --input hf://namespace/name, and no input is one; leave it out",
            )
        for name, given in (("signatures", self.signatures), ("exclude-documents", self.exclude_documents)):
            yield (
                given is not None and (self.dedup == "none" or self.shard is None),
                f"--{name} {given}: is for the parts of a deduplicated corpus; add --shard and --dedup",
            )

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


_LEAST = {"workers": 1, "min_chars": 0, "min_tokens": 0, "max_tokens": 1, "max_documents": 1, "max_expansion": 0}
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


def _is_day(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


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
