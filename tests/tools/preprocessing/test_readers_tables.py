"""Readers of tables: rows as the csv module, pyarrow and openpyxl write them, and files that are none."""

from __future__ import annotations

import csv
import datetime
import gzip
import importlib
import io
import re
import zipfile
from itertools import combinations
from pathlib import Path

import pytest
import zstandard
from oracles.reading import read_file

from retemper.engine.errors import UserError
from retemper.tools.preprocessing import formats
from retemper.tools.preprocessing.inputs.files import InputOptions, expand_inputs
from retemper.tools.preprocessing.readers import delimited, parquet

ROWS = [
    ["text", "id", ""],
    ["plain", "1", "x"],
    ['with "quotes", commas\tand tabs', "2", ""],
    ["two\nlines\r\nthree", "3", "y"],
    ["", "", ""],
    [" spaces ", "天🙂\u2028\x85", "\x0b"],
]
EXPECTED = [{"text": row[0], "id": row[1]} for row in ROWS[1:]]


def written(rows: list[list[str]], separator: str = ",", end: str = "\r\n", quoting: int = csv.QUOTE_MINIMAL) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=separator, lineterminator=end, quoting=quoting).writerows(rows)
    return buffer.getvalue().encode()


# ---------------------------------------------------------------------------------------------------------------
# CSV and TSV


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz", ".tsv.zst"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_rows_are_those_that_the_csv_module_wrote(tmp_path, suffix, end, quoting):
    content = written(ROWS, "\t" if ".tsv" in suffix else ",", end, quoting)
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(suffix[4:], bytes)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress(b"\xef\xbb\xbf" + content))
    reading = read_file(path, quoting="standard")
    assert (reading.values, reading.refused) == (EXPECTED, [])
    assert [place.rpartition(":")[2] for place in reading.places] == ["2", "3", "4", "7", "8"]
    # Blank lines are nothing, and the last line needs no end.
    path.write_bytes(compress(content.replace(end.encode(), end.encode() * 2, 2).removesuffix(end.encode())))
    assert read_file(path, quoting="standard").values == EXPECTED


BAD_ROWS = {
    b"text,id\na\nb,1\n": "2: 1 cells, where the header has 2",
    b"text,id\na,1,2\nb,1": "2: 3 cells, where the header has 2",
    b"text,id\na\xff,1\nb,1\n": "2: not valid UTF-8: byte 0xff at byte 2 of the line [invalid UTF-8]",
    b'text,id\n"one\ntw\xff",1\nb,1\n': "2: not valid UTF-8: byte 0xff at byte 3 of the line",
    b"text,id\na\0,1\nb,1\n": "2: a NUL byte",
    b'text,id\n"a"x,1\nb,1\n': "2: quotes that break the rules of CSV",
    b"text,id\r\na\rc,1\r\nb,1\r\n": "2: a carriage return that ends no line",
}


@pytest.mark.parametrize("content", BAD_ROWS)
def test_bad_rows_are_named_and_the_rest_is_read(tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    reading = read_file(path)
    assert [record["text"] for record in reading.values] == ["b"]
    assert len(reading.refused) == 1
    assert reading.refused[0].startswith(f"a.csv:{BAD_ROWS[content]}")


BAD_TABLES = {
    b"id,body\n1,a\n": r"a.csv:1: no column 'text' \(columns there: 'id', 'body'\); .* --json-key",
    b",\n1,a\n": r"a.csv:1: no column 'text' \(columns there: none with a name\)",
    b"text,id,text\na,1,b\n": "a.csv:1: two columns are called 'text'; rename",
    b'text\n"open\n': "a.csv:2: a quote that is not closed",
    b"text\n" + b"a" * 200: "a.csv:2: a cell of more than 99 characters",
}


@pytest.mark.parametrize("content", BAD_TABLES)
def test_tables_that_give_no_rows_are_refused_once(tmp_path, monkeypatch, content):
    monkeypatch.setattr(delimited, "_MAX_CELL", 99)
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    reading = read_file(path)
    assert re.match(BAD_TABLES[content], reading.refused[0]), reading.refused
    assert reading.values == []


def test_other_columns_may_stand_twice_and_an_empty_file_has_no_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,n,n\na,1,2\n")
    assert [record["text"] for record in read_file(path).values] == ["a"]
    assert read_file(path, columns=None).refused == [
        "a.csv:1: two columns are called 'n'; rename one of them [malformed]"
    ]
    for content in (b"", b"\xef\xbb\xbf", b"\n\n", b"text\n"):
        path.write_bytes(content)
        reading = read_file(path)
        assert (reading.values, reading.refused) == ([], [])


def test_what_no_row_can_come_after_ends_the_run(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    monkeypatch.setattr(delimited, "_MAX_CELL", 99)
    for content, reason in (
        (b'text\n"open\nx\n', "a quote that"),
        (b'text\n"' + b"a\n" * 99, "a cell of more than 99"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"a.csv:2: {reason}.* hides where the next rows begin"):
            read_file(path)
    path.write_bytes(b"text\xff\na\n")
    with pytest.raises(UserError, match=r"a.csv:1: the header is malformed: not valid UTF-8"):
        read_file(path)
    monkeypatch.setattr(delimited, "_MAX_LINE_BYTES", 50)
    path.write_bytes(b"text\n" + b"a" * 60)
    with pytest.raises(UserError, match=r"a.csv:2: a line of more than 50 bytes; use JSONL"):
        read_file(path)


def test_a_header_of_very_many_columns_takes_no_time(tmp_path):
    path = tmp_path / "a.csv"
    names = [f"c{number}" for number in range(100_000)]
    path.write_bytes(written([[*names, "text"], ["1"] * 100_001]))
    assert len(read_file(path).values) == 1


# ---------------------------------------------------------------------------------------------------------------
# Parquet

TABLE = {
    "id": list(range(10)),
    "text": ["one", "", "天🙂", "a\0b", None, "x" * 5000, "\u2028", "eight", "nine", "ten"],
    "a.b": [f"dotted {number}" for number in range(10)],
    "nested": [{"n": [number, None]} for number in range(10)],
}


@pytest.fixture
def pyarrow():
    pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install pyarrow")
    return importlib.import_module("pyarrow")


@pytest.fixture
def table_file(tmp_path, pyarrow):
    """A file of four row groups."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(TABLE), path, row_group_size=3)
    return path


def test_rows_of_parquet_are_those_of_pyarrow_wherever_it_is_cut(table_file, pyarrow):
    expected = pyarrow.parquet.read_table(table_file).to_pylist()
    assert expected[2] == {"id": 2, "text": "天🙂", "a.b": "dotted 2", "nested": {"n": [2, None]}}
    for count in range(4):
        for cuts in combinations(range(1, 4), count):
            reading = read_file(table_file, cuts, columns=None)
            assert reading.values == expected
            assert reading.places == [f"a.parquet: row {number}" for number in range(1, 11)]
    for columns in (("text",), ("a.b", "a"), ("nested.n", "nested"), ("text", "id", "absent")):
        wanted = [{name: value for name, value in row.items() if name in columns} for row in expected]
        assert read_file(table_file, [2], columns=columns).values == wanted


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_parquet_as_others_write_it(tmp_path, pyarrow, compression, version):
    texts = [f"{'word ' * (number % 40)}{number % 3}" for number in range(3000)]
    schemas = [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
    for schema in schemas:
        table = pyarrow.table({"text": pyarrow.array(texts, type=schema)})
        pyarrow.parquet.write_table(
            table, tmp_path / "a.parquet", compression=compression, data_page_version=version, row_group_size=1500
        )
        assert [record["text"] for record in read_file(tmp_path / "a.parquet", [1]).values] == texts


def test_bad_rows_of_parquet_are_named(tmp_path, pyarrow):
    values = pyarrow.array([b"good", b"ba\xff", None, b"fine"], type=pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 4, values.buffers())  # unchecked
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path, row_group_size=2)
    reading = read_file(path)
    assert [record["text"] for record in reading.values] == ["good", None, "fine"]
    expected = "a.parquet: row 2: column 'text' is not valid UTF-8: byte 0xff at byte 3 [invalid UTF-8]"
    assert reading.refused == [expected]


def test_tables_of_parquet_without_the_column_are_refused(tmp_path, pyarrow):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), path)
    assert re.match(r"a.parquet: no column 'text' \(columns there: 'body', 'id'\)", read_file(path).refused[0])
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, path)
    assert re.match(r"a.parquet: two columns are called 'text'", read_file(path).refused[0])
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert read_file(path).values == []


def test_parquet_that_is_cut_short_or_none_is_refused(table_file):
    content = table_file.read_bytes()
    for bad in (b"", b"PAR1", b"PAR1" * 3, content[:-1], content[: len(content) // 2], b"text\n" * 50, content[4:]):
        table_file.write_bytes(bad)
        with pytest.raises(UserError, match=r"a.parquet: truncated, damaged or not a valid Parquet file"):
            read_file(table_file)


def test_damaged_pages_of_parquet_are_refused(tmp_path, pyarrow):
    path = tmp_path / "a.parquet"
    texts = [f"row {number} " * 20 for number in range(200)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), path, write_page_checksum=True, use_dictionary=False, compression="none"
    )
    content = bytearray(path.read_bytes())
    content[content.index(b"row 100 ")] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a.parquet: truncated, damaged"):
        read_file(path)


def test_memory_that_is_not_there_is_no_traceback(table_file, monkeypatch):
    def fail(file: object, path: str) -> None:
        with parquet.damage_is_user_error(path, "Parquet"):
            raise MemoryError("malloc of size 9223372036854775807 failed")

    (file,) = expand_inputs([str(table_file)], InputOptions())
    monkeypatch.setattr(parquet, "_open", fail)
    with pytest.raises(UserError, match=r"a.parquet: damaged, or too much in one piece: .*malloc of size"):
        parquet.count_units(file.path)


# ---------------------------------------------------------------------------------------------------------------
# XLSX


@pytest.fixture
def openpyxl():
    return pytest.importorskip("openpyxl", reason="needs openpyxl: pip install openpyxl")


def test_rows_of_all_sheets_are_those_that_openpyxl_wrote(tmp_path, openpyxl):
    book = openpyxl.Workbook()
    sheet = book.active
    day = datetime.datetime(2024, 5, 1, 12, 30)
    rows = [
        ["text", "n", None, "text of note"],
        ["one\ntwo", 5, "unnamed", "天🙂"],
        [None, None, None, None],
        ["x", 1.5, None, day],
        ["last", True],
        [None, None, None, None, "beyond the header"],
    ]
    sheet.append([])
    for row in rows:
        sheet.append(row)
    other = book.create_sheet("Sheet two")
    other["B3"], other["B5"], other["C5"] = "text", "far away", "no name"
    book.create_sheet("empty")
    book.save(tmp_path / "a.xlsx")
    reading = read_file(tmp_path / "a.xlsx")
    assert reading.refused == []
    assert reading.values == [
        {"text": "one\ntwo", "n": 5, "text of note": "天🙂"},
        {"text": "x", "n": 1.5, "text of note": day},
        {"text": "last", "n": True, "text of note": None},
        {"text": None, "n": None, "text of note": None},
        {"text": "far away"},
    ]
    assert reading.places == [f"a.xlsx: sheet 'Sheet' row {number}" for number in (3, 5, 6, 7)] + [
        "a.xlsx: sheet 'Sheet two' row 5"
    ]


def test_the_size_that_a_sheet_claims_to_have_is_not_believed(tmp_path, openpyxl):
    book = openpyxl.Workbook()
    for row in (["id", "text"], [1, "one"], [2, "two"]):
        book.active.append(row)
    book.save(buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(tmp_path / "a.xlsx", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            assert "sheet1" not in name or b'<dimension ref="A1:B3"' in content
            target.writestr(name, content.replace(b'<dimension ref="A1:B3"', b'<dimension ref="A1:A2"'))
    assert read_file(tmp_path / "a.xlsx").values == [{"id": 1, "text": "one"}, {"id": 2, "text": "two"}]


def test_characters_that_xml_cannot_hold_are_read_as_excel_writes_them(tmp_path, openpyxl):
    book = openpyxl.Workbook()
    for text in ("text", "a_x000D_\nb_x0041_", "_x005F_x000D_", "_xD800_ and _x00"):
        book.active.append([text])
    book.save(tmp_path / "a.xlsx")
    texts = [record["text"] for record in read_file(tmp_path / "a.xlsx").values]
    assert texts == ["a\r\nbA", "_x000D_", "_xD800_ and _x00"]


def test_sheets_without_the_column_are_left_out_and_named(tmp_path, openpyxl):
    book = openpyxl.Workbook()
    book.active.append(["id", "note"])
    book.active.append([1, "a"])
    good = book.create_sheet("good")
    good.append(["text"])
    good.append(["b"])
    twice = book.create_sheet("twice")
    twice.append(["text", "text"])
    twice.append(["c", "d"])
    book.save(tmp_path / "a.xlsx")
    reading = read_file(tmp_path / "a.xlsx")
    assert reading.values == [{"text": "b"}]
    assert [note.split(": ", 1)[1] for note in reading.notes] == [
        "left out sheet 'Sheet', without a column 'text'; --sheet NAME reads a sheet"
    ]
    assert reading.refused[0].startswith("a.xlsx: sheet 'twice' row 1: two columns are called 'text'")
    assert len(reading.refused) == 1
    assert read_file(tmp_path / "a.xlsx", columns=("note",), sheets=("Sheet",)).values == [{"id": 1, "note": "a"}]
    assert len(read_file(tmp_path / "a.xlsx", sheets=("Sheet", "good")).refused) == 1
    with pytest.raises(UserError, match=r"a.xlsx: no sheet 'Good' \(sheets there: 'Sheet', 'good', 'twice'\)"):
        read_file(tmp_path / "a.xlsx", sheets=("Good",))


def test_what_is_no_workbook_is_refused(tmp_path, openpyxl):
    path = tmp_path / "a.xlsx"
    book = openpyxl.Workbook()
    book.active.append(["text"])
    for number in range(100):
        book.active.append([f"row {number}"])
    book.save(path)
    content = path.read_bytes()
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "no workbook")
    for bad in (b"", b"text\na\n", content[: len(content) // 2], content[:-10], other.getvalue()):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"a.xlsx: truncated, damaged or not a valid XLSX file"):
            read_file(path)
    path.write_bytes(b"\xd0\xcf\x11\xe0" + bytes(1000))
    with pytest.raises(UserError, match=r"a.xlsx: locked with a password, or an old .xls"):
        read_file(path)
    # A sheet that is damaged, in an archive that is whole.
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data[: len(data) // 2] if "sheet1" in name else data)
    with pytest.raises(UserError, match=r"a.xlsx: truncated, damaged or not a valid XLSX file"):
        read_file(path)


# ---------------------------------------------------------------------------------------------------------------
# Libraries that are not installed


@pytest.mark.parametrize(("suffix", "library"), [(".parquet", "pyarrow"), (".xlsx", "openpyxl"), (".pdf", "pypdf")])
def test_a_missing_library_is_named_with_the_line_that_installs_it(tmp_path, monkeypatch, suffix, library):
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> object:
        if name.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
        return real(name, package)

    monkeypatch.setattr(formats.importlib, "import_module", without)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"x")
    with pytest.raises(UserError, match=rf"a{suffix}: reading it needs {library}: pip install 'retemper\[formats\]'$"):
        read_file(path)


def test_a_library_that_is_broken_is_not_called_missing(tmp_path, monkeypatch):
    def broken(name: str) -> object:
        raise ImportError("libarrow.so: cannot open shared object file")

    monkeypatch.setattr(formats.importlib, "import_module", broken)
    with pytest.raises(UserError, match=r"needs pyarrow, which cannot be imported \(libarrow.so.*pip install"):
        formats.require_library("pyarrow.parquet", str(Path("a.parquet")))
