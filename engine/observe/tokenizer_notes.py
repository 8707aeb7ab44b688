"""Note differences between the datasets of a run and the texts of the model's tokenizer.

data/catalog.py refuses a dataset of another tokenizer. The notes here are about a model without a tokenizer, and about
documents that begin with a BOS although the model's texts do not, or the other way around.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..data.catalog import Catalog
from ..data.indexed_dataset import IndexedDataset
from ..data.sidecar import Sidecar
from ..tokenizer.frame import TokenizerFrame, describe_tokens, ids_of

_DOCUMENTS_SAMPLED = 16
"""Number of documents that are read from a dataset without a record of its BOS: a few milliseconds."""


@dataclass(frozen=True)
class _Dataset:
    prefix: str
    sidecar: Sidecar | None
    bos: str
    """The BOS with which its documents begin; may be empty."""


def tokenizer_notes(catalog: Catalog, frame: TokenizerFrame | None, has_tokenizer: bool) -> list[str]:
    """Return lines that begin with ``note:``.

    Args:
        catalog: the run's datasets.
        frame: tokens that the model's tokenizer puts around a text; None if unknown.
        has_tokenizer: whether the model has a tokenizer.
    """
    sources = [*catalog.train, *(source for named in catalog.validation.values() for source in named)]
    datasets = [
        _facts(dataset, frame) for dataset in {source.dataset.prefix: source.dataset for source in sources}.values()
    ]
    lines = [] if has_tokenizer else [_no_tokenizer(datasets)]
    return [f"note: {line}" for line in [*lines, *_bos_notes(datasets, frame)]]


def _no_tokenizer(datasets: Iterable[_Dataset]) -> str:
    made_with = {d.sidecar.tokenizer_sha256: d.sidecar.tokenizer for d in datasets if d.sidecar is not None}
    several = ""
    if len(made_with) > 1:
        several = f"; the datasets were made with different tokenizers: {', '.join(sorted(made_with.values()))}"
    return (
        "the model has no tokenizer, so it is not checked that the datasets hold its token ids; set "
        f"model.tokenizer to the folder of its tokenizer{several}"
    )


def _bos_notes(datasets: list[_Dataset], frame: TokenizerFrame | None) -> list[str]:
    with_bos, without = ([d for d in datasets if bool(d.bos) is has] for has in (True, False))
    if frame is not None and frame.prefix and without:
        others = f", while those of {_names(with_bos)} do" if with_bos else ""
        return [
            f"the model's tokenizer begins every text with {describe_tokens(frame.prefix)}, but the documents of "
            f"{_names(without)} do not{others}; preprocess them again with --bos auto, unless this is intended"
        ]
    if frame is not None and not frame.prefix and with_bos:
        others = f", and those of {_names(without)} do not" if without else ""
        return [
            f"the documents of {_names(with_bos)} begin with {with_bos[0].bos}, but the model's tokenizer does not "
            f"begin texts with it{others}; preprocess them again with --bos auto, unless this is intended"
        ]
    if with_bos and without:
        return [
            f"the documents of {_names(with_bos)} begin with {with_bos[0].bos}, and those of {_names(without)} do not; "
            "preprocess both with the same --bos, unless this is intended"
        ]
    return []


def _names(datasets: Iterable[_Dataset]) -> str:
    return ", ".join(dataset.prefix for dataset in datasets)


def _facts(dataset: IndexedDataset, frame: TokenizerFrame | None) -> _Dataset:
    sidecar = Sidecar.read(dataset.prefix)
    if sidecar is not None and sidecar.bos_ids is not None:
        ids = " ".join(map(str, sidecar.bos_ids))
        return _Dataset(dataset.prefix, sidecar, f"{sidecar.bos_token} ({ids})" if ids else "")
    expected = frame.prefix if frame is not None else ()
    begins = bool(expected) and _most_begin_with(dataset, ids_of(expected))
    return _Dataset(dataset.prefix, sidecar, describe_tokens(expected) if begins else "")


def _most_begin_with(dataset: IndexedDataset, ids: tuple[int, ...]) -> bool:
    """Return whether more than half of some evenly spread documents begin with ``ids``."""
    places = {dataset.next_boundary(i * dataset.num_tokens // _DOCUMENTS_SAMPLED) for i in range(_DOCUMENTS_SAMPLED)}
    starts = [place for place in places if place + len(ids) <= dataset.num_tokens]
    return 2 * sum(np.array_equal(dataset.tokens(start, start + len(ids)), ids) for start in starts) > len(starts)
