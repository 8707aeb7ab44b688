"""docs/continued_pretraining.md runs as it stands: every command in order, with a ten-millionth of the tokens."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
import yaml

from retemper.engine import pretrain
from retemper.engine.schedule import learning_rate
from retemper.tools import checkpoint
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter

GUIDE = (Path(__file__).parents[2] / "docs" / "continued_pretraining.md").read_text(encoding="utf-8")
SMALL = {
    "training.micro_batch_size": "2",
    "training.precision": "fp32",
    "training.eval_tokens": "500",
    "checkpoint.save_interval": "2",
    "logging.tensorboard": "false",
}
SMALL_OPTIONS = [word for key, value in SMALL.items() for word in (f"--{key}", value)]


@pytest.fixture(scope="module")
def folder(one_rank, tmp_path_factory):
    """The data and the base model that the recipes speak of."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "data").mkdir()
    for seed, name in enumerate(("web", "web_validation", "medicine", "medicine_validation")):
        tiny_run.write_dataset(folder / "data" / name, seed, documents=400)
    for seed, name in enumerate(("chats.train", "chats.valid"), 4):
        write_chats(folder / "data" / name, seed)
    base = tiny_run.write_config(tmp_path_factory.mktemp("base"))
    tiny_run.train(one_rank, base, ["--run_folder", str(folder / "run"), "--training.train_tokens", "1024"])
    (folder / "models").mkdir()
    (folder / "run" / "checkpoints" / "step-00000004").rename(folder / "models" / "base")
    return folder


def write_chats(prefix, seed):
    """A dataset whose documents have a question, which is masked, and an answer."""
    generator = np.random.default_rng(seed)
    with IndexedDatasetWriter(str(prefix), np.uint16, mask=True) as writer:
        for _ in range(400):
            length = int(generator.integers(8, 30))
            writer.add_documents(
                generator.integers(0, tiny_run.EOD, length), [length], mask=np.arange(length) >= length // 2
            )


def scaled(text):
    """``text`` with a ten-millionth of the tokens, and samples that are 128 times shorter. The decay of 200 tokens then
    begins in step 8, so that step 6 is before it."""
    for step, small in ((8000, 6), (9000, 2), (9250, 4), (9500, 6), (9537, 8)):
        text = text.replace(f"step-{step:08d}", f"step-{small:08d}")
    smaller = re.sub(r"(_tokens:? )([\d_]+)", lambda m: f"{m[1]}{int(m[2].replace('_', '')) // 10_000_000}", text)
    smaller = re.sub(r"(sequence_length:? )(\d+)", lambda m: f"{m[1]}{int(m[2]) // 128}", smaller)
    return re.sub(r"(global_batch_size:? )(\d+)", lambda m: f"{m[1]}{int(m[2]) // 64}", smaller)


def run(command, one_rank):
    """What a shell would do, but for a training run, which is made in this process."""
    expanded = subprocess.run(["bash", "-c", f"set -- {command}; printf '%s\\n' \"$@\""], stdout=-1, check=True).stdout
    words = expanded.decode().splitlines()
    if words[:2] == ["python", "tools/checkpoint.py"]:
        assert checkpoint.main(words[2:]) == 0
        return None
    if words[:2] != ["python", "engine/pretrain.py"]:
        subprocess.run(["bash", "-c", command], check=True)
        return None
    assert words[2] == "--config"
    given = {key.removeprefix("--") for key in words[4::2]}
    options = [word for key, value in SMALL.items() if key not in given for word in (f"--{key}", value)]
    made = pretrain.build(tiny_run.configure(Path(words[3]), *words[4:], *options), one_rank)
    pretrain.train(made)
    return made


@pytest.mark.slow
def test_every_recipe_runs_as_written(one_rank, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    trainers = []
    for language, content in re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE):
        if language == "yaml":
            name = re.match(r"# (\S+)\n", content)[1]
            Path(name).write_text(scaled(content))
            assert yaml.safe_load(content)["run_folder"] == f"runs/{name.removesuffix('.yaml')}"
            continue
        trainers += [run(command, one_rank) for command in scaled(content).replace("\\\n", " ").splitlines()]
    general, rewarmed, plateau, longer, _, medicine, annealed, lengthened, *others = trainers
    constant, _, decay, adapted, _, instructions = others
    said = capsys.readouterr().out

    # 1: the second schedule begins at the minimum of the first; a run extended before its decay is the longer run.
    assert Path(rewarmed.start.folder).name == f"step-{general.progress.step:08d}"
    assert "changed     training.train_tokens 2,000 -> 4,000" in said
    at_the_seam = learning_rate(2_000, rewarmed.config.training, rewarmed.config.optimizer)
    ended_at = learning_rate(2_000, general.config.training, general.config.optimizer)
    assert (at_the_seam, ended_at) == pytest.approx((3e-5, 3e-5))
    whole = [*SMALL_OPTIONS, "--run_folder", "runs/whole", "--training.train_tokens", "3000"]
    whole += ["--optimizer.schedule", "wsd", "--optimizer.decay_tokens", "200"]
    tiny_run.train(one_rank, Path("general.yaml"), whole)
    first = int(Path(longer.start.folder).name.removeprefix("step-"))
    after = [record for record in tiny_run.curve(Path("runs/whole")) if record[0] > first]
    assert after and tiny_run.curve(Path("runs/longer")) == after
    assert plateau.progress.tokens >= 2_000

    # 2: a fresh optimizer and clock, the weights of the other run.
    assert medicine.start.resumed_from is None and medicine.progress.step == -(-500 // (4 * 32))
    stored = json.loads(
        Path("runs/medicine/checkpoints", f"step-{medicine.progress.step:08d}", "manifest.json").read_text()
    )
    assert stored["consumed_tokens"] == medicine.progress.tokens and set(stored["datasets"]) == {"medicine", "web"}

    # 3: one clock over both stages, and over both lengths.
    assert annealed.order.cursors(annealed.progress.samples)["medicine"] > 0
    assert lengthened.plan.sequence_length == 128 and Path(lengthened.start.folder).parent == annealed.store.folder
    assert lengthened.progress.tokens >= 2_400

    # 4: the average of the checkpoints of the constant run, which the decay continues.
    kept = [tiny_run.tensors_of(folder) for folder in constant.store.complete()]
    average = tiny_run.tensors_of(Path("runs/average"))
    name = "model.norm.weight"
    torch.testing.assert_close(average[name], sum(tensors[name] for tensors in kept) / len(kept))
    assert len(kept) == 4 and Path(decay.start.folder) == constant.store.complete()[-1]
    assert learning_rate(decay.progress.tokens, decay.config.training, decay.config.optimizer) == 0
    assert Path("runs/constant/final_model/model.safetensors").is_file()

    # 5: the base as it was.
    base = tiny_run.tensors_of(Path("models/base"))
    assert adapted.progress.tokens >= 500
    for name, parameter in adapted.model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or "norm" in name)
        assert parameter.requires_grad or torch.equal(parameter, base[name])

    # 6: weights of the last domain, and three sets, of which the first counts answers alone.
    assert Path(instructions.start.folder).parent == medicine.store.folder
    first = [r for r in tiny_run.records(Path("runs/instructions")) if r.get("evaluation") and r["step"] == 0]
    assert [record["evaluation"] for record in first] == ["chats", "medicine", "web"]
    assert instructions.data.sources[0].dataset.has_loss_mask
