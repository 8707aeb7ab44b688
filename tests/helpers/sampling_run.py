"""A tiny run on text, with a tokenizer, that continues prompts; and what the ranks of it are asked to do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tiny_run
import yaml
from oracles.tiny_tokenizer import WORDS, train_tiny_tokenizer
from tokenizers import Tokenizer

from retemper.engine import pretrain
from retemper.engine.parallel.process_group import Ranks
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter

VOCAB_SIZE = 400
PROMPTS = ["the cat sat on", "rain fell over the old", "nobody"]
TOKENS = 12
SAMPLING = ["--logging.sample_prompts", json.dumps(PROMPTS), "--logging.sample_tokens", str(TOKENS)]


def cycle(start: int, words: int = 30) -> str:
    """Text in which each word tells the next one, so that a tiny model learns to continue it."""
    return " ".join(WORDS[(start + place) % len(WORDS)] for place in range(words))


def write_run(folder: Path) -> Path:
    """The run's YAML file, with a tokenizer, training and validation text in ``folder``."""
    tokenizer_folder = train_tiny_tokenizer(folder / "tokenizer")
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    for name, seeds in (("text.train", range(150)), ("text.validation", range(1000, 1020))):
        with IndexedDatasetWriter(str(folder / name), np.uint16) as writer:
            for seed in seeds:
                ids = tokenizer.encode(cycle(seed), add_special_tokens=False).ids
                writer.add_document(np.array([*ids, end]))
    base = yaml.safe_load(tiny_run.write_config(folder).read_text())
    base["model"] = {
        "architecture": {**tiny_run.ARCHITECTURE, "vocab_size": VOCAB_SIZE, "num_hidden_layers": 4},
        "tokenizer": str(tokenizer_folder),
    }
    base["data"] = {
        "train": [{"path": str(folder / "text.train")}],
        "validation": {"text": str(folder / "text.validation")},
    }
    base["training"] |= {"eval_at_start": True, "micro_batch_size": 2, "eval_interval": 10}
    base["checkpoint"]["save_interval"] = 10
    path = folder / "text.yaml"
    path.write_text(yaml.safe_dump(base), encoding="utf-8")
    return path


def samples(run_folder: Path) -> dict[int, dict[str, str]]:
    """Step -> prompt -> text of ``samples.jsonl``."""
    found: dict[int, dict[str, str]] = {}
    for line in (run_folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found.setdefault(record["step"], {})[record["prompt"]] = record["text"]
    return found


def train_and_stop(ranks: Ranks, path: Path, overrides: list[str]) -> int:
    """The run, asked to stop while it samples for the second time; its steps."""
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
    calls, chosen = [], run.samples._batches

    def asked(*arguments):
        calls.append(run.progress.step)
        if calls.count(10) == 3:
            run.stop.request()
        return chosen(*arguments)

    run.samples._batches = asked
    pretrain.train(run)
    return run.progress.step
