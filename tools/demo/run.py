"""Run ``make demo``: continued pretraining end to end, with the command that a user would type.

Nothing is downloaded. So a small base model is made first: corpora from text in every Python installation, a tokenizer,
a short pretraining, a Hugging Face folder. Then ``retemper train`` continues its pretraining on a domain corpus, on two
ranks: once without replay, which shows what is forgotten, and once with replay of general text, killed and resumed. The
result is loaded with transformers. The results are printed and written to ``report.html``.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from retemper.engine.config.command_line import CommandParser
from retemper.engine.config.files import SHIPPED
from retemper.engine.config.yaml_loader import load_yaml
from retemper.engine.errors import UserError, run_command
from retemper.engine.files.outputs import write_report
from retemper.engine.observe.curves import METRICS_FILE, SAMPLES_FILE
from retemper.engine.weights.checkpoint.manifest import read_manifest
from retemper.engine.weights.checkpoint.names import EXPORTS
from retemper.tools.cli.commands import find
from retemper.tools.demo.bpe import train_tokenizer
from retemper.tools.demo.corpora import build_corpora
from retemper.tools.reports.metrics import read_curves
from retemper.tools.reports.page import definitions, section, table
from retemper.tools.reports.run import RecordedRun, read_run
from retemper.tools.reports.run_page import format_run, run_page

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("def read_lines(path):\n", "class Parser:\n    def __init__(self", "The function returns")
NEW_TOKENS = 48
BASE = "base_hf"
WITHOUT_REPLAY, WITH_REPLAY = Path("runs", "without_replay"), Path("runs", "with_replay")
REPLAY = 0.3
CACHE = ("--data.cache_folder", "cache")


@dataclass(frozen=True)
class Command:
    """A command line of the demo and its run time."""

    line: str
    seconds: float


@dataclass
class Demo:
    """The demo and its folder; every command runs in this folder and is printed as typed there."""

    folder: Path
    commands: list[Command] = field(default_factory=list)

    def say(self, title: str) -> None:
        """Print the title of a stage."""
        print(f"\n== {title}", flush=True)

    def run(self, *words: str) -> None:
        """Run one command to its end.

        Raises:
            UserError: it failed; its own output gives the reason.
        """
        started = time.perf_counter()
        status = self.start(*words).wait()
        self.commands.append(Command(self.typed(words), time.perf_counter() - started))
        if status:
            raise UserError(f"'{self.typed(words)}' ended with status {status}; see its output above")

    def start(self, *words: str) -> subprocess.Popen:
        """Print and start one command of ``retemper``: the file of this repository that it runs."""
        print(f"$ {self.typed(words)}", flush=True)
        return subprocess.Popen([sys.executable, str(self.program(words[1])), *words[2:]], cwd=self.folder)

    def program(self, name: str) -> Path:
        """Return the file that ``retemper NAME`` runs."""
        return ROOT / f"{find(name).module.replace('.', '/')}.py"

    def typed(self, words: tuple[str, ...]) -> str:
        """Return the command as text."""
        return shlex.join(words)


def main() -> None:
    """Run the command line of this process."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("demo_run"), help="output folder; must not exist")
    parser.add_argument("--base-tokens", type=int, help="tokens of the base model's pretraining")
    parser.add_argument("--train-tokens", type=int, help="tokens of the continued pretraining")
    arguments = parser.parse_args()
    if os.path.lexists(arguments.folder):
        raise UserError(f"--folder {arguments.folder} exists; remove it or name another one")
    arguments.folder.mkdir(parents=True)
    started = time.perf_counter()
    demo = Demo(arguments.folder.resolve())
    make_base_model(demo, _budget(arguments.base_tokens))
    continue_pretraining(demo, _budget(arguments.train_tokens))
    write_samples(demo)
    print(f"\n{write_page(demo)}")
    print(f"\n{time.perf_counter() - started:.0f} s in all; report: {arguments.folder / 'report.html'}")


def _budget(tokens: int | None) -> list[str]:
    """Return the command-line overrides for another token budget with 10 % warm-up."""
    if tokens is None:
        return []
    return ["--training.train_tokens", str(tokens), "--training.warmup_tokens", str(tokens // 10)]


def make_base_model(demo: Demo, budget: list[str]) -> None:
    """Make corpora, tokenizer, and a base model in ``base_hf``, which a user would download."""
    demo.say("make a base model: general prose, a new tokenizer, a short pretraining")
    corpora = build_corpora(demo.folder / "corpora")
    for part in corpora.values():
        print(f"corpora/{part.path.name}: {part.num_documents} documents, {part.num_bytes / 1e6:.2f} MB")
    vocab_size = load_yaml((SHIPPED / "demo_base.yaml").read_text(encoding="utf-8"))["model"]["architecture"][
        "vocab_size"
    ]
    train_tokenizer(
        [corpora["general.train"].path, corpora["domain.train"].path], demo.folder / "tokenizer", vocab_size
    )
    demo.run("retemper", "train", "--config", "demo_base", *CACHE, *budget)
    os.symlink(newest_export(demo.folder / "runs" / "base"), demo.folder / BASE)


def continue_pretraining(demo: Demo, budget: list[str]) -> None:
    """Continue the pretraining like a user: first without, then with replay of general text."""
    demo.say(f"continue the pretraining of {BASE} on the domain corpus")
    demo.run(*training_command(WITHOUT_REPLAY, *budget))
    demo.say("the same with 30 % general text, against forgetting; interrupted once")
    command = training_command(WITH_REPLAY, "--replay", f"corpora/general.train.jsonl:{REPLAY}", *budget)
    killed_at = run_and_kill(demo, command)
    print(f"\nkilled after {killed_at:,} tokens; the same command resumes", flush=True)
    demo.run(*command)


def training_command(run: Path, *options: str) -> tuple[str, ...]:
    """Return the command that trains on the domain corpus in the folder ``run``."""
    return (
        *("retemper", "train", "--config", "demo", "--ranks", "2", "--model", BASE),
        *("--data", "corpora/domain.train.jsonl", "--validation", "0", "--output", str(run), *CACHE, *options),
        *("--evaluate", "domain=corpora/domain.validation.jsonl", "general=corpora/general.validation.jsonl"),
    )


def newest_export(run: Path) -> Path:
    """Return the Hugging Face folder that a run has written, relative to the folder of the demo."""
    folder = sorted((run / EXPORTS).glob("step-*"))[-1]
    return folder.relative_to(run.parents[1])


def run_and_kill(demo: Demo, command: tuple[str, ...]) -> int:
    """Kill all processes of ``command`` after it has trained past a checkpoint; return the tokens trained."""
    started = time.perf_counter()
    process = demo.start(*command)
    folder = demo.folder / WITH_REPLAY
    saved = killed_at = 0
    while not 0 < saved < killed_at:
        if process.poll() is not None:
            raise UserError(f"'{demo.typed(command)}' ended before it could be killed; see its output above")
        time.sleep(0.05)
        with suppress(UserError):  # nothing is recorded yet, or the run is removing an old checkpoint
            checkpoints = (folder / "checkpoints").glob("step-*")
            saved = max((read_manifest(path).consumed_tokens for path in checkpoints), default=0)
            killed_at = max(read_curves(folder / METRICS_FILE).tokens, default=0)
    launcher = psutil.Process(process.pid)
    for victim in [*launcher.children(recursive=True), launcher]:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()
    demo.commands.append(Command(f"{demo.typed(command)}   # killed", time.perf_counter() - started))
    return killed_at


def write_samples(demo: Demo) -> None:
    """Continue the prompts with both models, for the report of the run."""
    demo.say("load both models with transformers")
    after = newest_export(demo.folder / WITH_REPLAY)
    old_texts, new_texts = (generate(demo.folder / folder) for folder in (BASE, after))
    step = read_run(demo.folder / WITH_REPLAY).step
    with (demo.folder / WITH_REPLAY / SAMPLES_FILE).open("w", encoding="utf-8") as file:
        for prompt, old, new in zip(PROMPTS, old_texts, new_texts, strict=True):
            print(f"\n{prompt}\n  before: {old!r}\n  after:  {new!r}")
            for progress, text in ((0, old), (step, new)):
                file.write(json.dumps({"step": progress, "prompt": prompt, "text": text}) + "\n")


def write_page(demo: Demo) -> str:
    """Write ``report.html``, the reports of both runs and all commands; return the summary for the terminal."""
    run, other = (read_run(demo.folder / folder) for folder in (WITH_REPLAY, WITHOUT_REPLAY))
    losses = forgetting_table(run, other)
    sections = [
        section("Replay against forgetting", table(*losses)),
        section("Commands", command_table(demo.commands)),
        section("Environment", definitions(environment())),
    ]
    content = run_page(run, other, title="Continued pretraining, end to end", more=sections)
    write_report("report", demo.folder / "report.html", content)
    rows = [losses[0], *losses[1]]
    shown = "\n".join("".join(f"{cell:>18}" for cell in row) for row in rows)
    return f"{format_run(run)}\n\nvalidation losses\n{shown}"


def forgetting_table(run: RecordedRun, other: RecordedRun) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the validation losses before the training, and after the runs with and without replay."""
    rows = []
    for name, found in run.curves.evaluations.items():
        without = other.curves.evaluations[name]
        rows.append((name, *(f"{one.loss:.3f}" for one in (found[0], without[-1], found[-1]))))
    return ("", "before", "without replay", "with replay"), rows


def command_table(commands: Sequence[Command]) -> str:
    """Return a table of the commands and their times."""
    rows = [(command.line, f"{command.seconds:.1f} s") for command in commands]
    total = ("all commands", f"{sum(command.seconds for command in commands):.0f} s")
    return table(("command", "time"), rows, total, kind="code")


def environment() -> dict[str, str]:
    """Return versions and machine, for repeating the demo."""
    return {
        "Python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "retemper")},
        "System": f"{platform.system()} {platform.machine()}",
        "CPU cores": str(os.cpu_count()),
    }


def generate(folder: Path) -> list[str]:
    """Return greedy continuations of the prompts by a Hugging Face folder, using only transformers."""
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
