"""Download a model from the Hugging Face Hub, or only its tokenizer, and print the folder.

    python tools/download.py Qwen/Qwen2.5-0.5B                                  # into the cache of huggingface_hub
    python tools/download.py Qwen/Qwen2.5-0.5B --tokenizer-only --output tokenizer
    python tools/download.py Qwen/Qwen2.5-0.5B --revision 060db64 --output model

Runs and other commands that are given the name find the model in the cache. The same command continues an interrupted
download. Pickled weights, and further copies of the weights in subfolders, are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, run_command
from retemper.engine.files.disk_space import format_bytes, require_space

_KEY = "download"


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        description="Download a model from the Hugging Face Hub, or only its tokenizer, and print the folder. Other "
        "commands find a model in the cache by its name. The token comes from HF_TOKEN or `hf auth login`."
    )
    parser.add_argument("name", metavar="NAME", help="on the Hub, such as Qwen/Qwen2.5-0.5B")
    parser.add_argument("--tokenizer-only", action="store_true", help="config and tokenizer, without weights")
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit (default: the newest)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the files (default: the cache of huggingface_hub)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = build_parser().parse_args(arguments)
    print(download(options.name, options.tokenizer_only, options.revision, options.output))


def download(name: str, tokenizer_only: bool, revision: str | None, output: Path | None) -> Path:
    """Return the folder of the model ``name``, downloaded.

    The config comes first, so that a model that cannot be trained is refused before its weights are downloaded.

    Args:
        name: on the Hub.
        tokenizer_only: download the config and the tokenizer only.
        revision: branch, tag or commit; None: the newest.
        output: folder for the files; None: the cache.

    Raises:
        UserError: the Hub does not have it or cannot be reached, the model cannot be trained, or there is no space.
    """
    from retemper.engine.weights.checkpoint.assets import TOKENIZER_FILES
    from retemper.engine.weights.hugging_face.hub_download import (
        CONFIGS,
        WANTED,
        check_download,
        find_files,
        require_hub_name,
        require_supported,
    )

    if Path(name).is_dir():
        raise UserError(f"{_KEY} {name}: a folder of that name is here already; other commands take it as it is")
    require_hub_name(name, _KEY)
    if output is not None:
        _require_usable(output)
    _show_progress_in_terminals_only()
    with_config = find_files(name, _KEY, CONFIGS, revision)
    commit = with_config.name  # all files are those of one commit, even if the branch changes in between
    if tokenizer_only:
        folder = _fetch_rest(name, [*CONFIGS, *TOKENIZER_FILES], commit, output)
        _require_tokenizer(name, folder)
        return folder
    check_download(name, _KEY, with_config, require_supported)
    return _fetch_rest(name, WANTED, commit, output)


def _fetch_rest(name: str, wanted: Sequence[str], commit: str, output: Path | None) -> Path:
    """Download the ``wanted`` files if there is space for them, and return their folder."""
    from huggingface_hub import constants

    from retemper.engine.weights.hugging_face.hub_download import count_missing, find_files

    number, size = count_missing(name, _KEY, wanted, commit, output)
    place = Path(constants.HF_HUB_CACHE) if output is None else output
    require_space(place, size, name, lambda: "free some space, or name another disk with --output or HF_HOME")
    if number:
        print(f"{name}: {number} files, {format_bytes(size)}", file=sys.stderr, flush=True)
    return find_files(name, _KEY, wanted, commit, output)


def _require_tokenizer(name: str, folder: Path) -> None:
    from retemper.engine.tokenizer.files import find_local_tokenizer
    from retemper.engine.weights.hugging_face.hub_download import check_download

    check_download(name, _KEY, folder, lambda path: find_local_tokenizer(str(path)))


def _require_usable(output: Path) -> None:
    """Refuse a folder with files of another origin; an interrupted download has left a folder of huggingface_hub."""
    if output.is_dir() and any(output.iterdir()) and not (output / ".cache" / "huggingface").is_dir():
        raise UserError(f"--output {output}: holds other files; name a new folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; name a new folder")


def _show_progress_in_terminals_only() -> None:
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


if __name__ == "__main__":
    run_command(main)
