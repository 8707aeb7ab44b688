"""Folders with several chat templates: the one that transformers uses is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from oracles.tiny_tokenizer import train_tiny_tokenizer
from transformers import AutoTokenizer

from retemper.engine.errors import UserError
from retemper.tools.preprocessing.chat.encoder import ChatEncoder

MESSAGES = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
TOOLS = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object"}}}]


def template(name: str) -> str:
    """One that says its name, and whether it was given tools."""
    return (
        name + "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


JINJA, EXTRA = "chat_template.jinja", "additional_chat_templates"
FOLDERS = {
    "config": {"config": "a"},
    "file before config": {"config": "a", JINJA: "b"},
    "list in config": {"config": {"default": "a", "rag": "b"}},
    "list with tools": {"config": {"default": "a", "tool_use": "b"}},
    "file before list with tools": {"config": {"default": "a", "tool_use": "b"}, JINJA: "c"},
    "folder of templates": {JINJA: "a", f"{EXTRA}/tool_use.jinja": "b", f"{EXTRA}/rag.jinja": "c"},
    "folder with another default": {JINJA: "a", f"{EXTRA}/default.jinja": "b"},
    "folder before config": {"config": {"default": "a"}, f"{EXTRA}/default.jinja": "b", f"{EXTRA}/tool_use.jinja": "c"},
    "processor's file": {"config": "a", "chat_template.json": "b"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    train_tiny_tokenizer(folder, special=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    return folder


def fill(base: Path, folder: Path, files: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    config: dict = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    for name, content in files.items():
        if name == "config":
            named = content if isinstance(content, dict) else None
            entries = [{"name": key, "template": template(text)} for key, text in (named or {}).items()]
            config["chat_template"] = entries if named else template(content)
            continue
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        text = template(content)
        path.write_text(json.dumps({"chat_template": text}) if path.suffix == ".json" else text)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", FOLDERS)
def test_the_template_is_that_of_transformers(name, tools, base, tmp_path):
    folder = fill(base, tmp_path / "x", FOLDERS[name])
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES, tools=tools, return_dict=False)
    encoder = ChatEncoder(folder, None, None, False)
    encoded = encoder.encode({"messages": MESSAGES, **({"tools": tools} if tools else {})})
    assert encoded is not None and encoded.ids.tolist() == expected


def test_fingerprints_know_the_template_for_tools(base, tmp_path):
    one = fill(base, tmp_path / "one", {"config": {"default": "a", "tool_use": "b"}})
    other = fill(base, tmp_path / "other", {"config": {"default": "a", "tool_use": "c"}})
    found = [ChatEncoder(folder, None, None, False).fingerprint for folder in (one, other, one)]
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({f"{EXTRA}/rag.jinja": "a"}, r"no chat template is called default \(there: rag\)"),
        ({"config": "a", f"{EXTRA}/rag.jinja": "b"}, r"no chat template is called default \(there: rag\)"),
        ({"chat_template.json": "a"}, "do not read .*chat_template.json, use it by --chat-template"),
        ({}, "the tokenizer has no chat template"),
    ],
)
def test_no_default_is_refused(files, message, base, tmp_path):
    """transformers refuses these, too."""
    folder = fill(base, tmp_path / "x", files)
    with pytest.raises(ValueError, match="chat template"):
        AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES)
    with pytest.raises(UserError, match=message):
        ChatEncoder(folder, None, None, False)


def test_a_processors_file_may_be_named(base, tmp_path):
    folder = fill(base, tmp_path / "x", {"config": "a", "chat_template.json": "b"})
    named = ChatEncoder(folder, None, None, False, folder / "chat_template.json").encode({"messages": MESSAGES})
    (folder / "t.jinja").write_text(template("b"))
    same = ChatEncoder(folder, None, None, False, folder / "t.jinja").encode({"messages": MESSAGES})
    assert named is not None and same is not None and named.ids.tolist() == same.ids.tolist()
    (folder / "chat_template.json").write_text('{"template": 3}')
    with pytest.raises(UserError, match="chat_template is not a string"):
        ChatEncoder(folder, None, None, False, folder / "chat_template.json")


def test_bpe_dropout_is_off(base, tmp_path):
    """As in texts: one conversation, one encoding; and it is compared with transformers without dropout, too."""
    folder = fill(base, tmp_path / "x", {"config": "a"})
    expected = ChatEncoder(folder, None, None, False).encode({"messages": MESSAGES})
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(content))
    encoder = ChatEncoder(folder, None, None, False)
    for _ in range(5):
        encoded = encoder.encode({"messages": MESSAGES})
        assert encoded is not None and expected is not None and encoded.ids.tolist() == expected.ids.tolist()
    assert encoder.check_against_transformers()


def test_unicode_forms_that_transformers_alone_composes_are_a_note(base, tmp_path, capsys):
    """Qwen2Tokenizer normalizes, whatever tokenizer.json says."""
    folder = fill(base, tmp_path / "x", {"config": "a"})
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    assert ChatEncoder(folder, None, None, False).check_against_transformers()
    assert "note: " in (said := capsys.readouterr().err) and "Qwen2Tokenizer" in said
