"""The commands of docs/reports.md and docs/reliability.md run as written, in order, on finished runs."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import tiny_run
from documented_commands import ROOT, Documented, command_lines

EXPECTED = {
    "tools/report.py runs/x --json --overwrite": '"folder": "runs/x"',
    "tools/report.py runs/x --compare runs/y --output xy.html": "differs",
    "tools/checkpoint.py ls runs/x": "step-00000020",
    "tools/checkpoint.py prune runs/x --keep-last 2 --keep-every 10000 --dry-run": "step-00000012\nkeep",
}
"""What some of the commands print, among other things."""


@pytest.fixture
def folder(one_rank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the runs ``runs/x`` and ``runs/y``, and with the checkpoints A and B."""
    config = tiny_run.write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, rate in (("x", "1e-2"), ("y", "5e-3")):
        tiny_run.train(one_rank, config, ["--run_folder", f"runs/{name}", "--optimizer.learning_rate", rate])
        Path({"x": "A", "y": "B"}[name]).symlink_to(f"runs/{name}/checkpoints/step-00000020")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", ["reports", "reliability"])
def test_commands_run_on_a_run(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = []
    for line in command_lines((ROOT / "docs" / f"{page}.md").read_text("utf-8")):
        program, script, *arguments = Documented(page, line).words
        if program != "python" or not script.startswith("tools/"):
            continue
        capsys.readouterr()
        status = importlib.import_module(f"retemper.{script.removesuffix('.py').replace('/', '.')}").main(arguments)
        printed = capsys.readouterr().out
        command = " ".join([script, *arguments])
        assert (status or 0) == (1 if "diff A B" in command else 0), line
        assert EXPECTED.get(command, "") in printed, line
        ran.append(command)
    assert len(ran) >= 5
    if page == "reports":
        assert all(Path(name).stat().st_size > 10_000 for name in ("x.html", "xy.html", "runs/x/report.html"))
