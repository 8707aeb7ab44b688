"""That a dataset to be written replaces neither what the command reads nor files that are no dataset's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ....engine.data.index_format import dataset_prefix
from ....engine.files.outputs import Use, require_separate
from ....engine.tokenizer.files import companions, find_tokenizer_file
from ..cleaning.held_out import held_out_files
from ..dataset_files import REJECTS, dataset_files, refuse_existing_outputs
from ..inputs.files import STDIN, InputFile, expand_inputs
from ..options import PreprocessOptions
from ..tokenizer_choice import choose_tokenizer
from .split import Split
from .workspace import workspace_folder


def output_prefixes(options: PreprocessOptions, prefix: str) -> list[str]:
    """Prefixes of the datasets that a run writes: one, or one for each side of ``--split``."""
    return [f"{prefix}.{side}" for side in Split.parse(options.split).names] if options.split else [prefix]


def what_is_read(
    options: PreprocessOptions, files: Sequence[InputFile], held_out: Sequence[InputFile], tokenizer_file: Path
) -> list[Use]:
    """All files that the preprocess command reads.

    Args:
        files: what ``--input`` stands for.
        held_out: what ``--held-out`` stands for.
        tokenizer_file: what ``--tokenizer`` or ``--model`` stands for.
    """
    tokenizer = "--model" if options.model is not None else "--tokenizer"
    uses = [Use("--input", file.path) for file in files if file.path != STDIN]
    uses += [Use(tokenizer, path) for path in (tokenizer_file, *companions(tokenizer_file))]
    uses += [Use("--held-out", file.path) for file in held_out]
    if options.chat_template is not None:
        uses.append(Use("--chat-template", options.chat_template))
    return uses


def require_free(
    runs: Mapping[str, Sequence[str]], reads: Iterable[Use], overwrite: bool, rejects: bool = False
) -> None:
    """Refuse to write datasets where one would replace a file that is read, or is not a dataset's.

    Args:
        runs: prefixes of the datasets that a run writes, by the prefix that its work folder and rejects are named by.
        reads: all that the command reads.
        overwrite: files of an existing dataset may be replaced.
        rejects: whether rejects are written.

    Raises:
        UserError: nothing has been created.
    """
    files, folders = [], []
    for run, prefixes in runs.items():
        option = f"--output-prefix {run}"
        files += [Use(option, path) for prefix in prefixes for path in dataset_files(prefix)]
        files += [Use(option, f"{run}{REJECTS}")] if rejects else []
        folders.append(Use(option, workspace_folder(run)))
    require_separate(reads, files, folders)
    for run, prefixes in runs.items():
        for prefix in prefixes:
            refuse_existing_outputs(prefix, overwrite, run if rejects else None)


def require_free_shards(options: PreprocessOptions, num_shards: int) -> None:
    """Refuse a run in ``num_shards`` parts, which are joined, as each of them would refuse it when it starts."""
    files = expand_inputs(options.input, options.inputs)
    held_out = held_out_files(options.held_out, options.text_choice) if options.held_out else []
    reads = what_is_read(options, files, held_out, find_tokenizer_file(choose_tokenizer(options).name))
    prefix = dataset_prefix(options.output_prefix)
    names = [prefix, *(f"{prefix}.shard-{index}-of-{num_shards}" for index in range(num_shards))]
    # Parts that are there are what a former run has finished.
    require_free({name: output_prefixes(options, name) for name in names}, reads, overwrite=True, rejects=True)
