"""The common part of all conversions: write an output, prove it and record it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..block_copy import OutputFile, WrittenFile
from ..checkpoint.assets import ASSET_FOLDER, HfAssets
from ..hugging_face.shards import ShardPlan
from ..partial_folder import partial_folder
from ..tensor_source import StoredTensor, TensorSource
from .checkpoint_files import CheckpointPlan, write_converted_manifest
from .logits import describe_logits
from .provenance import ConversionRecord, require_same_source
from .stored_model import StoredModel
from .writing import size_of, write_tensors

Written = Mapping[str, WrittenFile]


@dataclass(frozen=True)
class Target:
    """The output of a conversion in one format."""

    files: Sequence[OutputFile]
    """Files with tensors."""
    complete: Callable[[Path, Written], None]
    """Writes all other files, except the record of the conversion."""
    finish: Callable[[Path, Written], None] = lambda folder, done: None
    """Writes what comes after the record."""


def hf_target(tensors: Mapping[str, StoredTensor], max_shard_size: int, assets: HfAssets) -> Target:
    """Return the plan of a Hugging Face folder."""
    plan = ShardPlan(tensors, max_shard_size)

    def complete(folder: Path, done: Written) -> None:
        plan.write_index(folder)
        assets.of_model().write(folder)

    return Target(plan.files, complete)


def checkpoint_target(tensors: Mapping[str, StoredTensor], assets: HfAssets) -> Target:
    """Return the plan of a checkpoint."""
    plan = CheckpointPlan(tensors)

    def complete(folder: Path, done: Written) -> None:
        plan.write_table(folder, done.values())
        assets.write(folder / ASSET_FOLDER)

    return Target(plan.files, complete, lambda folder, done: write_converted_manifest(folder, done.values()))


@dataclass(frozen=True)
class Conversion:
    """A planned conversion, before anything is written."""

    model: StoredModel
    source: TensorSource
    """The tensors to write: the model's parameters with the requested rows, or in the output's terms."""
    tensors: Mapping[str, StoredTensor]
    """The same as written."""
    target: Target
    record: ConversionRecord
    stored: Mapping[str, StoredTensor]
    """Every tensor of the source, for the record."""
    hashed_rows: Mapping[str, int] = field(default_factory=dict)
    """For tensors with another number of rows: how many come from the source."""
    casts: Sequence[str] = ()
    """Lines about casts."""
    notes: Sequence[str] = ()
    """Lines about the output."""

    def write(
        self,
        output: Path,
        workers: int,
        allow_nonfinite: bool,
        say: Callable[[str], None],
        compare: Callable[[Path], dict[str, Any]] | None = None,
        ending: str = "",
    ) -> None:
        """Write ``output``.

        Args:
            output: it must not exist.
            workers: threads that copy tensors.
            allow_nonfinite: copy weights that are NaN or infinite instead of refusing them.
            say: receives the lines about the source, casts and written files.
            compare: compares logits, given the complete folder.
            ending: of the last line.

        Raises:
            UserError: the source is damaged, or ``output`` exists or cannot be written. No files are left, except
                finished ones after an interruption or on a full disk: see :func:`partial_folder`.
        """
        for line in [*self.model.notes, *self.casts, *self.notes]:
            say(line)
        if allow_nonfinite:  # files copied with this option are not reused without it
            self.record.options["allow_nonfinite"] = True
        self.model.verify(workers)
        with partial_folder(output, self.record.identity, say) as partial:
            rows = self.hashed_rows
            done = write_tensors(partial, self.target.files, self.source, rows, workers, allow_nonfinite)
            self.complete(partial.content, done, say, compare)
        say(f"wrote {output}: {len(self.tensors)} tensors, {size_of(done.values())}{ending}")

    def complete(
        self,
        folder: Path,
        done: Written,
        say: Callable[[str], None],
        compare: Callable[[Path], dict[str, Any]] | None = None,
    ) -> None:
        """Write all files except those with tensors, which are ``done``.

        Raises:
            DiscardOutput: the source was changed meanwhile, or logits differ.
        """
        require_same_source(self.model.folder, self.record.source, self.model.identify)
        self.target.complete(folder, done)
        if compare is not None:
            self.record.logits = compare(folder)
            say(describe_logits(self.record.logits))
        self.record.write(folder, self.stored, self.tensors, done.values())
        self.target.finish(folder, done)
