"""What a wheel and a source distribution contain, and commands of the wheel in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from built_wheel import ROOT, build, copy_of_the_repository

import retemper

pytest.importorskip("setuptools", minversion="77")
INFO = f"retemper-{retemper.__version__}.dist-info"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_the_repository(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_has_the_type_marker_and_the_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    assert {"retemper/py.typed", "retemper/engine/pretrain.py", f"{INFO}/licenses/NOTICE"} <= {*archive.namelist()}
    assert archive.read(f"{INFO}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    metadata = archive.read(f"{INFO}/METADATA").decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    # Next to an expression, a classifier of a licence is an error for package indexes (PEP 639).
    assert "\nClassifier: License" not in metadata


def test_the_wheel_has_every_file_that_commands_use_and_nothing_else(wheel: Path) -> None:
    names = {name.removeprefix("retemper/") for name in zipfile.ZipFile(wheel).namelist() if INFO not in name}
    folders = ("benchmarks", "checkpoint_convert", "engine", "kernels", "launch", "megatron_configs", "tools")
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    assert {name for name in tracked if name.endswith((".py", ".yaml", ".sh"))} <= names
    assert names <= {*tracked, "__init__.py", "__main__.py", "py.typed"} | untracked(folders)


def untracked(folders: tuple[str, ...]) -> set[str]:
    """New files that are not committed yet."""
    command = ["git", "ls-files", "-o", "--exclude-standard", *folders]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines())


def test_the_source_distribution_makes_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    archive = build(source, "sdist", tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    again = build(tmp_path / archive.name.removesuffix(".tar.gz"), "wheel", tmp_path / "wheel")
    assert contents(again) == contents(wheel)


def contents(wheel: Path) -> dict[str, bytes]:
    archive = zipfile.ZipFile(wheel)
    return {name: archive.read(name) for name in archive.namelist()}


class Installation:
    """The wheel in an environment of its own, with the dependencies of this one, and an empty working folder."""

    def __init__(self, wheel: Path, folder: Path):
        self.folder = folder / "work"
        self.folder.mkdir()
        self.programs = folder / "venv" / "bin"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        [self.packages] = (folder / "venv" / "lib").glob("python*/site-packages")
        # Directories on this list contribute packages, not their .pth files, which would add this repository.
        known = [path for path in sys.path if path.endswith("site-packages")]
        (self.packages / "dependencies.pth").write_text("\n".join(known))
        install = [
            "-m",
            "pip",
            "--python",
            str(self.programs / "python"),
            "install",
            "--no-deps",
            "--no-index",
            str(wheel),
        ]
        subprocess.run([sys.executable, *install], check=True, capture_output=True)

    def run(self, *command: str) -> str:
        """Standard output of a command of the environment."""
        program = [str(self.programs / command[0]), *command[1:]]
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RETEMPER_CACHE": str(self.folder / "cache")}
        done = subprocess.run(
            program,
            cwd=self.folder,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout


@pytest.fixture(scope="module")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(wheel, tmp_path_factory.mktemp("installation"))


@pytest.mark.slow
def test_the_installed_commands_find_what_came_with_them(installation: Installation) -> None:
    where = "import retemper; print(retemper.__file__)"
    assert installation.run("python", "-c", where).startswith(str(installation.packages))
    assert "preprocess" in installation.run("retemper", "--help")
    assert installation.run("retemper", "--version") == f"retemper {retemper.__version__}\n"
    assert "80" in installation.run("retemper", "train", "--config", "qwen2_72b", "--print_config")
    script = Path(installation.run("retemper", "launch", "path", "one_node.sh").strip())
    assert script.parent == installation.packages / "retemper" / "launch" and os.access(script, os.X_OK)
    as_file = installation.run("python", f"{installation.packages}/retemper/tools/preprocess.py", "--help")
    assert as_file.startswith("usage: preprocess.py --input")


@pytest.mark.slow
def test_the_installed_commands_make_a_model_that_transformers_loads(
    installation: Installation, tiny_tokenizer: Path
) -> None:
    folder = installation.folder
    texts = [f"On day {day} the sea was {word}, and so was the ship." for day in range(50) for word in WORDS]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "run.yaml").write_text(RUN.format(tokenizer=tiny_tokenizer))
    installation.run("retemper", "preprocess", "--input", "corpus.jsonl", "--tokenizer", str(tiny_tokenizer))
    assert "200" in installation.run("retemper", "inspect", "dataset")
    installation.run("retemper", "train", "--config", "run.yaml")
    checkpoint = "run/checkpoints/step-00000008"
    installation.run("retemper", "checkpoint", "verify", checkpoint)
    installation.run("retemper", "export", "--checkpoint", checkpoint, "--output", "hf")
    load = "from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('hf').num_parameters())"
    assert int(installation.run("python", "-c", load).split()[-1]) > 10_000
    installation.run("retemper", "report", "run")
    assert (folder / "run" / "report.html").is_file()
    # All of it in one command, from the model that was made.
    words = ("--model", "hf", "--data", "corpus.jsonl", "--tokens", "2k", "--output", "again")
    installation.run(
        "retemper", "train", *words, "--training.sequence_length", "64", "--training.global_batch_size", "4"
    )
    assert (folder / "again" / "report.html").is_file() and list((folder / "again" / "hf").glob("**/model.safetensors"))


WORDS = ("calm", "rough", "cold", "wide")
RUN = """
run_folder: run
model:
  tokenizer: {tokenizer}
  architecture: {{model_type: qwen2, architectures: [Qwen2ForCausalLM], vocab_size: 512, hidden_size: 32,
    intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2,
    max_position_embeddings: 128, tie_word_embeddings: true, dtype: float32}}
data:
  train: [{{path: dataset}}]
training: {{train_tokens: 2048, sequence_length: 64, global_batch_size: 4, precision: fp32}}
"""
