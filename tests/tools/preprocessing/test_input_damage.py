"""Damaged files with --skip-bad-lines cost their unreadable rest; files that expand without bound are refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import openpyxl
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from oracles.preprocessing import report, run
from oracles.reading import read_file, read_texts

from retemper.engine.errors import UserError
from retemper.tools.preprocessing.readers import expansion_limit, json_array, lines, streams
from retemper.tools.preprocessing.records.errors import UNREADABLE

NUM_ROWS = 4000
TEXTS = [f"{number} {'word ' * (number * 7919 % 23)}" for number in range(NUM_ROWS)]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda content: b"".join(zstandard.compress(content[i : i + 5000]) for i in range(0, len(content), 5000)),
    ".bz2": lambda content: b"".join(bz2.compress(content[i : i + 5000]) for i in range(0, len(content), 5000)),
    ".xz": lzma.compress,
}


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def texts_of(values: list[object]) -> list[str]:
    return [value["text"] for value in values]  # type: ignore[index, misc]


def is_proper_beginning(texts: list[str], least: int = 1) -> bool:
    return least <= len(texts) < NUM_ROWS and texts == TEXTS[: len(texts)]


# ---------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_truncated_archive_costs_its_unreadable_rest(tmp_path, suffix, name):
    content = {
        "a.jsonl": JSONL,
        "a.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
        "a.csv": b"id,text\n" + b"".join(b'1,"%s"\n' % text.encode() for text in TEXTS),
    }[name]
    archive = COMPRESS[suffix](content)
    path = written(tmp_path / f"{name}{suffix}", archive[: len(archive) * 2 // 3])
    with pytest.raises(UserError, match=r"truncated or damaged"):
        read_file(path)
    reading = read_file(path, skip_damage=True)
    assert is_proper_beginning(texts_of(reading.values), least=NUM_ROWS // 3)
    assert len(reading.refused) == 1
    assert reading.refused[0].startswith(f"{path.name}: truncated or damaged (")
    assert reading.refused[0].endswith(f"[{UNREADABLE}]")


def test_what_the_archive_gives_before_its_end_is_what_zlib_gives(tmp_path):
    archive = gzip.compress(JSONL)
    path = written(tmp_path / "a.jsonl.gz", archive[:-30])
    readable = zlib.decompressobj(wbits=31).decompress(archive[:-30])
    expected = [json.loads(line)["text"] for line in readable.split(b"\n")[:-1]]
    assert texts_of(read_file(path, skip_damage=True).values) == expected


def test_garbage_behind_an_archive_and_wrong_archives_are_counted(tmp_path):
    path = written(tmp_path / "a.jsonl.gz", gzip.compress(JSONL) + b"garbage")
    reading = read_file(path, skip_damage=True)
    assert texts_of(reading.values) == TEXTS and len(reading.refused) == 1
    for content in (b"", JSONL, zstandard.compress(JSONL)):
        reading = read_file(written(path, content), skip_damage=True)
        assert reading.values == [] and len(reading.refused) == 1


def test_damaged_row_groups_of_parquet_cost_themselves(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": TEXTS})
    pa.parquet.write_table(
        table, path, row_group_size=1000, write_page_checksum=True, use_dictionary=False, compression="none"
    )
    content = bytearray(path.read_bytes())
    content[content.index(b"1500 word")] ^= 1
    path.write_bytes(content)
    for cuts in ([], [1], [1, 2, 3]):
        with pytest.raises(UserError, match=r"a.parquet: truncated, damaged"):
            read_file(path, cuts)
        reading = read_file(path, cuts, skip_damage=True)
        assert texts_of(reading.values) == TEXTS[:1000] + TEXTS[2000:]
        assert len(reading.refused) == 1
        assert reading.refused[0].startswith("a.parquet: row 1001: the rest of row group 2: truncated, damaged")
    # Of a file that is cut off nothing can be read: what tells where its parts are stood at its end.
    path.write_bytes(content[: len(content) // 2])
    reading = read_file(path, skip_damage=True)
    assert reading.values == [] and reading.refused[0].startswith("a.parquet: truncated, damaged")


@pytest.mark.parametrize("is_file", [False, True])
def test_a_truncated_arrow_file_costs_its_unreadable_rest(tmp_path, is_file):
    path = tmp_path / "a.arrow"
    table = pa.table({"text": TEXTS})
    with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"a.arrow: truncated, damaged or not a valid Arrow file"):
        read_file(path)
    reading = read_file(path, skip_damage=True)
    assert len(reading.refused) == 1 and "a.arrow: truncated, damaged" in reading.refused[0]
    assert reading.values == [] if is_file else is_proper_beginning(texts_of(reading.values), least=NUM_ROWS // 2)


def test_a_damaged_sheet_costs_its_unreadable_rest(tmp_path):
    book = openpyxl.Workbook()
    for sheet in (book.active, book.create_sheet("second")):
        sheet.append(["text"])
        for number in range(300):
            sheet.append([f"{sheet.title} {number}"])
    book.save(tmp_path / "whole.xlsx")
    with zipfile.ZipFile(tmp_path / "whole.xlsx") as source, zipfile.ZipFile(tmp_path / "a.xlsx", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data[: len(data) // 2] if "sheet1" in name else data)
    reading = read_file(tmp_path / "a.xlsx", skip_damage=True)
    texts = texts_of(reading.values)
    first = [text for text in texts if text.startswith("Sheet")]
    assert 50 < len(first) < 300 and first == [f"Sheet {number}" for number in range(len(first))]
    assert texts[len(first) :] == [f"second {number}" for number in range(300)]
    assert len(reading.refused) == 1
    written(tmp_path / "a.xlsx", (tmp_path / "whole.xlsx").read_bytes()[:-50])
    assert len(read_file(tmp_path / "a.xlsx", skip_damage=True).refused) == 1


def test_quotes_and_brackets_that_are_never_closed_cost_the_rest(tmp_path):
    path = written(tmp_path / "a.csv", b'id,text\n1,a\n2,b\n3,"open\n4,c\n')
    reading = read_file(path, skip_damage=True)
    assert texts_of(reading.values) == ["a", "b"] and reading.refused[0].startswith("a.csv: ")
    path = written(tmp_path / "a.json", b'[{"text": "a"}, {"text": "b"}, {"text": "c')
    assert texts_of(read_file(path, skip_damage=True).values) == ["a", "b"]


def test_a_run_counts_and_names_what_could_not_be_read(tmp_path, tiny_tokenizer, capsys):
    data = tmp_path / "data"
    data.mkdir()
    archive = gzip.compress(JSONL)
    written(data / "a.jsonl.gz", archive[: len(archive) // 2])
    written(data / "b.jsonl", b'{"text": "whole"}\n')
    written(data / "c.parquet", b"PAR1 and no more")
    with pytest.raises(UserError, match=r"c.parquet: truncated, damaged or not a valid Parquet file"):
        run(tiny_tokenizer, tmp_path, data)
    sidecar = run(tiny_tokenizer, tmp_path, data, skip_bad_lines=True)
    assert 1000 < sidecar.documents < NUM_ROWS
    assert sidecar.left_out == {UNREADABLE: 2}
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_bytes().splitlines()]
    assert [Path(reject["where"]).name for reject in rejects] == ["a.jsonl.gz", "c.parquet"]
    shown = capsys.readouterr().err
    for name in ("a.jsonl.gz", "c.parquet"):
        assert f"note: {data}/{name}: left out its unreadable rest: truncated" in shown
    # What --skip-bad-lines has made is not taken by a run without it.
    (data / "c.parquet").unlink()
    with pytest.raises(UserError, match=r"a.jsonl.gz: truncated or damaged"):
        report(tiny_tokenizer, tmp_path, data, overwrite=True)


# ---------------------------------------------------------------------------------------------------------------
# Expansion


@pytest.fixture
def small_bounds(monkeypatch):
    monkeypatch.setattr(expansion_limit, "LEAST_BYTES", 1 << 16)
    monkeypatch.setattr(expansion_limit, "LEAST_ROWS", 1 << 10)


ROW = b'{"text": "a"}\n'
BOMBS = {
    "rows.jsonl.zst": lambda: zstandard.compress(ROW * 20_000),
    "frames.jsonl.zst": lambda: zstandard.compress(ROW * 5_000) * 5,
    "line.jsonl.zst": lambda: zstandard.compress(b'{"text": "' + b"a" * (4 << 20)),
    "text.txt.gz": lambda: gzip.compress(b"a" * (4 << 20)),
    "rows.csv.xz": lambda: lzma.compress(b"text\n" + b"a\n" * (1 << 17)),
    "rows.json.bz2": lambda: bz2.compress(b"[" + b'{"text":"a"},' * 30_000),
    "page.html.zst": lambda: zstandard.compress(b"<p>a" * (1 << 15)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_compressed_bombs_are_refused(tmp_path, small_bounds, name):
    path = written(tmp_path / name, BOMBS[name]())
    for skip_damage in (False, True):
        with pytest.raises(UserError, match=rf"{name}: expands to more than 300 times its size .*--max-expansion"):
            read_file(path, skip_damage=skip_damage)
    if "jsonl" in name and "line" not in name:
        assert len(read_texts_without_bound(path)) == read_file(path, max_expansion=0).values.__len__()


def read_texts_without_bound(path: Path) -> list[bytes]:
    """The lines as zstandard itself decompresses them."""
    with open(path, "rb") as file:
        return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read().splitlines()


def test_a_bomb_behind_ordinary_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(expansion_limit, "_WINDOW_BYTES", 1 << 20)
    for module in (expansion_limit, streams):
        monkeypatch.setattr(module, "READ_AHEAD_BYTES", 1 << 9)
    noise = b'{"text": "%s"}\n' % random.Random(0).randbytes(50_000).hex().encode()
    content = zstandard.compress(noise) + zstandard.compress(b'{"text": "' + b"a" * (3 << 20) + b'"}\n')
    path = written(tmp_path / "a.jsonl.zst", content)
    assert 300 * len(content) > 3 << 20
    with pytest.raises(UserError, match="expands to more than 300 times its size"):
        read_file(path)


def test_text_that_compresses_well_is_read(tmp_path, small_bounds):
    content = b"".join(b'{"text": "The same sentence, with a number: %d"}\n' % n for n in range(10_000))
    for suffix in (".gz", ".xz", ".zst"):
        path = written(tmp_path / f"a.jsonl{suffix}", COMPRESS[suffix](content))
        assert len(read_texts(path).values) == 10_000


def test_tables_of_very_many_equal_rows_are_refused(tmp_path, small_bounds):
    rows = 20_000
    tables = {
        "equal": pa.table({"text": pa.array(["rain"] * rows).dictionary_encode()}),
        "null": pa.table({"text": pa.nulls(rows, pa.string())}),
        "list": pa.table({"text": pa.array([["a"] * rows])}),
        "long": pa.table({"text": ["x" * (1 << 20)] * 5}),
    }
    for name, table in tables.items():
        path = tmp_path / f"{name}.parquet"
        pa.parquet.write_table(table, path, compression="zstd", use_dictionary=name != "long")
        with pytest.raises(UserError, match=rf"{name}.parquet: (.* rows in|expands to more than)"):
            read_file(path)
        if name != "long":
            assert len(read_file(path, max_expansion=0).values) == table.num_rows
    nothing = pa.table({"text": pa.nulls(1 << 24)})
    long = pa.table({"text": pa.array(["x" * (1 << 16)] * 500).dictionary_encode()})
    for name, table in {"null": nothing, "dictionary": long, "zstd": tables["long"]}.items():
        options = pa.ipc.IpcWriteOptions(compression="zstd" if name == "zstd" else None)
        with pa.ipc.new_stream(str(tmp_path / f"{name}.arrow"), table.schema, options=options) as writer:
            writer.write_table(table)
        with pytest.raises(UserError, match=rf"{name}.arrow: (.* rows in|expands to more than)"):
            read_file(tmp_path / f"{name}.arrow")


def test_workbooks_that_expand_are_refused(tmp_path, small_bounds):
    book = openpyxl.Workbook()
    book.active.append(["text"])
    book.save(tmp_path / "base.xlsx")
    entities = b"".join(b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 20) for n in range(9))
    document_type = b'<!DOCTYPE x [<!ENTITY a "ha">' + entities + b"]>"
    row = b'<row><c t="inlineStr"><is><t>&j;</t></is></c></row>'
    changes = {
        "rows.xlsx": lambda xml: xml.replace(b"</sheetData>", b"<row/>" * (1 << 18) + b"</sheetData>"),
        "spaces.xlsx": lambda xml: xml.replace(b"</sheetData>", b" " * (4 << 20) + b"</sheetData>"),
        "entities.xlsx": lambda xml: document_type + xml.replace(b"</sheetData>", row + b"</sheetData>"),
    }
    for name, change in changes.items():
        with zipfile.ZipFile(tmp_path / "base.xlsx") as source:
            parts = {part: source.read(part) for part in source.namelist()}
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as target:
            for part, xml in parts.items():
                target.writestr(part, change(xml) if "sheet1" in part else xml)
        with pytest.raises(UserError, match=rf"{name}: (expands to more than|truncated, damaged)"):
            read_file(tmp_path / name)


def test_records_without_an_end_are_refused(tmp_path, monkeypatch):
    for module in (lines, json_array):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 1 << 20)
        monkeypatch.setattr(module, "LONG_BYTES", 1 << 16)
    for name, beginning in (("a.jsonl", b""), ("a.json", b'["')):
        path = written(tmp_path / name, beginning)
        with open(path, "r+b") as file:
            file.truncate(50 << 30)  # sparse: it takes no space
        with pytest.raises(UserError, match=rf"{name}.*: a (line|JSON value) of more than 0 GiB"):
            read_file(path)


def test_json_nested_very_deeply_is_malformed(tmp_path):
    deep = b'{"text": "a", "b": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n"
    reading = read_file(written(tmp_path / "a.jsonl", deep + ROW))
    assert texts_of(reading.values) == ["a"] and len(reading.refused) == 1
    assert read_file(written(tmp_path / "a.json", b"[" * 10**5 + b"]" * 10**5)).values == []
