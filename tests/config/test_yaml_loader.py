"""The strict YAML reader: merge keys as in PyYAML, keys as text, and a bounded refusal in one line for the rest."""

import os
import time
from pathlib import Path

import pytest
import yaml

from retemper.engine.config import yaml_loader as config_yaml
from retemper.engine.config.parser import parse_config
from retemper.engine.config.yaml_loader import dump_yaml, load_yaml
from retemper.engine.errors import UserError

NINE = ", ".join(["{}"] * 9)


def bomb(levels: int, wrap: str) -> str:
    """Each level names the one before nine times."""
    rest = [
        f"a{level}: &a{level} " + wrap.replace("%", NINE.replace("{}", f"*a{level - 1}")) for level in range(1, levels)
    ]
    return "\n".join(["a0: &a0 {x: 1}", *rest])


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n",
        "a: &a {x: 1}\nb: &b {x: 2, y: 2}\nc: {z: 3, <<: [*a, *b]}\n",
        "- &src {path: p, weight: 2}\n- {<<: *src, path: q}\n- <<: *src\n  name: n\n",
        "a: &a {x: {y: [1]}}\nb: &b {<<: *a, z: 1}\nc: {<<: *b, x: 5}\n",
        'a: {"<<": {x: 1}}\n',
        "a: {<<: {x: 1}, y: 2}\n",
        "a: &a [1, {b: c}]\nd: *a\ne: [*a, *a]\n",
        "a: !!str 12\nb: !!int 12\nc: !!float 1.5\nd: !!map {x: 1}\ne: !!seq [1]\nf: !!bool true\ng: !!null ~\n",
    ],
)
def test_merge_keys_aliases_and_plain_tags_are_those_of_pyyaml(text):
    assert load_yaml(text) == yaml.safe_load(text)


def test_keys_are_the_text_that_is_written():
    text = "{2024: a, true: b, null: c, ~: d, 1e-5: e, 2024-01-01: f, 010: g, on: h, '': i}"
    assert load_yaml(text) == dict(
        zip(["2024", "true", "null", "~", "1e-5", "2024-01-01", "010", "on", ""], "abcdefghi", strict=True)
    )
    assert load_yaml(dump_yaml(load_yaml(text))) == load_yaml(text)


def test_what_an_alias_names_is_copied():
    first, second = load_yaml("[&a {x: {y: 1}}, *a]")
    first["x"]["y"] = 2
    assert second == {"x": {"y": 1}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bomb(12, "[%]"), "more than 100,000 values, with aliases written out"),
        (bomb(12, "{<<: [%]}"), "more than 100,000 values, with aliases written out"),
        ("a: " + "[" * 10_000 + "]" * 10_000, "line 1: more than 50 nested lists or mappings"),
        ("{a: " * 10_000 + "}" * 10_000, "line 1: more than 50 nested lists or mappings"),
        ("- " * 10_000 + "x", "line 1: more than 50 nested lists or mappings"),
        ("".join(" " * level + "a:\n" for level in range(900)), "more than 50 nested lists or mappings"),
        ("a: &a [*a]", "line 1: *a contains itself"),
        ("a: &a {b: {c: [*a]}}", "line 1: *a contains itself"),
        ("a: &a {<<: *a}", "line 1: *a contains itself"),
        ("a: " + "7" * 5000, "line 1: a number of 5,000 characters"),
        ("a: -" + "7" * 5000, "line 1: a number of 5,001 characters"),
        ("a: 0." + "7" * 5000, "line 1: a number of 5,002 characters"),
        ("a: 1e999", "line 1: 1e999 is outside the range of floating-point numbers"),
        ("a: 1e-999", "line 1: 1e-999 is outside the range of floating-point numbers"),
        ("# " + "x" * 2**20, "characters of YAML; at most 1,048,576 are read"),
        ("a: !!python/object:os.system x", "line 1: the tag !!python/object:os.system is not supported"),
        ("a: !!set {a}", "line 1: the tag !!set is not supported"),
        ("a: !!binary aGk=", "line 1: the tag !!binary is not supported"),
        ("a: !!timestamp 2024-01-01", "line 1: the tag !!timestamp is not supported"),
        ("a: !!omap [b: 1]", "line 1: the tag !!omap is not supported"),
        ("a: !secret 3", "line 1: the tag !secret is not supported"),
        ("a: !!int abc", "line 1: 'abc' cannot be read as !!int"),
        ("a: !!bool maybe", "line 1: 'maybe' cannot be read as !!bool"),
        ("a: !!null 0", "line 1: '0' cannot be read as !!null"),
        ("a: !!map x", "line 1: !!map is for 'key: value' lines"),
        ("a: {<<: 3}", "line 1: << merges mappings only"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a\n", "duplicate key '<<' in line 4"),
        ("{a: 1, ? : 2}", "line 1: a value without a key"),
        ("a: 1\n---\nb: 2\n", "several documents"),
        ("a: 1\0", "not valid YAML: unacceptable character #x0000"),
        ("a:\n\tb: 1\n", "line 2, column 1: found character '\\t' that cannot start any token; indent with spaces"),
        ("- &a 1\n- &a 2\n", "found duplicate anchor 'a'"),
        ("a: *b", "found undefined alias 'b'"),
    ],
    ids=lambda text: text[:20].replace("\n", " ").replace("\0", ""),
)
def test_unbounded_and_unsupported_input_is_one_line(text, expected, tmp_path):
    """In files, and where the value fits there, on the command line."""
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        parse_config(["--config", str(path)])
    assert time.process_time() - start < 20  # 3 on an idle core
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    if len(text) < 10_000:
        with pytest.raises(UserError, match=r"^--model\.architecture"):
            parse_config([f"--model.architecture={text}"])


def test_values_are_counted_while_they_are_read(monkeypatch):
    monkeypatch.setattr(config_yaml, "_MOST_VALUES", 100)
    assert load_yaml("[" + "1, " * 99 + "]") == [1] * 99
    with pytest.raises(UserError, match="more than 100 values"):
        load_yaml("[" + "1, " * 100 + "{")  # what follows is not even parsed


def test_files_that_are_no_utf_8_text(tmp_path):
    path = tmp_path / "run.yaml"
    for encoding in ("utf-16", "utf-16-be"):
        path.write_bytes("run_folder: é".encode(encoding))
        with pytest.raises(UserError, match="not a UTF-8 text file"):
            parse_config(["--config", str(path)])
    path.write_bytes(b"\xef\xbb\xbfsead: 1\n")  # a byte order mark of UTF-8 is no part of the first key
    with pytest.raises(UserError, match="unknown key 'sead'"):
        parse_config(["--config", str(path)])


def test_pipes_and_devices_are_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(UserError, match="not a regular file"):
            parse_config(["--config", str(path)])
    large = tmp_path / "large.yaml"
    with large.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="1,099,511,627,776 bytes"):
        parse_config(["--config", str(large)])


@pytest.mark.parametrize("text", ["50%", "0o17", "0x10", "1,000", "12:30:00", "1k", "5M", "1 000", "²"])
def test_numbers_in_other_notations_are_refused_by_name(text, tmp_path):
    with pytest.raises(UserError, match=r"optimizer\.weight_decay is "):
        parse_config(["--optimizer.weight_decay", text])
    path = tmp_path / "run.yaml"
    path.write_text(f"training:\n  eval_interval: {text}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"training\.eval_interval is "):
        parse_config(["--config", str(path)])
