"""The package takes nobody's name: bare imports, the folders of scripts on ``sys.path``, and the version."""

import importlib
import importlib.metadata
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import retemper
from retemper.engine.errors import EXTRA_OF, command_name, install_command
from retemper.tools.cli.main import main

ROOT = Path(retemper.__file__).parent
SCRIPT_FOLDERS = ("engine", "tools", "checkpoint_convert", "tools/demo", "benchmarks")


def run_elsewhere(code: str, folder: Path) -> str:
    """Standard output of ``code`` in a fresh interpreter that stands in ``folder``."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["kernels", "tools", "engine", "checkpoint_convert", "tests", "setup"])
def test_bare_names_are_not_ours(tmp_path, name):
    code = (
        f"from importlib.util import find_spec; spec = find_spec({name!r}); "
        "print(spec and (spec.origin or list(spec.submodule_search_locations)))"
    )
    # The environment may lie inside the repository; what is ours lies in the folder of that name.
    assert str(ROOT / name) not in run_elsewhere(code, tmp_path)


def test_the_package_is_found_from_anywhere(tmp_path):
    code = "import retemper, retemper.engine.errors, retemper.kernels.rope as r; print(retemper.__file__, r.__file__)"
    assert run_elsewhere(code, tmp_path).split() == [str(ROOT / "__init__.py"), str(ROOT / "kernels" / "rope.py")]


def test_transformers_imports_beside_the_package_kernels(tmp_path):
    """transformers imports the PyPI package ``kernels`` where it is installed, as it is for these tests."""
    code = (
        "import retemper.kernels.rope, kernels, transformers; from transformers import AutoModelForCausalLM; "
        "from kernels import get_kernel; print(kernels.__file__)"
    )
    path = Path(run_elsewhere(code, tmp_path).splitlines()[-1])
    assert ROOT / "kernels" not in path.parents
    assert "site-packages" in path.parts


def test_scripts_run_from_a_clone_without_installation_and_import_that_clone(tmp_path):
    """Even where another clone is installed: without site-packages only the standard library is left."""
    clone = tmp_path / "clone of mine"
    (clone / "engine").mkdir(parents=True)
    (clone / "tools" / "demo").mkdir(parents=True)
    shutil.copy(ROOT / "__init__.py", clone)
    (clone / "engine" / "errors.py").touch()
    (clone / "engine" / "where.py").write_text("HERE = __file__\n", encoding="utf-8")
    for folder in ("tools", "tools/demo"):
        shutil.copy(ROOT / "engine" / "retemper.py", clone / folder)
        script = clone / folder / "command.py"
        script.write_text(
            "import retemper\nfrom retemper.engine.where import HERE\nprint(retemper.__file__, HERE, sep='|')\n"
        )
        for isolation in ([], ["-S"]):
            command = [sys.executable, *isolation, str(script)]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
            assert done.stdout.strip() == f"{clone / '__init__.py'}|{clone / 'engine' / 'where.py'}"


def test_every_folder_with_a_script_has_the_module_that_finds_the_clone():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    scripts = [ROOT / name for name in listed.stdout.split()]
    folders = {path.parent for path in scripts if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")}
    folders -= {ROOT, ROOT / "benchmarks" / "preprocess"}  # run as modules of the package, with python -m
    folders.remove(ROOT / "tools" / "ssh_launch")  # imports only the standard library
    for folder in sorted({*folders, ROOT / "tests"}):
        assert (folder / "retemper.py").resolve() == ROOT / "engine" / "retemper.py", folder


@pytest.mark.parametrize("folder", SCRIPT_FOLDERS)
def test_no_module_beside_a_script_shadows_another(folder):
    """``python engine/pretrain.py`` puts engine/ first on ``sys.path``: a module named like one of the standard library
    or of an installed package would be imported in its place."""
    ours = {path.stem for path in (ROOT / folder).glob("*.py")} | {
        path.name for path in (ROOT / folder).iterdir() if path.is_dir() and any(path.glob("*.py"))
    }
    ours -= {"__init__"}
    assert ours
    assert not ours & set(sys.stdlib_module_names)
    others = {
        name
        for name, distributions in importlib.metadata.packages_distributions().items()
        if {*distributions} != {"retemper"}
    }
    assert "torch" in others
    assert not ours & others


@pytest.fixture
def said(monkeypatch) -> dict:
    """What setup.py tells a stand-in for setuptools, which an environment that only runs the tests may lack."""
    said: dict = {}
    stand_in = SimpleNamespace(find_packages=lambda *_, **__: [], setup=lambda **keywords: said.update(keywords))
    for name in ("setuptools", "setuptools.command"):
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setitem(sys.modules, "setuptools.command.build_py", SimpleNamespace(build_py=object))
    runpy.run_path(str(ROOT / "setup.py"))
    return said


def test_the_version_is_said_once(said):
    assert said["name"] == "retemper"
    assert said["version"] == retemper.__version__ == importlib.metadata.version("retemper")


def test_every_optional_module_is_in_the_extra_that_messages_name(said):
    distributions = {"cryptography": "pypdf", "mlflow": "mlflow-skinny", "accelerate": "lm-eval"}
    for module, extra in EXTRA_OF.items():
        required = {re.split(r"[\[<>=]", requirement)[0] for requirement in said["extras_require"][extra]}
        assert {module, module.replace("_", "-"), distributions.get(module)} & required, module


def test_the_command_that_installs_a_package_names_the_clone_if_nothing_is_installed(monkeypatch):
    assert install_command("pyarrow.parquet") == "pip install 'retemper[formats]'"
    assert install_command("numpy") == "pip install retemper"
    assert command_name("export", "checkpoint_convert/dcp_to_hf.py") == "retemper export"

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    clone = Path(retemper.__file__).resolve().parent
    assert install_command("rensa") == f"pip install '{clone}[dedup]'"
    assert (
        command_name("export", "checkpoint_convert/dcp_to_hf.py") == f"python {clone}/checkpoint_convert/dcp_to_hf.py"
    )


def test_links_of_the_description_work_outside_the_repository(said):
    """The page of a package index has no files beside it."""
    text = said["long_description"]
    links = [*re.findall(r"\]\(([^)\s]*)", text), *re.findall(r"^\[[^\]]+\]: (\S+)", text, re.M)]
    assert links and all(re.match(r"https?:|#", link) for link in links)
    ours = [link.removeprefix(f"{said['url']}/blob/main/").partition("#")[0] for link in links if said["url"] in link]
    assert ours and all((ROOT / link).exists() for link in ours)


def test_the_command_is_an_entry_point(said):
    [line] = said["entry_points"]["console_scripts"]
    name, _, target = line.partition(" = ")
    module, _, function = target.partition(":")
    assert name == "retemper" and getattr(importlib.import_module(module), function) is main


def test_the_address_of_the_project_is_the_same_everywhere(said):
    assert f"repo_url: {said['url']}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
