"""Checks that the output replaces neither files that the command reads nor files that are not a dataset's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ....engine.data.index_format import dataset_prefix
from ....engine.errors import UserError
from ....engine.files.outputs import Use, require_separate
from ....engine.files.paths import is_url
from ...tokenizer.finding import companions, find_tokenizer_file
from ..cleaning.held_out import held_out_files
from ..dataset_files import REJECTS, dataset_files, refuse_existing, text_files
from ..inputs.files import STDIN, InputFile, expand_inputs
from ..options import PreprocessOptions
from ..tokenizer_choice import choose_tokenizer
from .split import DocumentSplit
from .workspace import workspace_folder


def output_prefixes(options: PreprocessOptions, prefix: str) -> list[str]:
    """Return the prefixes of the datasets that a run writes: one, or one for each side of ``--split``."""
    return [f"{prefix}.{side}" for side in DocumentSplit.parse(options.split).names] if options.split else [prefix]


def output_files(options: PreprocessOptions, prefix: str) -> list[str]:
    """Return the paths of all files that a run may write, except rejects, and datasets of ``--bins``.

    The names of bins are known when the input has been read.
    """
    prefixes = [] if options.bins else output_prefixes(options, prefix)
    return [path for each in prefixes for path in files_of(options, each)]


def files_of(options: PreprocessOptions, prefix: str) -> list[str]:
    """Return the paths of all files that a run may write for one dataset."""
    return text_files(prefix) if options.to_jsonl else dataset_files(prefix)


def what_is_read(
    options: PreprocessOptions, files: Sequence[InputFile], held_out: Sequence[InputFile], tokenizer_file: Path | None
) -> list[Use]:
    """Return all local files that the preprocess command reads, from its expanded options."""
    tokenizer = "--model" if options.model is not None else "--tokenizer"
    uses = [Use("--input", file.path) for file in files if file.path != STDIN and not is_url(file.path)]
    if tokenizer_file is not None:
        uses += [Use(tokenizer, path) for path in (tokenizer_file, *companions(tokenizer_file))]
    uses += [Use("--held-out", file.path) for file in held_out if not is_url(file.path)]
    if options.chat_template is not None:
        uses.append(Use("--chat-template", options.chat_template))
    return uses


def require_free(
    runs: Mapping[str, Sequence[str]],
    reads: Iterable[Use],
    overwrite: bool,
    rejects: bool = False,
) -> None:
    """Raise UserError if a dataset would replace a file that is read, or one that is not a dataset's.

    Args:
        runs: the files that a run may write, by the prefix of its work folder and rejects.
        reads: all files that the command reads.
        overwrite: an existing dataset may be replaced.
        rejects: whether rejects are written.
    """
    files, folders = [], []
    for run, paths in runs.items():
        option = f"--output-prefix {run}"
        files += [Use(option, path) for path in (*paths, *_rejects(run, rejects))]
        folders.append(Use(option, workspace_folder(run)))
    require_separate(reads, files, folders)
    for run, paths in runs.items():
        refuse_existing([*paths, *_rejects(run, rejects)], overwrite)


def _rejects(run: str, are_written: bool) -> list[str]:
    return [f"{run}{REJECTS}"] if are_written else []


def require_free_shards(options: PreprocessOptions, num_shards: int) -> None:
    """Make the checks of all shards of a run, and of the merge, before the first one starts.

    Raises:
        UserError: one of them fails, or tools/merge.py does not join such outputs.
    """
    if options.to_jsonl:
        raise UserError(
            "--to-jsonl: tools/merge.py joins tokens; run preprocess --shard for each part, and join by cat"
        )
    if options.bins:
        raise UserError(f"--bins {options.bins}: a shard does not know the bins of the others; leave it out")
    files = expand_inputs(options.input, options.inputs)
    held_out = held_out_files(options.held_out, options.text_choice) if options.held_out else []
    reads = what_is_read(options, files, held_out, find_tokenizer_file(choose_tokenizer(options).name))
    prefix = dataset_prefix(options.output_prefix)
    names = [prefix, *(f"{prefix}.shard-{index}-of-{num_shards}" for index in range(num_shards))]
    # Existing shards are from an earlier run.
    require_free({name: output_files(options, name) for name in names}, reads, overwrite=True, rejects=True)
