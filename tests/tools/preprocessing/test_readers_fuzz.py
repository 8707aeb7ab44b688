"""Readers on made-up input: they agree with the standard library, and damaged files give records or one line."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import random
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles.reading import Reading, read_file, read_texts
from oracles.tiny_pdf import tiny_pdf

from retemper.engine.errors import UserError
from retemper.tools.preprocessing.readers import delimited, json_array, lines
from retemper.tools.preprocessing.records import long_text

fuzz = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True, scope="module")
def small_limits():
    """Short records are long ones, so that both ways are tried."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (lines, json_array):
            patch.setattr(module, "LONG_BYTES", 40)
        patch.setattr(long_text, "LONG_BYTES", 5000)
        patch.setattr(long_text, "_LONG_STRING", 64)
        patch.setattr(long_text, "_PIECE_BYTES", 9)
        patch.setattr(json_array, "_READ_BYTES", 7)
        patch.setattr(delimited, "_MAX_CELL", 1000)
        yield


def read(name: str, content: bytes, **options: Any) -> Reading:
    """The records of a file with this name and content."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return read_file(path, **options)


def only_one_line(name: str, content: bytes, **options: Any) -> Reading | None:
    """As :func:`read`; None for a UserError of one line. Anything else that is raised fails the test."""
    try:
        reading = read(name, content, **options)
    except UserError as error:
        assert name in str(error) and "\n" not in str(error) and len(str(error)) < 600
        return None
    assert all(name in line and "\n" not in line for line in reading.refused)
    return reading


def strictly(text: str) -> Any:
    """What a strict parser of JSON reads: no NaN, no number beyond a double, no half characters; or ValueError."""

    def refuse(token: str) -> None:
        raise ValueError(token)

    def finite(token: str) -> float:
        if abs(value := float(token)) == float("inf"):
            raise ValueError(token)
        return value

    value = json.loads(text, parse_constant=refuse, parse_float=finite)
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.text(min_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(
    st.sampled_from(["text", "id", "a.b", "天", '"', "\\"]) | st.text(max_size=4), values, max_size=4
)
SCRAPS = rb'{ } [ ] " , : \ \u d800 null NaN -1e999 01 "text" {"text":"a"} text,id'.split()
BYTES = [b"\xff", b"\xe5\xa4", b"\xef\xbb\xbf", b"\xc2\x85", b"\0", b"\r", b"\n", b" ", b"\x0c"]
scraps = st.sampled_from(SCRAPS + BYTES)
rubbish = st.lists(scraps | st.binary(max_size=4), max_size=12).map(b"".join)


@st.composite
def json_lines(draw: st.DrawFn) -> list[bytes]:
    rows = []
    for record in draw(st.lists(objects | values, max_size=5)):
        row = json.dumps(record, ensure_ascii=draw(st.booleans())).encode()
        if draw(st.integers(0, 3)) == 0:
            place = draw(st.integers(0, len(row)))
            row = row[:place] + draw(rubbish) + row[place + draw(st.integers(0, 2)) :]
        rows += row.split(b"\n")
    return rows


@fuzz
@given(json_lines(), st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.lists(st.floats(0, 1), max_size=3))
def test_jsonl_is_what_json_reads_line_by_line(rows, end, last_end, cuts):
    content = end.join(rows) + (end if last_end else b"")
    expected, refused = [], []
    for number, row in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not row.strip(b" \t\n\r\x0b\x0c"):
            continue
        try:
            record = strictly(row.decode("utf-8"))
        except (ValueError, RecursionError):
            record = None
        if type(record) is dict:
            expected.append(record)
        else:
            refused.append(f"a.jsonl:{number}")
    places = sorted(int(cut * len(content)) for cut in cuts)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        assert only_one_line("a.jsonl", content) is None
        return
    reading = only_one_line("a.jsonl", content, cuts=places, columns=None, input_format="jsonl")
    assert reading is not None
    assert [line.split(": ")[0] for line in reading.refused] == refused
    assert reading.values == expected
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(content)
        texts = read_texts(path, places, input_format="jsonl")
    once = [r for r in expected if type(r.get("text")) is str]
    # What has the key twice is refused here, which json does not say.
    assert texts.values == [r["text"] for r in once] or any("twice" in line for line in texts.refused)
    assert len(texts.values) + len(texts.refused) == len(expected) + len(refused)


@fuzz
@given(st.lists(objects, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.binary(max_size=0) | rubbish)
def test_a_json_array_is_what_json_reads(records, indent, ascii_only, rubbish):
    content = json.dumps(records, indent=indent, ensure_ascii=ascii_only).encode()
    assert read("a.json", content, columns=None).values == json.loads(
        content,
    )
    place = len(content) // 2
    damaged = content[:place] + rubbish + content[place:]
    try:
        expected = strictly(damaged.decode("utf-8"))
    except (ValueError, RecursionError):
        expected = None
    reading = only_one_line("a.json", damaged, columns=None)
    if expected is not None:
        assert reading is not None
        assert reading.values == [record for record in expected if type(record) in (dict, str)]
    else:
        assert reading is None or reading.refused


cells = st.text(
    st.sampled_from('a,"\t\n\r é天🙂;') | st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6
)


@fuzz
@given(
    st.lists(st.tuples(cells, cells), max_size=6),
    st.sampled_from([".csv", ".tsv"]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_csv_is_what_the_csv_module_wrote(rows, suffix, end, quoting):
    if quoting == csv.QUOTE_MINIMAL:
        # Of a carriage return that it has not quoted the csv module itself reads a line end.
        rows = [(text.replace("\r", ""), key.replace("\r", "")) for text, key in rows]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter="," if suffix == ".csv" else "\t", lineterminator=end, quoting=quoting)
    writer.writerows([("text", "id"), *rows])
    reading = read(f"a{suffix}", buffer.getvalue().encode(), quoting="standard")
    assert reading.refused == []
    assert [(record["text"], record["id"]) for record in reading.values] == rows


tsv_cells = st.text(st.sampled_from("a,\"'\\ ") | st.characters(exclude_characters="\0\t\r\n"), max_size=6)


@fuzz
@given(st.lists(st.tuples(tsv_cells, tsv_cells), max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_tsv_is_what_the_csv_module_reads_without_quoting(rows, end):
    content = end.join("\t".join(row) for row in [("text", "id"), *rows])
    try:
        encoded = content.encode()
    except UnicodeEncodeError:
        return
    expected = list(csv.reader(io.StringIO(content, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    reading = read("a.tsv", encoded)
    assert [[record["text"], record["id"]] for record in reading.values] == [row for row in expected if row]


@fuzz
@given(
    rubbish,
    st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.md", "a.html", "a.jsonl.gz", "a.txt.zst"]),
)
def test_rubbish_gives_records_or_one_line(content, name):
    only_one_line(name, b"text\n" + content if ".csv" in name or ".tsv" in name else content)
    only_one_line(name, content, columns=None)


def archive_of_rows() -> bytes:
    return b"".join(b'{"text": "%d %s"}\n' % (number, b"word " * (number % 9)) for number in range(60))


def parquet_file() -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    buffer = io.BytesIO()
    table = pyarrow.table({"text": [f"row {number}" for number in range(50)], "id": list(range(50))})
    parquet.write_table(table, buffer, row_group_size=20, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def xlsx_file() -> bytes:
    openpyxl = pytest.importorskip("openpyxl", reason="needs openpyxl: pip install openpyxl")
    book = openpyxl.Workbook()
    for row in ("text", *(f"row {number}" for number in range(20))):
        book.active.append([row])
    buffer = io.BytesIO()
    book.save(buffer)
    # Stored, so that damage is not only that of the archive.
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(stored := io.BytesIO(), "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return stored.getvalue()


def pdf_file() -> bytes:
    pytest.importorskip("pypdf", reason="needs pypdf: pip install 'pypdf[crypto]'")
    return tiny_pdf([["one", "two"], ["three"]])


DAMAGED = {
    "a.jsonl.gz": (lambda: gzip.compress(archive_of_rows()) + gzip.compress(archive_of_rows()), 150),
    "a.jsonl.zst": (lambda: zstandard.compress(archive_of_rows()) * 2, 150),
    "a.parquet": (parquet_file, 150),
    "a.xlsx": (xlsx_file, 60),
    "a.pdf": (pdf_file, 60),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_give_records_or_one_line(name):
    make, times = DAMAGED[name]
    content = make()
    draw = random.Random(name)
    whole = read(name, content)
    assert whole.values and not whole.refused
    noticed = 0
    for _ in range(times):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 8))):
            place = draw.randrange(len(damaged))
            match draw.randrange(4):
                case 0:
                    damaged[place] ^= 1 << draw.randrange(8)
                case 1:
                    damaged[place : place + draw.randrange(30)] = b""
                case 2:
                    damaged[place:place] = draw.randbytes(draw.randrange(20))
                case _:
                    del damaged[place + 1 :]
            damaged += b"" if damaged else b"x"
        reading = only_one_line(name, bytes(damaged))
        noticed += reading is None or reading != whole
    assert noticed > times // 3
