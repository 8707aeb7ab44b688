"""Small inputs, which the preprocess command tokenizes itself: the same files as by workers and the fast tokenizer."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from oracles.megatron_index import read_megatron
from oracles.preprocessing import GOOD, jsonl, plain_ids, report
from oracles.tiny_tokenizer import sample_text, train_tiny_tokenizer
from tokenizers import Tokenizer

from retemper.engine.errors import UserError
from retemper.engine.tokenizer.backends import TokenizersReference
from retemper.tools.preprocessing import pipeline, run_setup
from retemper.tools.preprocessing.inputs.files import InputOptions, expand_inputs
from retemper.tools.preprocessing.workers import shared_tokenizer
from retemper.tools.preprocessing.workers.tasks import are_small
from retemper.tools.tokenizer.fast import FastEncoder
from retemper.tools.tokenizer.handle import TokenizerHandle, TokenizerSpec

TEXTS = [
    *(sample_text(seed, 5 + seed % 7) for seed in range(12)),
    "a<|endoftext|>b",
    "two\r\nlines 🙂",
    "",
    "Cafe\u0301",
]
CHAT = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]}
    for text in TEXTS[:4]
]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def never(*_: object) -> None:
    raise AssertionError("a worker process was started")


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metadata": ["n"], "shuffle": True, "task_bytes": 100},
        {"dedup": "minhash", "min_tokens": 3},
        {"dedup": "exact", "split": "train=0.5,valid=0.5"},
        {"skip_bad_lines": True, "normalize": "nfc", "min_chars": 12, "max_tokens": 60},
        {"append_eod": False},
        {"eod_token": "<|im_end|>", "metadata": ["n"]},
        {"allow_special_tokens": True},
        {"chat": True, "max_tokens": 100},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_the_files_are_the_same_whatever_encodes(tmp_path, tiny_tokenizer, monkeypatch, options):
    lines = [json.dumps(record).encode() for record in CHAT] if options.get("chat") else jsonl(TEXTS, n=1).splitlines()
    bad = [b"oops", b'{"text": 3}'] if "skip_bad_lines" in options else []
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, *bad, *lines[:3]]) + b"\n")
    if options.get("chat"):
        (tmp_path / "chat.jinja").write_text(TEMPLATE)
        options = {**options, "chat_template": str(tmp_path / "chat.jinja")}
    found = {}
    for encoder in ("fast", "auto", "reference"):
        with monkeypatch.context() as patch:
            if encoder != "fast":
                patch.setattr(pipeline, "run_tasks", never)
                patch.setattr(run_setup, "start_early", never)
            found[encoder] = report(
                tiny_tokenizer, tmp_path / encoder, tmp_path / "a.jsonl", encoder=encoder, **options
            )
    assert written(tmp_path / "auto") == written(tmp_path / "fast") == written(tmp_path / "reference")
    assert found["fast"].encoder.startswith("tokenizers " if options.get("chat") else "fastokens ")
    assert found["auto"].encoder.startswith("tokenizers ")
    assert ("takes longer" in found["auto"].encoder) and "takes longer" not in found["reference"].encoder


WITHOUT_FASTOKENS = """
import sys
sys.modules["fastokens"] = None
from retemper.engine.errors import run_command
from retemper.tools.preprocess import main
run_command(main)
"""


def test_without_fastokens_the_dataset_is_the_same_after_one_note(tmp_path, tiny_tokenizer, capsys):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    report(tiny_tokenizer, tmp_path / "with", tmp_path / "a.jsonl", encoder="fast")
    assert "fastokens" not in capsys.readouterr().err
    # In a process of its own, because workers inherit what is imported.
    options = (
        f"--input {tmp_path}/a.jsonl --tokenizer {tiny_tokenizer} --output-prefix {tmp_path}/without/out --encoder fast"
    )
    (tmp_path / "without").mkdir()
    command = [sys.executable, "-c", WITHOUT_FASTOKENS, *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr.count("pip install 'retemper[fast]'") == 1
    assert "encoder          tokenizers " in done.stdout
    assert written(tmp_path / "with") == written(tmp_path / "without")


def test_small_is_what_is_text_and_less_than_repays_the_fast_tokenizer(tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(b" " * 10_000)

    def small(*names: str) -> bool:
        return are_small(expand_inputs([str(tmp_path / name) for name in names], InputOptions()), tokenizer)

    (tmp_path / "a.jsonl").write_bytes(GOOD * 100)
    (tmp_path / "b.jsonl").write_bytes(GOOD * 100)
    (tmp_path / "big.jsonl").write_bytes(GOOD * 240)
    (tmp_path / "c.jsonl.gz").write_bytes(b"\x1f\x8b" + b"x" * 10)
    assert small("a.jsonl", "b.jsonl")
    assert not small("big.jsonl") and not small("a.jsonl", "big.jsonl")
    assert not small("c.jsonl.gz") and not small("a.jsonl", "c.jsonl.gz")  # may be any amount of text
    tokenizer.write_bytes(b" " * 100_000_000)
    assert small("big.jsonl")
    (tmp_path / "big.jsonl").write_bytes(GOOD * 300_000)
    assert not small("big.jsonl")  # which several workers do together


def test_an_interrupted_run_leaves_nothing(tmp_path, tiny_tokenizer, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TokenizerHandle, "encode_documents", interrupt)
        report(tiny_tokenizer, tmp_path / "o", tmp_path / "a.jsonl", encoder="auto")
    assert list((tmp_path / "o").iterdir()) == []


def test_workers_load_the_fast_tokenizer_once_for_any_document_end(tmp_path, monkeypatch):
    """One that is not flagged as special changes the tokenizer, which the fast one is made from."""
    folder = train_tiny_tokenizer(tmp_path / "tk")
    file = folder / "tokenizer.json"
    library = Tokenizer.from_file(str(file))
    library.add_tokens(["<end>"])
    library.save(str(file))
    loads = []
    load = FastEncoder.__init__
    monkeypatch.setattr(FastEncoder, "__init__", lambda self, *given: loads.append(load(self, *given)))
    spec = TokenizerSpec(str(folder), file, eod_token="<end>")
    shared_tokenizer.announce(spec)
    try:
        inherited = importlib.reload(shared_tokenizer).load_tokenizer_once(spec, spec.load().sha256)
        assert inherited.encoder.startswith("fastokens ") and len(loads) == 1
        assert inherited.eod("<end>")[1] not in inherited.encode_flat(["a<end>b"])[0]
        assert len(loads) == 1
    finally:
        monkeypatch.delenv("RETEMPER_PRELOADED_TOKENIZER")
        importlib.reload(shared_tokenizer)


def test_workers_inherit_the_tokenizer_where_the_package_is_not_installed(tmp_path):
    """As in a clone: only the command's own sys.path leads to it."""
    file = train_tiny_tokenizer(tmp_path / "tk") / "tokenizer.json"
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
        "from pathlib import Path; from concurrent.futures import ProcessPoolExecutor\n"
        "from retemper.tools.tokenizer.handle import TokenizerSpec\n"
        "from retemper.tools.preprocessing.workers import pool\n"
        f"pool.start_early(TokenizerSpec('tk', Path({str(file)!r})))\n"
        "with ProcessPoolExecutor(1, pool.worker_context()) as workers:\n"
        "    module = \"__import__('sys').modules['retemper.tools.preprocessing.workers.shared_tokenizer']\"\n"
        "    assert workers.submit(eval, f'{module}._loaded is not None').result()\n"
    )
    script = [sys.executable, "-S", "-c", code, json.dumps(sys.path)]
    subprocess.run(script, check=True, cwd=tmp_path, env={})


LOADS = """
import os, sys
from retemper.tools import preprocess as command
from retemper.tools.preprocessing.workers import worker
from retemper.tools.tokenizer.fast import FastEncoder

def noted(method, name):
    def call(*given):
        os.write(1, f"{name} {os.getpid() == PARENT}\\n".encode())
        return method(*given)
    return call

PARENT = os.getpid()
FastEncoder.__init__ = noted(FastEncoder.__init__, "loaded")
worker.TaskRunner.run = noted(worker.TaskRunner.run, "ran")
command.main(sys.argv[1:])
"""


def test_the_command_forks_its_workers_which_share_its_tokenizer(tmp_path, tiny_tokenizer):
    texts = [text for text in TEXTS if text]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--tokenizer", str(tiny_tokenizer), "--encoder", "fast"]
    script = [sys.executable, "-c", LOADS, *arguments, "--output-prefix", str(tmp_path / "out"), "--workers", "2"]
    found = subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    assert [line for line in found if line.startswith(("loaded", "ran"))] == ["loaded True", "ran False"]
    assert read_megatron(tmp_path / "out").documents == plain_ids(tiny_tokenizer, texts)


def test_a_process_with_a_second_thread_is_not_forked():
    """Its locks would be copied. The thread of a library counts, and the bar of a terminal has none."""
    code = (
        "import sys, threading; from retemper.tools import preprocess as command\n"
        "from retemper.tools.preprocessing.progress import ProgressReport\n"
        "from retemper.tools.preprocessing.workers.pool import may_fork\n"
        "sys.stderr.isatty = lambda: True\n"
        "with ProgressReport('tokenizing', 10) as bar:\n"
        "    bar.show(5, 5)\n"
        "    assert may_fork()\n"
        "waiting = threading.Event(); threading.Thread(target=waiting.wait).start()\n"
        "assert not may_fork()\n"
        "waiting.set()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class PanicException(BaseException):
    """As Rust's libraries raise it."""


@pytest.mark.parametrize("encoder", ["auto", "reference"])
def test_a_library_that_panics_costs_one_document(tmp_path, tiny_tokenizer, monkeypatch, encoder):
    encode = TokenizersReference.encode

    def fragile(self: TokenizersReference, texts: list[str]) -> Any:
        if "boom" in texts:
            raise PanicException("index out of bounds")
        return encode(self, texts)

    monkeypatch.setattr(TokenizersReference, "encode", fragile)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["fine", "boom", "too"]))
    with pytest.raises(UserError, match=r"cannot encode a text: index out of bounds"):
        report(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", encoder=encoder)
    found = report(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", encoder=encoder, skip_bad_lines=True)
    assert read_megatron(tmp_path / "out").documents == plain_ids(tiny_tokenizer, ["fine", "too"])
    assert found.first_bad is not None and "index out of bounds" in found.first_bad


def test_torch_is_not_imported(tmp_path, tiny_tokenizer):
    """Not for the work, and not for what is refused."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    code = (
        "import sys; from retemper.tools import preprocess; from retemper.engine.errors import UserError\n"
        "for arguments in sys.argv[1:]:\n"
        "    try: preprocess.main(arguments.split())\n"
        "    except UserError: print('refused')\n"
        "    assert not {'transformers', 'torch'} & set(sys.modules), arguments\n"
    )
    good = f"--input {tmp_path}/a.jsonl --tokenizer {tiny_tokenizer} --output-prefix {tmp_path}/out"
    commands = [
        good,
        good,
        f"--input {tmp_path}/none.jsonl --tokenizer {tiny_tokenizer}",
        f"--input {tmp_path}/a.jsonl --model {tmp_path}",
        f"--input {tmp_path}/a.jsonl --tokenizer {tmp_path}/none/tokenizer.json",
        f"{good} --encoder none",
    ]
    script = [sys.executable, "-c", code, *commands]
    found = subprocess.run(
        script,
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1"},
    )
    assert (tmp_path / "out.bin").exists()
    assert found.stdout.splitlines().count("refused") == len(commands) - 1
