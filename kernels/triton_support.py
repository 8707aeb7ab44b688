"""Check whether Triton kernels can run."""

from __future__ import annotations

import importlib.util
import os


def triton_refusal(device_type: str) -> str | None:
    """Return why the Triton kernels cannot run on devices of this type, with the remedy; None if they can.

    They run on NVIDIA and AMD GPUs (``device_type`` "cuda"), and anywhere through Triton's interpreter, for tests.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install triton"
    if device_type != "cuda" and not interpreted():
        return f"Triton has no backend for device '{device_type}'; use a GPU"
    return None


def interpreted() -> bool:
    """Return whether Triton runs its kernels in Python. This is fixed when Triton is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
