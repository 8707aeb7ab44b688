"""Describe errors of communication with the Hub in one line and without secrets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ..errors import UserError
from .masking import without_url_secrets

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

Result = TypeVar("Result")


def call_hub(action: Callable[[], Result], what: str, remedy: str, forbidden: str) -> Result:
    """Run ``action``, which uses the Hub through huggingface_hub.

    Args:
        action: may raise a more specific UserError itself.
        what: beginning of the error line.
        remedy: end of the error line.
        forbidden: meaning of an answer 403 here.

    Raises:
        UserError: for any exception of ``action``. HTTP clients, which differ between versions of huggingface_hub, and
            Xet's storage have no common class of errors. An interrupt is not caught.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        return action()
    except UserError:
        raise
    except LocalTokenNotFoundError:
        raise UserError(f"{what}: no token; set HF_TOKEN, or log in with `hf auth login`{remedy}") from None
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__
        said = _describe(cause, forbidden) if cause is not None else _without_secrets(error)
        raise UserError(f"{what}: {said}{remedy}") from None


def _describe(answer: HfHubHTTPError, forbidden: str) -> str:
    status = answer.response.status_code
    if status == 401:
        return "the Hub does not accept the token (401); check HF_TOKEN, or log in again with `hf auth login`"
    if status == 403:
        return forbidden
    return f"the Hub answered {status}: {_without_secrets(answer)}"


def _without_secrets(error: BaseException) -> str:
    """Return the message of ``error`` in one line, without the token, passwords in URLs, or signatures of URLs."""
    from huggingface_hub import get_token

    text = without_url_secrets(" ".join(f"{type(error).__name__}: {error}".split()))
    token = get_token()
    return text.replace(token, "***") if token else text
