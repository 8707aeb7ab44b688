"""Runs of the preprocess command that are interrupted, killed, run twice at once, or meet a full disk; parts joined."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard
from forked import LIMIT_SECONDS
from oracles.preprocessing import GOOD, jsonl, run
from oracles.tiny_tokenizer import sample_text

from retemper.engine.data.sidecar import Sidecar
from retemper.tools import preprocess as command
from retemper.tools.preprocessing.merging.merge import MergeOptions, merge

OUTPUTS = ["out.bin", "out.idx", "out.json"]
SCRIPT = Path(command.__file__)


@pytest.fixture
def long_run(tmp_path: Path, tiny_tokenizer: Path) -> Iterator[subprocess.Popen[str]]:
    """The command as a user starts it, on two tasks of a minute each, when both workers have begun."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.jsonl.zst").write_bytes(zstandard.compress(jsonl([sample_text(0, 20_000)])) * 2000)
    arguments = ["--input", str(tmp_path / "in"), "--tokenizer", str(tiny_tokenizer), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--output-prefix", str(tmp_path / "o" / "out")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(list((tmp_path / "o").glob(".out.partial/*.tokens"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    yield process
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def worker_ids(process: subprocess.Popen[str]) -> list[int]:
    """Processes below ``process`` that have no child of their own: its workers."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            names[int(folder.name)] = (folder / "cmdline").read_text()
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])

    def below(pid: int) -> bool:
        return pid in parents and (parents[pid] == process.pid or below(parents[pid]))

    return [p for p in parents if below(p) and p not in parents.values() and "resource_tracker" not in names[p]]


@pytest.mark.parametrize("event", ["Ctrl-C", "SIGTERM", "killed worker"])
def test_an_interrupted_run_ends_at_once_and_leaves_nothing(tmp_path, long_run, event):
    workers = worker_ids(long_run)
    assert len(workers) == 2
    if event == "Ctrl-C":
        os.killpg(long_run.pid, signal.SIGINT)
    elif event == "SIGTERM":
        long_run.terminate()
    else:
        os.kill(workers[0], signal.SIGKILL)
    _, err = long_run.communicate(timeout=LIMIT_SECONDS)
    lines = [line for line in err.splitlines() if not line.endswith(" workers")]
    if event == "killed worker":
        assert long_run.returncode == 1
        assert len(lines) == 1 and lines[0].startswith("error: a worker process was killed")
    else:
        assert (long_run.returncode, lines) == (130, ["interrupted"])
    assert os.listdir(tmp_path / "o") == []
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)


def in_small_tasks(tokenizer: Path, folder: Path, **popen: object) -> subprocess.Popen[str]:
    """A process that preprocesses ``folder``/in in tasks of some lines, and prints a line when it is done."""
    script = (
        "import sys; from pathlib import Path; from oracles.preprocessing import report; f = Path(sys.argv[2]);"
        "report(Path(sys.argv[1]), f / 'o', f / 'in', task_bytes=20_000, workers=2); print('done')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, str(tokenizer), str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **popen,  # type: ignore[call-overload]
    )


def test_a_killed_run_goes_on_after_its_last_finished_part(tmp_path, tiny_tokenizer):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl([sample_text(seed, 300) for seed in range(1500)]))
    killed = in_small_tasks(tiny_tokenizer, tmp_path)
    work = tmp_path / "o" / ".out.partial"
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(list(work.glob("*.json"))) < 3:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    workers = worker_ids(killed)
    killed.kill()
    out, _ = killed.communicate()
    assert out == "" and os.listdir(tmp_path / "o") == [".out.partial"]
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # One finished part is damaged, as by a loss of power: it is made again.
    finished = sorted(work.glob("*.json"))
    with open(finished[0].with_suffix(".tokens"), "r+b") as file:
        file.truncate(10)
    again = in_small_tasks(tiny_tokenizer, tmp_path)
    out, err = again.communicate(timeout=LIMIT_SECONDS)
    assert (again.returncode, out) == (0, "done\n")
    total = -(-(tmp_path / "in" / "a.jsonl").stat().st_size // 20_000)
    assert f"; {len(finished) - 1} of {total} parts are finished already" in err
    run(tiny_tokenizer, tmp_path / "whole", tmp_path / "in")
    assert sorted(os.listdir(tmp_path / "o")) == OUTPUTS
    for name in OUTPUTS:
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_parts_of_another_run_are_not_taken(tmp_path, tiny_tokenizer):
    """Whatever decides a part's contents decides its name: the input's bytes and the options."""
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl(["one", "two"]) + b"oops\n")
    with pytest.raises(ValueError, match="not valid JSON"):
        run(tiny_tokenizer, tmp_path, source, task_bytes=15)
    assert len(list((tmp_path / ".out.partial").glob("*.json"))) >= 1
    source.write_bytes(jsonl(["ONE", "two"]) + jsonl(["2"]))
    run(tiny_tokenizer, tmp_path, source, task_bytes=15, append_eod=False)
    run(tiny_tokenizer, tmp_path / "other", source, append_eod=False)
    for name in OUTPUTS:
        assert (tmp_path / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def stopped_before_assembly(monkeypatch: pytest.MonkeyPatch, *arguments: object, **options: object) -> None:
    """A run that is interrupted when all its parts are finished."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("retemper.tools.preprocessing.pipeline.publish", interrupt)
        run(*arguments, **options)  # type: ignore[arg-type]


def test_a_restart_that_allows_less_does_not_take_what_was_left_out(tmp_path, tiny_tokenizer, monkeypatch):
    source = tmp_path / "a.jsonl"
    source.write_bytes(GOOD + b"oops\n" + GOOD)
    stopped_before_assembly(monkeypatch, tiny_tokenizer, tmp_path, source, task_bytes=10, skip_bad_lines=True)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not valid JSON"):
        run(tiny_tokenizer, tmp_path, source, task_bytes=10)


@pytest.mark.parametrize("change", [{"append_eod": False}, {"eod_token": "<|im_end|>"}, {"normalize": "nfc"}])
def test_a_restart_with_other_options_takes_nothing(tmp_path, tiny_tokenizer, monkeypatch, change):
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl(["Cafe\u0301", "<|im_end|>"]))
    stopped_before_assembly(monkeypatch, tiny_tokenizer, tmp_path, source)
    run(tiny_tokenizer, tmp_path, source, **change)
    run(tiny_tokenizer, tmp_path / "fresh", source, **change)
    for name in OUTPUTS:
        assert (tmp_path / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_two_runs_at_once_on_one_output(tmp_path, long_run, refused):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    error = refused("--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "o" / "out")
    assert error.startswith(f"error: {tmp_path}/o/out: another run is writing this dataset")
    assert long_run.poll() is None


def test_a_full_disk_is_one_line_and_leaves_what_was_finished(tmp_path, tiny_tokenizer):
    """A limit on the size of files stands for the full disk: each part fits, the whole does not."""
    resource = pytest.importorskip("resource")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl([sample_text(seed, 300) for seed in range(400)]))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    full = in_small_tasks(tiny_tokenizer, tmp_path, preexec_fn=limit)
    out, err = full.communicate(timeout=LIMIT_SECONDS)
    assert (full.returncode, out) == (1, "")
    assert "UserError" in err and "File too large; no dataset was written" in err
    assert os.listdir(tmp_path / "o") == [".out.partial"]
    again = in_small_tasks(tiny_tokenizer, tmp_path)
    out, err = again.communicate(timeout=LIMIT_SECONDS)
    total = -(-(tmp_path / "in" / "a.jsonl").stat().st_size // 20_000)
    assert out == "done\n" and f"; {total} of {total} parts are there" in err
    assert sorted(os.listdir(tmp_path / "o")) == OUTPUTS


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_merged_shards_are_the_whole(tmp_path, tiny_tokenizer, count):
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.jsonl").write_bytes(jsonl([sample_text(seed, 30) for seed in range(60)], n=name))
    options: dict[str, object] = {"task_bytes": 900, "metadata": ["n"]}
    whole = run(tiny_tokenizer, tmp_path / "whole", tmp_path / "in", **options)
    for index in range(count):
        run(tiny_tokenizer, tmp_path / "o", tmp_path / "in", shard=f"{index}/{count}", **options)
    merge(MergeOptions([str(tmp_path / "o" / "out.shard-*")], str(tmp_path / "o" / "joined")))
    for suffix in (".bin", ".idx", ".metadata.jsonl"):
        assert (tmp_path / "o" / f"joined{suffix}").read_bytes() == (tmp_path / "whole" / f"out{suffix}").read_bytes()
    joined = Sidecar.read(tmp_path / "o" / "joined")
    assert joined is not None and (joined.documents, joined.tokens) == (whole.documents, whole.tokens)
    assert [s.documents for s in joined.sources] == [s.documents for s in whole.sources]


def test_a_shard_without_documents_is_one_too(tmp_path, tiny_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one", "two"]))
    counts = [run(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", shard=f"{i}/5").documents for i in range(5)]
    assert sum(counts) == 2 and 0 in counts
    run(tiny_tokenizer, tmp_path / "whole", tmp_path / "a.jsonl")
    merge(MergeOptions([str(tmp_path / "out.shard-*")], str(tmp_path / "joined")))
    assert (tmp_path / "joined.bin").read_bytes() == (tmp_path / "whole" / "out.bin").read_bytes()
