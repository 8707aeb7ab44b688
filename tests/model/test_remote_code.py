"""Models that bring their own code: it runs only if the user says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from converting import convert_there
from tiny_models import SHAPE, edit_json, read_folder
from transformers import LlamaConfig, LlamaForCausalLM

from retemper.engine.errors import UserError
from retemper.engine.model.generic.remote_code import register_remote_code
from retemper.engine.model.implementations import parse_architecture
from retemper.engine.weights.hugging_face.model import open_hf_model

ROOT = Path(__file__).parents[2]
CODE = """
import os
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path(os.environ["WITNESS"]).touch()

class {name}Config(LlamaConfig):
    model_type = "{name}"

class {name}ForCausalLM(LlamaForCausalLM):
    config_class = {name}Config
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A folder of a type of its own, whose code creates a file when it runs."""
    name = "own" + "".join(filter(str.isalnum, request.node.name)).lower()[-20:]
    folder = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": 160})).save_pretrained(folder)
    classes = {"AutoConfig": f"code.{name}Config", "AutoModelForCausalLM": f"code.{name}ForCausalLM"}
    edit_json(folder / "config.json", lambda config: config.update(model_type=name, auto_map=classes))
    (folder / "code.py").write_text(CODE.replace("{name}", name))
    monkeypatch.setenv("WITNESS", str(tmp_path / "ran"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def test_without_the_setting_no_code_runs(with_code: Path, tmp_path: Path) -> None:
    for open_ in (open_hf_model, lambda folder: convert_there(folder, tmp_path / "checkpoint")):
        with pytest.raises(
            UserError, match=r"own code \(auto_map\), which runs only with model\.trust_remote_code: true"
        ):
            open_(with_code)
    assert not (tmp_path / "ran").exists()


def test_with_the_setting_it_is_a_type_like_others(with_code: Path, tmp_path: Path) -> None:
    config = json.loads((with_code / "config.json").read_text())
    register_remote_code(config, with_code)
    assert (tmp_path / "ran").exists()
    architecture = parse_architecture(config)
    assert (architecture.implementation, architecture.model_type) == ("transformers", config["model_type"])
    assert len(open_hf_model(with_code).parameters.tensors) == len(read_folder(with_code))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "code.py").unlink(), "code of the model cannot be used"),
        (lambda folder: (folder / "code.py").write_text("1 / 0"), "ZeroDivisionError"),
        (
            lambda folder: edit_json(folder / "config.json", lambda config: config["auto_map"].pop("AutoConfig")),
            "AutoConfig",
        ),
    ],
)
def test_code_that_does_not_work_takes_one_line(with_code: Path, change, said: str) -> None:
    change(with_code)
    with pytest.raises(UserError, match=said) as refusal:
        register_remote_code(json.loads((with_code / "config.json").read_text()), with_code)
    assert "\n" not in str(refusal.value)


def test_code_of_types_that_transformers_knows_does_not_run(with_code: Path, tmp_path: Path) -> None:
    edit_json(with_code / "config.json", lambda config: config.update(model_type="llama"))
    register_remote_code(json.loads((with_code / "config.json").read_text()), with_code)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_run_and_its_checkpoints_keep_the_code(with_code: Path, run_file: Path, tmp_path: Path) -> None:
    """In other processes, in which nothing is registered."""
    config = yaml.safe_load(run_file.read_text())
    config["model"] = {"initialize_from": str(with_code), "trust_remote_code": True}
    config["run_folder"] = str(tmp_path / "run")
    config["training"]["train_tokens"] = 4 * 8 * 32
    config["checkpoint"]["export_hf"] = True
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, ROOT / "engine" / "pretrain.py", "--config", tmp_path / "run.yaml"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    export, checkpoint = tmp_path / "run/hf/step-00000004", tmp_path / "run/checkpoints/step-00000004"
    for folder in (export, checkpoint / "hf"):
        assert (folder / "code.py").read_bytes() == (with_code / "code.py").read_bytes()
    back = [sys.executable, ROOT / "checkpoint_convert/dcp_to_hf.py", "--checkpoint", checkpoint, "--output"]
    refused = subprocess.run([*back, tmp_path / "back"], check=False, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 1 and "trust_remote_code" in refused.stderr and len(refused.stderr.splitlines()) == 1
    subprocess.run([*back, tmp_path / "back", "--trust-remote-code"], check=True, capture_output=True, timeout=300)
    assert read_folder(tmp_path / "back") == read_folder(export)
