"""Decide an evaluation before any rank waits for another: check the request, and configure each model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ...engine.config.options import Settings
from ...engine.config.parser import add_arguments, build_config
from ...engine.config.settings import RunConfig
from ...engine.data.index_format import dataset_prefix
from ...engine.data.text_sources import is_text
from ...engine.errors import UserError
from ...engine.files.paths import is_url
from ...engine.parallel.layout import plan_layout
from ...engine.weights.checkpoint.assets import newest_of_run
from ...engine.weights.hugging_face.initial import INITIALIZE_FROM
from .harness import require_harness, require_tasks
from .model import default_sequence_length, longest_sequence
from .options import SETTINGS, EvaluateOptions

_OPTIONS_OF_SETTINGS = {
    "training.sequence_length": "--sequence-length",
    "training.micro_batch_size": "--batch-size",
}


@dataclass(frozen=True)
class EvaluationPlan:
    """An evaluation that is decided completely."""

    options: EvaluateOptions
    configs: dict[str, RunConfig]
    """By option, ``--model`` and ``--baseline``: one configuration for each model."""

    @property
    def config(self) -> RunConfig:
        """Of the model."""
        return self.configs["--model"]


def plan_evaluation(options: EvaluateOptions, words: Sequence[str], world_size: int) -> EvaluationPlan:
    """Check everything that needs no other rank.

    Args:
        options: the request.
        words: command line with settings of a run.
        world_size: number of ranks.

    Raises:
        UserError: the request is impossible.
    """
    options.check()
    if options.harness is not None:
        if world_size > 1:
            raise UserError(f"--lm-eval needs one process, and there are {world_size} ranks; start it without torchrun")
        require_harness()
    for entry in options.data:
        path = entry["path"]
        if not is_url(path) and not is_text(path) and not _is_dataset(path):
            raise UserError(f"--data {path}: no such file, folder or dataset")
    _require_known(words)
    configs: dict[str, RunConfig] = {}
    for option, model in (("--model", options.model), ("--baseline", options.baseline)):
        if model is not None:
            with named_options(option, options):
                configs[option] = _configure(options, words, model, world_size, configs.get("--model"))
    if options.harness is not None:
        require_tasks(options.harness)  # last: it takes seconds
    return EvaluationPlan(options, configs)


def _is_dataset(path: str) -> bool:
    return os.path.exists(f"{dataset_prefix(path)}.idx")


def _require_known(words: Sequence[str]) -> None:
    """Refuse settings that an evaluation would ignore."""
    for word in words:
        if not word.startswith("--"):
            continue
        key = word[2:].partition("=")[0]
        if not any(key == name or (name.endswith(".*") and key.startswith(name[:-1])) for name in SETTINGS):
            raise UserError(f"--{key}: unknown, or has no effect on an evaluation; see retemper evaluate --help-all")


def _configure(
    options: EvaluateOptions, words: Sequence[str], model: str, world_size: int, former: RunConfig | None
) -> RunConfig:
    """Return the configuration with which a model is opened; that of a baseline has the same sequence length."""
    settings = Settings()
    settings.tree = {
        "run_folder": "evaluation",  # never written
        "resume": "none",
        "model": {"initialize_from": newest_of_run(model) or model, "dropout": 0.0},  # nothing is trained
        "data": {"train": [dict(entry) for entry in options.data] or [{"path": "none"}]},
        "training": {
            "train_tokens": 1,
            "micro_batch_size": options.batch_size,
            "global_batch_size": options.batch_size,
        },
    }
    add_arguments(settings, words)
    settings.found.raise_if_any()
    drafted = build_config(settings)
    longest = longest_sequence(drafted)  # also refuses a model that does not exist
    if former is not None:
        length = former.training.sequence_length
    else:
        length = options.sequence_length or default_sequence_length(drafted, longest)
    options.stride_of(length)
    if options.mode == "sliding" and drafted.data.attend_across_documents:
        raise UserError(
            "--data.attend_across_documents true has no effect with --mode sliding, where each document is alone; "
            "remove it, or use --mode packed"
        )
    parallel = drafted.parallel
    if parallel.cpu_offload == "auto":
        raise UserError(
            "parallel.cpu_offload is auto, which predicts the memory of training; an evaluation needs less: set it to "
            "false, optimizer or true"
        )
    layout = plan_layout(parallel, world_size)
    count = parallel.pipeline * parallel.pipeline_stages_per_rank if parallel.pipeline > 1 else 1
    training = replace(
        drafted.training,
        sequence_length=length,
        global_batch_size=options.batch_size * layout.data_parallel * count,
    )
    return replace(drafted, training=training)


@contextmanager
def named_options(option: str, options: EvaluateOptions) -> Iterator[None]:
    """Name options of this command in errors instead of the settings of a run that they become."""
    try:
        yield
    except UserError as error:
        text = re.sub(
            r"data\.train\[(\d+)\]", lambda found: f"--data {options.data[int(found[1])]['path']}", str(error)
        )
        for setting, ours in ((INITIALIZE_FROM, option), *_OPTIONS_OF_SETTINGS.items()):
            text = text.replace(setting, ours)
        raise UserError(text) from None
