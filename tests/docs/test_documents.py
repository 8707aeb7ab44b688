"""What README, docs and the shipped configs say is so."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from retemper.engine.config.parser import parse_config
from retemper.engine.model.decoder import Decoder
from retemper.engine.model.implementations import parse_architecture
from retemper.engine.parallel.layout import plan_layout
from retemper.engine.schedule import learning_rate, plan_batches

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "megatron_configs").glob("*.yaml"))
README, STEPS, SHIPPED_PAGE = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/step_by_step.md", "docs/shipped_configurations.md")
)

# (ranks that the file's first lines speak of, parameters in billions as the models' cards give them)
SHIPPED = {
    "qwen2_72b": (32, 72.71),
    "qwen2.5_0.5b": (1, 0.494),
    "qwen2.5_7b": (8, 7.616),
    "qwen3_8b": (8, 8.191),
    "llama3_8b": (8, 8.030),
    "llama3.1_8b": (8, 8.030),
    "llama3.2_1b": (8, 1.236),
    "mistral_7b": (8, 7.248),
    "qwen2.5_1.5b": (8, 1.544),
    "qwen2.5_3b": (8, 3.086),
    "qwen2.5_14b": (8, 14.770),
    "qwen2.5_32b": (8, 32.764),
    "qwen2.5_72b": (32, 72.706),
    "olmo2_7b": (8, 7.299),
    "gemma3_4b": (8, 3.880),
    "phi4": (8, 14.660),
    "pythia_160m": (1, 0.1623),
    "qwen3_30b_a3b": (8, 30.532),
    "qwen2_57b_a14b": (16, 57.409),
    "mixtral_8x7b": (16, 46.703),
    "demo_base": (1, None),
    "demo": (2, None),
}


def test_every_shipped_config_is_listed_here_and_on_its_page():
    assert {path.stem for path in CONFIGS} == SHIPPED.keys()
    for path in CONFIGS:
        assert f"`{path.name}`" in SHIPPED_PAGE


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_is_valid_on_its_ranks(path):
    world_size, billions = SHIPPED[path.stem]
    config = parse_config(["--config", str(path)])
    layout = plan_layout(config.parallel, world_size)
    plan = plan_batches(config.training, layout.data_parallel)
    assert plan.num_micro_batches >= 1
    if config.model.architecture is None:
        return
    architecture = parse_architecture(config.model.architecture)
    with torch.device("meta"):
        model = Decoder(architecture)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == architecture.num_parameters
    assert any(architecture.sliding_windows) == (path.stem == "gemma3_4b")
    if billions is not None:
        assert count / 1e9 == pytest.approx(billions, rel=1e-3)


def test_the_reference_recipe():
    config = parse_config(["--config", str(ROOT / "megatron_configs" / "qwen2_72b.yaml")])
    training, optimizer = config.training, config.optimizer
    plan = plan_batches(training, plan_layout(config.parallel, 32).data_parallel)
    assert (plan.num_micro_batches, plan.steps_for(training.train_tokens)) == (1, 50)
    rates = [learning_rate(step * plan.tokens_per_step, training, optimizer) for step in range(1, 51)]
    assert rates[:5] == pytest.approx([1e-5, 2e-5, 3e-5, 4e-5, 5e-5])
    assert max(rates) == pytest.approx(5e-5) and rates[-1] == pytest.approx(5e-6)
    assert (training.precision, config.checkpoint.save_interval, optimizer.schedule) == ("bf16", 1000, "cosine")
    assert (optimizer.weight_decay, optimizer.beta1, optimizer.beta2, optimizer.clip_grad_norm) == (0.1, 0.9, 0.95, 1.0)


def test_the_configuration_of_the_most_important_keys_parses(tmp_path):
    [snippet] = re.findall(r"^```yaml\n(.*?)^```$", SHIPPED_PAGE, re.DOTALL | re.MULTILINE)
    path = tmp_path / "mine.yaml"
    path.write_text(snippet, encoding="utf-8")
    config = parse_config(["--config", str(path)])
    assert config.training.train_tokens == 1_638_400
    assert [source.weight for source in config.data.train] == [0.9, 0.1]


def test_the_commands_of_the_steps_exist_with_their_options(monkeypatch, capsys):
    text = STEPS.replace("\\\n", " ")
    commands = re.findall(r"(?:python|torchrun\b.*?)\s+((?:tools|engine|checkpoint_convert)/\w+\.py)(?=(.*))", text)
    scripts = {script for script, _ in commands}
    assert scripts >= {
        "tools/preprocess.py",
        "checkpoint_convert/hf_to_dcp.py",
        "engine/pretrain.py",
        "checkpoint_convert/dcp_to_hf.py",
        "tools/show_dataset.py",
        "tools/generate.py",
    }
    for script in sorted(scripts):
        # In this process, which has imported most of what they need. A program would also have its own folder on
        # sys.path, which tests/test_package.py looks at.
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), "--help"])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        shown = capsys.readouterr()
        assert exit_.value.code == 0, shown.err
        for option in {o for s, rest in commands if s == script for o in re.findall(r"--[\w.-]+", rest.split("`")[0])}:
            assert option in shown.out, f"{script} {option}"


def test_files_that_the_documents_name_exist():
    architecture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    existing = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    for document in (README, STEPS, architecture):
        for name in re.findall(r"\b[a-z_]+\.py\b", document):
            assert name in existing, name


def test_make_targets_that_the_documents_name_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z-]+)`?\b", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
