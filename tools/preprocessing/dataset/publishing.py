"""Makes datasets and sidecars from the outputs of a run, publishes them together, and reports the run."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ....engine.data.sidecar import InputSource, Sidecar
from ....engine.errors import UserError
from ....engine.tokenizer.frame import ids_of, name_of
from ..dataset_files import TEXT
from ..dataset_writer import IndexedDatasetWriter
from ..options import PreprocessOptions
from ..progress import ProgressReport
from ..run_plan import RunPlan
from ..run_setup import print_notes
from ..storage import without_secrets
from ..workers.task_output import TaskOutput, TaskResult
from .assembly import Assembly, DatasetName, DocumentWriter, SourceTotals
from .bins import mixture_yaml, parse_weights
from .checks import files_of, require_free
from .rejected_records import write_rejects
from .text_writer import TextWriter
from .workspace import remove_workspace

_SHOWN_NOTES = 20
EMPTY_SIDE = "no document was assigned to"


@dataclass(frozen=True)
class PreprocessReport:
    """Results of a run."""

    sidecars: dict[str, Sidecar]
    """By prefix."""
    first_bad: str | None
    """``file:line: reason`` of the first record that was skipped."""
    encoder: str
    """The library that encoded, with remarks."""
    seconds: float
    files: tuple[str, ...]
    """The files written."""
    mixture: str = ""
    """With ``--bins``, the ``data`` section of a run that mixes them."""


def publish(plan: RunPlan, results: Sequence[TaskResult]) -> PreprocessReport:
    """Make the datasets from the outputs of ``results``, in the order of the plan's tasks.

    Raises:
        UserError: there is no document. (A shard of a run may be empty.)
    """
    _print_notes_of_readers([note for result in results for note in result.notes])
    prefix, options = plan.setup.prefix, plan.options
    outputs = [TaskOutput(plan.work, key) for key in plan.tasks]
    assembly = Assembly(outputs, options, plan.work, len(options.input), [result.bins for result in results])
    if options.shard_place is None and not any(result.documents for result in results):
        remove_workspace(plan.work)  # a restart cannot use it
        raise UserError(_nothing_found(plan, results))
    prefixes = [side.prefix(prefix) for side in assembly.sides]
    files = [path for each in prefixes for path in sorted(files_of(options, each))]
    if options.bins:
        require_free({prefix: files}, plan.setup.reads, options.overwrite, rejects=True)
    with contextlib.ExitStack() as stack:
        writers = [_writer(plan, each) for each in prefixes]
        for writer in writers:
            stack.enter_context(writer)
        _write(plan, assembly, writers, results)
        rejects = write_rejects(outputs, prefix, plan.work)
    written = {
        side: writer.prefix
        for side, writer in zip(assembly.sides, writers, strict=True)
        if writer.num_documents or not options.bins
    }
    sidecars = {side: Sidecar.read(f"{each}{TEXT}" if options.to_jsonl else each) for side, each in written.items()}
    return PreprocessReport(
        {written[side]: sidecar for side, sidecar in sidecars.items() if sidecar is not None},
        _first_bad(results),
        _encoder(plan, results),
        0.0,
        (*(path for path in files if os.path.exists(path)), *rejects),
        _mixture(options, sidecars, written) if options.bins else "",
    )


def _mixture(
    options: PreprocessOptions, sidecars: Mapping[DatasetName, Sidecar | None], written: Mapping[DatasetName, str]
) -> str:
    """Return the ``data`` section of a run: the side "train", or the first one, is trained on."""
    splits = list(dict.fromkeys(side.split for side in sidecars))
    train = "train" if "train" in splits else splits[0]
    paths = {side: f"{prefix}{options.text_suffix if options.to_jsonl else ''}" for side, prefix in written.items()}
    sizes = {
        paths[side]: sidecar.tokens or sidecar.text_bytes
        for side, sidecar in sidecars.items()
        if side.split == train and sidecar is not None
    }
    validation = {".".join(side) if len(splits) > 2 else side.bin: paths[side] for side in paths if side.split != train}
    return mixture_yaml(sizes, validation, parse_weights(options.bin_weights))


def _writer(plan: RunPlan, prefix: str) -> DocumentWriter:
    options, scratch = plan.options, plan.work / f"dataset-{os.path.basename(prefix)}"
    if options.to_jsonl:
        return TextWriter(prefix, options.text_suffix, overwrite=options.overwrite, scratch=scratch)
    return IndexedDatasetWriter(
        prefix,
        plan.setup.dtype,
        overwrite=options.overwrite,
        mask=options.writes_mask,
        metadata=bool(options.metadata),
        longest=options.window,
        scratch=scratch,
    )


def _write(plan: RunPlan, assembly: Assembly, writers: Sequence[DocumentWriter], results: Sequence[TaskResult]) -> None:
    """Write the datasets, up to the renames."""
    size = sum(output.tokens.stat().st_size for output in assembly.outputs)
    with ProgressReport("writing", size) as progress:
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            progress.show(done, done // plan.setup.dtype.itemsize)

        totals = assembly.write(writers, on_bytes)
    left_out = _by_source((result.left_out for result in results), assembly.left_out)
    changed = _by_source((result.changed for result in results), [Counter() for _ in assembly.left_out])
    fingerprint = plan.setup.tokenizer.fingerprint
    for side, writer, total in zip(assembly.sides, writers, totals, strict=True):
        if writer.num_documents == 0 and plan.options.bins and any(other.num_documents for other in writers):
            print_notes([f"{writer.prefix}: not written, because it would have no documents"])
            writer.discard()
            continue
        if writer.num_documents == 0 and plan.options.shard_place is None:
            raise UserError(
                f"--split: {EMPTY_SIDE} {side.split!r}; give it a larger share, or use a larger corpus"
                if side.split
                else _nothing_found(plan, results)
            )
        writer.sidecar = _sidecar(plan, total, left_out, changed, fingerprint)
        writer.prepare()


def _by_source(counts: Iterable[Mapping[str, Mapping[str, int]]], before: Sequence[Counter[str]]) -> list[Counter[str]]:
    """Return the sums by source of the workers' counts, added to those ``before``."""
    total = [Counter(counter) for counter in before]
    for count in counts:
        for source, numbers in count.items():
            total[int(source)].update(numbers)
    return total


def _sidecar(
    plan: RunPlan,
    totals: SourceTotals,
    left_out: Sequence[Counter[str]],
    changed: Sequence[Counter[str]],
    fingerprint: str,
) -> Sidecar:
    options, setup = plan.options, plan.setup
    mine = [[file for file in plan.files if file.source == index] for index in range(len(options.input))]
    return Sidecar(
        tokenizer=setup.tokenizer.name,
        tokenizer_sha256=setup.tokenizer.sha256,
        vocab_size=setup.tokenizer.vocab_size,
        append_eod=options.append_eod and not options.to_jsonl,
        eod_token=setup.eod[0] if setup.eod else None,
        eod_id=setup.eod[1] if setup.eod else None,
        sources=tuple(
            InputSource(
                name=without_secrets(name),
                files=len(files),
                bytes=sum(file.size for file in files),
                documents=int(totals.documents[index]),
                tokens=int(totals.tokens[index]),
                characters=int(totals.characters[index]),
                text_bytes=int(totals.text_bytes[index]),
                left_out=dict(left_out[index]),
                changed=dict(changed[index]),
            )
            for index, (name, files) in enumerate(zip(options.input, mine, strict=True))
        ),
        options=options.record(),
        bos_token=name_of(setup.begin) or None,
        bos_ids=ids_of(setup.begin),
        eos_ids=ids_of(setup.end[:-1]),
        tokenizer_fingerprint=fingerprint,
    )


def _encoder(plan: RunPlan, results: Sequence[TaskResult]) -> str:
    failures = sum(result.fast_path_failures for result in results)
    reference = f"; it failed on {failures:,} batches, which the reference encoded" if failures else ""
    return (results[0].encoder if results else plan.setup.tokenizer.encoder) + reference


def _first_bad(results: Sequence[TaskResult]) -> str | None:
    return next((result.first_bad for result in results if result.first_bad), None)


def _nothing_found(plan: RunPlan, results: Sequence[TaskResult]) -> str:
    reasons: Counter[str] = Counter()
    for result in results:
        for counts in result.left_out.values():
            reasons.update(counts)
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items())) or "nothing left out"
    first_bad = _first_bad(results)
    first = f"; the first malformed: {first_bad}" if first_bad else ""
    return (
        f"--input {' '.join(plan.options.input)}: no document to write ({len(plan.files)} input files; "
        f"{left_out}{first})"
    )


def _print_notes_of_readers(notes: Sequence[str]) -> None:
    """Print the readers' remarks about files."""
    print_notes(notes[:_SHOWN_NOTES])
    if len(notes) > _SHOWN_NOTES:
        print_notes([f"{len(notes) - _SHOWN_NOTES:,} more such notes about files"])
