"""The identity of the base of an adapter: an exact hash of its weights, which the checkpoints of the adapter record.

The hash depends on names, shapes, dtypes and values of the tensors, and not on how they are divided into files.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import xxhash

from ..guards.background import run_in_background
from ..parallel.process_group import Ranks
from .block_copy import BLOCK_BYTES
from .raw_bytes import bytes_of
from .tensor_source import TensorSource, read_blocks
from .workers import default_workers


def content_hash(source: TensorSource, on_bytes: Callable[[int], object] = lambda count: None) -> str:
    """Return the xxh3_128, in hexadecimal, of names, shapes, dtypes and values of the tensors of ``source``.

    ``on_bytes`` is called with the number of bytes of every block, from any thread.
    """
    names = sorted(source.tensors)
    with ThreadPoolExecutor(default_workers()) as pool:
        digests = list(pool.map(lambda name: _hash_of(source, name, on_bytes), names))
    facts = [
        [name, list(source.tensors[name].shape), str(source.tensors[name].dtype), digest]
        for name, digest in zip(names, digests, strict=True)
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())


class BaseIdentity:
    """The folder and the hash of a base. The main rank computes the hash in a thread, while the run is built.

    Args:
        folder: of the base; empty if its weights are random.
        hash_base: returns the hash.
        ranks: all ranks.
    """

    def __init__(self, folder: str, hash_base: Callable[[], str], ranks: Ranks):
        self._folder, self._ranks = str(Path(folder).resolve()) if folder else "", ranks
        self._hash: Future[str] | None = None
        self._record: Mapping[str, str] | None = None
        if ranks.is_main:
            self._hash = Future()
            # A daemon, so that a run that is refused meanwhile does not wait for it.
            threading.Thread(target=_compute, args=(self._hash, hash_base), name="hash of base", daemon=True).start()

    def record(self) -> dict[str, str]:
        """Return ``{"folder": ..., "hash": ...}``. All ranks must call this; the first call waits for the hash.

        Raises:
            UserError: on all ranks, if the base cannot be read.
        """
        if self._record is None:
            found = run_in_background(self._ranks, None if self._hash is None else self._hash.result)
            self._record = {"folder": self._folder, "hash": self._ranks.broadcast(found)}
        return dict(self._record)


def _compute(result: Future[str], hash_base: Callable[[], str]) -> None:
    try:
        result.set_result(hash_base())
    except BaseException as error:
        result.set_exception(error)


def _hash_of(source: TensorSource, name: str, on_bytes: Callable[[int], object]) -> str:
    digest = xxhash.xxh3_128()
    for block in read_blocks(source, name, BLOCK_BYTES):
        data = bytes_of(block)
        digest.update(data)
        on_bytes(len(data))
    return digest.hexdigest()
