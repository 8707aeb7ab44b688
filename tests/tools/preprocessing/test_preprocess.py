"""The preprocess command: its output against the plain ``tokenizers`` library, a document at a time; bad inputs."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from oracles.megatron_index import read_megatron
from oracles.preprocessing import GOOD, jsonl, plain_ids, report, run
from oracles.tiny_tokenizer import sample_text, shared_data, train_tiny_tokenizer

from retemper.engine.data.sidecar import Sidecar
from retemper.tools import preprocess as command
from retemper.tools.preprocessing.inputs.files import InputOptions, expand_inputs
from retemper.tools.preprocessing.workers.tasks import plan_tasks

TEXTS = [*(sample_text(seed, 5 + seed) for seed in range(30)), "a<|endoftext|>b", "\x00\u2028 two\r\nlines 🙂", "cat"]
OUTPUTS = ["out.bin", "out.idx", "out.json"]


def test_every_format_gives_the_librarys_ids_in_input_order(tmp_path, tiny_tokenizer):
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "a.jsonl").write_bytes(jsonl(TEXTS[:10]))
    (data / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS[10:15])) + gzip.compress(jsonl(TEXTS[15:20])))
    frames = [zstandard.ZstdCompressor().compress(jsonl(TEXTS[i : i + 4])) for i in (20, 24)]
    (data / "c.jsonl.zst").write_bytes(b"".join(frames))
    (data / "sub" / "d.txt").write_bytes(TEXTS[28].encode())
    (data / "sub" / "e.TXT").write_bytes(TEXTS[31].encode())
    (data / ".hidden.txt").write_text("no")
    (tmp_path / "first.txt").write_bytes(TEXTS[32].encode())
    sidecar = run(tiny_tokenizer, tmp_path, tmp_path / "first.txt", data)
    expected = [TEXTS[32], *TEXTS[:29], TEXTS[31]]
    written = read_megatron(tmp_path / "out")
    assert written.documents == plain_ids(tiny_tokenizer, expected)
    assert written.code == 8
    assert (sidecar.documents, sidecar.tokens) == (len(expected), sum(written.lengths))
    assert sidecar.characters == sum(map(len, expected))
    assert sidecar.text_bytes == sum(len(text.encode()) for text in expected)
    assert (sidecar.append_eod, sidecar.eod_token, sidecar.eod_id) == (True, "<|endoftext|>", 0)
    assert sidecar.max_token_id == max(map(max, written.sequences))
    assert [(Path(s.name).name, s.files, s.documents) for s in sidecar.sources] == [
        ("first.txt", 1, 1),
        ("data", 5, 30),
    ]
    sizes = [path.stat().st_size for path in data.rglob("*") if path.is_file() and path.name != ".hidden.txt"]
    assert [s.bytes for s in sidecar.sources] == [(tmp_path / "first.txt").stat().st_size, sum(sizes)]


def test_same_bytes_for_any_workers_and_task_size(tmp_path, tiny_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(jsonl([text]).strip() for text in TEXTS))  # no newline at the end
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
    for index, text in enumerate(TEXTS[:5]):
        (tmp_path / f"c{index}.txt").write_text(text)
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c*.txt"]
    outputs = []
    for workers, task_bytes, batch in ((1, None, 1 << 20), (1, 7, 10), (2, 100, 50), (3, 333, 1 << 20)):
        folder = tmp_path / f"{workers}-{task_bytes}"
        run(tiny_tokenizer, folder, *inputs, workers=workers, task_bytes=task_bytes, batch_characters=batch)
        outputs.append([(folder / name).read_bytes() for name in OUTPUTS])
        assert sorted(os.listdir(folder)) == OUTPUTS
    assert all(output == outputs[0] for output in outputs)
    expected = plain_ids(tiny_tokenizer, [*TEXTS, *TEXTS, *TEXTS[:5]])
    assert read_megatron(tmp_path / "2-100" / "out").documents == expected


@pytest.mark.parametrize("task_bytes", [1, 2, 3, 5, 8, 13, 1000])
def test_tasks_cover_each_byte_once_and_in_order(tmp_path, task_bytes):
    for name, size in (("a.jsonl", 20), ("b.jsonl", 0), ("c.txt", 7), ("d.txt", 1), ("e.jsonl.gz", 9)):
        (tmp_path / name).write_bytes(b"x" * size)
    files = expand_inputs([str(tmp_path)], InputOptions())
    tasks = plan_tasks(files, task_bytes)
    assert [task.index for task in tasks] == list(range(len(tasks)))
    covered = [(files.index(s.file), byte) for task in tasks for s in task.spans for byte in range(s.start, s.stop)]
    assert covered == [(number, byte) for number, file in enumerate(files) for byte in range(file.size)]
    spans = [span for task in tasks for span in task.spans]
    assert {span.file for span in spans} == set(files)
    assert all((s.file.format == "jsonl" and not s.file.compression) or s.stop == s.file.size for s in spans)


def test_bom_crlf_blank_lines_empty_texts_and_other_keys(tmp_path, tiny_tokenizer):
    lines = [b'{"body": "one"}\r\n', b"\r\n", b'{"body": ""}\n', b"  \n", b'{"n": [1], "body": "two"}']
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + b"".join(lines)))
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfthree\r\n")
    (tmp_path / "d.txt").write_bytes(b"")
    (tmp_path / "e.jsonl").write_bytes(b"\xef\xbb\xbf")
    sidecar = run(tiny_tokenizer, tmp_path, tmp_path, json_key=["body"], append_eod=False, task_bytes=9)
    texts = ["one", "two", "one", "two", "three\r\n"]
    assert read_megatron(tmp_path / "out").documents == plain_ids(tiny_tokenizer, texts, [])
    assert sidecar.left_out == {"empty": 3}
    assert (sidecar.append_eod, sidecar.options) == (False, {"json_key": ["body"]})


def test_wide_vocabulary_and_choice_of_eod(tmp_path):
    folder = train_tiny_tokenizer(tmp_path / "t", special=("<pad>", "</s>", "<doc>"), eos="</s>")
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["model"]["vocab"].update({f"unused {i}": len(content["model"]["vocab"]) + i for i in range(65500)})
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[:3]))
    for options, end in (({}, [1]), ({"eod_token": "<doc>"}, [2])):
        run(folder, tmp_path, tmp_path / "a.jsonl", overwrite=True, **options)
        written = read_megatron(tmp_path / "out")
        assert (written.code, written.documents) == (4, plain_ids(folder, TEXTS[:3], end))


def test_a_tokenizer_that_changes_between_two_runs_of_one_process(tmp_path):
    """Workers inherit the tokenizer of the first run from the process that starts them."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[:3]))
    for special in (("<|endoftext|>",), ("<|endoftext|>", "<a>", "<b>")):
        folder = train_tiny_tokenizer(tmp_path / "t", special=special, eos=None)
        run(folder, tmp_path, tmp_path / "a.jsonl", overwrite=True)
        assert read_megatron(tmp_path / "out").documents == plain_ids(folder, TEXTS[:3])


MALFORMED = {
    "cut short": (b'{"text": "a"', "not valid JSON"),
    "not an object": (b"[1]", "an array, not a JSON object"),
    "a string": (b'"text"', "a string, not a JSON object"),
    "missing key": (b'{"txt": "a"}', "no key 'text' .*'txt'.* --json-key"),
    "number": (b'{"text": 5}', "the value of 'text' is a number, not a string"),
    "null": (b'{"text": null}', "the value of 'text' is null, not a string"),
    "not UTF-8": (b'{"text": "a\xffb"}', "not valid UTF-8: byte 0xff at byte 12"),
    "lone surrogate": (b'{"text": "\\ud800"}', "lone surrogate"),
    "two records": (b'{"text": "a"}{"text": "b"}', "not valid JSON"),
    "a key twice": (b'{"text": "a", "text": "b"}', "the key 'text' twice"),
    "too deep": (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_line_is_named_and_nothing_is_left(tmp_path, refused, fault):
    line, reason = MALFORMED[fault]
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    path.write_bytes(GOOD * 3 + b"\n" + line + b"\n" + GOOD)
    error = refused("--input", path, "--output-prefix", tmp_path / "o" / "out")
    assert error.startswith(f"error: {path}:5: ")
    utf8 = " or --drop-invalid-utf8" if fault == "not UTF-8" else ""
    assert error.endswith(f"fix it, or leave such records out with --skip-bad-lines{utf8}")
    assert re.search(reason, error)
    assert os.listdir(tmp_path / "o") == []


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_line_numbers_are_exact_in_any_task(tmp_path, tiny_tokenizer, suffix):
    compress = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
    path = tmp_path / f"a{suffix}"
    for number in (1, 99):
        lines = [GOOD, b"\n"] * 50
        lines[number - 1] = b"oops\n"
        path.write_bytes(compress(b"".join(lines)))
        with pytest.raises(ValueError, match=rf"a{suffix}:{number}: not valid JSON"):
            run(tiny_tokenizer, tmp_path, path, task_bytes=100)
        found = report(tiny_tokenizer, tmp_path, path, task_bytes=100, skip_bad_lines=True)
        assert found.first_bad is not None and found.first_bad.startswith(f"{path}:{number}: not valid JSON")
        (line,) = (tmp_path / "out.rejects.jsonl").read_text().splitlines()
        assert json.loads(line)["where"] == f"{path}:{number}"
        for name in (*OUTPUTS, "out.rejects.jsonl"):
            (tmp_path / name).unlink()


def test_skipped_lines_are_counted_and_said(tmp_path, tiny_tokenizer, capsys):
    bad = b"".join(line + b"\n" for line, _ in MALFORMED.values())
    (tmp_path / "a.jsonl").write_bytes(GOOD + bad + GOOD)
    (tmp_path / "b.txt").write_bytes(b"one\ntwo\xff")
    arguments = ["--input", str(tmp_path), "--tokenizer", str(tiny_tokenizer), "--workers", "1", "--skip-bad-lines"]
    command.main([*arguments, "--output-prefix", str(tmp_path / "out")])
    table = dict(re.split("  +", line.strip(), maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert table["malformed"] == str(len(MALFORMED) - 1) and table["invalid UTF-8"] == "2"
    assert table["first malformed"].startswith(f"{tmp_path}/a.jsonl:2: not valid JSON")
    sidecar = Sidecar.read(tmp_path / "out")
    assert sidecar is not None and sidecar.documents == 2
    assert sidecar.left_out == {"malformed": len(MALFORMED) - 1, "invalid UTF-8": 2}
    assert read_megatron(tmp_path / "out").documents == plain_ids(tiny_tokenizer, ["fine", "fine"])
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_bytes().splitlines()]
    places = [f"{tmp_path}/a.jsonl:{2 + number}" for number in range(len(MALFORMED))]
    assert [reject["where"] for reject in rejects] == [*places, f"{tmp_path}/b.txt:2"]
    for reject, (line, reason) in zip(rejects, MALFORMED.values(), strict=False):
        assert re.search(reason, reject["reason"])
        assert reject["record"].rstrip("\n") == line.decode("utf-8", "backslashreplace")


def truncated_archives(folder: Path) -> dict[str, str]:
    content = jsonl([sample_text(seed, 50) for seed in range(50)])
    files = {
        "cut.jsonl.gz": (gzip.compress(content)[:-500], "truncated or damaged"),
        "cut.jsonl.zst": (zstandard.compress(content)[:-500], "truncated or damaged"),
        "tail.jsonl.zst": (zstandard.compress(content)[:-1], "truncated or damaged"),
        "not.jsonl.gz": (content, "truncated or damaged"),
        "not.jsonl.zst": (content, "truncated or damaged"),
        "zero.jsonl.gz": (b"", "an empty file"),
        "zero.jsonl.zst": (b"", "an empty file"),
    }
    for name, (raw, _) in files.items():
        (folder / name).write_bytes(raw)
    return {name: message for name, (_, message) in files.items()}


def test_damaged_archives_are_refused(tmp_path, refused):
    for name, message in truncated_archives(tmp_path).items():
        arguments = ("--input", tmp_path / name, "--output-prefix", tmp_path / "o" / "out")
        error = refused(*arguments)
        assert error.startswith(f"error: {tmp_path / name}: {message}")
        assert error.endswith("; or keep what comes before with --skip-bad-lines")
        assert os.listdir(tmp_path / "o") == []


def test_inputs_that_cannot_be_are_refused(tmp_path, refused):
    for name in ("x.doc", "x.unknown"):
        (tmp_path / name).write_text("a,b")
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "none").mkdir()
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "absent")
    cases = [
        (["absent.jsonl"], "absent.jsonl: no such file or folder"),
        (["x.doc"], r"x.doc: a word processor's document, which is not read; convert it"),
        (["x.unknown"], r"x.unknown: unknown format; known are .*\.jsonl"),
        (["*.parquet"], r"\*.parquet: no file matches this pattern"),
        (["none"], "none: no .jsonl, .* file in this folder"),
        (["gone.jsonl"], "gone.jsonl: no such file or folder"),
        (["a.jsonl", "a.jsonl"], "a.jsonl is already an input"),
        (["a.jsonl", "a*.jsonl"], "a.jsonl is already an input"),
    ]
    for names, message in cases:
        inputs = [tmp_path / name for name in names]
        error = refused("--input", *inputs, "--output-prefix", tmp_path / "o" / "out")
        assert re.search(message, error), error
        assert not (tmp_path / "o").exists()


def test_empty_corpus_is_refused(tmp_path, refused):
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": ""}\noops\n')
    (tmp_path / "c.txt").write_bytes(b"")
    arguments = ("--input", tmp_path, "--output-prefix", tmp_path / "o" / "out", "--skip-bad-lines")
    error = refused(*arguments)
    assert "no document to write (3 input files; 2 empty, 1 malformed; the first malformed: " in error
    assert f"{tmp_path}/b.jsonl:2: " in error
    assert os.listdir(tmp_path / "o") == []


@pytest.mark.parametrize("name", OUTPUTS)
def test_existing_output_is_refused_before_any_work(tmp_path, refused, name):
    (tmp_path / name).write_text("mine")
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    for more in ([], ["--overwrite"]):
        error = refused("--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "out", *more)
        assert error.startswith(f"error: {tmp_path / name}: exists and is not recognised")
    assert (tmp_path / name).read_text() == "mine"


def test_overwriting_keeps_the_old_until_the_new_is_complete(tmp_path, tiny_tokenizer, refused):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["old"]))
    run(tiny_tokenizer, tmp_path / "o", tmp_path / "a.jsonl")
    old = [(tmp_path / "o" / name).read_bytes() for name in OUTPUTS]
    (tmp_path / "a.jsonl").write_bytes(jsonl(["new"]) + b"oops\n")
    refused("--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "o" / "out", "--overwrite")
    assert [(tmp_path / "o" / name).read_bytes() for name in OUTPUTS] == old
    assert sorted(os.listdir(tmp_path / "o")) == OUTPUTS
    run(tiny_tokenizer, tmp_path / "o", tmp_path / "a.jsonl", overwrite=True, skip_bad_lines=True)
    assert read_megatron(tmp_path / "o" / "out").documents == plain_ids(tiny_tokenizer, ["new"])


def test_wrong_options_are_refused(tmp_path, refused):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "file").write_bytes(b"")
    out = ("--output-prefix", tmp_path / "o" / "out")
    cases = [
        (out, ("--workers", "0"), "--workers 0: must be at least 1"),
        (out, ("--eod-token", "</nope>"), "'</nope>' is not in the vocabulary; .* --eod-token"),
        (out, ("--tokenizer", tmp_path), "no tokenizer.json in this folder; .* --tokenizer"),
        (out, ("--tokenizer", tmp_path / "absent"), "no such tokenizer folder or file; .* --tokenizer"),
        (("--output-prefix", f"{tmp_path}/"), (), "names a folder; add a file name"),
        (("--output-prefix", tmp_path / "file" / "out"), (), "cannot write there: "),
    ]
    for prefix, options, message in cases:
        error = refused("--input", tmp_path / "a.jsonl", *prefix, *options)
        assert re.search(message, error), error
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "file"]


SCRIPT = Path(command.__file__)


def test_command_line_as_a_user_runs_it(tmp_path, tiny_tokenizer):
    (tmp_path / "corpus.jsonl").write_bytes(jsonl(TEXTS))
    arguments = [sys.executable, str(SCRIPT), "--input", "corpus.jsonl", "--tokenizer", str(tiny_tokenizer)]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert sorted(os.listdir(tmp_path)) == ["corpus.jsonl", "dataset.bin", "dataset.idx", "dataset.json"]
    assert read_megatron(tmp_path / "dataset").documents == plain_ids(tiny_tokenizer, TEXTS)
    table = dict(re.split("  +", line.strip(), maxsplit=1) for line in result.stdout.splitlines())
    assert table["documents"] == str(len(TEXTS))
    assert table["document end"] == "<|endoftext|> (0)"
    assert table["files"] == "dataset.bin dataset.idx dataset.json"
    assert len(result.stderr.splitlines()) == 1
    sidecar = Sidecar.read(tmp_path / "dataset")
    assert sidecar is not None and [source.name for source in sidecar.sources] == ["corpus.jsonl"]


@pytest.mark.slow
def test_real_text_where_there_is_any(tmp_path):
    """An addition to the tests above, for which made-up text is enough."""
    folder = shared_data()
    if folder is None:
        return
    lines = (folder / "corpora" / "chinese_classics.jsonl").read_bytes().splitlines(keepends=True)[:8]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    tokenizer = folder / "tokenizers" / "qwen3"
    run(tokenizer, tmp_path, tmp_path / "a.jsonl")
    texts = [json.loads(line)["text"] for line in lines]
    written = read_megatron(tmp_path / "out")
    assert (written.code, written.documents) == (4, plain_ids(tokenizer, texts, [151643]))
