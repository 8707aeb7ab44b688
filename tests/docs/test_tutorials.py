"""The tutorials that need only a CPU run as written, one after another, and print what they show."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = ("first_run", "your_corpus", "new_vocabulary", "mix_instructions")
"""Those that run here, in the order in which they continue each other."""
SHIM = """#!{python}
import sys
sys.path.insert(0, {tools!r})  # where the name retemper is this clone
from retemper.tools.cli.main import main
if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which ``retemper`` is that of this clone, without a network, and with a cache of its own."""
    programs, cache = tmp_path_factory.mktemp("programs"), tmp_path_factory.mktemp("cache")
    (programs / "retemper").write_text(SHIM.format(python=sys.executable, tools=str(ROOT / "tools")))
    (programs / "retemper").chmod(0o755)
    path = f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "RETEMPER_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def without_numbers(text: str) -> str:
    """``text`` without numbers, signs and the widths of columns: losses differ between machines."""
    return " ".join(re.sub(r"[-+]?\d[\d,.]*", "#", text).split())


def run_blocks(text: str, folder: Path, environment: dict[str, str]) -> int:
    """Run the ``bash`` blocks of a page; each line of a ``text`` block is in what the block before it printed.

    Returns:
        the number of blocks that ran.
    """
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for (language, content), (after, expected) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if language != "bash":
            continue
        command = ["bash", "-eu", "-o", "pipefail", "-c", content]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{content}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        printed = without_numbers(done.stdout + done.stderr)
        for line in expected.splitlines() if after == "text" else ():
            assert without_numbers(line) in printed, f"{content}\nnot printed: {line}\n{done.stdout[-2000:]}"
    return sum(language == "bash" for language, _ in blocks)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tutorials_run_as_written(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> None:
    folder = tmp_path_factory.mktemp("tutorials")
    ran = [
        run_blocks((ROOT / "docs" / "tutorials" / f"{name}.md").read_text("utf-8"), folder, environment)
        for name in TUTORIALS
    ]
    assert all(number >= 4 for number in ran), ran
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_notebook_runs(tmp_path: Path, environment: dict[str, str]) -> None:
    notebook = json.loads((ROOT / "docs" / "notebooks" / "first_run.ipynb").read_text("utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    program = "\n".join(f"print('cell', {number})\n{source}" for number, source in enumerate(cells))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "texts loss fell by" in done.stdout
    losses = [float(loss) for loss in re.findall(r"^step +\d+: loss of texts ([\d.]+)$", done.stdout, re.MULTILINE)]
    assert len(losses) >= 3 and losses[-1] < losses[0] - 1


def test_the_notebook_has_no_outputs() -> None:
    notebook = json.loads((ROOT / "docs" / "notebooks" / "first_run.ipynb").read_text("utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_check_of_tutorials_finds_what_is_not_printed(tmp_path: Path) -> None:
    page = "```bash\necho loss fell by {}, from 7.5\n```\n\n```text\nloss fell by 1.2\n```\n"
    assert run_blocks(page.format("3.4"), tmp_path, dict(os.environ)) == 1
    with pytest.raises(AssertionError, match="not printed: loss fell by"):
        run_blocks(page.format("nothing"), tmp_path, dict(os.environ))
    with pytest.raises(AssertionError):
        run_blocks("```bash\nfalse\n```\n", tmp_path, dict(os.environ))
