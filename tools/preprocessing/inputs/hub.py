"""Datasets of the Hugging Face Hub as inputs: ``hf://namespace/name``, with ``--hf-subset`` and ``--hf-split``.

The library datasets finds the files of a subset and split, by the dataset's card or by the names of its files. They are
then read like other remote files. ``hf://namespace/name/folder/*.parquet`` names files without it. All addresses are
those of huggingface_hub's file system, except that ``datasets/`` may be left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import unquote

from ....engine.errors import UserError, install_command
from ..storage import errors_of

_DATASET = re.compile(
    r"hf://(?:datasets/)?(?!(?:models|spaces|buckets|kernels)/)(?P<name>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DEFAULT_SPLIT = "train"


class HubDataset(NamedTuple):
    """What a URL names."""

    name: str
    """``namespace/name``."""
    revision: str | None
    """A commit, branch or tag; None: the default branch."""
    path: str
    """Of files in it; empty: the dataset."""

    @property
    def url(self) -> str:
        """The URL for huggingface_hub's file system."""
        revision = f"@{self.revision.replace('/', '%2F')}" if self.revision else ""
        return f"hf://datasets/{self.name}{revision}" + (f"/{self.path}" if self.path else "")


def parse_hub_dataset(url: str) -> HubDataset | None:
    """Return the dataset that ``url`` names; None if it is not one of the Hub."""
    found = _DATASET.fullmatch(url)
    if found is None:
        return None
    revision = unquote(found["revision"]) if found["revision"] else None
    return HubDataset(found["name"], revision, (found["path"] or "").strip("/"))


def pin_revisions(arguments: Sequence[str]) -> list[str]:
    """Return ``arguments`` with the commit in every dataset of the Hub, so that all reads see the same files.

    Raises:
        UserError: a dataset or revision does not exist, or the Hub cannot be reached.
    """
    return [_pinned(argument) for argument in arguments]


def _pinned(url: str) -> str:
    dataset = parse_hub_dataset(url)
    if dataset is None:
        return url
    if dataset.revision and _COMMIT.fullmatch(dataset.revision):
        return dataset.url
    from huggingface_hub import HfApi

    with errors_of(url):
        return dataset._replace(revision=HfApi().dataset_info(dataset.name, revision=dataset.revision).sha).url


def files_of_split(dataset: HubDataset, name: str, subset: str | None, split: str | None) -> list[str]:
    """Return the URLs of the files of a split, in the order in which the library datasets reads them.

    Args:
        dataset: with a commit as its revision.
        name: the option with its value, for messages.
        subset: None: the default one.
        split: None: the only one, or "train".

    Raises:
        UserError: there is no such subset or split, or the dataset has no files that can be read.
    """
    try:
        from datasets import load_dataset_builder
    except ImportError:
        raise UserError(
            f"{name}: finding the files of a split needs datasets: {install_command('datasets')}; or name the files, "
            f"as in {dataset.url}/data/*.parquet"
        ) from None
    with errors_of(dataset.url):
        try:
            builder = load_dataset_builder(f"hf://datasets/{dataset.name}", subset, revision=dataset.revision)
        except ValueError as error:
            if "onfig" not in str(error):
                raise
            raise UserError(f"{name}: {' '.join(str(error).split())}; choose one with --hf-subset") from error
        except RuntimeError as error:
            raise UserError(
                f"{name}: {error}; the Hub may have converted it: hf://{dataset.name}@refs/convert/parquet"
            ) from error
    splits = {str(each): [str(file) for file in files] for each, files in (builder.config.data_files or {}).items()}
    chosen = split or (next(iter(splits), "") if len(splits) == 1 else _DEFAULT_SPLIT)
    if chosen not in splits:
        there = ", ".join(splits) or "none"
        raise UserError(f"{name}: no split {chosen!r} (splits there: {there}); choose one with --hf-split")
    return splits[chosen]
