"""Upload a Hugging Face folder to a model repository on the Hub, or a folder of Parquet files to a dataset repository.

The token is that of ``HF_TOKEN`` or ``hf auth login``: it is in no configuration, command line, log or file of ours.
The settings of huggingface_hub (``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, proxies) apply.
"""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from ...errors import UserError
from ...files.hub_errors import call_hub
from .folder import INDEX_FILE, WEIGHTS_FILE

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_DIGITS = "[0-9]" * 5
# No asterisk: in patterns of the Hub it also matches slashes, and files in subfolders must not be deleted.
_OWN_FILES = {
    "model": (WEIGHTS_FILE, INDEX_FILE, f"model-{_DIGITS}-of-{_DIGITS}.safetensors"),
    "dataset": (f"data/train-{_DIGITS}-of-{_DIGITS}.parquet",),
}
"""For each kind of repository, patterns of the names of files with weights, here and in transformers, or with data."""
Kind = Literal["model", "dataset"]
_FORBIDDEN = "the token may not write there (403); use one with write access, or another repository"


def require_repository_name(name: str, key: str) -> None:
    """Refuse an invalid name of a repository.

    Raises:
        UserError: names the option or setting ``key``.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{key} {name!r}: expected a repository on the Hub, such as my-organization/my-model")


def open_repository(name: str, key: str, private: bool = True, only_private: bool = False, kind: Kind = "model") -> str:
    """Check that the repository ``name`` exists and can be written to, before long work is done for it.

    If it does not exist, it is created. The visibility of an existing repository is never changed.

    Args:
        name: of a repository.
        key: the option or setting that gives the name, for errors.
        private: whether a new repository is private.
        only_private: refuse an existing repository that is public.
        kind: of the repository.

    Returns:
        Its address, its visibility, and the user whose token is used.

    Raises:
        UserError: there is no token, it may not write there, the Hub cannot be reached, or the repository is public.
    """
    from huggingface_hub import HfApi

    def open_() -> str:
        api = HfApi()
        user = api.whoami()
        url = api.create_repo(name, exist_ok=True, private=private, repo_type=kind)
        # Creating an existing repository again needs no permission to write. Older versions cannot check it.
        if "write" in inspect.signature(api.auth_check).parameters:
            api.auth_check(name, write=True, repo_type=kind)
        is_private = bool(api.repo_info(name, repo_type=kind).private)
        if only_private and not is_private:
            raise UserError(
                f"{key} {name}: this repository is public, and --private is given; make it private in its settings on "
                "the Hub, or name another repository"
            )
        visible = "private" if is_private else "public"
        kept = "" if is_private == private else ", which it was before: its settings on the Hub change that"
        return f"{url} ({visible}{kept}), as {user.get('name')}"

    require_repository_name(name, key)
    return call_hub(open_, f"{key} {name}", "", _FORBIDDEN)


def upload_folder(
    folder: Path,
    name: str,
    key: str,
    leave_out: Sequence[str] = (),
    message: str | None = None,
    kind: Kind = "model",
) -> str:
    """Upload the files in ``folder`` in one commit; files that are already there are not sent again.

    The same commit deletes weights in the repository that ``folder`` does not have, such as shards replaced by one
    file: some readers prefer the old ones. The same applies to the files with data of a dataset. All other files in the
    repository are kept.

    Args:
        folder: a Hugging Face folder, or one with Parquet files in ``data``.
        name: of an existing repository.
        key: the option or setting that gives the name, for errors.
        leave_out: names of files that are not uploaded.
        message: of the commit; None: the name of the folder.
        kind: of the repository.

    Returns:
        The address of the commit, and the number of files that it has deleted, if any.

    Raises:
        UserError: it failed. The folder and the repository are unchanged.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()

    def upload() -> str:
        api = HfApi()
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        files = {file: path for file, path in files.items() if file not in leave_out}
        there = api.list_repo_files(name, repo_type=kind)
        stale = sorted(file for file in there if _is_own(file, kind) and file not in files)
        # HfApi.upload_folder may use several commits, and the first of them would leave the model incomplete.
        commit = api.create_commit(
            name,
            [
                *(CommitOperationDelete(file, is_folder=False) for file in stale),
                *(CommitOperationAdd(file, path) for file, path in files.items()),
            ],
            commit_message=message or f"Upload {folder.name}",
            repo_type=kind,
        )
        return f"{commit.commit_url}{_describe_deleted(stale, kind)}"

    command = ["hf", "upload", name, str(folder), "."]
    command += [] if kind == "model" else ["--repo-type", kind]
    command += [] if message is None else ["--commit-message", message]
    for file in leave_out:
        command += ["--exclude", file]
    for pattern in _OWN_FILES[kind]:
        command += ["--delete", pattern]
    remedy = f"; {folder} is complete, upload it with: {shlex.join(command)}"
    return call_hub(upload, f"{key} {name}", remedy, _FORBIDDEN)


def _is_own(file: str, kind: Kind) -> bool:
    return any(fnmatchcase(file, pattern) for pattern in _OWN_FILES[kind])


def _describe_deleted(files: Sequence[str], kind: Kind) -> str:
    if not files:
        return ""
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    what = "weights" if kind == "model" else "files"
    return f", and deleted the {what} that were there before ({files[0]}{more})"
