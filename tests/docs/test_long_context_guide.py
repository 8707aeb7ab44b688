"""The configuration and the commands of docs/long_context.md run, with fewer and shorter samples of a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import yaml
from evaluating import FP32, evaluate, request

from retemper.tools.evaluate_model import build_parser
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter

GUIDE = (Path(__file__).parents[2] / "docs" / "long_context.md").read_text(encoding="utf-8")
SMALL = ("--training.precision", "fp32", "--training.eval_tokens", "500", "--logging.tensorboard", "false")
LONGER = "--training.sequence_length 131_072"


def scaled(text: str, folder: Path) -> str:
    """``text`` for two ranks, with samples that are 512 times shorter, and a two-millionth of the tokens."""

    def shorter(match: re.Match[str]) -> str:
        return f"{match[1]}{int(match[2].replace('_', '')) // 512}"

    text = re.sub(r"((?:sequence.length|stride):? )([\d_]+)", shorter, text)
    text = re.sub(r"(train_tokens: )([\d_]+)", lambda m: f"{m[1]}{int(m[2].replace('_', '')) // 2_000_000}", text)
    text = re.sub(r"(global_batch_size:? )(\d+)", lambda m: f"{m[1]}{int(m[2]) // 8}", text)
    # More ranks than heads divide among use ring attention; with two of them it is named.
    text = text.replace("parallel.context 8", "parallel.context 2 --parallel.context_kind ring")
    text = text.replace("eval_interval: 200", "eval_interval: 2").replace("Qwen/Qwen2.5-7B", "models/base")
    return re.sub(r"\b(models|data|runs)/", rf"{folder}/\1/", text.replace("long_32k.yaml", f"{folder}/long_32k.yaml"))


def write_documents(prefix: Path, seed: int, lengths: range) -> None:
    generator = np.random.default_rng(seed)
    with IndexedDatasetWriter(str(prefix), np.uint16) as writer:
        for _ in range(20 if prefix.name.endswith("validation") else 200):
            length = int(generator.integers(lengths.start, lengths.stop))
            writer.add_document(np.append(generator.integers(0, tiny_run.EOD, length), tiny_run.EOD))


@pytest.fixture
def folder(one_rank, tmp_path):
    """The data and the base model that the page speaks of."""
    (tmp_path / "data").mkdir()
    for seed, name in enumerate(("long", "long_validation", "short", "short_validation")):
        write_documents(tmp_path / "data" / name, seed, range(32, 200) if "long" in name else range(1, 32))
    base = tmp_path / "base"
    base.mkdir()
    tiny_run.train(one_rank, tiny_run.write_config(base), ["--training.train_tokens", "1024"])
    (tmp_path / "models").mkdir()
    (base / "run" / "checkpoints" / "step-00000004").rename(tmp_path / "models" / "base")
    return tmp_path


@pytest.mark.slow
def test_both_runs_and_the_evaluations(two_ranks, folder):
    [content] = re.findall(r"^```yaml\n# long_32k.yaml\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    (folder / "long_32k.yaml").write_text(scaled(content, folder))
    shell = "\n".join(re.findall(r"^```bash\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    first, second = [shlex.split(scaled(line, folder)) for line in shell.splitlines() if "pretrain.py" in line]
    for command in (first, second):
        assert command[3:5] == ["engine/pretrain.py", "--config"]
    two_ranks.run(tiny_run.train, Path(first[5]), [*first[6:], *SMALL])

    # The tiny model has 128 positions: longer samples need the change that the page names.
    [rope] = re.findall(r"`model\.rope: (\{kind: default.*?\})`", GUIDE)
    changes = [word for key, value in yaml.safe_load(rope).items() for word in (f"--model.rope.{key}", str(value))]
    two_ranks.run(tiny_run.train, Path(second[5]), [*second[6:], *SMALL, *changes])
    for name, length, positions, theta in (("long_32k", 64, 128, 1e4), ("long_128k", 256, 8 * 128, 8e6)):
        records = tiny_run.records(folder / "runs" / name)
        assert records[-1]["tokens"] >= 2_000 and all(np.isfinite(record["loss"]) for record in records)
        assert {record["evaluation"] for record in records if "evaluation" in record} == {"long", "short"}
        config = json.loads((folder / "runs" / name / "final_model" / "config.json").read_text())
        assert (config["max_position_embeddings"], config["rope_theta"]) == (positions, theta)
        settings = yaml.safe_load((folder / "runs" / name / "config.yaml").read_text())
        assert settings["training"]["sequence_length"] == length
        assert settings["training"]["global_batch_size"] * length == 256

    losses = []
    for line in shell.splitlines():
        if "evaluate_model.py" not in line:
            continue
        given, words = build_parser().parse_known_args(shlex.split(scaled(line, folder))[4:])
        lengths = {"sequence_length": given.sequence_length, "stride": given.stride}
        asked = request(given.model, *given.data, mode=given.mode, **lengths)
        [score] = two_ranks.run(evaluate, asked, [*FP32, *words])[0].model.sets
        losses.append((given.sequence_length, score.loss, score.targets))
    assert [length for length, _, _ in losses] == [256, 8] and losses[0][1] != losses[1][1]
    assert losses[0][2] == losses[1][2] > 0
