"""preprocess --to-jsonl: the text of the documents that a dataset would have, in its order, without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard
from oracles.megatron_index import read_megatron
from oracles.preprocessing import report, run
from oracles.tiny_tokenizer import sample_text

from retemper.engine.data.sidecar import Sidecar
from retemper.engine.errors import UserError
from retemper.tools.preprocess import main
from retemper.tools.preprocessing.options import PreprocessOptions
from retemper.tools.preprocessing.pipeline import PreprocessReport, preprocess
from retemper.tools.preprocessing.records import long_text
from retemper.tools.preprocessing.report import format_report
from retemper.tools.preprocessing.workers.encoded import LongTextLine
from retemper.tools.preprocessing.workers.worker import TaskRunner

TEXTS = [f'{sample_text(seed, 12)} "\\\n天{seed}  \u2028\x01' for seed in range(40)]
RECORDS = [{"id": number, "text": text, "from": {"site": f"s{number % 3}"}} for number, text in enumerate(TEXTS)]


def write(folder: Path, options: dict[str, object]) -> PreprocessReport:
    settings = {"output_prefix": str(folder / "out"), "to_jsonl": "plain", **options}
    return preprocess(PreprocessOptions([str(folder / "a.jsonl")], **settings))  # type: ignore[arg-type]


def read(path: Path) -> list[dict[str, object]]:
    content = path.read_bytes()
    if path.suffix == ".zst":
        content = zstandard.ZstdDecompressor().stream_reader(content).read()
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    records = [*RECORDS, *RECORDS[::4], {"id": -1, "text": "", "from": {}}]
    (tmp_path / "a.jsonl").write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records))
    return tmp_path


def test_lines_are_the_cleaned_documents_with_their_metadata(corpus):
    found = write(corpus, {"dedup": "exact", "strip_control": True, "metadata": ["id", "from.site"]})
    wanted = [
        {"text": record["text"].replace("\x01", ""), "id": record["id"], "from.site": record["from"]["site"]}
        for record in RECORDS
    ]
    assert read(corpus / "out.jsonl") == wanted
    assert [list(line) for line in read(corpus / "out.jsonl")] == [["text", "id", "from.site"]] * len(wanted)
    assert found.files == (f"{corpus}/out.jsonl", f"{corpus}/out.jsonl.json")
    sidecar = Sidecar.read(corpus / "out.jsonl")
    assert sidecar is not None
    assert sidecar.documents == len(wanted)
    assert sidecar.left_out == {"duplicate": 10, "empty": 1}
    assert sidecar.changed == {"--strip-control": 50}
    assert "tokens" not in format_report(found)
    assert sorted(path.name for path in corpus.iterdir()) == ["a.jsonl", "out.jsonl", "out.jsonl.json"]


OPTIONS = {
    "as it comes": {"max_documents": 23},
    "some left out": {"dedup": "exact", "min_chars": 70},
    "shuffled": {"shuffle": True, "seed": 3},
    "split": {"split": "train=0.7,valid=0.3", "shuffle": True},
    "near-duplicates": {"dedup": "minhash"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("form", ["plain", "zst"])
def test_the_text_read_back_gives_the_same_dataset(corpus, tiny_tokenizer, options, form):
    metadata = {"metadata": ["id"]}
    run_options = {"output_prefix": str(corpus / "direct"), **options, **metadata}
    direct = report(tiny_tokenizer, corpus, corpus / "a.jsonl", **run_options)
    write(corpus, {**options, **metadata, "to_jsonl": form})
    for prefix, sidecar in direct.sidecars.items():
        name = Path(prefix).name.replace("direct", "out")
        text = corpus / f"{name}.jsonl{'.zst' if form == 'zst' else ''}"
        back = run(tiny_tokenizer, corpus, text, output_prefix=str(corpus / "back"), overwrite=True, **metadata)
        assert (back.bin_xxh3_128, back.idx_xxh3_128) == (sidecar.bin_xxh3_128, sidecar.idx_xxh3_128)
        assert back.metadata_xxh3_128 == sidecar.metadata_xxh3_128
        assert read_megatron(corpus / "back").documents == read_megatron(Path(prefix)).documents


@pytest.mark.parametrize("form", ["plain", "zst"])
def test_bytes_do_not_depend_on_workers_and_tasks(corpus, form):
    contents = set()
    for settings in ({}, {"task_bytes": 700, "workers": 2, "encoder": "fast"}, {"batch_characters": 1}):
        write(corpus, {"to_jsonl": form, "metadata": ["id"], "split": "a=0.5,b=0.5", "overwrite": True, **settings})
        contents.add(tuple(path.read_bytes() for path in sorted(corpus.glob("out.*.jsonl*"))))
    assert len(contents) == 1


def test_a_long_text_is_written_in_pieces(tmp_path, monkeypatch):
    texts = ["short", 'long "\\ 天\n' * 300, "x" * 40, "end"]
    records = [{"text": text, "n": number} for number, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records))
    monkeypatch.setattr(long_text, "LONG_BYTES", 1000)
    monkeypatch.setattr("retemper.tools.preprocessing.readers.lines.LONG_BYTES", 1000)
    monkeypatch.setattr(long_text, "_LONG_STRING", 100)
    monkeypatch.setattr(long_text, "_PIECE_BYTES", 64)
    seen = []
    whole_line = LongTextLine.extend_line
    monkeypatch.setattr(LongTextLine, "extend_line", lambda self, text: seen.append(text) or whole_line(self, text))
    for least, kept in ((0.0, [0, 1, 2, 3]), (0.8, [0, 2, 3])):
        write(tmp_path, {"metadata": ["n"], "overwrite": True, "min_letter_ratio": least})
        assert read(tmp_path / "out.jsonl") == [records[number] for number in kept]
        assert len(seen) > 10
        seen.clear()


def test_a_killed_run_continues(corpus, monkeypatch):
    ran = []
    whole = TaskRunner.run

    def run_once(self, task, key):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(key)
        return whole(self, task, key)

    options = {"task_bytes": 1500}
    monkeypatch.setattr(TaskRunner, "run", run_once)
    with pytest.raises(KeyboardInterrupt):
        write(corpus, options)
    assert not list(corpus.glob("out*"))
    ran.clear()
    monkeypatch.setattr(TaskRunner, "run", lambda self, task, key: ran.append(key) or whole(self, task, key))
    write(corpus, options)
    assert len(read(corpus / "out.jsonl")) == 50
    num_after = len(ran)
    ran.clear()
    write(corpus, {**options, "overwrite": True})
    assert len(ran) == num_after + 2


def test_shards_joined_are_the_whole(corpus):
    write(corpus, {"metadata": ["id"], "task_bytes": 700})
    whole = (corpus / "out.jsonl").read_bytes()
    parts = b""
    for index in range(3):
        write(corpus, {"metadata": ["id"], "task_bytes": 700, "shard": f"{index}/3"})
        parts += (corpus / f"out.shard-{index}-of-3.jsonl").read_bytes()
    assert parts == whole


def test_nothing_else_is_replaced(corpus, tiny_tokenizer):
    with pytest.raises(UserError, match="is an input"):
        write(corpus, {"output_prefix": str(corpus / "a"), "overwrite": True})
    (corpus / "out.jsonl").write_text("mine")
    with pytest.raises(UserError, match="not recognised as part of a dataset"):
        write(corpus, {"overwrite": True})
    (corpus / "out.jsonl").unlink()
    run(tiny_tokenizer, corpus, corpus / "a.jsonl")
    dataset = {path.name: path.read_bytes() for path in corpus.glob("out.*")}
    write(corpus, {})
    with pytest.raises(UserError, match="already there"):
        write(corpus, {"to_jsonl": "zst"})
    write(corpus, {"to_jsonl": "zst", "overwrite": True})
    assert {path.name for path in corpus.glob("out.*")} == {*dataset, "out.jsonl.zst", "out.jsonl.json"}
    assert all((corpus / name).read_bytes() == content for name, content in dataset.items())


def test_a_folder_with_text_and_its_record_is_read_again(corpus):
    (corpus / "clean").mkdir()
    write(corpus, {"output_prefix": str(corpus / "clean" / "text")})
    preprocess(PreprocessOptions([str(corpus / "clean")], to_jsonl="plain", output_prefix=str(corpus / "again")))
    assert (corpus / "again.jsonl").read_bytes() == (corpus / "clean" / "text.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"tokenizer": "x"}, "tokenizer"),
        ({"min_tokens": 3}, "min-tokens"),
        ({"append_eod": False}, "no-append-eod"),
        ({"metadata": ["text"]}, "metadata text"),
        ({"cache_folder": "c"}, "cache-folder"),
    ],
)
def test_options_for_tokens_are_refused(corpus, options, name):
    with pytest.raises(UserError, match=f"--{name}"):
        write(corpus, options)


def test_the_command_line(corpus, capsys):
    main(["--input", str(corpus / "a.jsonl"), "--to-jsonl", "--output-prefix", str(corpus / "out")])
    assert "out.jsonl" in capsys.readouterr().out
    main(["--input", str(corpus / "a.jsonl"), "--to-jsonl", "zst", "--output-prefix", str(corpus / "packed")])
    assert read(corpus / "packed.jsonl.zst") == read(corpus / "out.jsonl")
