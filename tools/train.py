"""Continue the pretraining of a model on text: tokenize, plan, train, export and report in one command.

    retemper train --model Qwen/Qwen2.5-0.5B --data corpus/ --replay general.jsonl:0.1
    retemper train --model ./model --data corpus.jsonl --tokens 100M --dry-run      # only the plan, and its YAML
    retemper train --config run.yaml                                                # the same as engine/pretrain.py

The same command continues an interrupted run. This file is the command line of retemper.tools.training; with --config
and without --model it is that of engine/pretrain.py. The guide is docs/one_command.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from retemper.engine.config.command_line import CommandParser
from retemper.engine.config.parser import build_parser as build_settings_parser
from retemper.engine.errors import UserError, run_command
from retemper.engine.files.atomic import replace_file
from retemper.engine.guards.garbage_collection import without_gc
from retemper.tools.training.options import TrainOptions, parse_evaluation, parse_replay, parse_source, parse_tokens
from retemper.tools.training.recipe import LORA_RANK

_ONE_COMMAND = ("--model", "--data")


def build_parser() -> CommandParser:
    """Return the parser of the options that are not settings of a run."""
    parser = CommandParser(
        description="Continue the pretraining of a model on text: tokenize it, plan, train, export and report. The "
        "same command continues an interrupted run.",
        epilog="All settings of engine/pretrain.py can be given too, such as --optimizer.learning_rate 1e-5 or "
        "--training.sequence_length 4096. With --config and without --model and --data, this is engine/pretrain.py.",
        allow_abbrev=False,
    )
    _add_request(parser)
    _add_run(parser)
    return parser


def _add_request(parser: CommandParser) -> None:
    parser.add_argument(
        "--model", metavar="DIR|NAME", help="model to start from: a Hugging Face folder, a checkpoint, or a Hub name"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        metavar="TEXT",
        help="files, folders, patterns, URLs (hf://namespace/name, s3://) or dataset prefixes; or an entry of "
        "data.train, as '{path: hf://a/b, split: train, column: body}'",
    )
    parser.add_argument(
        "--replay",
        action="append",
        default=[],
        metavar="TEXT:SHARE",
        help="general text that prevents forgetting, and its share of the training tokens, as general.jsonl:0.1; may "
        "be repeated",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--tokens", metavar="N", help="tokens to train on: 200k, 100M, 1.5B")
    budget.add_argument("--epochs", type=float, metavar="N", help="or passes over the data (default: 1)")
    parser.add_argument(
        "--validation",
        type=float,
        default=TrainOptions.validation,
        metavar="PART",
        help="part of the documents of each text to hold out and evaluate (default: %(default)s)",
    )
    parser.add_argument(
        "--evaluate",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=TEXT",
        help="more texts, or dataset prefixes, to evaluate before, during and after the training; "
        "'NAME={path: chats.jsonl, preprocess: {chat: true}}' gives a text options",
    )


def _add_run(parser: CommandParser) -> None:
    parser.add_argument(
        "--output", metavar="DIR", help="run folder (default: runs/MODEL-DATA); the model appears below its hf/"
    )
    parser.add_argument(
        "--lora",
        action="store_true",
        help="train a LoRA adapter on all linear layers instead of all parameters: less memory, less forgetting, and "
        "less is learned; the model in hf/ has it merged",
    )
    parser.add_argument(
        "--qlora",
        action="store_true",
        help="--lora with the matrices of the model in 4 bits (nf4), on one GPU: least memory, and slower",
    )
    parser.add_argument(
        "--lora-rank",
        type=int,
        metavar="N",
        help=f"with --lora or --qlora: the rank of its matrices (default: {LORA_RANK})",
    )
    parser.add_argument(
        "--auto",
        action="store_true",
        help="choose micro-batch, parallel layout and recomputation so that the model fits and is fast; where it does "
        "not fit, train a LoRA adapter, then one on a base in 4 bits if this machine can, and then offload",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the YAML of the run, and stop")
    parser.add_argument("--save-config", metavar="FILE", help="write the YAML of the run, and stop")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML with further settings")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="processes on this machine (default: one for each GPU; on a CPU one)"
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="with --dry-run: plan for --ranks GPUs of this kind, as a100-80gb"
    )
    parser.take_settings(build_settings_parser)


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Run the command line, by default that of this process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = {word.partition("=")[0] for word in words}
    if "--config" in given and given.isdisjoint(_ONE_COMMAND):
        from retemper.engine import pretrain

        pretrain.main(words)
        return None
    options, settings = build_parser().parse_known_args(words)
    return _train(_request(options), options, settings)


def _request(options: argparse.Namespace) -> TrainOptions:
    if options.model is None or not options.data:
        missing = "--model" if options.model is None else "--data"
        raise UserError(
            f"{missing} is missing; name a model and text, as in --model Qwen/Qwen2.5-0.5B --data corpus/, or a "
            "configuration with --config; see --help"
        )
    if os.environ.get("RANK"):
        raise UserError(
            "--model and --data start the ranks of this machine themselves; run the command without torchrun, or for "
            "several nodes write the configuration with --save-config and start engine/pretrain.py"
        )
    if options.gpu is not None and not (options.dry_run or options.save_config):
        raise UserError(f"--gpu {options.gpu}: only plans for another machine; add --dry-run or --save-config FILE")
    return TrainOptions(
        model=options.model,
        data=tuple(parse_source("--data", text) for text in options.data),
        replay=tuple(parse_replay(text) for text in options.replay),
        evaluate=tuple(map(parse_evaluation, options.evaluate)),
        tokens=None if options.tokens is None else parse_tokens(options.tokens),
        epochs=options.epochs,
        validation=options.validation,
        output=options.output,
        ranks=options.ranks,
        auto=options.auto,
        lora=options.lora or options.qlora or options.lora_rank is not None,
        qlora=options.qlora,
        lora_rank=options.lora_rank,
    )


def _train(request: TrainOptions, options: argparse.Namespace, settings: Sequence[str]) -> int:
    if options.save_config is not None:
        _require_free(options.save_config)
    with without_gc():
        from retemper.tools.training.command import plan_training, run_plan

    files = [word for file in options.config for word in ("--config", file)]
    plan = plan_training(request, files, settings, options.dry_run, options.gpu)
    print("\n".join(plan.lines), file=sys.stderr, flush=True)
    if options.dry_run:
        print(plan.yaml, end="")
    if options.save_config is not None:
        replace_file(Path(options.save_config), [plan.yaml.encode()])
        print(f"settings    {options.save_config}", file=sys.stderr)
    return 0 if options.dry_run or options.save_config is not None else run_plan(plan)


def _require_free(path: str) -> None:
    folder = os.path.dirname(path) or "."
    if os.path.lexists(path):
        raise UserError(f"--save-config {path}: exists; remove it or name another file")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"--save-config {path}: the folder {folder} does not exist or is not writable")


if __name__ == "__main__":
    run_command(main)
