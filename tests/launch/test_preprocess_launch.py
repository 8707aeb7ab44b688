"""The scripts that preprocess on many machines, with a stand-in for Slurm that runs jobs at once, on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from oracles.tiny_tokenizer import sample_text, train_tiny_tokenizer

from retemper.engine.errors import install_command

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "launch" / "preprocess_slurm.sh"
DATATROVE = ROOT / "launch" / "preprocess_datatrove.py"
NUM_SHARDS = 3

SBATCH = """#!/usr/bin/env bash
# Runs a copy of the script, as Slurm does, once for each task of the array.
printf '%s\\n' "$*" >> sbatch.log
last=
while [[ $1 == --* ]]; do
  [[ $1 == --array=0-* ]] && last=${1#--array=0-}
  shift
done
cp "$1" spooled.sh
shift
for index in $(seq 0 "${last:-0}"); do
  [[ -n $last ]] && export SLURM_ARRAY_TASK_ID=$index SLURM_CPUS_PER_TASK=1
  bash spooled.sh "$@" >> jobs.log 2>&1 || echo "failed: $?" >> jobs.log
done
echo "17;a_cluster"
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a corpus whose name has a space in it, and a stand-in for sbatch."""
    lines = [json.dumps({"text": sample_text(seed, 20)}) + "\n" for seed in range(60)]
    (tmp_path / "a corpus.jsonl").write_text("".join(lines))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    return tmp_path


def run(folder: Path, *command: Path | str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def preprocess_arguments(tokenizer: Path, prefix: str, *more: str) -> list[str]:
    arguments = ["--input", "a corpus.jsonl", "--tokenizer", str(tokenizer), "--output-prefix", prefix]
    return [*arguments, "--split", "train=0.8,valid=0.2", *more]


def assert_like_one_machine(folder: Path, tokenizer: Path, prefix: str, *more: str) -> None:
    program = [
        sys.executable,
        ROOT / "tools" / "preprocess.py",
        *preprocess_arguments(tokenizer, "whole", "--overwrite", *more),
    ]
    done = run(folder, *program)
    assert done.returncode == 0, done.stderr
    for side in ("train", "valid"):
        for suffix in ("bin", "idx"):
            expected = (folder / f"whole.{side}.{suffix}").read_bytes()
            assert (folder / f"{prefix}.{side}.{suffix}").read_bytes() == expected


def submit(folder: Path, tokenizer: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"SHARDS": str(NUM_SHARDS), "SBATCH_OPTIONS": "--partition=cpu --time=1:00:00", **environment}
    return run(folder, SLURM, *preprocess_arguments(tokenizer, "out", *more), **settings)


@pytest.mark.slow
def test_slurm_parts_are_joined_and_made_again_where_they_are_missing(folder, tokenizer):
    done = submit(folder, tokenizer)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "submitted: array job 17 makes 3 parts, then job 17 joins them to out\n"
    assert_like_one_machine(folder, tokenizer, "out")
    first, second = (folder / "sbatch.log").read_text().splitlines()
    assert "--partition=cpu --time=1:00:00 --array=0-2 " in first and "--dependency" not in first
    assert "--dependency=afterok:17 --kill-on-invalid-dep=yes" in second and "--array" not in second
    assert "failed" not in (folder / "jobs.log").read_text()
    # Asked for again it is refused before anything is submitted.
    again = submit(folder, tokenizer)
    assert again.returncode == 1 and "already there; pass --overwrite" in again.stderr
    assert len((folder / "sbatch.log").read_text().splitlines()) == 2
    # After a failure the same command makes what is missing.
    for path in [*folder.glob("out.train.*"), *folder.glob("out.valid.*"), *folder.glob("out.shard-1-*")]:
        path.unlink()
    (folder / "jobs.log").unlink()
    assert submit(folder, tokenizer).returncode == 0
    log = (folder / "jobs.log").read_text()
    assert "out.shard-0-of-3: complete" in log and "out.shard-2-of-3: complete" in log and "failed" not in log
    assert "out.shard-1-of-3: complete" not in log
    assert_like_one_machine(folder, tokenizer, "out")


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {"SHARDS": "0"}, "SHARDS='0': set it to the number of parts"),
        (["--shard", "0/2"], {}, "--shard is set by this script"),
        (["--input", "-"], {}, "standard input cannot be divided"),
        (["--min-chars", "-1"], {}, "--min-chars -1: must be at least 0"),
        (["--dedup", "fuzzy"], {}, "argument --dedup: invalid choice"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_submitted(folder, tokenizer, arguments, environment, message):
    done = submit(folder, tokenizer, *arguments, **environment)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert not (folder / "sbatch.log").exists()


def test_datatrove_is_named_where_it_is_missing(folder, tokenizer):
    command = [sys.executable, "-c", "import sys, runpy; sys.modules['datatrove'] = None; sys.argv.pop(0)\n"]
    command[-1] += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run(folder, *command, DATATROVE, "--shards", "2", "--logs", "logs", "--", "--input", "x")
    assert (done.returncode, done.stderr) == (1, f"error: datatrove is not installed: {install_command('datatrove')}\n")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("datatrove") is None, reason="pip install datatrove")
@pytest.mark.parametrize(("at_once", "dedup"), [("1", "none"), ("2", "none"), ("2", "minhash"), ("2", "exact")])
def test_datatrove_parts_are_joined_to_what_one_machine_makes(folder, tokenizer, at_once, dedup):
    if dedup != "none":
        corpus = folder / "a corpus.jsonl"
        near = corpus.read_text().replace(" ", "  ") if dedup == "minhash" else corpus.read_text()
        corpus.write_text(corpus.read_text() + near)
    command = [sys.executable, DATATROVE, "--shards", str(NUM_SHARDS), "--at-once", at_once, "--logs", "logs", "--"]
    for _ in range(2):  # the second time there is nothing to do
        done = run(folder, *command, *preprocess_arguments(tokenizer, "out", "--dedup", dedup))
        assert done.returncode == 0, done.stderr
        assert_like_one_machine(folder, tokenizer, "out", "--dedup", dedup)
    assert not (folder / "logs" / "dedup").exists()
    refused = run(folder, *command, *preprocess_arguments(tokenizer, "out", "--shard", "0/2"))
    assert refused.returncode == 1 and "error: this command sets --shard itself" in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("datatrove") is None, reason="pip install datatrove")
@pytest.mark.skipif(find_spec("ray") is None, reason="pip install ray")
def test_ray_makes_what_one_machine_makes_and_continues_after_a_failure(folder, tokenizer):
    corpus = folder / "a corpus.jsonl"
    good = corpus.read_text() * 2
    corpus.write_text(good)
    command = [sys.executable, DATATROVE, "--shards", str(NUM_SHARDS), "--logs", str(folder / "logs"), "--ray"]
    command += ["--cpus", "1", "--memory-per-cpu", "1", "--"]
    more = ["--input", str(corpus), "--output-prefix", str(folder / "out"), "--dedup", "exact"]
    # As long as the good line, so that the size of the file stays the same.
    last = good.splitlines()[-1]
    corpus.write_text(good.removesuffix(f"{last}\n") + f"[{' ' * (len(last) - 2)}]\n")
    failed = run(folder, *command, *preprocess_arguments(tokenizer, "out", *more))
    assert failed.returncode == 1 and "logs/signatures/logs: task 2 failed; start again" in failed.stderr
    corpus.write_text(good)
    done = run(folder, *command, *preprocess_arguments(tokenizer, "out", *more))
    assert done.returncode == 0, done.stderr
    assert_like_one_machine(folder, tokenizer, "out", "--dedup", "exact")
