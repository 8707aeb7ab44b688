"""``make demo``: the main job, end to end, on text that every Python has, with the commands that a user would type.

A small base model is made first, since none can be downloaded: corpora, tokenizer, a moment of pretraining, a Hugging
Face folder. Then comes what users do: preprocess a domain corpus, convert, continue the pretraining on two ranks
(killed on the way, and resumed), convert back, load with transformers. It ends in a table and ``report.html``.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from retemper.engine.checkpoint.manifest import read_manifest
from retemper.engine.config_yaml import load_yaml
from retemper.engine.errors import CommandParser, UserError, run_command
from retemper.tools.demo.bpe import train_tokenizer
from retemper.tools.demo.charts import Interruption, require_matplotlib
from retemper.tools.demo.corpora import build_corpora
from retemper.tools.demo.report import (
    Command,
    LossChange,
    ReportData,
    Sample,
    describe_environment,
    format_table,
    write_report,
)

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("def read_lines(path):\n", "class Parser:\n    def __init__(self", "The function returns")
NEW_TOKENS = 48


@dataclass
class Demo:
    """The demonstration in its own folder; every command runs there and is printed as it can be typed there."""

    folder: Path
    commands: list[Command] = field(default_factory=list)

    def say(self, title: str) -> None:
        """Announce a stage."""
        print(f"\n== {title}", flush=True)

    def run(self, *words: str) -> None:
        """Run one command to its end.

        Raises:
            UserError: it failed; its own output says why.
        """
        started = time.perf_counter()
        status = self.start(*words).wait()
        self.commands.append(Command(self.typed(words), time.perf_counter() - started))
        if status:
            raise UserError(f"'{self.typed(words)}' ended with status {status}; see its output above")

    def start(self, *words: str) -> subprocess.Popen:
        """Print and start one command: ``python`` and ``torchrun`` of this environment, scripts of this repository."""
        print(f"$ {self.typed(words)}", flush=True)
        program = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
        return subprocess.Popen([*program, *words[1:]], cwd=self.folder)

    def typed(self, words: tuple[str, ...]) -> str:
        """The command as text."""
        return shlex.join(words)

    def script(self, path: str) -> str:
        """A file of the repository, as seen from the demo's folder."""
        return os.path.relpath(ROOT / path, self.folder)


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("demo_run"), help="where everything goes; must be new")
    parser.add_argument("--base-tokens", type=int, help="pretrain the base model on this many tokens")
    parser.add_argument("--train-tokens", type=int, help="continue its pretraining on this many tokens")
    arguments = parser.parse_args()
    require_matplotlib()
    if os.path.lexists(arguments.folder):
        raise UserError(f"--folder {arguments.folder} exists; remove it or name another one")
    arguments.folder.mkdir(parents=True)
    started = time.perf_counter()
    demo = Demo(arguments.folder.resolve())
    make_base_model(demo, _budget(arguments.base_tokens))
    interruption = continue_pretraining(demo, _budget(arguments.train_tokens))
    data = collect_results(demo, interruption)
    write_report(demo.folder / "report.html", data)
    print(f"\n{format_table(data)}")
    print(f"\n{time.perf_counter() - started:.0f} s in all; report: {arguments.folder / 'report.html'}")


def _budget(tokens: int | None) -> list[str]:
    """Command-line overrides for another budget, a tenth of it warm-up."""
    if tokens is None:
        return []
    return ["--training.train_tokens", str(tokens), "--training.warmup_tokens", str(tokens // 10)]


def make_base_model(demo: Demo, budget: list[str]) -> None:
    """Corpora, tokenizer, and a base model as a Hugging Face folder ``base_hf``: what a user would have downloaded."""
    demo.say("a base model to start from: general prose, a new tokenizer, a moment of pretraining")
    corpora = build_corpora(demo.folder / "corpora")
    for name in ("general", "domain"):
        for split in ("train", "validation"):
            part = getattr(getattr(corpora, name), split)
            print(f"corpora/{part.path.name}: {part.num_documents} documents, {part.num_bytes / 1e6:.2f} MB")
    config = demo.script("megatron_configs/demo_base.yaml")
    vocab_size = load_yaml((demo.folder / config).read_text(encoding="utf-8"))["model"]["architecture"]["vocab_size"]
    train_tokenizer([corpora.general.train.path, corpora.domain.train.path], demo.folder / "tokenizer", vocab_size)
    preprocess(demo, "general", "tokenizer")
    preprocess(demo, "domain_validation", "tokenizer")
    preprocess(demo, "general_validation", "tokenizer")
    demo.run("python", demo.script("engine/pretrain.py"), "--config", config, *budget)
    export(demo, "base", "base_hf")


def continue_pretraining(demo: Demo, budget: list[str]) -> Interruption:
    """What users do, with one power cut in the middle."""
    demo.say("the job: continue the pretraining of base_hf on the domain corpus")
    preprocess(demo, "domain", "base_hf")
    demo.run("python", demo.script("checkpoint_convert/hf_to_dcp.py"), "--hf", "base_hf", "--output", "ckpt/base")
    command = (
        *("torchrun", "--nproc-per-node", "2", demo.script("engine/pretrain.py")),
        *("--config", demo.script("megatron_configs/demo.yaml"), *budget),
    )
    interruption = run_and_kill(demo, command)
    print(f"\nkilled after {interruption.killed_at:,} tokens; the same command resumes", flush=True)
    demo.run(*command)
    export(demo, "domain", "domain_hf")
    return interruption


def preprocess(demo: Demo, name: str, tokenizer: str) -> None:
    """Tokenize ``corpora/{name}`` into the dataset ``{name}``."""
    file = f"{name.replace('_', '.')}.jsonl" if "_" in name else f"{name}.train.jsonl"
    command = demo.script("tools/preprocess.py")
    demo.run(*("python", command, "--input", f"corpora/{file}", "--tokenizer", tokenizer, "--output-prefix", name))


def export(demo: Demo, run: str, output: str) -> None:
    """Convert the newest checkpoint of a run to a Hugging Face folder."""
    checkpoint = sorted((demo.folder / "runs" / run / "checkpoints").glob("step-*"))[-1]
    demo.run(
        *("python", demo.script("checkpoint_convert/dcp_to_hf.py")),
        *("--checkpoint", os.path.relpath(checkpoint, demo.folder), "--output", output),
    )


def run_and_kill(demo: Demo, command: tuple[str, ...]) -> Interruption:
    """Run ``command`` until it has trained past a checkpoint, then kill all its processes at once."""
    started = time.perf_counter()
    process = demo.start(*command)
    checkpoints = demo.folder / "runs" / "domain" / "checkpoints"
    saved = killed_at = 0
    while not 0 < saved < killed_at:
        if process.poll() is not None:
            raise UserError(f"'{demo.typed(command)}' ended before it could be killed; see its output above")
        time.sleep(0.05)
        with suppress(UserError):  # the run may be removing an old checkpoint just now
            saved = max((read_manifest(path).consumed_tokens for path in checkpoints.glob("step-*")), default=0)
        killed_at = max((record["tokens"] for record in read_records(demo.folder) if "loss" in record), default=0)
    launcher = psutil.Process(process.pid)
    for victim in [*launcher.children(recursive=True), launcher]:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()
    demo.commands.append(Command(f"{demo.typed(command)}   # killed", time.perf_counter() - started))
    return Interruption(killed_at=killed_at, resumed_at=saved)


def read_records(folder: Path) -> list[dict]:
    """The complete lines of the domain run's metrics; the trainer may be writing the last one."""
    path = folder / "runs" / "domain" / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def collect_results(demo: Demo, interruption: Interruption) -> ReportData:
    """Losses before and after, and what both models write."""
    demo.say("loading both models with transformers")
    records = read_records(demo.folder)
    evaluations = [record for record in records if "evaluation" in record]
    changes = {}
    for name in ("domain", "general"):
        losses = [record["loss"] for record in evaluations if record["evaluation"] == name]
        changes[name] = LossChange(before=losses[0], after=losses[-1])
    before, after = (generate(demo.folder / name) for name in ("base_hf", "domain_hf"))
    samples = [Sample(*texts) for texts in zip(PROMPTS, before, after, strict=True)]
    for sample in samples:
        print(f"\n{sample.prompt}\n  before: {sample.before!r}\n  after:  {sample.after!r}")
    return ReportData(
        domain=changes["domain"],
        general=changes["general"],
        metrics=demo.folder / "runs" / "domain" / "metrics.jsonl",
        configuration=(demo.folder / "runs" / "domain" / "config.yaml").read_text(encoding="utf-8"),
        commands=demo.commands,
        facts={"Steps": f"{records[-1]['step']:,}", "Tokens trained on": f"{records[-1]['tokens']:,}", "Ranks": "2"},
        environment=describe_environment(),
        samples=samples,
        interruptions=[interruption],
    )


def generate(folder: Path) -> list[str]:
    """Greedy continuations of the prompts by the Hugging Face folder, through transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts.append(str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)))
    return texts


if __name__ == "__main__":
    run_command(main)
