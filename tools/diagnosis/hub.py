"""Check the token of the Hugging Face Hub, and if asked whether the Hub can be reached."""

from __future__ import annotations

import os
import time

from .finding import Finding, note, ok, problem

GROUP = "Hugging Face Hub"
_TIMEOUT = 10.0
_LOGIN = "set HF_TOKEN, or log in with `hf auth login`"


def check_hub(network: bool) -> list[Finding]:
    """Return findings on the token, and with ``network`` on the connection. The token is never shown."""
    from huggingface_hub import get_token

    token = get_token()
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    findings = [note(GROUP, "offline", "HF_HUB_OFFLINE is set: only cached models are found")] if offline else []
    if token is None:
        findings.append(note(GROUP, "token", "none; gated models and uploads need one", _LOGIN))
    elif not network:
        findings.append(ok(GROUP, "token", "present; --network checks it"))
    if network and not offline:
        findings += _connection(token)
    return findings


def _connection(token: str | None) -> list[Finding]:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    start = time.perf_counter()
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception as error:  # HTTP errors, whose types differ between versions of the Hub client
        remedy = "check the network, HTTPS_PROXY and HF_ENDPOINT; or name local folders"
        return [
            problem(GROUP, "connection", f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})", remedy)
        ]
    milliseconds = (time.perf_counter() - start) * 1000
    findings = [ok(GROUP, "connection", f"{constants.ENDPOINT} answers after {milliseconds:.0f} ms")]
    return findings if token is None else [*findings, _owner(token)]


def _owner(token: str) -> Finding:
    from huggingface_hub import HfApi

    from ...engine.errors import UserError
    from ...engine.files.hub_errors import call_hub

    try:
        user = call_hub(lambda: HfApi().whoami(token), "token", "", "the Hub refuses the token (403)")
    except UserError as error:
        return problem(GROUP, "token", str(error).removeprefix("token: "), "")
    return ok(GROUP, "token", f"valid, of {user.get('name')}")
