"""Read and write the sidecar ``{prefix}.json``: the inputs of an indexed dataset, and its tokenizer.

Megatron's two files do not record the tokenizer, nor the ends of documents. The sidecar does, so that a run can refuse
a dataset made for another vocabulary. Datasets made by other programs have no sidecar, and work without it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_origin, get_type_hints

from ..errors import UserError
from ..files.regular import read_regular

if TYPE_CHECKING:
    from .indexed_dataset import IndexedDataset

FORMAT_VERSION = 2
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class InputSource:
    """One ``--input`` argument: a file, or all files of a folder or pattern."""

    name: str
    """Name as given on the command line."""
    files: int
    bytes: int
    """Size of the files on disk."""
    documents: int
    """Number of kept documents."""
    tokens: int
    """Number of their tokens, end-of-document tokens included."""
    characters: int
    """Number of Unicode code points in their text."""
    text_bytes: int
    """Size of their text in UTF-8, in bytes."""
    left_out: dict[str, int]
    """Number of documents, invalid lines or rows, conversation turns and untrained parts of kept conversations that
    were left out, by reason."""
    changed: dict[str, int] = field(default_factory=dict)
    """Number of documents that cleaning, ``--fim-rate`` or ``--window`` changed, by option; they were not left out by
    their text."""


@dataclass(frozen=True)
class Sidecar:
    """The content of ``{prefix}.json``. The dataset writer fills in the counts and hashes at the end."""

    tokenizer: str
    """Folder, file or Hugging Face Hub name of the tokenizer, as given."""
    tokenizer_sha256: str
    """SHA-256 of the tokenizer's file, in hexadecimal."""
    vocab_size: int
    """Upper bound of the tokenizer's ids, added tokens included (exclusive)."""
    append_eod: bool
    """True if each document ends with the end-of-document token."""
    eod_token: str | None
    """The end-of-document token. None: there is no such token; append_eod is then false."""
    eod_id: int | None
    """Id of the end-of-document token."""
    sources: tuple[InputSource, ...]
    """The inputs, in the order of their documents unless these were shuffled."""
    options: dict[str, Any]
    """Non-default options that affect the choice of documents or their text."""
    dtype: str = ""
    """Token dtype of .bin: "uint16" or "int32"."""
    documents: int = 0
    tokens: int = 0
    """Tokens in .bin, end-of-document tokens included."""
    max_token_id: int = -1
    """Largest id in .bin; -1 if it is empty."""
    bin_xxh3_128: str = ""
    """xxh3-128 of .bin, in hexadecimal."""
    idx_xxh3_128: str = ""
    """xxh3-128 of .idx, in hexadecimal."""
    mask_xxh3_128: str = ""
    """xxh3-128 of .mask.bin; empty if there is none."""
    metadata_xxh3_128: str = ""
    """xxh3-128 of .metadata.jsonl; empty if there is none."""
    text_xxh3_128: str = ""
    """xxh3-128 of the .jsonl or .jsonl.zst, in the record of a file of text, which has no tokenizer and no tokens.
    Empty for datasets."""
    bos_token: str | None = None
    """The BOS at the beginning of each document, as text. None: no token is added. For conversations, the beginning
    that the chat template adds."""
    bos_ids: tuple[int, ...] | None = None
    """Ids of the BOS; empty: no token is added. None: not recorded, in datasets of earlier versions."""
    eos_ids: tuple[int, ...] | None = None
    """Ids that the tokenizer adds after a text, before the end-of-document token; nearly always empty. None: not
    recorded."""
    tokenizer_fingerprint: str = ""
    """Fingerprint of the tokenizer's vocabulary and behaviour, see :mod:`tokenizer_fingerprint`; empty in datasets of
    earlier versions."""

    @staticmethod
    def read(prefix: str | os.PathLike[str]) -> Sidecar | None:
        """Return the sidecar of the dataset ``prefix`` (without suffix), or None if it has none.

        Raises:
            UserError: the file cannot be read, is not a sidecar, or has another format version.
        """
        path = Path(f"{os.fspath(prefix)}.json")
        try:
            record = json.loads(read_regular(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}); {_REMEDY}") from error
        if not isinstance(record, dict) or "format_version" not in record:
            raise UserError(f"{path}: not a dataset's sidecar: it has no format_version; {_REMEDY}")
        version = record.pop("format_version")
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: format_version {version}, but only {FORMAT_VERSION} is supported; {_REMEDY}")
        sources = record.get("sources")
        if not isinstance(sources, list):
            raise UserError(f"{path}: sources is not a list; {_REMEDY}")
        record["sources"] = tuple(_from_record(InputSource, _with_changed(source), path) for source in sources)
        record = {**_ADDED_LATER, **record}
        return _from_record(Sidecar, record, path)

    def to_json(self) -> bytes:
        """Return the file's bytes, which are a function of the contents."""
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2, ensure_ascii=False)
        # A path that is not valid UTF-8 holds lone surrogates. After replacement by a backslash they are JSON escapes.
        return (text + "\n").encode("utf-8", "backslashreplace")

    @property
    def characters(self) -> int:
        """Number of Unicode code points in the documents' text."""
        return sum(source.characters for source in self.sources)

    @property
    def text_bytes(self) -> int:
        """Size of the documents' text in UTF-8, in bytes."""
        return sum(source.text_bytes for source in self.sources)

    @property
    def left_out(self) -> dict[str, int]:
        """Counts over all sources, by reason."""
        return _total(source.left_out for source in self.sources)

    @property
    def changed(self) -> dict[str, int]:
        """Counts over all sources, by option."""
        return _total(source.changed for source in self.sources)


def _total(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


def require_same_dataset(sidecar: Sidecar, dataset: IndexedDataset) -> None:
    """Check that ``sidecar`` belongs to ``dataset``, without reading the data.

    Raises:
        UserError: names the first difference.
    """
    if dataset.remarks:  # acceptable in datasets of other programs; datasets with a sidecar were written in order
        raise UserError(
            f"{dataset.remarks[0]}; {dataset.prefix}.json shows that it was written by tools/preprocess.py or "
            "tools/merge.py, so this is damage: build or copy all files of the dataset again, or remove the .json if "
            "the index was changed on purpose"
        )
    facts: tuple[tuple[str, object, object], ...] = (
        ("documents", sidecar.documents, dataset.num_documents),
        ("tokens", sidecar.tokens, dataset.num_tokens),
        ("dtype", sidecar.dtype, dataset.dtype.name),
        ("a loss mask", bool(sidecar.mask_xxh3_128), dataset.has_loss_mask),
    )
    for name, recorded, found in facts:
        if recorded != found:
            raise UserError(
                f"{dataset.prefix}.json: says {name}: {recorded}, but the dataset's files say {found}; build or copy "
                "all files of the dataset again"
            )


_ADDED_LATER: dict[str, Any] = {
    "tokenizer_fingerprint": "",
    "text_xxh3_128": "",
    "bos_token": None,
    "bos_ids": None,
    "eos_ids": None,
}
"""Fields that sidecars of this format version may lack, and their default values."""
_REMEDY = "build the dataset again, or remove this file to skip the checks that need it"


def _with_changed(source: Any) -> Any:
    """Add what earlier versions did not count."""
    return {"changed": {}, **source} if isinstance(source, dict) else source


def _from_record(kind: type[_Record], record: Any, path: Path) -> _Record:
    """Build the dataclass ``kind`` from a JSON object that has exactly its fields, each of the right type."""
    if not isinstance(record, Mapping):
        raise UserError(f"{path}: {kind.__name__.lower()} is not an object; {_REMEDY}")
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if missing := [name for name in names if name not in record]:
        raise UserError(f"{path}: has no {', '.join(missing)}; {_REMEDY}")
    if unknown := sorted(set(record) - set(names)):
        raise UserError(f"{path}: unknown {', '.join(unknown)}; {_REMEDY}")
    for name, hint in get_type_hints(kind).items():
        value = record[name]
        if name in ("bos_ids", "eos_ids"):
            if value is not None and not (isinstance(value, list) and all(type(number) is int for number in value)):
                raise UserError(f"{path}: {name} is {value!r}, not a list of token ids; {_REMEDY}")
            record = {**record, name: None if value is None else tuple(value)}
            continue
        wanted = tuple if name == "sources" else dict if get_origin(hint) is dict else hint
        fits = isinstance(value, wanted) and (hint is bool or not isinstance(value, bool))
        if hint == dict[str, int]:
            fits = fits and all(type(number) is int for number in value.values())
        if not fits:
            raise UserError(f"{path}: {name} is {value!r}, not {getattr(hint, '__name__', hint)}; {_REMEDY}")
    return kind(**record)
