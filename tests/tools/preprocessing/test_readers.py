"""Readers of lines, whole texts and JSON arrays: the records of ``json`` and ``str``, wherever a file is cut."""

from __future__ import annotations

import gzip
import json
import re
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard
from oracles.reading import read_file, read_texts

from retemper.engine.errors import UserError
from retemper.tools.preprocessing.cleaning.cleaner import Cleaner
from retemper.tools.preprocessing.cleaning.decontamination import NgramFilter
from retemper.tools.preprocessing.cleaning.held_out import held_out_files, read_held_out
from retemper.tools.preprocessing.options import PreprocessOptions
from retemper.tools.preprocessing.readers import json_array, lines, streams, text
from retemper.tools.preprocessing.records import long_text
from retemper.tools.preprocessing.records.reading import ReadOptions
from retemper.tools.preprocessing.records.text_choice import TextChoice

BOM = b"\xef\xbb\xbf"
DEEP = 1100  # beyond what parsers take


@pytest.fixture
def small_limits(monkeypatch):
    """Records of more than 64 bytes are long, strings of more than 16 in them too."""
    for module in (lines, text, json_array):
        monkeypatch.setattr(module, "LONG_BYTES", 64)
    monkeypatch.setattr(long_text, "LONG_BYTES", 8000)
    monkeypatch.setattr(long_text, "_LONG_STRING", 16)
    monkeypatch.setattr(long_text, "_PIECE_BYTES", 7)
    monkeypatch.setattr(lines, "_COPY_BYTES", 5)
    monkeypatch.setattr(text, "_COPY_BYTES", 5)
    monkeypatch.setattr(json_array, "_READ_BYTES", 3)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def zstd_frames(*parts: bytes) -> bytes:
    """A .zst of several frames as other programs write them: streamed, empty, skippable, and with a checksum."""
    streamed = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compressobj()
    frames = [streamed.compress(parts[0]) + streamed.flush(), zstandard.compress(b"")]
    frames.append(struct.pack("<II", 0x184D2A53, 5) + b"index")
    frames += [zstandard.ZstdCompressor(level=19).compress(part) for part in parts[1:]]
    return b"".join(frames)


# ---------------------------------------------------------------------------------------------------------------
# Lines

LINES = [
    BOM + b'{"text": "one", "n": 1}',
    b'{"text": "tw\\u00f6\\ud83d\\ude42 \\u0000"}\r',
    b"",
    b" \t\r",
    '{"n": [{"text": 1}], "text": "天é🙂\u2028\x85\x7f"}'.encode(),
    b'\t{"text":""} ',
    b'{"text": "long ' + b"word " * 30 + b'"}',
    b'{"a": "' + b"z" * 70 + b'", "text": "' + b'\\"\\\\' * 20 + b'"}\r',
    b"",
    b'{"text": "last"}',
]


def test_jsonl_gives_what_json_reads_from_each_line_wherever_it_is_cut(tmp_path, small_limits):
    content = b"\n".join(LINES)  # no newline at the end
    path = write(tmp_path / "a.jsonl", content)
    expected = [json.loads(line.removeprefix(BOM)) for line in LINES if line.strip()]
    places = [f"a.jsonl:{number}" for number, line in enumerate(LINES, 1) if line.strip()]
    for cut in range(len(content) + 1):
        reading = read_file(path, [cut], columns=None)
        assert (reading.values, reading.places, reading.refused) == (expected, places, [])
        assert read_texts(path, [cut]).values == [record["text"] for record in expected]
    for step in (1, 2, 7, 63, 64, 65):
        assert read_file(path, range(step, len(content), step), columns=None).values == expected


def test_lines_of_text_are_the_lines_of_str_wherever_it_is_cut(tmp_path, small_limits):
    texts = ["one", " two \x85\u2028x", "", "\ufeffnot a mark", "d" * 63, "d" * 64, "é" * 50, "\t", "end\r", "\x00"]
    content = BOM + "\r\n".join(texts).encode() + b"\r\n"
    path = write(tmp_path / "a.txt", content)
    expected = [text.rstrip("\r") for text in texts if text.strip(" \t")]
    places = [f"a.txt:{number}" for number, text in enumerate(texts, 1) if text.strip(" \t")]
    for cut in range(len(content) + 1):
        reading = read_file(path, [cut], txt_mode="line")
        assert (reading.values, reading.places, reading.refused) == (expected, places, [])


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_bad_lines_are_named_wherever_it_is_cut(tmp_path, small_limits, suffix):
    bad = {1: b"oops", 4: b'{"text": "\xff"}', 7: b'{"text": "' + b"a" * 90 + b'\xff"}', 9: b'{"text": "x"'}
    rows = [bad.get(number, b'{"text": "fine"}') if number % 3 else b"" for number in range(1, 9)] + [bad[9]]
    content = b"\n".join(rows)
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path = write(tmp_path / f"a.jsonl{suffix}", compress(content))
    for cut in range(1, len(content)) if not suffix else [None]:
        cuts = [] if cut is None else [cut]
        for reading in (read_file(path, cuts), read_texts(path, cuts)):
            assert len(reading.values) == 3
            assert [line.split(": ")[0] for line in reading.refused] == [f"{path.name}:{n}" for n in bad]
            assert "byte 0xff at byte 11 of the line [invalid UTF-8]" in reading.refused[1]
            assert "byte 0xff at byte 101 of the line [invalid UTF-8]" in reading.refused[2]


LONG_STRINGS = ["word " * 3000, "\n" * 3000, "天" * 3000, 'say "text" ' * 500, 'ends with "text' + "x" * 3000 + '"text']


@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("text", LONG_STRINGS, ids=["words", "line ends", "Chinese", "quotes", "a quote at the end"])
def test_a_repeated_key_is_found_on_either_side_of_a_long_text(tmp_path, text, escaped):
    long = json.dumps(text, ensure_ascii=escaped)
    once = [
        f'{{"text": {long}}}',
        f'{{"b": {{"text": 1}}, "text": {long}}}',
        f'{{"text": {long}, "b": "text", "c": [{{"text": 1}}, {{"text": 2}}]}}',
    ]
    twice = [
        f'{{"text": "a", "text": {long}}}',
        f'{{"text": {long}, "text": "a"}}',
        f'{{"text": {long}, "text": {long}}}',
        f'{{"b": {{"text": 1, "text": 2}}, "text": {long}}}',
        f'{{"text": {long}, "b": {{"text": 1, "text": 2}}}}',
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(once + twice).encode())
    reading = read_texts(path)
    assert reading.values == [text] * len(once)
    assert [line.partition(": ")[2] for line in reading.refused] == [
        "the key 'text' twice in one object [malformed]"
    ] * len(twice)


BAD_LINES = {
    "cut short": (b'{"text": "a"', "not valid JSON"),
    "nothing but a BOM inside": (b'{"text": "a"}\n' + BOM + b'{"text": "a"}', "a.jsonl:2: not valid JSON: .*BOM"),
    "UTF-8 cut short": (b'{"text": "\xe5\xa4"}', "not valid UTF-8: byte 0xe5 at byte 11 of the line"),
    "a surrogate in UTF-8": (b'{"text": "\xed\xa0\x80"}', "not valid UTF-8: byte 0xed at byte 11"),
    "an escaped surrogate": (b'{"text": "\\ud800"}', "lone surrogate"),
    "an escaped surrogate of another key": (b'{"text": "a", "b": "\\udc00"}', "lone surrogate|invalid low"),
    "NUL": (b'{"text": "a\0b"}', "not valid JSON: .*control character.* at character 12"),
    "NULs": (b"\0" * 20, "not valid JSON"),
    "the key twice": (b'{"text": "a", "text": "b"}', "the key 'text' twice in one object"),
    "the key twice within": (b'{"text": "a", "b": {"text": 1, "text": 2}}', "the key 'text' twice"),
    "the key twice, escaped": (b'{"te\\u0078t": "a", "te\\u0078t": "b"}', "the key 'text' twice"),
    "twice with a long number": (b'{"text": "a", "text": ' + b"9" * 300 + b"}", "the key 'text' twice"),
    "deep": (b'{"text": ' + b"[" * DEEP + b"]" * DEEP + b"}", "not valid JSON: .*(depth|recursion)"),
    "deep and twice": (b'{"text": "a", "b": ' + b"[" * 1000 + b"]" * 1000 + b', "text": 1}', "twice|deeply"),
    "an array": (b'[{"text": "a"}]', "an array, not a JSON object"),
    "null": (b"null", "null, not a JSON object"),
    "NaN": ('{"é": NaN, "text": "a"}'.encode(), "NaN or Infinity at character 7 of the line, which JSON does not"),
    "two records": (b'{"text": "a"} {"text": "b"}', "not valid JSON"),
    "single quotes": (b"{'text': 'a'}", "not valid JSON"),
}


@pytest.mark.parametrize("fault", BAD_LINES)
@pytest.mark.parametrize("long", [False, True])
def test_what_is_wrong_with_a_line_is_said_once_and_the_rest_is_read(tmp_path, request, fault, long):
    content, reason = BAD_LINES[fault]
    if long:
        request.getfixturevalue("small_limits")
        # White space inside makes it long without making it anything else.
        content = content.replace(b",", b"," + b" " * 80, 1)
        reason = reason.partition(" at ")[0]
    path = write(tmp_path / "a.jsonl", content + b'\n{"text": "good"}\r\n')
    for reading in (read_file(path), read_texts(path)):
        assert len(reading.refused) == 1
        assert reading.refused[0].startswith("a.jsonl:")
        assert re.search(reason, reading.refused[0]), reading.refused
    assert reading.values[-1] == "good"


BAD_VALUES = {
    b"{}": "no key 'text' (keys there: none)",
    b'{"txt": "a"}': "no key 'text' (keys there: 'txt')",
    b'{"text": null}': "the value of 'text' is null, not a string",
    b'{"text": 1}': "the value of 'text' is a number, not a string",
    b'{"text": ["a"]}': "the value of 'text' is an array, not a string",
    b'{"text": true}': "the value of 'text' is a boolean, not a string",
}


@pytest.mark.parametrize("line", BAD_VALUES)
def test_a_line_without_a_text_is_refused(tmp_path, line):
    path = write(tmp_path / "a.jsonl", b'\n{"text": "good"}\n' + line)
    reading = read_texts(path)
    assert reading.values == ["good"]
    assert len(reading.refused) == 1 and reading.refused[0].startswith(f"a.jsonl:3: {BAD_VALUES[line]}")


def test_keys_that_look_like_others_are_no_duplicates(tmp_path):
    records = [
        {"text": 'a "text" b', "b": {"text": "inside"}},
        {"text": "text", "key": "text"},
        {"文": "a", "text": "x"},
        {"a": {"b": "deep"}, "text": "y"},
    ]
    content = "\n".join(json.dumps(record, ensure_ascii=number % 2 == 0) for number, record in enumerate(records))
    path = write(tmp_path / "a.jsonl", content.encode())
    assert read_file(path).values == records
    assert read_texts(path).values == [record["text"] for record in records]
    path = write(tmp_path / "b.jsonl", b'{"a": {"b": "x"}}\n{"a": {"b": "x", "b": "y"}}\n{"\\u6587": "z"}')
    reading = read_texts(path, key="a.b")
    assert reading.values == ["x"]
    assert reading.refused[0].startswith("b.jsonl:2: the key 'b' twice")
    assert read_texts(path, key="文").values == ["z"]


def test_long_numbers_of_spaces_and_line_ends_are_no_part_of_a_long_line(tmp_path, small_limits):
    path = write(tmp_path / "a.txt", b"x" * 64 + b"\r" * 9000 + b"\nnext\n" + b"y" * 65 + b"\r\r")
    assert read_file(path, txt_mode="line").values == ["x" * 64, "next", "y" * 65]


def test_a_line_of_backslashes_takes_no_time(tmp_path, small_limits, monkeypatch):
    monkeypatch.setattr(long_text, "_PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(lines, "_COPY_BYTES", 1 << 20)
    raw = b"\\" * 3_000_000
    path = write(tmp_path / "a.jsonl", b'{"text": "' + raw + b'"}\n{"text": "' + b"\x80" * 3_000_000 + b'"}')
    reading = read_texts(path)
    assert reading.values == ["\\" * 1_500_000]
    assert len(reading.refused) == 1 and "a.jsonl:2: not valid UTF-8" in reading.refused[0]


def test_json_of_many_small_values_beyond_the_limit_is_refused(tmp_path, small_limits):
    path = write(tmp_path / "a.jsonl", b'{"n": [' + b"1," * 5000 + b'1], "text": "a"}\n{"text": "good"}')
    reading = read_texts(path)
    assert reading.values == ["good"]
    assert len(reading.refused) == 1
    assert reading.refused[0].startswith("a.jsonl:1: more than 0 MB of JSON outside its longest strings")


# ---------------------------------------------------------------------------------------------------------------
# Whole texts

TEXTS = {
    "plain": b"one\ntwo",
    "CRLF": b"one\r\ntwo\r\n",
    "BOM": BOM + b"one",
    "two BOMs": BOM + BOM + b"one",
    "only a BOM": BOM,
    "empty": b"",
    "NUL": b"a\0b",
    "long": ("é天🙂a\n" * 50).encode(),
    "long with a BOM": BOM + b"a" * 64,
    "just not long": b"a" * 63,
    "just long": b"a" * 64,
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_file_is_its_characters(tmp_path, small_limits, name, suffix):
    content = TEXTS[name]
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    for format_suffix in (".txt", ".md"):
        path = write(tmp_path / f"a{format_suffix}{suffix}", compress(content))
        assert read_file(path).values == [content.removeprefix(BOM).decode("utf-8")]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_what_is_wrong_with_a_text_file_is_said(tmp_path, small_limits, suffix):
    compress = {"": bytes, ".gz": gzip.compress}[suffix]
    path = write(tmp_path / f"a.txt{suffix}", compress(b"one\ntw\xff"))
    expected = f"a.txt{suffix}:2: not valid UTF-8: byte 0xff at byte 3 of the line [invalid UTF-8]"
    assert read_file(path).refused == [expected]
    for bad, place in ((b"a" * 80 + b"\xff", 81), (b"a" * 76 + b"\xe5\xa4", 77)):
        path = write(tmp_path / f"a.txt{suffix}", compress(bad))
        (refused,) = read_file(path).refused
        assert refused.startswith(f"a.txt{suffix}: not valid UTF-8: byte 0x{bad[place - 1]:02x} at byte {place} of the")
    for mark, codec in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        for name in ("a.txt", "a.jsonl", "a.json", "a.csv"):
            path = write(tmp_path / f"{name}{suffix}", compress(mark + '{"text": 1}'.encode(codec)))
            with pytest.raises(UserError, match="is UTF-16; convert it first: iconv"):
                read_file(path)


# ---------------------------------------------------------------------------------------------------------------
# JSON arrays

ARRAYS = [
    b"[]",
    b" \n[ ]\r\n",
    BOM + b'[{"text": "one"}]',
    b'[{"text": "a]}\\"[{,", "n": [1, {"m": "]"}]} , {"text": "\\\\"}\n,{"text": "\\\\\\"", "b": -1.5e3}]',
    b'[{"text": "' + b"word " * 40 + b'"},{"text":"' + b'\\"' * 60 + b'"}, {}]',
    b'[{"a": {"b": [[], {}, [{}]]}, "text": "\xe5\xa4\xa9"}]',
]


@pytest.mark.parametrize("content", ARRAYS)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_elements_of_a_json_array_are_those_of_json(tmp_path, small_limits, content, suffix):
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    reading = read_file(write(tmp_path / f"a.json{suffix}", compress(content)))
    expected = json.loads(content.removeprefix(BOM))
    assert (reading.values, reading.refused) == (expected, [])
    assert reading.places == [f"a.json{suffix}: element {number}" for number in range(1, len(expected) + 1)]


def test_a_json_object_is_one_record(tmp_path, small_limits):
    for record in ({}, {"text": "a}", "n": {"m": ["}"]}}, {"text": "long " * 40}):
        content = json.dumps(record, indent=2).encode()
        assert read_file(write(tmp_path / "a.json", b" " + content + b" \n")).values == [record]


BAD_ELEMENTS = {
    b'[{"text": "a"}, 5, null, []]': ["2: a number", "3: null", "4: an array"],
    b'[{"text": "a"},,{"text": "b"},]': ["2: not valid JSON", "4: not valid JSON"],
    b'[{"text": "a"} {"text": "b"}]': ["1: not valid JSON"],
    b'[{"text": "a", "text": "b"}]': ["1: the key 'text' twice"],
    b'[{"text": "\xff"}, {"text": "\\ud800"}]': ["1: not valid UTF-8", "2: an escaped lone surrogate"],
    b"[" + b"[" * DEEP + b"]" * DEEP + b"]": ["1: not valid JSON"],
    b'[{"text": "a]"}, {"text": nope}]': ["2: not valid JSON"],
    b"[{]]": ["1: not valid JSON"],
}


@pytest.mark.parametrize("content", BAD_ELEMENTS)
def test_bad_elements_are_named_and_the_rest_is_read(tmp_path, content):
    reading = read_file(write(tmp_path / "a.json", content))
    assert len(reading.refused) == len(BAD_ELEMENTS[content])
    for refused, expected in zip(reading.refused, BAD_ELEMENTS[content], strict=True):
        assert refused.startswith(f"a.json: element {expected}")
        assert "line" not in refused


BAD_ARRAYS = {
    b'[{"text": "a"}': r"a.json: element 1: the JSON array ends there: truncated",
    b'[{"text": "a"}, {"text": "b': r"a.json: element 2: the JSON array ends there: truncated",
    b"[": "a.json: element 1: the JSON array ends there",
    b'[{"text": "a"}}]': r"a.json: element 1: the JSON array has a '}' too many",
    b"[{]}]": r"a.json: element 1: the JSON array has a '}' too many",
    b'[{"text": "a"}] [': r"a.json: has content after the end of the JSON array",
    b'{"text": "a"} 5': r"a.json: has content after the end of JSON object 1, which is not another object",
}


@pytest.mark.parametrize("content", BAD_ARRAYS)
def test_damaged_arrays_end_the_run(tmp_path, small_limits, content):
    with pytest.raises(UserError, match=BAD_ARRAYS[content]):
        read_file(write(tmp_path / "a.json", content))


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "an empty file"), (b" \n", "an empty"), (b"5", "begins with '5'")]
)
def test_a_json_file_that_is_no_array_is_refused(tmp_path, content, reason):
    reading = read_file(write(tmp_path / "a.json", content))
    assert reading.values == []
    assert len(reading.refused) == 1 and reading.refused[0].startswith(f"a.json: {reason}")


# ---------------------------------------------------------------------------------------------------------------
# Compression

ROWS = [b'{"text": "%d %s"}\n' % (number, b"word " * (number % 50)) for number in range(300)]


def test_archives_of_several_parts_are_read_to_the_end(tmp_path):
    content = b"".join(ROWS)
    parts = [content[start:stop] for start, stop in pairwise([0, 1, 2, 500, 501, len(content)])]
    expected = [json.loads(row) for row in ROWS]
    write(tmp_path / "a.jsonl.gz", b"".join(map(gzip.compress, parts)) + gzip.compress(b"") + bytes(512))
    write(tmp_path / "a.jsonl.zst", zstd_frames(*parts))
    for suffix in (".gz", ".zst"):
        assert read_file(tmp_path / f"a.jsonl{suffix}").values == expected
        assert read_texts(tmp_path / f"a.jsonl{suffix}").values == [record["text"] for record in expected]
    # A mark that is parted between frames is one still.
    write(tmp_path / "b.txt.zst", zstd_frames(BOM[:1], BOM[1:2], BOM[2:] + b"x"))
    write(tmp_path / "b.txt.gz", b"".join(map(gzip.compress, (BOM[:1], BOM[1:2], BOM[2:] + b"x"))))
    for suffix in (".gz", ".zst"):
        assert read_file(tmp_path / f"b.txt{suffix}").values == ["x"]


def test_every_truncation_of_an_archive_is_noticed(tmp_path):
    content = b"".join(ROWS[:12])
    gz, zst = gzip.compress(content), zstd_frames(content[:500], content[500:])
    frame_ends = {len(zstd_frames(content[:500])), len(zst)} | {len(zstd_frames(content[:500])) - n for n in (13, 22)}
    for name, archive, whole in (("a.jsonl.gz", gz, {len(gz)}), ("a.jsonl.zst", zst, frame_ends)):
        for size in range(1, len(archive)):
            path = write(tmp_path / name, archive[:size])
            if size not in whole:
                with pytest.raises(UserError, match=rf"{name}: truncated or damaged"):
                    read_file(path)


def test_what_is_no_archive_is_refused(tmp_path):
    for suffix, other in ((".gz", zstandard.compress), (".zst", gzip.compress)):
        for content in (b"".join(ROWS), other(b"".join(ROWS)), b"\0" * 100):
            with pytest.raises(UserError, match=f"a.jsonl{suffix}: truncated or damaged"):
                read_file(write(tmp_path / f"a.jsonl{suffix}", content))
        with pytest.raises(UserError, match=f"a.jsonl{suffix}: an empty file"):
            read_file(write(tmp_path / f"a.jsonl{suffix}", b""))
    for garbage in (b"garbage", b'{"text": "a"}\n'):
        with pytest.raises(UserError, match=r"a.jsonl.gz: truncated or damaged"):
            read_file(write(tmp_path / "a.jsonl.gz", gzip.compress(b"".join(ROWS)) + garbage))


def test_a_file_that_changes_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", ROWS[0])
    check = streams.check_unchanged
    monkeypatch.setattr(streams, "check_unchanged", lambda file, size: check(file, size + 1))
    with pytest.raises(UserError, match=r"a.jsonl: was \d+ bytes and is \d+ now"):
        read_file(path)


def test_the_standard_librarys_gzip_does_too(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "_GzipFile", gzip.GzipFile)
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b"".join(ROWS)))
    assert len(read_file(path).values) == len(ROWS)
    with pytest.raises(UserError, match="truncated or damaged"):
        read_file(write(path, path.read_bytes()[:-5]))


def test_a_decompressor_may_give_a_byte_at_a_time(tmp_path, monkeypatch):
    class Slow(gzip.GzipFile):
        def readinto1(self, buffer: memoryview) -> int:
            return super().readinto1(buffer[:1])

    monkeypatch.setattr(streams, "_GzipFile", Slow)
    assert read_file(write(tmp_path / "a.txt.gz", gzip.compress(BOM + b"x"))).values == ["x"]


# ---------------------------------------------------------------------------------------------------------------
# Held-out texts


_PLAIN = Cleaner(PreprocessOptions(["-"]))


def test_held_out_records_give_their_text_or_else_all_their_strings(tmp_path, small_limits):
    question, choice, passage = (" ".join(f"{name}{number}" for number in range(14)) for name in "qcp")
    rows = [{"text": passage, "id": question}, {"id": 1, "data": {"question": question, "choices": [choice, None]}}]
    path = write(tmp_path / "test.jsonl", "\n".join(map(json.dumps, rows)).encode())
    keys = TextChoice(("text",))
    ngrams = read_held_out(held_out_files([str(path)], keys), keys, _PLAIN, tmp_path, ReadOptions())
    for text_, expected in ((passage, True), (question, True), (choice, True), ("quite another text " * 9, False)):
        assert ngrams.contaminated_batch([text_]).tolist() == [expected]


def held_out(path: Path | str, folder: Path, **options: object) -> NgramFilter:
    keys, reading = TextChoice(("text",)), ReadOptions(**options)
    return read_held_out(held_out_files([str(path)], keys), keys, _PLAIN, folder, reading)


def test_a_held_out_file_that_expands_too_far_is_refused(tmp_path):
    bomb = write(tmp_path / "d.txt.gz", gzip.compress(b"a" * (9 << 20)))
    with pytest.raises(UserError, match="--max-expansion"):
        held_out(bomb, tmp_path)
    assert held_out(bomb, tmp_path, max_expansion=0).num_ngrams > 0


def test_what_is_wrong_with_held_out_files_is_reported(tmp_path, small_limits):
    def refused(path: Path | str) -> str:
        with pytest.raises(UserError) as error:
            held_out(path, tmp_path)
        return str(error.value).replace(f"{tmp_path}/", "")

    bad = write(tmp_path / "a.jsonl", b'{"text": "' + b"a" * 90 + b'\xff"}')
    assert refused(bad).startswith("--held-out a.jsonl:1: not valid UTF-8: byte 0xff at byte 101 of the line; fix it")
    assert refused(write(tmp_path / "b.txt", b"a" * 90 + b"\xff")).startswith("--held-out b.txt: not valid UTF-8")
    assert refused("-").startswith("--held-out -: standard input is for the corpus")
    assert refused(tmp_path / "absent.txt") == "--held-out absent.txt: no such file or folder"
    assert refused(write(tmp_path / "c.txt", b"")).startswith("--held-out c.txt: no text in it")
    words = b" ".join(b"w%d" % number for number in range(14))
    quotes = write(tmp_path / "e.csv", b'text\n"a"' + words + b"\n")
    assert "--quoting none" in refused(quotes)
    assert held_out(quotes, tmp_path, quoting="none").num_ngrams > 0
