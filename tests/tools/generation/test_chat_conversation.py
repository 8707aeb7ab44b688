"""Conversations: prompts and answers of transformers, the cache across turns, and what a user may do on a terminal."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from retemper.engine.errors import UserError, run_command
from retemper.tools import generate
from retemper.tools.generation.chat import Conversation
from retemper.tools.generation.decoder_backend import CachedSession
from retemper.tools.generation.sampling import Sampling
from retemper.tools.generation.text_generator import TextGenerator

QUESTIONS = ["the cat sat on", "a mat while rain fell", "naïve 天色"]
SYSTEM = "old stone roofs"
NEW = 10


@pytest.fixture(scope="module", params=["folder", "checkpoint"])
def model(request: pytest.FixtureRequest, chat_models: dict[str, Path]) -> TextGenerator:
    """Through transformers, and through our own model."""
    return TextGenerator(chat_models[request.param], device="cpu")


def library_answers(folder: Path, questions: list[str], system: str) -> list[str]:
    """The answers of ``transformers.generate`` to the whole conversation, again for each question."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    messages = [{"role": "system", "content": system}] if system else []
    answers = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        fixed: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
        output = model.generate(**prompt, **fixed)  # type: ignore[misc]
        answers.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


@pytest.mark.parametrize("system", ["", SYSTEM])
def test_answers_equal_transformers(model: TextGenerator, chat_models: dict[str, Path], system: str) -> None:
    conversation = Conversation(model, Sampling(NEW), system)
    expected = library_answers(chat_models["folder"], QUESTIONS, system)
    pieces: list[str] = []
    found = [conversation.ask(question, pieces.append)[0].text for question in QUESTIONS]
    assert found == expected and "".join(pieces) == "".join(expected)
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system"] * bool(system) + ["user", "assistant"] * 3
    conversation.clear()
    assert conversation.ask(QUESTIONS[0])[0].text == expected[0]


def test_only_new_tokens_are_computed(chat_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = TextGenerator(chat_models["checkpoint"], device="cpu")
    conversation, computed = Conversation(model, Sampling(1)), []
    plain = CachedSession.append
    monkeypatch.setattr(
        CachedSession, "append", lambda self, ids: (computed.append(sum(map(len, ids))), plain(self, ids))[1]
    )
    # One new token: text of several may be encoded as other tokens than the model chose.
    conversation.ask("the cat")
    first = sum(computed)
    conversation.ask("a mat")
    whole = len(conversation._encode(conversation._turns))
    assert first < sum(computed) < whole


def test_answers_end_where_a_turn_ends(chat_models: dict[str, Path], tmp_path: Path) -> None:
    """At the template's special token, although no file of this model names it; or before the text of a header."""
    model = TextGenerator(chat_models["folder"], device="cpu")
    end = model.tokenizer.encode_flat(["<|im_end|>"])[0].tolist()
    model.stop_ids = set()
    assert Conversation(model, Sampling(NEW))._stop_ids == {end[0]: "end of text"}
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.role|upper }}: {{ m.content }}\n{% endfor %}ASSISTANT:")
    conversation = Conversation(model, Sampling(NEW), template=template)
    assert conversation._stop_ids == {} and conversation._sampling.stop == ("USER:",)


def test_the_oldest_turns_leave_a_full_context(model: TextGenerator) -> None:
    conversation = Conversation(model, Sampling(16), SYSTEM)
    forgotten = [conversation.ask("the cat sat on a mat")[1] for _ in range(8)]
    assert forgotten[0] == 0 and max(forgotten) >= 1
    assert conversation.messages[0]["content"] == SYSTEM
    assert conversation.messages[1]["role"] == "user" and len(conversation.messages) % 2 == 1
    before = list(conversation.messages)
    with pytest.raises(UserError, match="max_position_embeddings"):
        conversation.ask("cat " * 400)
    assert conversation.messages == before


def test_an_interrupted_answer_stays(model: TextGenerator) -> None:
    conversation, pieces = Conversation(model, Sampling(NEW)), []

    def interrupt(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    answer, _ = conversation.ask("the cat", interrupt)
    assert answer.ended_by == "Ctrl-C" and answer.text == "".join(pieces)
    assert conversation.messages[1]["content"] == answer.text
    follow_up = conversation.ask("a mat")[0].text
    again = Conversation(model, Sampling(NEW))
    again._turns = conversation._turns[:2]
    assert again.ask("a mat")[0].text == follow_up


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command with ``--chat``: arguments and stdin in, status, stdout and stderr out."""

    def run_chat(*arguments: object, stdin: str = "", terminal: bool = False) -> tuple[int, str, str]:
        source = io.StringIO(stdin)
        source.isatty = lambda: terminal  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", source)
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments), "--device", "cpu", "--chat"])
        with pytest.raises(SystemExit) as exit_:
            run_command(generate.main)
        return int(exit_.value.code or 0), *capsys.readouterr()

    return run_chat


@pytest.mark.parametrize("terminal", [True, False])
def test_a_conversation_on_a_terminal_and_through_a_pipe(
    chat_models: dict[str, Path], run: Callable[..., tuple], terminal: bool
) -> None:
    first, second, _ = library_answers(chat_models["folder"], QUESTIONS, "")
    options = ("--model", chat_models["checkpoint"], "--max-new-tokens", NEW)
    lines = [QUESTIONS[0], QUESTIONS[1], "", "cat " * 400, "/clear", QUESTIONS[0], "/exit", "never asked"]
    status, out, err = run(*options, stdin="\n".join(lines) + "\n", terminal=terminal)
    assert (status, out.replace("you> ", "")) == (0, f"{first}\n\n{second}\n\n{first}\n\n")
    assert err.count("error: ") == 1 and ("/exit" in err) is terminal
    # Questions on the command line, and the end of input.
    status, out, _ = run(*options, "--prompt", QUESTIONS[0], "--prompt", QUESTIONS[1])
    assert (status, out) == (0, f"{first}\n\n{second}\n\n")
    assert run(*options, stdin=f"{QUESTIONS[0]}\n")[:2] == (0, f"{first}\n\n")


@pytest.mark.parametrize(
    ("template", "options", "fragment"),
    [
        (None, (), "no chat template"),
        ("{% for m in messages %}{{ m.content", (), "chat_template.jinja"),
        ("{{ raise_exception('only poems') }}", (), "only poems"),
        ("{{ raise_exception('no system') if messages[0].role == 'system' }}", ("--system", "x"), "no system"),
        ("x", ("--samples", "2", "--temperature", "1"), "--samples 2"),
        ("x", ("--output", "x.jsonl"), "--output"),
        ("x", ("--bos", "yes"), "--bos yes"),
    ],
)
def test_refusals_take_one_line(
    chat_models: dict[str, Path],
    tmp_path: Path,
    run: Callable[..., tuple],
    template: str | None,
    options: tuple[str, ...],
    fragment: str,
) -> None:
    folder = Path(shutil.copytree(chat_models["folder"], tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    status, out, err = run("--model", folder, *options, stdin="the cat\n")
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and fragment in err
