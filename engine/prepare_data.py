"""Make datasets from the text of a run, before anything else is opened."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from .config.settings import ModelConfig, RunConfig
from .data.text_sources import TextSource, cache_folder, text_sources, with_datasets
from .data.tokenizing import CachedDataset, TokenizingJob
from .errors import UserError
from .files.masking import without_url_secrets
from .guards.background import run_in_background
from .guards.stop_request import StopRequest
from .parallel.launcher import read_launcher
from .parallel.process_group import Ranks
from .weights.checkpoint.assets import newest_of_run


def prepare_data(config: RunConfig, ranks: Ranks, stop: StopRequest, say: Callable[..., None]) -> RunConfig:
    """Return ``config`` with datasets in place of text, tokenized by one process on each node.

    All ranks must call this.

    Raises:
        UserError: on every rank, if a text cannot be tokenized.
        StoppedBeforeTraining: on every rank, after a request to stop. Finished work stays in the cache.
    """
    texts = ranks.broadcast(ranks.run_on_rank0(lambda: text_sources(config.data)))
    if not texts:
        if config.data.cache_folder is not None:
            say("note: data.cache_folder has no effect: no source is text")
        return config
    datasets = {text.key: _tokenize(text, config, ranks, stop) for text in texts}
    for text in texts:
        path = without_url_secrets(text.path)
        for one in datasets[text.key].values():
            say(f"data        {path}: {one.documents:,} documents, {one.tokens:,} tokens in {one.prefix}")
    ranks.fail_together(lambda: _require_visible([one for made in datasets.values() for one in made.values()]))
    prefixes = {key: {side: one.prefix for side, one in made.items()} for key, made in datasets.items()}
    return replace(config, data=with_datasets(config.data, prefixes))


def _tokenize(text: TextSource, config: RunConfig, ranks: Ranks, stop: StopRequest) -> dict[str, CachedDataset]:
    """Return the datasets of ``text`` by side. With several nodes, each makes a part, and rank 0 joins them."""
    cache = cache_folder(config.data)
    job = ranks.fail_together(lambda: TokenizingJob(text, tokenizer_of(config.model, text.key), cache))
    nodes = [rank for rank, local in enumerate(ranks.all_gather(read_launcher().local_rank)) if local == 0]
    if len(nodes) > 1 and text.is_divisible:
        place = nodes.index(ranks.rank) if ranks.rank in nodes else None
        make_part = None if place is None else partial(job.run, f"{place}/{len(nodes)}")
        run_in_background(ranks, make_part, stop.agreed, job.stop)
        stop.exit_if_agreed()
    made = run_in_background(ranks, job.run if ranks.is_main else None, stop.agreed, job.stop)
    stop.exit_if_agreed()
    found: dict[str, CachedDataset] = ranks.broadcast(made)
    return found


def prepare_data_here(config: RunConfig) -> RunConfig:
    """Return ``config`` with datasets in place of text, tokenized by this process, which is not part of a run.

    Raises:
        UserError: a text cannot be tokenized.
    """
    cache, prefixes = cache_folder(config.data), {}
    for text in text_sources(config.data):
        made = TokenizingJob(text, tokenizer_of(config.model, text.key), cache).run()
        prefixes[text.key] = {side: one.prefix for side, one in made.items()}
    return replace(config, data=with_datasets(config.data, prefixes)) if prefixes else config


def tokenizer_of(model: ModelConfig, key: str) -> list[str]:
    """Return the options of tools/preprocess.py that name the tokenizer of ``model``.

    Args:
        model: of the run.
        key: setting of the text, for the error.

    Raises:
        UserError: the model has none.
    """
    if model.tokenizer is not None:
        return ["--tokenizer", model.tokenizer]
    if model.initialize_from is None:
        raise UserError(f"{key} is text, but no tokenizer is known; set model.tokenizer to its folder")
    return ["--model", newest_of_run(model.initialize_from) or model.initialize_from]


def _require_visible(datasets: list[CachedDataset]) -> None:
    for one in datasets:
        if not os.path.exists(f"{one.prefix}.idx"):
            raise UserError(
                f"{one.prefix}.idx was made by another node and does not exist here; set data.cache_folder to a folder "
                "on storage that all nodes share"
            )
