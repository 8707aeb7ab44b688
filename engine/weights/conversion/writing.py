"""Copy tensors into a folder that survives an interruption, under a progress bar, for all conversions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from ..block_copy import OutputFile, WrittenFile, copy_files
from ..finite import REMEDY, NotFinite
from ..partial_folder import DiscardOutput, PartialFolder
from ..tensor_source import TensorSource


@contextmanager
def progress(description: str, num_bytes: int) -> Iterator[Callable[[int], object]]:
    """Show a progress bar on a terminal; yield a function to call with the bytes of every block, from any thread."""
    lock = threading.Lock()
    with tqdm(desc=description, total=num_bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        yield advance


def write_tensors(
    partial: PartialFolder,
    files: Sequence[OutputFile],
    source: TensorSource,
    hashed_rows: Mapping[str, int],
    workers: int,
    allow_nonfinite: bool = False,
) -> dict[str, WrittenFile]:
    """Make ``files`` in ``partial``; files that an earlier run has made are read and verified instead.

    Returns:
        All of them, by name.

    Raises:
        UserError, OSError: see :func:`~retemper.engine.weights.block_copy.copy_files`.
    """
    num_bytes = sum(file.num_bytes for file in files)
    # Every byte is written, or read from an existing file, and then read back.
    with progress("converting", 2 * num_bytes) as advance:
        done: dict[str, WrittenFile] = {}
        for file in files:
            before = partial.verified(file.name, lambda count: advance(2 * count))
            # Another version of the library that distributes tensors may use the name for other tensors.
            if before is not None and before.tensors.keys() == file.tensors.keys():
                done[file.name] = before
        rest = [file for file in files if file.name not in done]
        remedy = None if allow_nonfinite else REMEDY
        try:
            done |= copy_files(partial.content, rest, source, workers, hashed_rows, advance, partial.record, remedy)
        except NotFinite as error:  # other weights are another source, and the option makes another output
            raise DiscardOutput(str(error)) from None
    return {file.name: done[file.name] for file in files}


def size_of(files: Iterable[WrittenFile]) -> str:
    """Return their total size, formatted."""
    return tqdm.format_sizeof(sum(file.record.bytes for file in files), "B")
