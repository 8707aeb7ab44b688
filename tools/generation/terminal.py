"""Print continuations as they appear, and talk with a model on a terminal. Answers go to stdout, remarks to stderr."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from ...engine.errors import UserError, report_user_error
from .prompts import NOT_UTF_8
from .sampling import Sampling

if TYPE_CHECKING:
    from .chat import Conversation
    from .text_generator import Completion, TextGenerator

CLEAR, EXIT = "/clear", "/exit"


def remark(line: str) -> None:
    """Print a line for people."""
    print(line, file=sys.stderr, flush=True)


def show_piece(text: str) -> None:
    """Print a part of a text."""
    print(text, end="", flush=True)


def describe(completion: Completion, seconds: float | None = None) -> str:
    """Return number of tokens, speed if it is known, and the reason of the end."""
    speed = "" if seconds is None else f"{completion.num_tokens / max(seconds, 1e-9):,.1f} tokens/s, "
    return f"[{completion.num_tokens} tokens, {speed}ended by {completion.ended_by}]"


def show_continuation(model: TextGenerator, prompt: str, sampling: Sampling) -> None:
    """Print a prompt and its continuations, each while it is generated."""
    ids = model.encode(prompt)
    for sample in range(sampling.samples):
        show_piece(prompt)
        started = time.perf_counter()
        completion = model.generate_one(ids, sample, sampling, show_piece)
        print("\n", flush=True)
        remark(describe(completion, time.perf_counter() - started))


def show_batches(model: TextGenerator, prompts: Sequence[str], sampling: Sampling, batch_size: int) -> None:
    """Print prompts with their continuations, several of which are generated at a time."""
    ids = [model.encode(prompt) for prompt in prompts]
    started, num_tokens = time.perf_counter(), 0
    for number, completion in enumerate(model.generate_all(ids, sampling, batch_size)):
        print(f"{prompts[number // sampling.samples]}{completion.text}\n", flush=True)
        remark(describe(completion))
        num_tokens += completion.num_tokens
    seconds = time.perf_counter() - started
    remark(f"[{len(prompts) * sampling.samples} texts, {num_tokens} tokens, {num_tokens / seconds:,.1f} tokens/s]")


def typed_lines(prompt: str, hint: str) -> Iterator[str]:
    """Yield the lines of stdin that are not empty, until its end. Ctrl-C discards the current line.

    Args:
        prompt: asks for a line on a terminal.
        hint: says how to end.

    Raises:
        UserError: they are not UTF-8.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets input() edit lines
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            line = input(prompt if is_terminal else "")
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError(NOT_UTF_8) from None
        except KeyboardInterrupt:
            remark(f"\n{hint}")
            continue
        if line.strip():
            yield line


def answer_each(lines: Iterator[str], answer: Callable[[str], object]) -> None:
    """Call ``answer`` for each line. A :class:`UserError` is reported, and Ctrl-C ends only the answer."""
    with ended_by_sigterm():
        for line in lines:
            try:
                answer(line)
            except UserError as error:
                report_user_error(error)
            except KeyboardInterrupt:
                print("\n", flush=True)
                remark("[ended by Ctrl-C]")


def chat(conversation: Conversation, questions: Sequence[str] | None) -> None:
    """Hold a conversation: the ``questions``, or, if they are None, those that are typed."""
    if questions is not None:
        for question in questions:
            show_answer(conversation, question)
        return
    if sys.stdin.isatty():
        remark(f"{CLEAR} forgets the conversation, {EXIT} or the end of input ends it, Ctrl-C ends an answer")
    lines = typed_lines("you> ", f"{EXIT} ends the conversation")
    answer_each(_until_exit(lines), lambda line: _obey_or_answer(conversation, line))


def show_answer(conversation: Conversation, question: str) -> None:
    """Print the answer to a question while it is generated."""
    started = time.perf_counter()
    completion, forgotten = conversation.ask(question, show_piece)
    print("\n", flush=True)
    if forgotten:
        remark(f"note: the context is full; the oldest {forgotten} questions with their answers were forgotten")
    remark(describe(completion, time.perf_counter() - started))


def _until_exit(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if line.strip() == EXIT:
            return
        yield line


def _obey_or_answer(conversation: Conversation, line: str) -> None:
    if line.strip() == CLEAR:
        conversation.clear()
        remark("[the conversation is empty]")
    else:
        show_answer(conversation, line)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the program and not only an answer, as Ctrl-C does."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    former = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
