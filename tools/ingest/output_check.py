"""That a dataset to be written replaces neither what the command reads nor files that are no dataset's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ...engine.data.dataset_files import REJECTS, dataset_files, refuse_existing_outputs
from ...engine.data.tokenizer_files import companions
from ...engine.outputs import Use, require_separate
from .inputs import STDIN, InputFile
from .options import PreprocessOptions
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
    run: str, prefixes: Sequence[str], reads: Iterable[Use], overwrite: bool, rejects: bool = False
) -> None:
    """Refuse to write the datasets ``prefixes`` where one would replace a file that is read, or that is not a dataset's.

    Args:
        run: the prefix on the command line, by which the run's work folder and rejects are named.
        reads: all that the command reads.
        overwrite: files of an existing dataset may be replaced.
        rejects: whether rejects are written.

    Raises:
        UserError: nothing has been created.
    """
    option = f"--output-prefix {run}"
    files = [path for prefix in prefixes for path in dataset_files(prefix)]
    files += [f"{run}{REJECTS}"] if rejects else []
    require_separate(reads, [Use(option, path) for path in files], [Use(option, workspace_folder(run))])
    for prefix in prefixes:
        refuse_existing_outputs(prefix, overwrite, run if rejects else None)
