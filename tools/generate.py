"""Continue prompts with a model: a Hugging Face folder or a checkpoint.

    python tools/generate.py --model hf/ --prompt 'The sea was' --max-new-tokens 64 --temperature 0.8 --top-p 0.95
    python tools/generate.py --model runs/x/checkpoints/step-00001000 < prompts.txt     # one prompt a line
    python tools/generate.py --model ckpt/base                                          # asks for prompts

Prompts and their continuations are written to stdout, everything else to stderr. There is no key/value cache: the time
per token grows with the length. This file is the command line of retemper.tools.generation.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, report_user_error, run_command
from retemper.engine.guards.garbage_collection import without_gc
from retemper.engine.tokenizer.frame import BOS_CHOICES
from retemper.engine.weights.hugging_face.weight_options import DTYPE_CHOICES
from retemper.tools.generation.sampling import Sampling

if TYPE_CHECKING:
    from retemper.tools.generation.text_generator import TextGenerator


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(description="Continue prompts with a Hugging Face folder or a checkpoint.")
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder, or checkpoint folder")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue; may be repeated (default: the lines of stdin, or a prompt on a terminal)",
    )
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
    parser.add_argument("--seed", type=int, default=Sampling.seed, help="seed of the sampling (default: %(default)s)")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder with tokenizer.json (default: the model's own)")
    parser.add_argument(
        "--bos",
        choices=BOS_CHOICES,
        default="auto",
        help="begin prompts with the BOS (auto: as the documents in training if the checkpoint records it, "
        "else as the tokenizer begins texts)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPE_CHOICES,
        default="auto",
        help="dtype to compute in (default: the dtype in the model's config)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.mark_usual("--model", "--prompt", "--max-new-tokens", "--temperature", "--top-p", "--seed", "--tokenizer")
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default that of this process."""
    return build_parser().parse_args(arguments)


def typed_prompts() -> Iterator[str]:
    """Yield prompts typed on a terminal, until end of input; empty lines are ignored."""
    while True:
        try:
            prompt = input("prompt> ")
        except EOFError:
            return
        if prompt:
            yield prompt


def piped_prompts() -> list[str]:
    """Return the lines of stdin.

    Raises:
        UserError: there are no lines, or one is empty.
    """
    prompts = sys.stdin.read().splitlines()
    if not prompts:
        raise UserError("stdin is empty; give prompts there, one per line, or with --prompt")
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UserError(f"stdin, line {number}: the prompt is empty; give one prompt per line")
    return prompts


def show_completion(model: TextGenerator, prompt: str, sampling: Sampling) -> None:
    """Print the prompt with its continuation, and the speed."""
    started = time.perf_counter()
    completion = model.generate(prompt, sampling)
    seconds = time.perf_counter() - started
    print(f"{prompt}{completion.text}\n", flush=True)
    print(
        f"[{completion.num_tokens} tokens, {completion.num_tokens / seconds:,.1f} tokens/s, ended by "
        f"{completion.ended_by}]",
        file=sys.stderr,
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = parse_arguments(arguments)
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.seed)
    interactive = options.prompt is None and sys.stdin.isatty()
    prompts = options.prompt if options.prompt is not None else [] if interactive else piped_prompts()
    with without_gc():
        from retemper.tools.generation.text_generator import TextGenerator

    model = TextGenerator(options.model, options.tokenizer, options.dtype, options.device, options.bos)
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    # All prompts are checked before the first is run, so that an error in the last does not waste the work on the
    # others.
    for prompt in prompts:
        model.encode(prompt)
    for prompt in typed_prompts() if interactive else prompts:
        try:
            show_completion(model, prompt, sampling)
        except UserError as error:
            if not interactive:
                raise
            report_user_error(error)


if __name__ == "__main__":
    run_command(main)
