"""Chat templates that loop or allocate without bound are refused in seconds, and do not disturb what comes after."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from forked import LIMIT_SECONDS
from test_chat_input import ANSWER, CHATML, USER, encode, save

from retemper.engine.errors import UserError
from retemper.tools.preprocessing.chat.encoder import ChatEncoder
from retemper.tools.preprocessing.records.errors import MalformedError

MEMORY = {
    "repeat": "{{ 'a' * 10000000000 }}",
    "computed": "{% set n = 99999 %}{{ 'a' * (n * n * 100) }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "replace": "{% set a = 'a' * 100000 %}{{ a.replace('a', a) }}",
    "list": "{{ (range(99999) | list * 10000) | length }}",
    "tabs": "{{ ('\t' * 1000).expandtabs(100000000) }}",
}
TIME = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "words": "{{ lipsum(n=99999999) }}",
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory(tmp_path, name):
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match=r"not a usable chat template, .* it takes more than 1 GiB of memory"):
        ChatEncoder(save(tmp_path, MEMORY[name] + CHATML), None, None, False)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 10 ** 10 ** 10 }}", r"line 1 of the chat template uses \*\*, which can compute without end"),
        ("\n{% for i in range(10**9) %}{% generation %}{% endgeneration %}{% endfor %}", r"line 2 .* uses \*\*"),
        ("{% for i in range(1000000000) %}{% endfor %}", "Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth exceeded"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
        ("{% for a in range(2) %}" * 25 + "{% endfor %}" * 25, "too many statically nested blocks"),
        ("{{ 'a' * 3000000 }}", "it writes 3,000,104 characters for a conversation of"),
        ("x" * 1_100_000, "a chat template of 1,100,"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
    ],
)
def test_other_limits(tmp_path, template, message):
    with pytest.raises(UserError, match=message) as caught:
        ChatEncoder(save(tmp_path, template + CHATML), None, None, False)
    assert "\n" not in str(caught.value)


def test_two_stars_in_text_are_allowed(tmp_path):
    encoder = ChatEncoder(save(tmp_path, "**Rules** {{ '**' }}" + CHATML), None, None, False)
    assert encode(encoder, {"messages": [USER, ANSWER]}).mask.any()


def test_a_template_that_is_costly_for_some_conversations(tmp_path):
    """Each is refused; after the third it is the template that is refused, whatever is skipped."""
    bomb = "{% if messages[0].content == 'x' %}" + MEMORY["repeat"] + "{% endif %}"
    encoder = ChatEncoder(save(tmp_path, bomb + CHATML), None, None, False)
    bad = {"messages": [{**USER, "content": "x"}, ANSWER]}
    for _ in range(2):
        with pytest.raises(
            MalformedError, match="the chat template cannot be used for the conversation: it takes more"
        ):
            encoder.encode(bad)
        assert encode(encoder, {"messages": [USER, ANSWER]}).mask.any()
    with pytest.raises(UserError, match="and so for 3 conversations; give --chat-template FILE with another"):
        encoder.encode(bad)


def test_long_conversations_are_no_bomb(tmp_path):
    encoder = ChatEncoder(save(tmp_path), None, None, False)
    assert encode(encoder, {"messages": [{**USER, "content": "mat " * 260_000}, ANSWER]}).mask.any()


def test_time(tmp_path):
    """In a process of its own: pytest's timeout uses the same signal."""
    folders = [str(save(tmp_path / name, TIME[name] + CHATML)) for name in TIME]
    good = str(save(tmp_path / "good"))
    code = (
        "import sys, json; from pathlib import Path\n"
        "from retemper.tools.preprocessing.chat import encoder as chat, render_limits\n"
        "render_limits.MAX_SECONDS = 0.2\n"
        f"for folder in {folders}:\n"
        "    try: chat.ChatEncoder(Path(folder), None, None, False)\n"
        "    except chat.UserError as error: print(error)\n"
        f"encoder = chat.ChatEncoder(Path({good!r}), None, None, False)\n"
        f"print(len(encoder.encode({json.dumps({'messages': [USER, ANSWER]})}).ids))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert all(
        "a plain question fails: the chat template cannot be used" in line and " s" in line for line in lines[:3]
    )
    assert len(lines) == 4 and int(lines[3]) > 5


def test_a_template_that_is_no_file(tmp_path):
    for path, reason in (("/dev/zero", "not a regular file"), (str(tmp_path), "Is a directory")):
        with pytest.raises(UserError, match=f"{path}: cannot be read as a chat template: {reason}"):
            ChatEncoder(save(tmp_path / "folder"), None, None, False, Path(path))
