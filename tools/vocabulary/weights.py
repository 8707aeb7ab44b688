"""Add rows for new tokens to embedding and head, from a Hugging Face folder or a checkpoint to one of the same kind.

The row of a new token is the mean of the rows of its old tokens. Additional rows, which only fill the vocabulary up to
a round number, are the mean of all tokens' rows. By Jensen's inequality such a row gets no more of the softmax than the
average token (Hewitt, 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ...engine.errors import UserError
from ...engine.model.config_file import CONFIG_FILE
from ...engine.weights.block_copy import WrittenFile, copy_files
from ...engine.weights.checkpoint.manifest import MANIFEST_FILE
from ...engine.weights.conversion.checkpoint_files import CheckpointPlan
from ...engine.weights.conversion.stored_model import StoredModel, open_checkpoint, open_hf
from ...engine.weights.conversion.vocabulary import mean_row
from ...engine.weights.conversion.writing import progress
from ...engine.weights.hugging_face.hub_download import find_model_folder
from ...engine.weights.hugging_face.shards import ShardPlan
from ...engine.weights.tensor_source import ReadRows, StoredTensor, TensorSource
from ...engine.weights.workers import default_workers
from .vocabulary import NewToken

_LARGEST_MULTIPLE = 128


def open_model(name: str) -> StoredModel:
    """Open and verify a checkpoint by its folder, or open a Hugging Face model by folder or Hub name.

    Raises:
        UserError: it is neither, or not complete.
    """
    if (Path(name) / MANIFEST_FILE).is_file():
        model = open_checkpoint(Path(name))
        model.verify(default_workers())
        return model
    if Path(name).is_dir() and not (Path(name) / CONFIG_FILE).is_file():
        raise UserError(
            f"--model {name}: holds neither {CONFIG_FILE} nor {MANIFEST_FILE}; name a model or a checkpoint"
        )
    return open_hf(name, find_model_folder(name, "--model"))


def require_known_tables(model: StoredModel, name: str) -> None:
    """Refuse a model with another tensor than embedding and head that has a row for each token.

    Raises:
        UserError: names the tensor.
    """
    rows, tables = model.architecture.vocab_size, model.architecture.tables
    for tensor, stored in model.parameters.tensors.items():
        if stored.shape[:1] == (rows,) and tensor not in tables:
            raise UserError(
                f"--model {name}: {tensor} also has a row for each of the {rows:,} tokens, and only "
                f"{' and '.join(tables)} can get new ones; train this {model.architecture.model_type} model with "
                "its own vocabulary"
            )


def choose_rows(rows: int, first_id: int, num_tokens: int, multiple_of: int | None) -> tuple[int, str]:
    """Return the number of rows of the new embedding, and a line with the reason.

    Args:
        rows: of the old one.
        first_id: of the first new token.
        num_tokens: number of new tokens.
        multiple_of: the number of rows becomes a multiple of it; None: the largest power of two up to 128 that divides
            the old number.
    """
    needed = first_id + num_tokens
    fitting = multiple_of or max(2**power for power in range(8) if rows % 2**power == 0)
    assert multiple_of or fitting <= _LARGEST_MULTIPLE
    reason = "--pad-vocab-to-multiple-of" if multiple_of else f"like the old {rows:,}"
    wanted = -(-max(rows, needed) // fitting) * fitting
    if wanted == rows:
        return rows, f"{rows:,} rows, unchanged: ids from {first_id:,} already had rows without tokens"
    spare = f" (the first {rows - first_id:,} use rows that had no token)" if first_id < rows else ""
    return wanted, (
        f"{rows:,} rows become {wanted:,}, a multiple of {fitting} ({reason}): {num_tokens:,} new tokens{spare}, "
        f"{wanted - needed:,} rows of padding"
    )


class ExtendedVocabulary:
    """A source whose embedding and head have rows for new tokens (a ``TensorSource``).

    Args:
        source: of the old model.
        tables: names of its tensors with one row for each token.
        vocab_size: new number of rows.
        num_used: exclusive upper bound of the old tokens' ids.
        tokens: new ones, with consecutive ids from ``num_used`` on.
    """

    def __init__(
        self, source: TensorSource, tables: Sequence[str], vocab_size: int, num_used: int, tokens: Sequence[NewToken]
    ):
        self._source, self._num_used, self._tokens = source, num_used, tokens
        assert [token.id for token in tokens] == list(range(num_used, num_used + len(tokens)))
        self._extended = tables
        self.hashed_rows = dict.fromkeys(self._extended, num_used)
        """For each extended tensor: how many rows come from the source."""
        self.tensors: Mapping[str, StoredTensor] = {
            name: StoredTensor((vocab_size, *tensor.shape[1:]), tensor.dtype) if name in self._extended else tensor
            for name, tensor in source.tensors.items()
        }

    @contextmanager
    def rows(self, name: str) -> Iterator[ReadRows]:
        """Read rows, see :class:`~retemper.engine.weights.tensor_source.TensorSource`."""
        with self._source.rows(name) as read:
            if name not in self._extended:
                yield read
                return
            stored = self._source.tensors[name]
            mean = mean_row(read, stored, self._num_used)
            new = self._new_rows(read, stored, mean)
            num_stored, first_new, stop_new = stored.shape[0], self._num_used, self._num_used + len(new)

            def read_extended(first: int, rows: Tensor) -> None:
                stop = first + rows.shape[0]
                if first < num_stored:
                    read(first, rows[: num_stored - first])
                start, end = max(first, first_new), min(stop, stop_new)
                if start < end:
                    rows[start - first : end - first] = new[start - first_new : end - first_new]
                start = max(first, num_stored, stop_new)
                if start < stop:
                    rows[start - first :] = mean

            yield read_extended

    def _new_rows(self, read: ReadRows, stored: StoredTensor, mean: Tensor) -> Tensor:
        """Return the rows of the new tokens in the stored dtype; ``mean`` for a token without parts."""

        @functools.cache
        def row(token: int) -> Tensor:
            values = torch.empty((1, *stored.shape[1:]), dtype=stored.dtype)
            read(token, values)
            return values[0].float()

        new = torch.empty((len(self._tokens), *stored.shape[1:]), dtype=stored.dtype)
        for place, token in enumerate(self._tokens):
            new[place] = torch.stack([row(part) for part in token.subtokens]).mean(0) if token.subtokens else mean
        return new


def write_weights(
    folder: Path, as_checkpoint: bool, source: ExtendedVocabulary, max_shard_size: int
) -> dict[str, WrittenFile]:
    """Write the tensors of a Hugging Face model, or of a checkpoint without its manifest, into ``folder``.

    Returns:
        The files, by name.

    Raises:
        OSError: it cannot be written.
        UserError: the disk returns other bytes than were written.
    """
    shards, files = ShardPlan(source.tensors, max_shard_size), CheckpointPlan(source.tensors)
    plan = files if as_checkpoint else shards
    num_bytes = sum(tensor.num_bytes for tensor in source.tensors.values())
    # Everything is written and read back.
    with progress("writing", 2 * num_bytes) as advance:
        rows, remedy = source.hashed_rows, "new rows are means of the old ones; repair the model first"
        done = copy_files(folder, plan.files, source, default_workers(), rows, advance, nonfinite_remedy=remedy)
    if as_checkpoint:
        files.write_table(folder, done.values())
    else:
        shards.write_index(folder)
    return done
