"""Measure a model on texts: loss, perplexity and bits per byte, and what it has learned and forgotten.

    retemper evaluate --model runs/x --data corpus.jsonl general=wiki/ --baseline Qwen/Qwen2.5-0.5B
    retemper evaluate --model hf/ --data test.jsonl --mode sliding --stride 512 --json result.json --output result.html
    torchrun --nproc-per-node 8 tools/evaluate_model.py --model hf/ --data test.jsonl --parallel.shard 8

This file is the command line of retemper.tools.evaluation. Its name is not evaluate.py, because that is the name of a
library that lm-evaluation-harness imports. The guide is docs/evaluation.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, run_command
from retemper.engine.files.outputs import Use, require_report, write_json_report, write_report
from retemper.engine.files.paths import expand_path
from retemper.engine.guards.garbage_collection import without_gc
from retemper.engine.parallel.launcher import read_launcher
from retemper.tools.evaluation.options import SETTINGS, EvaluateOptions, HarnessOptions, parse_sets

if TYPE_CHECKING:
    from retemper.engine.config.settings import RunConfig
    from retemper.tools.evaluation.plan import EvaluationPlan
    from retemper.tools.evaluation.scores import EvaluationResult


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        description="Measure a model on texts: loss, perplexity and bits per byte of each set, and with --baseline "
        "what was learned and forgotten.",
        epilog=f"Settings of a run that can be given as well: {', '.join(f'--{name}' for name in SETTINGS)}.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR|NAME",
        help="a Hugging Face folder, a checkpoint, a run folder, or a Hub name",
    )
    parser.add_argument(
        "--baseline", metavar="DIR|NAME", help="model to compare with, such as the one before the training"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=TEXT",
        help="files, folders, patterns, URLs (hf://namespace/name, s3://) or dataset prefixes; or an entry of "
        "data.train, as '{path: hf://a/b, split: test, column: body}'",
    )
    _add_windows(parser)
    _add_outputs(parser)
    _add_harness(parser)
    parser.mark_usual("--model", "--baseline", "--data", "--mode", "--stride", "--json", "--output", "--lm-eval")
    return parser


def _add_windows(parser: CommandParser) -> None:
    parser.add_argument(
        "--mode",
        choices=("packed", "sliding"),
        default=EvaluateOptions.mode,
        help="packed: in chunks, as validation in training; sliding: each document alone in overlapping windows "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--stride", type=int, metavar="N", help="sliding: tokens that each window scores (default: half of a window)"
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="tokens of a window (default: as the checkpoint was trained, else that of the model up to 2048)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=EvaluateOptions.batch_size,
        metavar="N",
        help="windows that a rank computes at once (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="evaluate about N tokens of each set, spread evenly"
    )
    parser.add_argument("--max-documents", type=int, metavar="N", help="only the first N documents of each set")
    parser.add_argument(
        "--extremes",
        type=int,
        default=EvaluateOptions.extremes,
        metavar="N",
        help="documents to show with the highest and the lowest loss (default: %(default)s)",
    )


def _add_outputs(parser: CommandParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results as JSON")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report as a page (HTML)")


def _add_harness(parser: CommandParser) -> None:
    parser.add_argument(
        "--lm-eval",
        metavar="TASKS",
        help="tasks of lm-evaluation-harness to run as well: names, YAML files or folders, separated by commas",
    )
    parser.add_argument("--lm-eval-include-path", type=Path, metavar="DIR", help="folder with more tasks")
    parser.add_argument("--lm-eval-limit", type=float, metavar="N", help="examples of each task, or a share below 1")
    parser.add_argument("--lm-eval-fewshot", type=int, metavar="N", help="examples in the prompt (default: the task's)")
    parser.add_argument(
        "--lm-eval-batch-size",
        default=HarnessOptions.batch_size,
        metavar="N",
        help="requests at once, or auto (default: %(default)s)",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options, words = build_parser().parse_known_args(arguments)
    request = _request(options)
    _require_outputs(options)
    evaluated = _evaluate(request, words)
    if evaluated is not None:
        _finish(*evaluated, options)


def _require_outputs(options: argparse.Namespace) -> None:
    for name in ("json", "output"):
        if (path := getattr(options, name)) is not None:
            require_report(f"--{name}", path, [Use("--model", options.model)])
    if options.json is not None and options.output is not None and options.json.resolve() == options.output.resolve():
        raise UserError(f"--output {options.output}: --json writes the same file; name another one")


def _request(options: argparse.Namespace) -> EvaluateOptions:
    harness = None
    for name in ("include_path", "limit", "fewshot"):
        if options.lm_eval is None and (value := getattr(options, f"lm_eval_{name}")) is not None:
            raise UserError(f"--lm-eval-{name.replace('_', '-')} {value} has no effect without --lm-eval TASKS; add it")
    if options.lm_eval is not None:
        include = options.lm_eval_include_path
        harness = HarnessOptions(
            tuple(expand_path(task.strip(), "--lm-eval") for task in options.lm_eval.split(",") if task.strip()),
            None if include is None else str(include),
            options.lm_eval_limit,
            options.lm_eval_fewshot,
            options.lm_eval_batch_size,
        )
    return EvaluateOptions(
        model=options.model,
        data=parse_sets(options.data),
        baseline=options.baseline,
        mode=options.mode,
        sequence_length=options.sequence_length,
        stride=options.stride,
        batch_size=options.batch_size,
        max_tokens=options.max_tokens,
        max_documents=options.max_documents,
        extremes=options.extremes,
        harness=harness,
    )


def _evaluate(request: EvaluateOptions, words: Sequence[str]) -> tuple[EvaluationPlan, EvaluationResult] | None:
    """Return the plan and the result, without tasks, on the main rank."""
    with without_gc():
        from retemper.engine.guards.rank_consistency import agree_on_config
        from retemper.engine.observe.waiting import rank0_printer
        from retemper.engine.parallel.layout import plan_layout
        from retemper.engine.parallel.mesh import build_mesh
        from retemper.engine.parallel.process_group import process_group
        from retemper.tools.evaluation.command import evaluate_models
        from retemper.tools.evaluation.plan import plan_evaluation

    world_size = read_launcher().world_size
    plans: list[EvaluationPlan] = []

    def read() -> RunConfig:
        plans.append(plan_evaluation(request, words, world_size))
        return plans[0].config

    config, rendezvous = agree_on_config(read, world_size > 1)
    with process_group(config.device, config.parallel.timeout_seconds, rendezvous) as ranks:
        mesh = build_mesh(plan_layout(config.parallel, ranks.world_size), ranks.device.type, config.parallel.expert)
        result = evaluate_models(plans[0], ranks, mesh, rank0_printer(ranks.is_main))
        is_main = ranks.is_main
    return (plans[0], result) if is_main else None


def _finish(plan: EvaluationPlan, result: EvaluationResult, options: argparse.Namespace) -> None:
    from retemper.engine.observe.waiting import rank0_printer
    from retemper.tools.evaluation.command import with_tasks

    try:
        result = with_tasks(plan, result, rank0_printer(True))
    finally:
        # If a task fails, perhaps after hours, what has been measured is kept.
        if result.model.sets or result.model.tasks:
            _write(result, options)


def _write(result: EvaluationResult, options: argparse.Namespace) -> None:
    from retemper.tools.evaluation.report import format_result, result_page

    print(f"\n{format_result(result)}")
    if options.json is not None:
        write_json_report("--json", options.json, result.to_dict())
        print(f"\njson        {options.json}")
    if options.output is not None:
        write_report("--output", options.output, result_page(result))
        print(f"page        {options.output}")


if __name__ == "__main__":
    run_command(main)
