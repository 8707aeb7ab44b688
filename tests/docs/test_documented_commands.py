"""Every command line in README and in the documentation is accepted by the parser of its command."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from documented_commands import PAGES, ROOT, Documented, check, command_lines, documented_commands, write_configs

from retemper.engine.config.spelling import known_keys
from retemper.engine.errors import UserError

COMMANDS = documented_commands()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands of the documentation name: the shipped configurations, and a config.json."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "megatron_configs").symlink_to(ROOT / "megatron_configs")
    return folder


@pytest.mark.parametrize("page", sorted({command.page for command in COMMANDS}))
def test_commands_are_accepted(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = folder / page.replace("/", "_")
    shutil.copytree(folder / "megatron_configs", own / "megatron_configs")
    write_configs(page, own)
    monkeypatch.chdir(own)
    for variable in ("TOKENIZER", "MODEL", "RANK", "HOST", "last", "index"):
        monkeypatch.setenv(variable, "1")
    problems = []
    for command in COMMANDS:
        if command.page == page:
            try:
                check(command.words)
            except (UserError, SystemExit, AssertionError, ValueError) as error:
                problems.append(f"{command.line}\n    {error}")
    assert not problems, "\n".join(problems)


def test_the_pages_show_commands_of_every_kind() -> None:
    programs = {command.words[0] for command in COMMANDS}
    assert programs >= {"retemper", "python", "torchrun", "make"}
    assert len(COMMANDS) > 80


@pytest.mark.parametrize(
    "line",
    [
        "python tools/preprocess.py --input a.jsonl --no-such-option",
        "python engine/pretrain.py --config run.yaml --training.train_token 5",
        "torchrun --nproc-per-nodes 8 engine/pretrain.py --config qwen2_72b",
        "torchrun --nproc-per-node 8 engine/pretrain.py --config qwen2_72b --training.micro_batch_size many",
        "python tools/plan.py --config qwen2_72b --nodes 4 --parallel.tensors 8",
        "retemper preprocess --inputs a.jsonl",
        "retemper trainn --config run.yaml",
        "launch/one_node.sh --config run.yaml --seeds 1",
        "make demos",
        "pip install '.[formats,chats]'",
        "kubectl apply -f launch/kubernetes_job.yaml",
        "accelerate launch --num_processes 8 engine/pretrain.py --config run.yaml --seeds 1",
    ],
)
def test_the_check_finds_mistakes(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [found] = command_lines(f"```bash\n{line}\n```")
    with pytest.raises((UserError, SystemExit, AssertionError)):
        check(Documented("", found).words)


def test_settings_that_the_pages_name_exist() -> None:
    known = {key for key, _ in known_keys()}
    sections = "data|training|model|optimizer|parallel|checkpoint|logging"
    unknown = [
        f"{page.relative_to(ROOT)}: {name}"
        for page in PAGES
        if page.name != "CHANGELOG.md"
        for name in re.findall(rf"`(?:--)?((?:{sections})\.[a-z_]+)\b(?![./(\[])", page.read_text("utf-8"))
        if name not in known and name.split(".")[1] not in ("embed_tokens", "safetensors")
    ]
    assert not unknown
