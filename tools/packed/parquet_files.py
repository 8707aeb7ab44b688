"""Writes packed sequences as Parquet files that the library datasets reads as one split."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engine.files.atomic import new_folder
from ..preprocessing.formats import require_library
from ..preprocessing.progress import ProgressReport

if TYPE_CHECKING:
    from .samples import PackedData, PackedSequence

RECORD, CARD = "packed.json", "README.md"
_GROUP_TOKENS = 1 << 22
"""Tokens in a row group, which is held in memory."""
_LISTS = ("input_ids", "labels", "position_ids", "seq_lengths")
_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---

Packed token sequences for language model training, written by Retemper: {rows:,} sequences of {length:,} tokens.
`packed.json` records the datasets that they are made from.

- `input_ids`: token ids.
- `labels`: `input_ids`, and -100 at the first token of each document and at tokens that are not trained on.
- `position_ids`: positions, from 0 in each document. `seq_lengths`: lengths of the documents.
- `source`: name of the dataset.
"""
_SHIFTED = """- `shift_labels`: for each position the next token, also across the end of the sequence, or -100.
"""


def write_parquet(data: PackedData, output: Path, tokens_per_file: int, shift_labels: bool) -> list[str]:
    """Write ``data/train-*.parquet``, a card and a record to the new folder ``output``; return the files' names.

    Raises:
        UserError: ``output`` exists or cannot be written, or pyarrow is missing.
    """
    rows_per_file = max(1, tokens_per_file // data.sequence_length)
    num_files = -(-data.num_rows // rows_per_file)
    rows = data.rows()
    columns = (*_LISTS, "shift_labels") if shift_labels else _LISTS
    with new_folder(output) as folder, ProgressReport("packing", data.num_rows * data.sequence_length * 4) as progress:
        (folder / "data").mkdir()
        for number in range(num_files):
            count = min(rows_per_file, data.num_rows - number * rows_per_file)
            path = folder / "data" / f"train-{number:05d}-of-{num_files:05d}.parquet"
            _write_file(path, islice(rows, count), columns, max(1, _GROUP_TOKENS // data.sequence_length))
            done = (number * rows_per_file + count) * data.sequence_length
            progress.show(4 * done, done)
        card = _CARD.format(rows=data.num_rows, length=data.sequence_length) + (_SHIFTED if shift_labels else "")
        (folder / CARD).write_text(card, encoding="utf-8")
        (folder / RECORD).write_text(json.dumps(data.record, indent=1) + "\n", encoding="utf-8")
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _write_file(path: Path, rows: Iterator[PackedSequence], columns: tuple[str, ...], rows_per_group: int) -> None:
    arrow: Any = require_library("pyarrow", str(path))
    parquet: Any = require_library("pyarrow.parquet", str(path))
    lists = [(name, arrow.list_(arrow.int32())) for name in columns]
    schema = arrow.schema([*lists, ("source", arrow.string())])
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(rows, rows_per_group)):
            arrays = [_list_array(arrow, [getattr(row, name) for row in group]) for name in columns]
            sources = arrow.array([row.source for row in group], arrow.string())
            writer.write_table(arrow.Table.from_arrays([*arrays, sources], schema=schema))


def _list_array(arrow: Any, rows: Iterable[np.ndarray]) -> Any:
    rows = list(rows)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return arrow.ListArray.from_arrays(offsets, arrow.array(np.concatenate(rows).astype(np.int32)))
