"""The table of the commands of ``retemper``: name, summary, and the module that is imported when the command runs.

A module has ``build_parser()``, used for help and completion, and ``main(arguments=None)``, which by default reads the
command line of the process. A command whose module is not installed is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from retemper.engine.config.spelling import nearest
from retemper.engine.errors import UserError


@dataclass(frozen=True)
class Command:
    """A command, or a group of subcommands.

    Args:
        module: without ``retemper.``; empty if there are subcommands.
    """

    name: str
    summary: str
    module: str = ""
    subcommands: tuple[Command, ...] = ()

    @property
    def installed(self) -> bool:
        """Whether the module exists; it is not imported."""
        return bool(self.subcommands) or find_spec(f"retemper.{self.module}") is not None

    def load(self) -> ModuleType:
        """Import the module."""
        return import_module(f"retemper.{self.module}")


CONVERT = (
    Command("hf-to-dcp", "Hugging Face folder to a checkpoint for training", "checkpoint_convert.hf_to_dcp"),
    Command("dcp-to-hf", "checkpoint to a Hugging Face folder", "checkpoint_convert.dcp_to_hf"),
    Command("from-megatron", "Megatron-Core checkpoint to either of them", "checkpoint_convert.from_megatron"),
    Command("to-megatron", "Hugging Face folder or checkpoint to Megatron-Core", "checkpoint_convert.to_megatron"),
)
GROUPS: dict[str, tuple[Command, ...]] = {
    "train": (
        Command("train", "continue the pretraining of a model on text", "tools.train"),
        Command("plan", "predict memory, traffic and time of a run, without GPUs", "tools.plan"),
        Command("launch", "list, print or copy scripts for many nodes: Slurm, Kubernetes", "tools.launch_scripts"),
        Command("report", "show the results of a run, and write them as a page", "tools.report"),
        Command("checkpoint", "list, verify, compare, average, prune and upgrade checkpoints", "tools.checkpoint"),
    ),
    "data": (
        Command("preprocess", "tokenize text to a dataset", "tools.preprocess"),
        Command("inspect", "show and verify the contents of a dataset", "tools.show_dataset"),
        Command("merge", "join datasets, or the shards of one", "tools.merge"),
        Command("export-packed", "write packed sequences as Parquet for other trainers", "tools.export_packed"),
    ),
    "model": (
        Command("evaluate", "measure a model on texts: loss, bits per byte, what it forgot", "tools.evaluate_model"),
        Command("export", "write a checkpoint as a Hugging Face folder", "checkpoint_convert.dcp_to_hf"),
        Command("generate", "continue prompts with a model or a checkpoint, or talk with it", "tools.generate"),
        Command("models", "list shipped configurations and families of models", "tools.models"),
        Command("download", "download a model, or only its tokenizer", "tools.download"),
        Command("convert", "convert between Hugging Face, checkpoints and Megatron", subcommands=CONVERT),
        Command("extend-vocab", "add tokens for a domain to a model", "tools.extend_vocab"),
        Command("expand-blocks", "add blocks to a model that can be trained alone", "tools.expand_blocks"),
        Command("upcycle", "make a mixture of experts of a dense model", "tools.upcycle"),
    ),
    "machine": (
        Command("doctor", "check this machine and installation", "tools.doctor"),
        Command("benchmark", "time the training step", "tools.benchmark"),
        Command("completion", "print a script that completes commands in a shell", "tools.completion"),
    ),
}


def groups() -> Iterator[tuple[str, list[Command]]]:
    """Yield the name of each group and its installed commands."""
    for name, commands in GROUPS.items():
        if installed := [command for command in commands if command.installed]:
            yield name, installed


def runnable() -> Iterator[tuple[str, Command]]:
    """Yield every installed command that has a module, with its full name, such as ``convert hf-to-dcp``."""
    for _, commands in groups():
        for command in commands:
            if not command.subcommands:
                yield command.name, command
            for subcommand in command.subcommands:
                yield f"{command.name} {subcommand.name}", subcommand


def find(name: str, among: Sequence[Command] | None = None) -> Command:
    """Return the command called ``name``.

    Args:
        among: subcommands of one command (default: all commands).

    Raises:
        UserError: there is none; suggests the most similar name.
    """
    known = [command for _, commands in groups() for command in commands] if among is None else among
    found = {command.name: command for command in known}
    if name in found:
        return found[name]
    if name.startswith("-"):
        raise UserError(f"{name}: the command comes first, as in '{known[0].name} {name} ...'; see retemper --help")
    near = nearest(name.replace("_", "-"), found)
    raise UserError(f"unknown command '{name}'; " + (f"did you mean '{near}'?" if near else "see retemper --help"))
