"""Callbacks of users: found, refused in one line, and harmless when they fail. A callback stops a run on all ranks."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from documented_commands import FENCE, ROOT
from helpers import tiny_run
from local_server import LocalServer

from retemper.engine import pretrain
from retemper.engine.config.parser import config_folders
from retemper.engine.errors import UserError
from retemper.engine.observe.callbacks import create_callbacks, import_callbacks
from retemper.engine.observe.observer import Observer, StepRecord
from retemper.engine.schedule import Progress

IMPORT = "from retemper.engine.observe.observer import Observer\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of user modules whose imports are forgotten at the end."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def created(folder: Path, path: str, say=print) -> list[Observer]:
    import_callbacks([path], [folder])
    return create_callbacks([path], say)


@pytest.mark.parametrize(
    ("source", "path", "named"),
    [
        (None, "user_c.Mine", "there is no module user_c"),
        (IMPORT, "user_c.inner.Mine", "there is no module user_c.inner"),
        (IMPORT, "user_c.Mine", "has no class Mine"),
        ("class Mine: pass", "user_c.Mine", "not a subclass of Observer"),
        (f"{IMPORT}Mine = Observer()", "user_c.Mine", "not a subclass of Observer"),
        ("\nimport what_nobody_has", "user_c.Mine", "No module named 'what_nobody_has' ({file}, line 2)"),
        ("def x(:", "user_c.Mine", "SyntaxError: invalid syntax (user_c.py, line 1)"),
        ("raise SystemExit(3)", "user_c.Mine", "SystemExit: 3 ({file}, line 1)"),
        (
            f"{IMPORT}class Mine(Observer):\n    def __init__(self, url): pass",
            "user_c.Mine",
            "user_c.Mine cannot be created: TypeError: ",
        ),
        (
            f"{IMPORT}class Mine(Observer):\n    def __init__(self):\n        self.x = 1 / 0",
            "user_c.Mine",
            "user_c.Mine cannot be created: ZeroDivisionError: division by zero ({file}, line 4)",
        ),
    ],
)
def test_wrong_callbacks_are_refused_in_one_line(source, path, named, folder):
    if source is not None:
        (folder / "user_c.py").write_text(source)
    with pytest.raises(UserError) as refused:
        created(folder, path)
    message = str(refused.value)
    assert message.startswith(f"callbacks: {path}") and "\n" not in message
    assert named.format(file=folder / "user_c.py") in message


@pytest.mark.parametrize("place", ["", "class Mine(Observer):\n    def __init__(self):\n        "])
def test_the_reason_of_a_wrong_callback_has_no_secret(place, folder, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "CANARY-123")
    failing = 'raise ValueError("CANARY-123 is refused by https://user:CANARY@host/")'
    (folder / "user_c.py").write_text(f"{IMPORT}{place}{failing}")
    with pytest.raises(UserError, match="ValueError") as refused:
        created(folder, "user_c.Mine")
    assert "CANARY" not in str(refused.value)


@pytest.mark.parametrize("path", ["Mine", "user_c.", "user c.Mine", "./user_c.py:Mine", "user_c..Mine"])
def test_what_is_no_import_path_is_refused_with_the_configuration(path, tmp_path):
    with pytest.raises(UserError, match=r"callbacks has .*such as my_module.MyCallback"):
        tiny_run.configure(tiny_run.write_config(tmp_path), "--callbacks", f"['{path}']")


def test_modules_are_found_in_the_folder_of_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").touch()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.yaml").touch()
    monkeypatch.chdir(tmp_path)
    words = ["--config", "a.yaml", "--seed", "1", f"--config={tmp_path}/b/c.yaml", "--config", "qwen2_72b"]
    assert {folder.resolve() for folder in config_folders(words)} == {
        tmp_path, tmp_path / "b", ROOT / "megatron_configs"
    }  # fmt: skip


def test_a_file_of_the_user_does_not_replace_a_library(folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (folder / "colorsys.py").write_text("raise RuntimeError")
    (folder / "user_library.py").write_text(f"import colorsys\n{IMPORT}class Mine(Observer): pass")
    created(folder, "user_library.Mine")


def test_an_exception_is_shown_with_its_traceback_and_ends_only_the_callback(folder):
    (folder / "user_fails.py").write_text(
        f"{IMPORT}class Mine(Observer):\n    def step(self, record):\n        self.helper(record)\n\n"
        "    def helper(self, record):\n        raise KeyError(record.progress.step)\n"
    )
    said: list[str] = []
    [callback] = created(folder, "user_fails.Mine", said.append)
    for step in (1, 2):
        callback.step(StepRecord(Progress(step, step, step), {}, 0, 0.0, []))
    note, shown = said
    assert note.startswith("note: the callback user_fails.Mine failed: KeyError: 1")
    assert f'{folder / "user_fails.py"}", line 7, in helper' in shown and "raise KeyError(record" in shown


def documented(name: str) -> str:
    """A callback of docs/tracking.md."""
    page = (ROOT / "docs" / "tracking.md").read_text(encoding="utf-8")
    [source] = [found[3] for found in FENCE.finditer(page) if f"class {name}(Observer)" in found[3]]
    return source


class Webhook(LocalServer):
    """Keeps what is posted."""

    def __init__(self) -> None:
        self.posted: list[dict] = []

    def handler(self) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.serving.posted.append(json.loads(body))
                self.send_response(200)
                self.end_headers()

        return Handler


def test_the_documented_callback_posts_the_result(folder, one_rank, monkeypatch):
    (folder / "user_posts.py").write_text(documented("Notify"))
    words = ["--config", str(tiny_run.write_config(folder)), "--callbacks", "[user_posts.Notify]"]
    with Webhook() as server:
        monkeypatch.setenv("WEBHOOK_URL", server.url)
        pretrain.train(pretrain.build(pretrain.prepare(1, words), one_rank))
    records = tiny_run.records(folder / "run")
    training = next(record["loss"] for record in records if record["step"] == 20 and "evaluation" not in record)
    validation = next(record["loss"] for record in reversed(records) if "evaluation" in record)
    expected = f"{folder / 'run'}: step 20, training {training:.3f}, validation validation {validation:.3f}"
    assert server.posted == [{"text": expected}]


def built(ranks, folder: Path, options: list[str]):
    words = ["--config", str(folder / "run.yaml"), *options]
    return pretrain.build(pretrain.prepare(ranks.world_size, words), ranks)


def stopped(ranks, folder: Path, options: list[str]) -> tuple[int, list[str], int]:
    """The step at which this rank stops, the modules of users that it has imported, and the number of observers."""
    run = built(ranks, folder, options)
    pretrain.train(run)
    return run.progress.step, [name for name in sys.modules if name.startswith("user_")], len(run.report.observers)


def refused(ranks, folder: Path, options: list[str]) -> str:
    with pytest.raises(UserError) as error:
        built(ranks, folder, options)
    return str(error.value)


def test_a_callback_that_rank_0_cannot_create_ends_all_ranks(two_ranks, tmp_path):
    tiny_run.write_config(tmp_path)
    (tmp_path / "user_broken.py").write_text(
        f"{IMPORT}class Mine(Observer):\n    def __init__(self):\n        raise OSError('no such service')\n"
    )
    first, second = two_ranks.run(refused, tmp_path, ["--callbacks", "[user_broken.Mine]"])
    assert (
        first.startswith("callbacks: user_broken.Mine cannot be created: OSError: no such service") and first in second
    )
    assert not (tmp_path / "run").exists()


def test_a_callback_stops_all_ranks_at_the_same_step_and_they_save(two_ranks, tmp_path):
    tiny_run.write_config(tmp_path)
    bound = 3.0
    (tmp_path / "user_stops.py").write_text(documented("StopWhenGood").replace("2.0", str(bound)), encoding="utf-8")
    options = ["--callbacks", "[user_stops.StopWhenGood]", "--checkpoint.save_interval", "1000"]
    (step, modules, _), (other_step, other_modules, observers) = two_ranks.run(stopped, tmp_path, options)
    assert step == other_step < 20 and "user_stops" in modules and "user_stops" in other_modules and observers == 0
    losses = {record["step"]: record["loss"] for record in tiny_run.records(tmp_path / "run") if "evaluation" in record}
    first = min(step for step, loss in losses.items() if loss < bound)
    assert step in (first, first + 1)
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{step:08}"
