"""Continue prompts with a model, or talk with it: a Hugging Face folder or a checkpoint.

    python tools/generate.py --model hf/ --prompt 'The sea was' --max-new-tokens 64 --temperature 0.8 --top-p 0.95
    python tools/generate.py --model runs/x/checkpoints/step-00001000 < prompts.txt     # one prompt a line
    python tools/generate.py --model hf/ --input prompts.jsonl --output results.jsonl --batch-size 16
    python tools/generate.py --model ckpt/base                                          # asks for prompts
    python tools/generate.py --model hf/ --chat --system 'Answer in one sentence.'

Texts are written to stdout, everything else to stderr. This file is the command line of retemper.tools.generation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, run_command
from retemper.engine.files.outputs import Use
from retemper.engine.guards.garbage_collection import without_gc
from retemper.engine.tokenizer.frame import BOS_CHOICES
from retemper.engine.weights.hugging_face.weight_options import DTYPE_CHOICES
from retemper.tools.generation import terminal
from retemper.tools.generation.prompts import ResultFile, piped_prompts, read_prompts, require_output
from retemper.tools.generation.sampling import Sampling

if TYPE_CHECKING:
    from retemper.tools.generation.text_generator import TextGenerator


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(description="Continue prompts with a Hugging Face folder or a checkpoint, or talk with it.")
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="Hugging Face folder, checkpoint, run folder (its newest checkpoint), or a model on the Hub",
    )
    _add_prompts(parser)
    _add_sampling(parser)
    _add_chat(parser)
    _add_model_options(parser)
    parser.mark_usual(
        *("--model", "--prompt", "--input", "--output", "--chat", "--system", "--max-new-tokens", "--temperature"),
        *("--top-p", "--seed", "--tokenizer"),
    )
    return parser


def _add_prompts(parser: CommandParser) -> None:
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue; may be repeated (default: the lines of stdin, or a prompt on a terminal)",
    )
    parser.add_argument(
        "--input", type=Path, metavar="FILE", help='prompts: one per line, or in a .jsonl objects {"prompt": "..."}'
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write the texts there and not to stdout, as JSON lines with prompt, sample, text, tokens and reason",
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="texts generated at a time (default: %(default)s)"
    )


def _add_sampling(parser: CommandParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=Sampling.max_new_tokens, help="default: %(default)s")
    parser.add_argument(
        "--temperature",
        type=float,
        default=Sampling.temperature,
        help="0 takes the most likely token, 1 samples from the model's distribution (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=Sampling.top_p,
        help="sample from the smallest set of most likely tokens that reaches this probability (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k", type=int, default=Sampling.top_k, help="sample from this many most likely tokens (default: all)"
    )
    parser.add_argument(
        "--min-p",
        type=float,
        default=Sampling.min_p,
        help="sample from tokens at least this many times as likely as the most likely one (default: all)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=Sampling.repetition_penalty,
        help="above 1: tokens that the text has already become less likely (default: %(default)s)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=Sampling.samples,
        metavar="N",
        help="texts of each prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end a text before this one; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=Sampling.seed, help="seed of the sampling (default: %(default)s)")


def _add_chat(parser: CommandParser) -> None:
    parser.add_argument(
        "--chat", action="store_true", help="talk with the model in its chat template; prompts are questions"
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="with --chat: system prompt")
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="with --chat: a chat template (default: the tokenizer's own)"
    )


def _add_model_options(parser: CommandParser) -> None:
    parser.add_argument("--tokenizer", metavar="DIR", help="folder with tokenizer.json (default: the model's own)")
    parser.add_argument(
        "--bos",
        choices=BOS_CHOICES,
        default="auto",
        help="begin prompts with the BOS (auto: as the documents in training if the checkpoint records it, "
        "else as the tokenizer begins texts; with --chat, as the chat template)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPE_CHOICES,
        default="auto",
        help="dtype to compute in (default: the dtype in the model's config)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that comes with a model whose type transformers does not know (default: refuse it)",
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default that of this process.

    Raises:
        UserError: options contradict each other.
    """
    options = build_parser().parse_args(arguments)
    if options.prompt is not None and options.input is not None:
        raise UserError("--prompt and --input both give prompts; use one of them")
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: expected at least 1")
    if options.chat:
        _refuse(options, "--chat holds one conversation", "input", "output")
        if options.samples > 1:
            raise UserError(f"--samples {options.samples}: --chat gives one answer to each question")
    else:
        _refuse(options, "only --chat has a chat template", "system", "chat_template")
    return options


def _refuse(options: argparse.Namespace, reason: str, *names: str) -> None:
    for name in names:
        if getattr(options, name):
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(options, name)}: {reason}; leave out --{option}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = parse_arguments(arguments)
    sampling = Sampling(
        options.max_new_tokens,
        options.temperature,
        options.top_p,
        options.top_k,
        options.seed,
        options.min_p,
        options.repetition_penalty,
        options.samples,
        tuple(options.stop),
    )
    if options.output is not None:
        inputs = [Use("--input", options.input)] if options.input is not None else []
        require_output(options.output, [*inputs, Use("--model", options.model)])
    prompts = None if options.chat and options.prompt is None else _prompts(options)
    with without_gc():
        from retemper.engine.out_of_memory import in_one_line

    with in_one_line("lower --batch-size or --max-new-tokens, use --dtype bfloat16, or --device cpu"):
        _generate(prompts, sampling, options)


def _generate(prompts: list[str] | None, sampling: Sampling, options: argparse.Namespace) -> None:
    with without_gc():
        from retemper.tools.generation.text_generator import TextGenerator

    model = TextGenerator(
        options.model, options.tokenizer, options.dtype, options.device, options.bos, options.trust_remote_code
    )
    for note in model.notes:
        terminal.remark(f"note: {note}")
    if options.chat:
        _chat(model, sampling, options)
    elif prompts is None:
        lines = terminal.typed_lines("prompt> ", "the end of input (Ctrl-D) ends the program")
        terminal.answer_each(lines, lambda line: terminal.show_continuation(model, line, sampling))
    else:
        _continue(model, prompts, sampling, options)


def _prompts(options: argparse.Namespace) -> list[str] | None:
    """Return the prompts; None if they will be typed."""
    if options.prompt is not None:
        prompts: list[str] = options.prompt
        return prompts
    if options.input is not None:
        return read_prompts(options.input)
    if not sys.stdin.isatty():
        return piped_prompts()
    if options.output is not None:
        raise UserError("--output is for prompts that are given; use --prompt or --input, or pipe them to stdin")
    return None


def _continue(model: TextGenerator, prompts: list[str], sampling: Sampling, options: argparse.Namespace) -> None:
    # All prompts are checked before the first is run, so that an error in the last does not waste the work on the
    # others.
    ids = [model.encode(prompt) for prompt in prompts]
    if (note := model.describe_cache(ids, sampling, options.batch_size)) is not None:
        terminal.remark(f"note: {note}")
    if options.output is not None:
        _write(model, prompts, ids, sampling, options)
    elif options.batch_size == 1 or len(prompts) * sampling.samples == 1:
        for prompt in prompts:
            terminal.show_continuation(model, prompt, sampling)
    else:
        terminal.show_batches(model, prompts, sampling, options.batch_size)


def _write(
    model: TextGenerator,
    prompts: list[str],
    ids: list[list[int]],
    sampling: Sampling,
    options: argparse.Namespace,
) -> None:
    from retemper.engine.observe.waiting import ProgressBar

    total = len(prompts) * sampling.samples
    with (
        ResultFile(options.output, total, terminal.remark) as results,
        ProgressBar("generating", total, terminal.remark) as bar,
    ):
        for request, completion in model.generate_in_batches(ids, sampling, options.batch_size):
            record = {
                "prompt": prompts[request.prompt],
                "sample": request.sample,
                "text": completion.text,
                "tokens": completion.num_tokens,
                "reason": completion.ended_by,
            }
            results.add(request.prompt * sampling.samples + request.sample, record)
            bar.update(1)
    terminal.remark(f"wrote {total} texts to {options.output}")


def _chat(model: TextGenerator, sampling: Sampling, options: argparse.Namespace) -> None:
    from retemper.tools.generation.chat import Conversation

    conversation = Conversation(model, sampling, options.system, options.chat_template, options.bos)
    terminal.chat(conversation, options.prompt)


if __name__ == "__main__":
    run_command(main)
