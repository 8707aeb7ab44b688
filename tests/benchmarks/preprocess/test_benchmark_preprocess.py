"""The benchmark of the preprocess command: what it measures against what is known to have been used; its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from forked import LIMIT_SECONDS
from oracles.megatron_index import read_megatron, write_megatron
from oracles.tiny_tokenizer import sample_text
from tokenizers import Tokenizer

from retemper.benchmarks.preprocess import benchmark
from retemper.benchmarks.preprocess.benchmark import (
    Bench,
    PreprocessBenchmarkOptions,
    Results,
    check_tokens,
    compare_datasets,
)
from retemper.benchmarks.preprocess.corpora import (
    BenchmarkCorpus,
    beginning,
    describe,
    read_texts,
    repeated,
    write_documents,
    write_long_document,
)
from retemper.benchmarks.preprocess.limit import batches_of
from retemper.benchmarks.preprocess.memory import MemoryUse, check_memory
from retemper.benchmarks.preprocess.report import format_report, summarize
from retemper.benchmarks.process_tree import Cost, measure
from retemper.engine.errors import UserError
from retemper.tools import benchmark_preprocess as command
from retemper.tools.tokenizer.handle import load_tokenizer

ROOT = Path(command.__file__).parents[1]
TEXTS = [sample_text(seed, 5 + seed) for seed in range(20)]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmark is for Linux")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text(
        "\n\n".join(json.dumps({"text": text}) for text in TEXTS), encoding="utf-8"
    )  # no newline at its end
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Costs

BURN = "import time, os, sys\nuntil = time.process_time() + {0}\nwhile time.process_time() < until: pass\n"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_cpu_time_is_that_of_all_processes_with_orphans_and_of_none_besides():
    """A child that is waited for, a grandchild that is orphaned, and threads; each burns what it says."""
    code = f"""
import os, subprocess, sys, threading
burn = lambda seconds: subprocess.Popen([sys.executable, "-S", "-c", {BURN!r}.format(seconds)])
burn(0.3).wait()
if os.fork() == 0:
    if os.fork() == 0:
        exec({BURN.format(0.4)!r})
    os._exit(0)
os.wait()
exec({BURN.format(0.2)!r})
print("done")
"""
    cost, output = measure(python(code))
    assert output == "done\n"
    # Starting three interpreters takes some more.
    assert 0.9 <= cost.cpu_seconds < 0.9 + 1.0
    assert cost.processes == 2


def test_the_wall_time_ends_with_the_command_but_its_orphans_are_waited_for():
    code = "import os, time\nif os.fork() == 0:\n    time.sleep(1.5)\n    os._exit(0)\n"
    started = time.monotonic()
    cost, _ = measure(python(code))
    # 1.5 s pass between the two ends, less what a busy machine takes to notice the first.
    assert time.monotonic() - started - cost.wall_seconds > 0.5


def test_peak_memory_sums_over_processes_what_is_their_own():
    """60 MB of the parent are shared with its child by fork; 40 MB are the child's own."""
    code = """
import os, time
def touched(mib):
    memory = bytearray(mib << 20)
    memory[::4096] = b"x" * (mib << 8)
    return memory
shared = touched(60)
if os.fork() == 0:
    own = touched(40)
    time.sleep(1.2)
    os._exit(0)
os.wait()
"""
    empty = measure(python("import time; time.sleep(0.5)"))[0]
    cost = measure(python(code))[0]
    mib = (1 << 20) / 1e6
    assert 100 * mib <= cost.peak_mb - empty.peak_mb + 2 < 135 * mib
    assert 100 * mib <= cost.largest_process_mb


def test_pages_of_mapped_files_are_told_apart(tmp_path):
    path = tmp_path / "mapped"
    path.write_bytes(bytes(50 << 20))
    code = f"""
import mmap, time
file = open({str(path)!r}, "rb")
view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
total = sum(view[::4096])
time.sleep(1)
"""
    cost = measure(python(code))[0]
    assert cost.peak_with_files_mb - cost.peak_mb > 50
    assert cost.peak_mb < 40


def test_a_command_that_fails_is_reported_with_its_last_line():
    with pytest.raises(UserError, match=r"exit status 3: error: no such thing$"):
        measure(python("import sys; print('first\\nerror: no such thing', file=sys.stderr); sys.exit(3)"))


def test_the_environment_of_the_command():
    assert measure(python("import os; print(os.environ['X_OF_TEST'])"), {"X_OF_TEST": "5"})[1] == "5\n"


def test_when_the_measurement_is_stopped_so_is_the_command(tmp_path):
    """The child is signalled, and the process that measures ends only after it."""
    noted = tmp_path / "noted"
    child = f"""
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.3)
    pathlib.Path({str(noted)!r}).write_text("stopped")
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
pathlib.Path({str(noted)!r}).write_text("running")
time.sleep(60)
"""
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, signal.default_int_handler); "
        f"from retemper.benchmarks.process_tree import measure; measure([sys.executable, '-c', {child!r}])"
    )
    with subprocess.Popen(python(code), stderr=subprocess.DEVNULL) as running:
        until = time.monotonic() + LIMIT_SECONDS
        while not (noted.exists() and noted.read_text() == "running"):
            assert running.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        running.terminate()
        assert running.wait(60) != 0
    assert noted.read_text() == "stopped"


# ---------------------------------------------------------------------------------------------------------------------
# Corpora


def test_corpora_hold_what_they_say(corpus, tmp_path):
    size = sum(len(text.encode()) for text in TEXTS)
    original = describe(corpus, "text")
    assert original == BenchmarkCorpus(corpus, len(TEXTS), size)
    assert repeated(original, 1, tmp_path) is original
    assert beginning(original, "text", size, tmp_path) is original
    thrice = repeated(original, 3, tmp_path)
    assert list(read_texts(thrice.path, "text")) == TEXTS * 3
    assert thrice == describe(thrice.path, "text")
    part = beginning(original, "text", sum(len(text.encode()) for text in TEXTS[:4]) + 1, tmp_path)
    assert list(read_texts(part.path, "text")) == TEXTS[:5]
    assert part == describe(part.path, "text")


@pytest.mark.parametrize("write", [write_long_document, write_documents])
def test_made_up_corpora(write, tmp_path):
    path = tmp_path / "made.jsonl"
    made = write(path, "text", 5_000_000)
    assert made == describe(path, "text")
    assert made.text_bytes == pytest.approx(5_000_000, rel=0.3)
    text = next(read_texts(path, "text"))
    assert "天" in text and "🙂" in text
    assert (made.documents == 1) == (write is write_long_document)


def test_batches_hold_all_texts_in_order():
    batches = batches_of(TEXTS, 300)
    assert [text for batch in batches for text in batch] == TEXTS
    for batch in batches[:-1]:
        assert sum(map(len, batch)) >= 300 > sum(map(len, batch[:-1]))


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons and figures


def write_dataset(prefix: Path, documents: list[list[int]]) -> Path:
    write_megatron(prefix, [[document] for document in documents], code=8)
    return prefix


def test_datasets_that_differ_are_found(tmp_path):
    documents = [[1, 2, 3], [4], [5, 6]]
    ours = write_dataset(tmp_path / "ours", documents)
    assert "2 documents with 4 tokens" in compare_datasets(ours, write_dataset(tmp_path / "part", documents[:2]))
    for number, other in enumerate(([[1, 2, 9], [4]], [[1, 2, 3], [5]], [[1, 2, 3], [4], [5, 7]])):
        peer = write_dataset(tmp_path / f"peer-{number}", other)
        with pytest.raises(UserError, match=rf"differ in document {number}$"):
            compare_datasets(ours, peer)
    longer = write_dataset(tmp_path / "longer", [*documents, [8]])
    with pytest.raises(UserError, match=r"differ in document 3$"):
        compare_datasets(ours, longer)


def cost(cpu: float, wall: float, peak: float = 0.0) -> Cost:
    return Cost(cpu, wall, peak, peak + 1, 0.0, 1)


def results(**changes: object) -> Results:
    """100 MB; the bare tokenizer at best 50 MB a CPU-second, ours 40 without a start of 1 CPU-second."""
    limit = [
        {"encoder": "fast 1", "threads": 1, "batch_megacharacters": 4.0, "text_bytes": 100_000_000, "cpu_seconds": c}
        for c in (2.5, 2.0)
    ]
    found = Results(
        BenchmarkCorpus(Path("somewhere/corpus.jsonl"), 7, 100_000_000),
        workers=2,
        limit=[{**one, "wall_seconds": one["cpu_seconds"] / 2, "tokens": 3} for one in limit],
        ours=[cost(4.5, 2.5, 700), cost(3.5, 3.0, 500)],
        ours_start=[cost(1.0, 0.75), cost(1.25, 1.0)],
    )
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_figures_are_those_of_the_best_rounds():
    found = summarize(results())
    assert found["limit_mb_per_cpu_second"] == pytest.approx(50)
    assert found["ours_mb_per_cpu_second"] == pytest.approx(100 / 3.5)
    assert found["ratio_to_limit"] == pytest.approx(2 / 3.5)
    assert found["ratio_to_limit_without_start"] == pytest.approx(40 / 50)
    assert found["ours_mb_per_second"] == pytest.approx(40)
    assert found["ours_peak_mb"] == 700
    assert "wall_ratio_to_megatron" not in found
    # 20 MB in 10 s after a start of 2 s: 52 s for all of it, where ours takes 2.5.
    found = summarize(results(megatron=cost(20, 12, 900), megatron_start=cost(3, 2), megatron_text_bytes=20_000_000))
    assert found["wall_ratio_to_megatron"] == pytest.approx(52 / 2.5)
    assert found["megatron_mb_per_second"] == pytest.approx(100 / 52)
    assert found["megatron_mb_per_cpu_second"] == pytest.approx(1)


def test_memory_is_measured_on_one_document_and_on_many(tmp_path):
    seen = []

    def run(corpus: BenchmarkCorpus, prefix: Path) -> Cost:
        seen.append(describe(corpus.path, "words")[1:])
        prefix.with_suffix(".bin").write_bytes(b"output")
        return cost(1.0, 2.0, 123.0)

    one, many = check_memory(run, "words", (1.0, 3.0), 4, tmp_path)
    assert (one.peak_mb, one.peak_with_files_mb, one.seconds) == (123.0, 124.0, 2.0)
    assert one.allowed_mb == many.allowed_mb == 1000 + 4 * 300
    assert seen[0] == (1, pytest.approx(1e6, rel=0.3))
    assert seen[1][0] > 100 and seen[1][1] == pytest.approx(3e6, rel=0.5)
    assert not list(tmp_path.iterdir())


def test_no_rate_without_start_is_given_for_a_corpus_that_is_all_start():
    tiny = results(ours=[cost(1.2, 1.0)])
    assert "ratio_to_limit_without_start" not in summarize(tiny)
    assert "corpus too small" in format_report(tiny, {})


def test_the_report_is_markdown_and_names_no_folder():
    found = results(memory=[MemoryUse("one document", 1000, 512, 700, 1600, 20)], checks=["all is well"])
    text = format_report(found, {"cores": 2})
    assert "somewhere" not in text and "corpus.jsonl: 7 documents, 100.0 MB of text; 2 workers; cores 2" in text
    assert "checked: all is well" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["tools/preprocess.py", "28.6", "40.0", "700 MB"] in rows
    assert ["CPU time: share of the bare tokenizer's rate", "0.57", "0.8"] in rows
    assert ["one document", "1,000 MB", "20.0 s", "512 MB", "700 MB", "1,600 MB"] in rows
    widths = {len(line) for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 3  # one for each table: its columns are in line


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "--runs 0: must be at least 1"),
        (["--megatron-megabytes", "0"], "--megatron-megabytes 0: must be more than 0"),
        (["--memory-megabytes", "1", "-1"], "--memory-megabytes -1"),
        (["--scratch", "nowhere"], "--scratch nowhere: no such folder"),
        (["--json-key", "body"], r"corpus.jsonl:1: not a JSON object with a string under 'body'; see --json-key"),
        (["--input", "nothing.jsonl"], "--input nothing.jsonl: No such file"),
        (["--tokenizer", "nothing"], "nothing"),
    ],
)
def test_wrong_options_are_one_line(corpus, tiny_tokenizer, arguments, message):
    with pytest.raises(UserError, match=message):
        command.main(["--input", str(corpus), "--tokenizer", str(tiny_tokenizer), *arguments])


def test_a_dataset_with_other_tokens_is_refused(tmp_path, corpus, tiny_tokenizer):
    program = [sys.executable, str(ROOT / "tools" / "preprocess.py"), "--workers", "1", "--input", str(corpus)]
    program += ["--tokenizer", str(tiny_tokenizer), "--output-prefix", str(tmp_path / "ours")]
    subprocess.run(program, check=True, capture_output=True)
    tokenizer = Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))
    tokens = sum(len(tokenizer.encode(text).ids) for text in TEXTS)
    assert f"{tokens:,}" in check_tokens([{"tokens": tokens}], tmp_path / "ours")
    with pytest.raises(UserError, match=f"fast 1 gave {tokens + 1:,} tokens"):
        check_tokens([{"tokens": tokens}, {"tokens": tokens + 1, "encoder": "fast 1"}], tmp_path / "ours")


def plain_ids(tokenizer: Path) -> list[list[int]]:
    """The ids of each text, without document ends."""
    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    loaded.encode_special_tokens = True
    return [loaded.encode(text, add_special_tokens=False).ids for text in TEXTS]


def test_the_benchmark(tmp_path, corpus, tiny_tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "BATCH_MEGACHARACTERS", (1,))  # one is enough here
    arguments = ["--input", str(corpus), "--tokenizer", str(tiny_tokenizer), "--runs", "1", "--repeat", "2"]
    arguments += ["--workers", "1", "--json", str(tmp_path / "results.json"), "--scratch", str(tmp_path)]
    command.main(arguments)
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "results.json").read_text())
    tokens = 2 * sum(map(len, plain_ids(tiny_tokenizer)))
    size = 2 * sum(len(text.encode()) for text in TEXTS)
    rows = {row["program"]: row for row in record["rows"]}
    assert rows["bare tokenizer"]["tokens"] == tokens
    assert rows["bare tokenizer"]["text_bytes"] == record["settings"]["corpus"]["text_bytes"] == size
    assert f"checked: as many tokens as the bare tokenizer, {tokens:,}," in shown
    ours = rows["preprocess"]
    assert record["summary"]["ours_mb_per_cpu_second"] == pytest.approx(size / 1e6 / ours["cpu_seconds"])
    assert ours["processes"] == 1  # a small input is tokenized in the command's own process
    assert str(tmp_path) not in shown + json.dumps(record)
    assert sorted(os.listdir(tmp_path)) == ["corpus.jsonl", "results.json"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("megatron") is None, reason="pip install --no-deps megatron-core==0.16.1")
def test_the_loop_of_megatron_lm(tmp_path, corpus, tiny_tokenizer):
    options = PreprocessBenchmarkOptions(corpus, str(tiny_tokenizer), workers=1)
    bench = Bench(options, Results(describe(corpus, "text"), workers=1))
    bench.run_peer(load_tokenizer(tiny_tokenizer), describe(corpus, "text"), tmp_path / "theirs")
    assert read_megatron(tmp_path / "theirs").documents == [[[*ids, 0]] for ids in plain_ids(tiny_tokenizer)]


def test_without_megatron_core_its_loop_is_refused(corpus, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps megatron-core"):
        command.main(["--input", str(corpus), "--tokenizer", str(tiny_tokenizer), "--megatron"])
