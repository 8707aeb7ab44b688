"""Formats that are not supported: their names, and how to convert them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable

from ..formats import split_compression

_UNPACK = "unpack it, and name the folder"
_OFFICE = "soffice --headless --convert-to"
_FOREIGN: dict[tuple[str, ...], tuple[str, str]] = {
    (".mds",): ("MosaicML Streaming", "write its samples to JSONL or Parquet with streaming.StreamingDataset"),
    (".npy", ".npz"): ("NumPy arrays, mostly token ids", "preprocess the text that they were made of"),
    (".ds", ".ds.index"): ("tokens of datatrove", "preprocess the text that they were made of"),
    (".bin", ".idx"): (
        "binary data: litdata chunks, or a dataset that is tokenized already",
        "train on a tokenized dataset by its prefix under data.train; export litdata's samples to JSONL",
    ),
    (".tar", ".tgz", ".tbz2", ".txz"): ("a tar archive, such as a shard of WebDataset", _UNPACK),
    (".zip", ".7z", ".rar"): ("an archive", _UNPACK),
    (".tfrecord", ".tfrecords"): ("TFRecord", "export its texts to JSONL with tensorflow.data.TFRecordDataset"),
    (".avro", ".orc", ".lance", ".vortex"): ("a table format that is not read", "export it to Parquet"),
    (".h5", ".hdf5", ".pkl", ".pickle", ".pt", ".msgpack"): ("Python or HDF5 data", "export its texts to JSONL"),
    (".db", ".sqlite", ".sqlite3", ".duckdb"): ("a database", "export the table to Parquet or CSV"),
    (".xls",): ("an old Excel workbook", f"save it as .xlsx ({_OFFICE} xlsx FILE)"),
    (".xlsb", ".xlsm", ".ods", ".numbers"): ("a workbook that is not read", f"save it as .xlsx ({_OFFICE} xlsx FILE)"),
    (".doc", ".docx", ".odt", ".rtf"): ("a word processor's document", f"convert it to text ({_OFFICE} txt FILE)"),
    (".ppt", ".pptx"): ("slides", f"convert them to PDF ({_OFFICE} pdf FILE)"),
    (".epub", ".mobi", ".azw3", ".fb2"): ("an e-book", "convert it to text (pandoc -t plain FILE, or ebook-convert)"),
    (".tex", ".rst", ".org"): ("marked-up text", "convert it (pandoc -t markdown FILE), or give --input-format txt"),
    (".xml", ".yaml", ".yml"): ("structured text", "export its texts to JSONL, or give --input-format txt"),
    (".warc", ".wet", ".wat"): ("a web archive", "extract its texts to JSONL with datatrove or trafilatura"),
    (".lz4", ".br", ".z", ".lzma", ".lz", ".sz", ".snappy"): (
        "compressed in a way that is not read",
        "compress it as .zst",
    ),
}
_BY_SUFFIX = {suffix: entry for suffixes, entry in _FOREIGN.items() for suffix in suffixes}


def remedy(path: str) -> str | None:
    """Return what a file is and how to convert it, by its name; None if unknown."""
    stem, compression = split_compression(path.lower())
    if compression and stem.endswith((".parquet", ".arrow", ".xlsx", ".pdf")):
        return f"a {os.path.splitext(stem)[1]} file in {compression} compression; decompress it first"
    entry = _BY_SUFFIX.get(os.path.splitext(stem)[1])
    return None if entry is None else f"{entry[0]}, which is not read; {entry[1]}"


def most_common_remedy(paths: Iterable[str]) -> str | None:
    """Return the most common remedy for the files of a folder, with their number; None if there is none."""
    counts = Counter(text for text in map(remedy, paths) if text is not None)
    if not counts:
        return None
    ((text, count),) = counts.most_common(1)
    return f"{count:,} of them: {text}"
