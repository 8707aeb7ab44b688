"""A Hugging Face folder to a model repository on the Hub.

The token is that of ``HF_TOKEN`` or ``hf auth login``: it stands in no configuration, command line, log or file of
ours. What huggingface_hub knows of the place (``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, proxies) holds here as well.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ..errors import UserError

Result = TypeVar("Result")
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def require_repository_name(name: str, key: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        UserError: naming the option or setting ``key``.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{key} {name!r}: expected a repository on the Hub, such as my-organization/my-model")


def open_repository(name: str, key: str) -> str:
    """Make sure that the repository ``name`` exists and can be written to, before long work is done for it.

    One that does not exist is made, and is private.

    Args:
        name: of a model repository.
        key: the option or setting that gives the name, for errors.

    Returns:
        where it is, who can see it, and whose token is used.

    Raises:
        UserError: there is no token, it may not write there, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    def open_() -> str:
        api = HfApi()
        user = api.whoami()
        # Whoever wants it public can make it so; what was public for an hour cannot be taken back.
        url = api.create_repo(name, exist_ok=True, private=True)
        # For one that exists, creating it again asks for no right to write. Older versions cannot ask for that.
        if "write" in inspect.signature(api.auth_check).parameters:
            api.auth_check(name, write=True)
        visible = "private" if api.model_info(name).private else "public"
        return f"{url} ({visible}), as {user.get('name')}"

    require_repository_name(name, key)
    return _asking(open_, f"{key} {name}", "")


def upload_folder(folder: Path, name: str, key: str, leave_out: Sequence[str] = ()) -> str:
    """Upload the files in ``folder``, in one commit; those that are there already are not sent again.

    Args:
        folder: a Hugging Face folder.
        name: of a repository that exists.
        key: the option or setting that gives the name, for errors.
        leave_out: names of files that stay here.

    Returns:
        the address of the commit.

    Raises:
        UserError: it failed. The folder is as it was.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()

    def upload() -> str:
        api = HfApi()
        message = f"Upload {folder.name}"
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=list(leave_out)
        )
        return str(commit.commit_url)

    command = " ".join(["hf", "upload", name, str(folder), ".", *(f"--exclude {file}" for file in leave_out)])
    return _asking(upload, f"{key} {name}", f"; {folder} is complete, upload it with: {command}")


def _asking(action: Callable[[], Result], what: str, remedy: str) -> Result:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        return action()
    except LocalTokenNotFoundError:
        raise UserError(f"{what}: no token; set HF_TOKEN, or log in with `hf auth login`{remedy}") from None
    # The errors of the HTTP client, of which its versions have different ones, have no common class.
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__
        said = _describe(cause.response.status_code, cause) if cause is not None else _without_secrets(error)
        raise UserError(f"{what}: {said}{remedy}") from None


def _describe(status: int, error: BaseException) -> str:
    if status == 401:
        return "the Hub does not accept the token (401); check HF_TOKEN, or log in again with `hf auth login`"
    if status == 403:
        return "the token may not write there (403); use one with write access, or another repository"
    return f"the Hub answered {status}: {_without_secrets(error)}"


def _without_secrets(error: BaseException) -> str:
    """What ``error`` says, in a line, without the token or the signatures of addresses."""
    from huggingface_hub import get_token

    text = re.sub(r"\?\S+", "", f"{type(error).__name__}: {' '.join(str(error).split())}")
    token = get_token()
    return text.replace(token, "***") if token else text
