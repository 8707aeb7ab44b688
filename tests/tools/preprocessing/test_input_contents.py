"""Files are read as what they hold: JSON of any shape and name, unquoted tables, Arrow, workbooks."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from oracles.preprocessing import run
from oracles.reading import read_file

from retemper.engine.errors import UserError
from retemper.tools.preprocessing.readers import arrow, delimited, parquet

RECORDS = [{"text": "one", "id": 1}, {"text": "two\nlines", "id": 2}, {"text": "天🙂", "id": 3}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
BAD_SECOND_LINE = LINES.replace(b'{"text": "two', b'{"text" "two')
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".zstd": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# ---------------------------------------------------------------------------------------------------------------
# JSON

SHAPES = {
    "an object on each line": LINES,
    "without a last line end": LINES[:-1],
    "CRLF, a mark and blank lines": b"\xef\xbb\xbf\n" + LINES.replace(b"\n", b"\r\n\r\n"),
    "an array": json.dumps(RECORDS).encode(),
    "an array over lines": json.dumps(RECORDS, indent=1).encode(),
    "objects over lines": b"\n".join(json.dumps(record, indent=1).encode() for record in RECORDS),
    "a long first line": LINES.replace(b'"one"', b'"' + b"one" * 30_000 + b'"'),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.jsonlines", "a"])
@pytest.mark.parametrize("compression", [".gz", ".zstd", ".bz2", ".xz", ""])
def test_json_of_every_shape_is_read_under_every_name(tmp_path, shape, name, compression):
    path = written(tmp_path / f"{name}{compression}", COMPRESS[compression](SHAPES[shape]))
    texts = ["one" * 30_000 if "long" in shape else "one", "two\nlines", "天🙂"]
    assert [record["text"] for record in read_file(path).values] == texts
    # Compressed without saying so.
    if compression in (".gz", ".bz2"):
        written(tmp_path / name, path.read_bytes())
        assert [record["text"] for record in read_file(tmp_path / name).values] == texts


def test_a_bad_line_of_json_lines_costs_itself_whatever_the_name(tmp_path):
    for name in ("a.json", "a.jsonl"):
        reading = read_file(written(tmp_path / name, BAD_SECOND_LINE))
        assert [record["text"] for record in reading.values] == ["one", "天🙂"]
        assert [place.split(": ")[0] for place in reading.refused] == [f"{name}:2"]
    bad_first = written(tmp_path / "a.json", b'{"text":\n' + LINES)
    reading = read_file(bad_first)
    assert reading.values == RECORDS
    assert [place.split(": ")[0] for place in reading.refused] == ["a.json:1"]
    # One object over several lines, some of which are objects.
    nested = b'{"list": [\n{"a": 1},\n{"b": 2}\n]}\n'
    assert read_file(written(tmp_path / "a.json", nested), columns=None).values == [json.loads(nested)]
    # An object over several lines that is damaged takes the rest with it, and says so.
    with pytest.raises(UserError, match=r"a.json: has content after the end of JSON object 1"):
        read_file(written(tmp_path / "a.json", json.dumps(RECORDS[0], indent=1).encode() + b"\n5"))


def test_arrays_of_strings_are_texts(tmp_path):
    texts = ["one", 'with "quotes" and ]', "", "天🙂\n"]
    assert read_file(written(tmp_path / "a.json", json.dumps(texts).encode())).values == texts
    assert (
        read_file(written(tmp_path / "a.json.gz", gzip.compress(json.dumps(texts, indent=1).encode()))).values == texts
    )


def test_text_files_of_json_lines_are_records_if_they_have_the_key(tmp_path, capsys):
    for content, name in ((LINES, "a.txt"), (gzip.compress(LINES), "a.txt.gz")):
        for mode in ("file", "line"):
            assert read_file(written(tmp_path / name, content), txt_mode=mode).values == RECORDS
    assert "read as jsonl because of its content" in capsys.readouterr().err
    assert read_file(tmp_path / "a.txt", input_format="txt").values == [LINES.decode()]
    for text in (
        "{not json}\n",
        "[1] A footnote.\n",
        "{}",
        "[]\n\nx",
        "{\n}\n",
        '[{"a": 1}]',
        BAD_SECOND_LINE.decode(),
    ):
        assert read_file(written(tmp_path / "a.txt", text.encode())).values == [text]


def test_text_files_of_other_json_are_text(tiny_tokenizer, tmp_path):
    # Told by the key of the text, which --json-key names.
    written(tmp_path / "a.txt", b'{"setting": 1}\n{"setting": 2}\n')
    assert run(tiny_tokenizer, tmp_path / "1", tmp_path / "a.txt").documents == 1
    written(tmp_path / "b.txt", b'{"body": "a"}\n{"body": "b"}\n')
    assert run(tiny_tokenizer, tmp_path / "2", tmp_path / "b.txt").documents == 1
    assert run(tiny_tokenizer, tmp_path / "3", tmp_path / "b.txt", json_key=["body"]).documents == 2


def test_files_of_tables_are_told_by_their_first_bytes(tmp_path):
    table = pa.table({"text": ["a", "b"]})
    pa.parquet.write_table(table, tmp_path / "part-00000")
    assert [record["text"] for record in read_file(tmp_path / "part-00000").values] == ["a", "b"]
    written(tmp_path / "a.parquet.gz", gzip.compress((tmp_path / "part-00000").read_bytes()))
    written(tmp_path / "b.gz", gzip.compress((tmp_path / "part-00000").read_bytes()))
    for name in ("a.parquet.gz", "b.gz"):
        with pytest.raises(UserError, match=rf"{name}: .*parquet.* in .gz compression; decompress it first"):
            read_file(tmp_path / name)


NUMBERS = [2**63, 2**64 - 1, 2**64, 2**64 + 1, -(2**63) - 1, 10**30, 123456789012345678901234567890, 0.1, 1e22, -0.0]


def test_integers_beyond_64_bits_stay_as_they_are(tmp_path, tiny_tokenizer):
    records = [{"text": "a", "n": number, "deep": {"list": [number, "x"]}} for number in NUMBERS]
    written(tmp_path / "a.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())
    written(tmp_path / "b.json", json.dumps(records).encode())
    for name in ("a.jsonl", "b.json"):
        for columns in (None, ("text", "n", "deep")):
            assert read_file(tmp_path / name, columns=columns).values == records
        folder = tmp_path / name[0]
        run(tiny_tokenizer, folder, tmp_path / name, metadata=["n", "deep"], json_key=["{text} {n}"])
        kept = [json.loads(line) for line in (folder / "out.metadata.jsonl").read_bytes().splitlines()]
        assert kept == [{"n": record["n"], "deep": record["deep"]} for record in records]
        assert [str(line["n"]) for line in kept] == [str(number) for number in NUMBERS]


def test_integers_of_any_length_are_exact_or_refused(tmp_path):
    long = b"1" * 400
    content = b'{"text": "a", "n": %s}\n{"text": "b", "n": 1e400}\n{"text": "c", "n": %s}\n' % (long, b"1" * 5000)
    reading = read_file(written(tmp_path / "a.jsonl", content), columns=None)
    assert [record["n"] for record in reading.values] == [int(long)]
    assert [line.split(": ")[1] for line in reading.refused] == [
        "not valid JSON",
        "an integer of too many digits [malformed]",
    ]


# ---------------------------------------------------------------------------------------------------------------
# Tables of text

UNQUOTED = 'id\ttext\n1\t"Rain fell\n2\tA cat sat\n3\tit was over"\n4\t5" disks, "quoted" and \'so\'\n5\t"whole"\n'


def test_tsv_has_no_quoting(tmp_path):
    path = written(tmp_path / "a.tsv", UNQUOTED.encode())
    expected = list(csv.reader(io.StringIO(UNQUOTED), delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    reading = read_file(path)
    assert [[record["id"], record["text"]] for record in reading.values] == expected and len(expected) == 5
    assert reading.places == [f"a.tsv:{number}" for number in range(2, 7)]
    with_quoting = read_file(written(path, UNQUOTED.rsplit("\n4", 1)[0].encode() + b"\n"), quoting="standard")
    assert [record["id"] for record in with_quoting.values] == ["1"]


def test_tsv_that_was_written_with_quoting_is_noticed(tmp_path):
    rows = [["text", "id"], ["plain", "1"], ['He said "hi"', "2"], ["two\nlines", "3"]]
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        buffer = io.StringIO(newline="")
        csv.writer(buffer, delimiter="\t", quoting=quoting).writerows(rows)
        path = written(tmp_path / "a.tsv", buffer.getvalue().encode())
        expected = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
        assert read_file(path, quoting="standard").values == expected
        reading = read_file(path)
        if quoting == csv.QUOTE_ALL:
            assert (reading.values, reading.notes) == (expected, [])  # its header cannot be text
        else:
            assert reading.values[1]["text"] == '"He said ""hi"""'
            assert "a.tsv:3: cells seem to be quoted" in reading.notes[0]
            assert "give --quoting standard" in reading.refused[0]


SWALLOWED = {
    b'id,text\n1,"Rain fell\n2,A cat sat\n3,it was over"\n4,last\n': ("2", ["last"]),
    b'text,id\n"Rain fell,1\nit was over",2\nlast,4\n': (None, None),  # refused as it is, by the csv module
    b'a,text,c\nx,"one,y\nx,two",y\n': (None, None),
    b'id,text,n\n1,"one,7\n2,"two,8\n': (None, None),
    b'id,text\r\n1,"one\r\n2,two"\r\n': ("2", []),
}


@pytest.mark.parametrize("content", SWALLOWED)
def test_rows_that_a_chance_quote_would_swallow_are_refused(tmp_path, content):
    path = written(tmp_path / "a.csv", content)
    line, texts = SWALLOWED[content]
    if line is None:
        try:
            assert read_file(path).refused
        except UserError as error:
            assert "--quoting none" in str(error)
    else:
        reading = read_file(path)
        assert reading.refused[0].startswith(f"a.csv:{line}: a quote over ")
        assert [record["text"] for record in reading.values] == texts
    expected = list(csv.DictReader(io.StringIO(content.decode(), newline=""), quoting=csv.QUOTE_NONE))
    assert read_file(path, quoting="none").values == expected


def test_cells_over_several_lines_are_read_and_very_long_ones_noted(tmp_path, monkeypatch):
    cells = ["Dear Sir,\nyours, X", "a, b\nc, d", "first\n\nsecond", "1\n2", "x\n" * 30]
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([["id", "text"], *([str(n), cell] for n, cell in enumerate(cells))])
    path = written(tmp_path / "a.csv", buffer.getvalue().encode())
    assert [record["text"] for record in read_file(path).values] == cells
    assert read_file(path).notes == []
    monkeypatch.setattr(delimited, "_MANY_LINES", 20)
    assert "a.csv:11: a quoted cell spans 31 lines" in read_file(path).notes[0]
    one_column = written(tmp_path / "b.csv", b'text\n"a\nb"\n')
    assert read_file(one_column).values == [{"text": "a\nb"}]


# ---------------------------------------------------------------------------------------------------------------
# Arrow and Parquet

TABLE = pa.table(
    {
        "text": ["one", "", "天🙂", "a\0b", None, "x" * 5000],
        "id": [2**63, 2, 3, 4, 5, 2**64 - 1],
        "kind": pa.array(["a", "b", "a", None, "b", "a"]).dictionary_encode(),
        "nested": [{"n": [number, None]} for number in range(6)],
    },
    schema=pa.schema(
        {
            "text": pa.large_string(),
            "id": pa.uint64(),
            "kind": pa.dictionary(pa.int32(), pa.string()),
            "nested": pa.struct({"n": pa.list_(pa.int64())}),
        }
    ),
)


def write_arrow(path: Path, table: pa.Table, is_file: bool, rows: int = 4, **options: object) -> Path:
    new = pa.ipc.new_file if is_file else pa.ipc.new_stream
    with new(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_rows_of_arrow_are_those_of_pyarrow(tmp_path, monkeypatch, is_file, compression):
    monkeypatch.setattr(arrow, "_SLICE_ROWS", 3)
    path = write_arrow(tmp_path / "a.arrow", TABLE, is_file, compression=compression)
    reading = read_file(path, columns=None)
    assert (reading.values, reading.refused) == (TABLE.to_pylist(), [])
    assert reading.places == [f"a.arrow: row {number}" for number in range(1, 7)]
    assert read_file(path, columns=("text", "absent")).values == TABLE.select(["text"]).to_pylist()
    assert read_file(path.rename(tmp_path / "part-0"), columns=None).values == TABLE.to_pylist()


def test_text_that_is_not_utf_8_and_columns_that_are_absent_are_named(tmp_path):
    binary = pa.array([b"good", b"ba\xff", None], type=pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, binary.buffers())  # unchecked
    reading = read_file(write_arrow(tmp_path / "a.arrow", pa.table({"text": text}), False))
    assert [record["text"] for record in reading.values] == ["good", None]
    assert reading.refused == ["a.arrow: row 2: column 'text' is not valid UTF-8: byte 0xff at byte 3 [invalid UTF-8]"]
    table = pa.table({"id": [1], "content": ["a"]})
    pa.parquet.write_table(table, tmp_path / "b.parquet")
    for path in (write_arrow(tmp_path / "b.arrow", table, True), tmp_path / "b.parquet"):
        assert "no column 'text' (columns there: 'id', 'content')" in read_file(path).refused[0]
        assert "--json-key (here perhaps content)" in read_file(path).refused[0]
    empty = pa.table({"text": pa.array([], pa.string())})
    assert read_file(write_arrow(tmp_path / "c.arrow", empty, False)).values == []


def test_dictionaries_of_long_texts_are_read_in_small_steps(tmp_path, monkeypatch):
    for module in (arrow, parquet):
        monkeypatch.setattr(module, "_MAX_REPEATED_BYTES", 100)
    texts = pa.array(["a" * 60, "b", "a" * 60, "c", "b"] * 3).dictionary_encode()
    table = pa.table({"text": texts})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    for path in (write_arrow(tmp_path / "a.arrow", table, True, rows=100), tmp_path / "a.parquet"):
        assert read_file(path).values == table.to_pylist()


# ---------------------------------------------------------------------------------------------------------------
# Workbooks


def workbook(path: Path, **sheets: list[list[object]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl", reason="needs openpyxl: pip install openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_a_cover_is_no_data(tmp_path):
    data = [["id", "text"], [1, "one"], [2, "two"]]
    path = workbook(tmp_path / "a.xlsx", Cover=[["Our corpus"], ["Version", 3]], Empty=[], Data=data, Legend=[["id"]])
    reading = read_file(path)
    assert [record["text"] for record in reading.values] == ["one", "two"]
    assert reading.refused == []
    assert reading.notes[0].endswith(
        "left out sheets 'Cover', 'Legend', without a column 'text'; --sheet NAME reads a sheet"
    )
    assert read_file(path, sheets=("Data",)).values == reading.values
    # Without any sheet that has the column, each is refused.
    path = workbook(tmp_path / "b.xlsx", Cover=[["Our corpus"]], Data=[["id", "body"], [1, "one"]])
    assert [line.split(":")[1] for line in read_file(path).refused] == [" sheet 'Cover' row 1", " sheet 'Data' row 1"]
    assert "here perhaps body" in read_file(path).refused[1]


def test_archives_under_the_name_of_a_workbook_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w") as archive:
        archive.writestr("a.jsonl", LINES)
    with pytest.raises(UserError, match=r"a.xlsx: truncated, damaged or not a valid XLSX file"):
        read_file(tmp_path / "a.xlsx")


def test_verses_in_quotes_are_one_cell_though_each_line_has_the_commas_of_a_row(tmp_path):
    verses = 'text,author\n"roses are red,\nviolets are blue",anonymous\nlast,x\n'
    path = written(tmp_path / "a.csv", verses.encode())
    assert read_file(path, columns=("text",)).values == list(csv.DictReader(io.StringIO(verses)))
