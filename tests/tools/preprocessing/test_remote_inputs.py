"""Remote inputs give what the same files give from the disk: from memory, and from a web server on this machine."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sys
from collections.abc import Callable

import fsspec
import pytest
import zstandard
from oracles.preprocessing import jsonl, run
from oracles.reading import read_file
from oracles.tiny_pdf import tiny_pdf
from oracles.tiny_tokenizer import sample_text
from range_server import RangeServer

from retemper.engine.errors import UserError
from retemper.tools import preprocess
from retemper.tools.preprocessing import storage
from retemper.tools.preprocessing.inputs.files import InputOptions, expand_inputs
from retemper.tools.preprocessing.readers import line_buffer

TEXTS = [sample_text(seed, 6).replace("\n", " ") for seed in range(30)]
LINES = jsonl(TEXTS)


def parquet() -> bytes:
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS, "n": range(len(TEXTS))}), buffer, row_group_size=7)
    return buffer.getvalue()


def arrow() -> bytes:
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    buffer = io.BytesIO()
    table = pa.table({"text": TEXTS})
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table, 8)
    return buffer.getvalue()


def xlsx() -> bytes:
    openpyxl = pytest.importorskip("openpyxl", reason="needs openpyxl")
    book = openpyxl.Workbook()
    for text in ("text", *TEXTS):
        book.active.append([text])
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()


FORMATS: dict[str, tuple[Callable[[], bytes], tuple[int, ...]]] = {
    "a.jsonl": (lambda: LINES, (100, 1000, 1001)),
    "part-00000": (lambda: LINES, (500,)),
    "a.jsonl.gz": (lambda: gzip.compress(LINES), ()),
    "a.jsonl.zst": (lambda: zstandard.compress(LINES), ()),
    "a.json": (lambda: json.dumps([{"text": text} for text in TEXTS]).encode(), ()),
    "a.txt": (lambda: "\n".join(TEXTS).encode(), ()),
    "a.txt.bz2": (lambda: bz2.compress("\n".join(TEXTS).encode()), ()),
    "a.csv": (lambda: b"text\n" + "\n".join(f'"{text}"' for text in TEXTS).encode(), ()),
    "a.tsv.xz": (lambda: lzma.compress(("text\n" + "\n".join(TEXTS)).encode()), ()),
    "a.parquet": (parquet, (1, 3)),
    "a.arrow": (arrow, ()),
    "a.xlsx": (xlsx, ()),
    "a.pdf": (lambda: tiny_pdf([["one", "two"], ["three"]]), ()),
    "a.md": (lambda: b"# A title\n\ntext\n", ()),
    "a.html": (lambda: b"<html><body><p>One</p><p>Two</p></body></html>", ()),
}


@pytest.fixture
def memory():
    """The file system memory://, empty before and after."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("aiohttp", reason="needs aiohttp: pip install aiohttp")
    monkeypatch.setattr(storage, "_WAITS", (0, 0, 0))
    with RangeServer() as serving:
        yield serving


@pytest.mark.parametrize("name", FORMATS)
def test_records_are_those_of_the_local_file(tmp_path, memory, name):
    make, cuts = FORMATS[name]
    content = make()
    (tmp_path / name).write_bytes(content)
    memory.pipe(f"/corpus/{name}", content)
    local = read_file(tmp_path / name, cuts)
    remote = read_file(f"memory://corpus/{name}", cuts)  # type: ignore[arg-type]
    assert local.values and remote.values == local.values
    assert (remote.refused, remote.notes) == (local.refused, local.notes)


def test_a_text_longer_than_memory_allows_is_read_from_a_copy(tmp_path, memory, monkeypatch):
    from retemper.tools.preprocessing.readers import text

    monkeypatch.setattr(text, "LONG_BYTES", 100)
    memory.pipe("/a.txt", "\n".join(TEXTS).encode())
    assert read_file("memory://a.txt").values == ["\n".join(TEXTS)]  # type: ignore[arg-type]


def test_places_of_bad_lines_need_no_second_pass(memory):
    memory.pipe("/data/a.jsonl", LINES + b"{}\n[]\n")
    (refused,) = read_file("memory://data/a.jsonl", (len(LINES),)).refused  # type: ignore[arg-type]
    assert refused.startswith(f"a.jsonl: line at byte {len(LINES) + 3}: ")


FOLDER = (
    *("README.md", "train.jsonl", "test.jsonl", ".hidden.jsonl", "deep/.git/x.jsonl", "deep/a.jsonl", "deep/er/b.txt"),
    *("deep/b.docx", "other/a.csv", "_SUCCESS", "without", "other/c.jsonl.gz"),
)
ARGUMENTS = ("", "/", "/deep", "/*", "/**", "/**/*.jsonl", "/*.jsonl", "/d*", "/*/a.*", "/deep/[ab]*", "/other/?.csv")


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_folders_and_patterns_name_the_same_files(tmp_path, memory, argument):
    for name in FOLDER:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'{"text": "x"}\n{"text": "y"}\n')
        memory.pipe(f"/data/{name}", path.read_bytes())
    local = _described(f"{tmp_path}/data{argument}", str(tmp_path))
    assert local and _described(f"memory://data{argument}", "memory://") == local


def _described(argument: str, root: str) -> list[tuple[str, str, str, int]]:
    try:
        files = expand_inputs([argument], InputOptions())
    except UserError as error:
        return [(str(error).replace(root, ""), "", "", 0)]
    return [(file.path.removeprefix(root), file.format, file.compression, file.size) for file in files]


def test_a_dataset_of_a_web_server_is_that_of_the_disk(tmp_path, tiny_tokenizer, server, monkeypatch):
    content = {"/a.jsonl": LINES * 30, "/b.jsonl.zst": zstandard.compress(LINES * 3), "/c.parquet": parquet()}
    server.files.update(content)
    for name, each in content.items():
        (tmp_path / name[1:]).write_bytes(each)
    urls = [f"{server.url}{name}" for name in content]
    # Workers start with a server that refuses and breaks off answers at times.
    server.fail = lambda method, path, number: {7: 503, 11: 1}.get(number % 13, 0)
    for folder, inputs in (("local", [tmp_path / name[1:] for name in content]), ("remote", urls)):
        (tmp_path / folder).mkdir()
        run(tiny_tokenizer, tmp_path / folder, *inputs, workers=2, task_bytes=20_000)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"remote/out.{suffix}").read_bytes() == (tmp_path / f"local/out.{suffix}").read_bytes()
    sources = json.loads((tmp_path / "remote/out.json").read_text())["sources"]
    assert [(each["name"], each["bytes"]) for each in sources] == [
        (url, len(content[name])) for url, name in zip(urls, content, strict=True)
    ]
    assert not list(tmp_path.glob("remote/*.jsonl*"))


@pytest.mark.slow  # a worker tries for 15 seconds
def test_an_interrupted_run_continues(tmp_path, tiny_tokenizer, server):
    server.files.update({"/a.jsonl": LINES * 30, "/b.jsonl": LINES * 30})
    urls = [f"{server.url}/a.jsonl", f"{server.url}/b.jsonl"]
    settings = {"workers": 1, "task_bytes": 10_000}
    heads = 1

    def fail(method: str, path: str, number: int) -> int:
        """Refuse what workers read of b.jsonl; the first request detects its format."""
        nonlocal heads
        heads -= (method, path) == ("GET", "/b.jsonl")
        return 503 if path == "/b.jsonl" and heads < 0 else 0

    server.fail = fail
    with pytest.raises(UserError, match=r"b\.jsonl: cannot be read .*503"):
        run(tiny_tokenizer, tmp_path, *urls, **settings)
    assert not (tmp_path / "out.idx").exists()
    server.fail = lambda method, path, number: 0
    server.requests.clear()
    run(tiny_tokenizer, tmp_path, *urls, **settings)
    gets = [path for method, path, _ in server.requests if method == "GET"]
    assert gets.count("/a.jsonl") < gets.count("/b.jsonl")
    (tmp_path / "local").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "local" / name).write_bytes(LINES * 30)
    run(tiny_tokenizer, tmp_path, tmp_path / "local", output_prefix=str(tmp_path / "whole"))
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


REQUESTS = {
    "stream": ["25590-25599", "12345-16344", "16345-17899"],
    "table": ["25000-25999", "12000-12999", "13000-13999", "14000-14999", "15000-15999", "16000-16999"],
    "part": ["25590-25599", "12345-15344", "12400-12899", "14900-16899"],
}


@pytest.mark.parametrize("access", REQUESTS)
def test_a_remote_file_is_read_in_blocks(server, monkeypatch, access):
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 1000)
    content = server.files["/a"] = bytes(range(256)) * 100
    with storage.open_file(f"{server.url}/a", access) as file:
        assert file.seek(-10, os.SEEK_END) == 25_590 and file.read(100) == content[-10:]
        for start, size in ((12_345, 3_000), (12_400, 500), (14_900, 2_000)):
            assert file.seek(start) and file.read(size) == content[start : start + size] and file.tell() == start + size
    fetched = [asked.removeprefix("bytes=") for method, _, asked in server.requests if method == "GET"]
    assert fetched == REQUESTS[access]


def test_workers_fetch_little_more_than_their_parts(server, monkeypatch):
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 2000)
    monkeypatch.setattr(line_buffer, "_BLOCK_BYTES", 500)
    server.files["/a.jsonl"] = LINES * 50
    cuts = range(10_000, len(LINES) * 50, 10_000)
    assert len(read_file(f"{server.url}/a.jsonl", cuts).values) == len(TEXTS) * 50  # type: ignore[arg-type]
    ranges = [asked.removeprefix("bytes=").split("-") for method, _, asked in server.requests if method == "GET"]
    fetched = sum(int(last) - int(first) + 1 for first, last in ranges[1:])  # the first one detects the format
    assert fetched < 1.4 * len(LINES) * 50


@pytest.mark.parametrize("fault", [503, 429, 1, 2])
def test_errors_that_may_pass_are_tried_again(server, fault):
    server.files["/a"] = os.urandom(50_000)
    server.fail = lambda method, path, number: fault if number in (1, 2, 5, 7) else 0
    with storage.open_file(f"{server.url}/a") as file:
        assert file.read(40_000) + file.read() == server.files["/a"]


def test_errors_that_stay_are_one_line(server):
    server.files["/a"] = os.urandom(50_000)
    server.fail = lambda method, path, number: 503 if method == "GET" else 0
    with storage.open_file(f"{server.url}/a") as file, pytest.raises(UserError, match=r"/a: cannot be read .*503"):
        file.read(10)
    server.fail = lambda method, path, number: 403
    seen = len(server.requests)
    with pytest.raises(UserError, match=r"/a: no permission to read it .*403"):
        storage.open_file(f"{server.url}/a")
    assert len(server.requests) - seen <= 2  # it is not tried again
    server.fail, server.ranges = (lambda method, path, number: 0), False
    with pytest.raises(UserError, match="/a: "):
        storage.open_file(f"{server.url}/a")


def test_a_file_that_has_changed_is_noticed(server):
    url = f"{server.url}/a.jsonl"
    server.files["/a.jsonl"] = LINES
    (before,) = expand_inputs([url], InputOptions())
    server.files["/a.jsonl"] = LINES[::-1]
    (after,) = expand_inputs([url], InputOptions())
    assert before.size == after.size and before.version != after.version
    server.files["/a.jsonl"] = LINES + LINES
    from retemper.tools.preprocessing.readers.streams import open_unchanged

    with pytest.raises(UserError, match=r"a\.jsonl: was \d+ bytes and is \d+ now"), open_unchanged(after):
        pass


def test_listed_inputs_are_not_read(server, capsys):
    server.files.update({"/a.jsonl": LINES, "/b": b"x"})
    preprocess.main(["--input", f"{server.url}/a.jsonl", f"{server.url}/b", "--list-inputs"])
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(facts["path"], facts["size"]) for facts in listed] == [
        (f"{server.url}/a.jsonl", len(LINES)),
        (f"{server.url}/b", 1),
    ]
    assert all(facts["identity"].startswith("ETag ") for facts in listed)
    assert {method for method, _, _ in server.requests} == {"HEAD"}


def test_wrong_urls_are_one_line(refused, memory, server, tmp_path, monkeypatch):
    out = ["--output-prefix", str(tmp_path / "out")]
    assert "nosuch:// is not a file system" in refused("--input", "nosuch://bucket/a.jsonl", *out)
    assert "memory:///a.jsonl: no such file" in refused("--input", "memory://a.jsonl", *out)
    assert "memory://data/*.jsonl: no file matches" in refused("--input", "memory://data/*.jsonl", *out)
    assert f"{server.url}/a.jsonl: no such file" in refused("--input", f"{server.url}/a.jsonl", *out)
    memory.pipe("/a.jsonl", LINES)
    twice = refused("--input", "memory://a.jsonl", "memory:///a.jsonl", *out)
    assert "is already an input" in twice
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert "reading it needs s3fs: pip install" in refused("--input", "s3://bucket/a.jsonl", *out)
