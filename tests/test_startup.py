"""Help, wrong options and lists of checkpoints need no PyTorch, whose import takes seconds."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import retemper
from retemper.engine.weights.checkpoint.manifest import Manifest, write_manifest

ROOT = Path(retemper.__file__).parent
COMMANDS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("engine", "tools", "tools/demo", "checkpoint_convert")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)
# Runs command lines, one after another, as the scripts that they name. Where one imports PyTorch, which is refused to
# all of them alike, the stack tells what asked for it.
RUNNER = """
import contextlib, io, json, os, runpy, sys, traceback

class Refused:
    def find_spec(self, name, path=None, target=None):
        if f"{name}.".startswith(os.environ.get("REFUSED", "torch") + "."):
            asked.append([f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_stack()
                          if "importlib" not in frame.filename][-8:])
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, Refused())
found = []
for script, *arguments in json.load(sys.stdin):
    asked, printed = [], io.StringIO()
    sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(script)
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            runpy.run_path(script, run_name="__main__")
            status = None
        except SystemExit as end:
            status = end.code
        except Exception as error:
            status = repr(error)
    found.append((status, printed.getvalue(), asked))
json.dump(found, sys.__stdout__)
"""


def run(*lines: list[str], **environment: str) -> list[tuple[int, str, list[list[str]]]]:
    """What a fresh process answers to each command line: its status, what it prints, and where it asks for PyTorch."""
    given = json.dumps([[str(ROOT / script), *map(str, arguments)] for script, *arguments in lines])
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=given,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=100,
        env={**os.environ, **environment},
    )
    return json.loads(done.stdout)


def test_every_command_helps_without_pytorch():
    assert {"engine/pretrain.py", "tools/generate.py", "checkpoint_convert/to_megatron.py"} <= {*COMMANDS}
    for command, (status, printed, asked) in zip(COMMANDS, run(*([name, "--help"] for name in COMMANDS)), strict=True):
        assert not asked, f"{command} --help imports torch: {asked[0]}"
        assert status == 0 and printed.startswith("usage: "), command


REFUSED = [
    (["engine/pretrain.py", "--config", "run.yaml", "--training.train_tokes", "5"], "training.train_tokes"),
    (["engine/pretrain.py", "--config", "run.yaml", "--parallel.tensor", "2"], "parallel.tensor 2"),
    (["tools/plan.py"], "--config"),
    (["tools/plan.py", "--config", "run.yaml", "--gpu", "abacus"], "--gpu abacus"),
    (["tools/plan.py", "--config", "run.yaml", "--gpu", "h100-80gb", "--nodes", "0"], "--nodes 0"),
    (["tools/benchmark.py", "--config", "run.yaml", "--steps", "0"], "--steps 0"),
    (["tools/benchmark_kernels.py", "--kernels", "sort"], "--kernels sort"),
    (["tools/generate.py", "--model", "hf", "--temperature", "-1"], "--temperature -1"),
    (["tools/extend_vocab.py", "--model", "hf", "--output", "new"], "--corpus or --tokens"),
    (["tools/checkpoint.py", "ls", "nowhere"], "nowhere"),
    (["tools/checkpoint.py", "prune", "runs", "--keep-last", "0"], "--keep-last"),
    (["checkpoint_convert/hf_to_dcp.py", "--hf", "hf", "--output", "there"], "there: exists already"),
    (["checkpoint_convert/hf_to_dcp.py", "--hf", "hf", "--output", "new", "--dtype", "int4"], "--dtype"),
    (["checkpoint_convert/dcp_to_hf.py", "--checkpoint", "c", "--output", "new", "--workers", "0"], "--workers 0"),
    (["checkpoint_convert/dcp_to_hf.py", "--checkpoint", "c", "--output", "new", "--max-shard-size", "5"], "size 5"),
    (["checkpoint_convert/to_megatron.py", "--hf", "hf", "--output", "new", "--tensor-parallel", "0"], "parallel 0"),
    (["checkpoint_convert/to_megatron.py", "--checkpoint", "c", "--output", "new", "--verify"], "--verify: needs"),
    (
        ["checkpoint_convert/from_megatron.py", "--megatron=m", "--output=new", "--format=checkpoint", "--verify"],
        "--verify: needs",
    ),
]


@pytest.fixture
def run_yaml(tmp_path):
    """The file of a run whose data do not exist."""
    model = {"model_type": "qwen2", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48}
    model |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = {"run_folder": "run", "model": {"architecture": model}, "data": {"train": [{"path": "data"}]}}
    config["training"] = {"train_tokens": 5120, "sequence_length": 32, "global_batch_size": 8}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def test_wrong_options_are_reported_without_pytorch(run_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    for (line, part), (status, printed, asked) in zip(REFUSED, run(*(line for line, _ in REFUSED)), strict=True):
        assert not asked, f"{line} imports torch: {asked[0]}"
        assert status == 1 and printed.startswith("error: ") and printed.count("\n") == 1, (line, printed)
        assert part in printed, (line, printed)


def test_checkpoints_are_listed_and_verified_without_pytorch(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "rank-00000.safetensors").write_bytes(b"tensors")
    write_manifest(checkpoint, Manifest("training", step=10, consumed_tokens=2560))
    listed, verified, compared = run(
        ["tools/checkpoint.py", "ls", tmp_path],
        ["tools/checkpoint.py", "verify", tmp_path],
        ["tools/checkpoint.py", "diff", checkpoint, checkpoint],
    )
    for (status, printed, asked), part in ((listed, "2,560"), (verified, "1 files")):
        assert (status, asked) == (0, []) and part in printed, printed
    # What needs PyTorch says that it is missing; and this test sees what asks for it.
    status, printed, asked = compared
    assert status == 1 and printed.startswith("error: No module named 'torch'") and printed.count("\n") == 1
    assert any("comparison.py" in place for place in asked[0])


@pytest.mark.parametrize("rank", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_a_rank_whose_installation_is_broken_ends_before_others_wait_for_it(rank, run_yaml):
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "9"}
    line = ["engine/pretrain.py", "--config", run_yaml, "--parallel.timeout_seconds", "300"]
    [(status, printed, asked)] = run(line, REFUSED="retemper.engine.start", **launcher)
    assert status == 1 and printed.startswith(f"[rank {rank}] error: No module named 'torch'; install"), printed
    assert printed.count("\n") == 1
    assert any("in prepare" in place for place in asked[0])


def test_all_modules_of_a_run_are_imported_before_ranks_meet(run_yaml):
    """A module of the recipe that is missing or broken must not show when others wait already."""
    recipe = ROOT / "engine" / "pretrain.py"
    needed = set()
    for node in ast.walk(ast.parse(recipe.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            needed.add(str(node.module))
    program = (
        "import json, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])['prepare'](1); "
        "print(json.dumps([*sys.modules]))"
    )
    line = [sys.executable, "-c", program, str(recipe), "--config", str(run_yaml)]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=300)
    assert "retemper.engine.step" in needed
    assert not needed - {*json.loads(done.stdout)}
