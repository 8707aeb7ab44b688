"""Choose the attention backend of a run, with a reason, or check a requested one."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import flash, per_document, self_check
from .block import BLOCK_BACKENDS
from .plan import FA3, FA4, FLASH_ATTN, FLEX, PER_DOCUMENT, SDPA, VARLEN, WITH_SINKS, WITH_SOFTCAP

BACKENDS = {
    FA4: "FlashAttention-4 through PyTorch",
    FA3: "FlashAttention-3 through PyTorch",
    SDPA: "PyTorch SDPA over documents of one length as a batch",
    FLASH_ATTN: "flash-attn package",
    VARLEN: "PyTorch varlen_attn (FlashAttention-2)",
    FLEX: "FlexAttention",
    PER_DOCUMENT: "PyTorch SDPA per document",
}
"""Description of each backend, in the order in which they are tried."""

_HALF = (torch.bfloat16, torch.float16)


class Choice(NamedTuple):
    """A backend and the reason for its choice."""

    backend: str
    reason: str
    """One line: what the backend is, why it was chosen, and what a check of its kernels found."""
    equal_lengths_backend: str | None = None
    """Replaces ``backend`` for packings whose documents have one length; see :func:`plan_attention`."""


class UnusableBackend(ValueError):
    """A requested backend cannot be used: one line with the cause and the remedy."""


@dataclass(frozen=True)
class Setting:
    """The facts that decide whether a backend can be used."""

    device: torch.device
    capability: tuple[int, int]
    """Compute capability of the GPU; (0, 0) elsewhere."""
    dtype: torch.dtype
    head_dim: int
    windowed: bool
    """True if some layer has a window that is shorter than the maximum document length."""
    equal_lengths: bool
    """All documents of a packing have the same length."""
    value_head_dim: int
    softcap: bool
    """True if some layer caps its scores."""
    sinks: bool
    """True if some layer has attention sinks."""
    in_blocks: bool = False
    """True if attention is computed in blocks of documents (ring attention)."""

    @property
    def is_special(self) -> bool:
        """Whether the model needs more than the usual kernels have."""
        return self.softcap or self.sinks or self.value_head_dim != self.head_dim


def choose_attention_backend(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    windows: Iterable[int | None] = (),
    equal_lengths: bool = False,
    value_head_dim: int | None = None,
    softcap: bool = False,
    sinks: bool = False,
    in_blocks: bool = False,
) -> Choice:
    """Return the backend of a run. On a GPU this checks the kernels that depend on its software.

    Args:
        requested: ``auto``, or a key of ``BACKENDS``.
        device: where the attention runs.
        dtype: of queries, keys and values.
        head_dim: D.
        windows: the windows of the model's layers, None for full attention.
        equal_lengths: every packing is one document, or documents of one length.
        value_head_dim: E; None for D.
        softcap: some layer caps its scores.
        sinks: some layer has attention sinks.
        in_blocks: attention is computed by :mod:`.blocks`.

    Raises:
        UnusableBackend: ``requested`` cannot work here.
    """
    windowed = any(window is not None for window in windows)
    setting = Setting(
        device,
        _capability(device),
        dtype,
        head_dim,
        windowed,
        equal_lengths,
        value_head_dim=value_head_dim or head_dim,
        softcap=softcap,
        sinks=sinks,
        in_blocks=in_blocks,
    )
    if requested == "auto":
        backend = next(name for name in BACKENDS if _preferred(name, setting) and obstacle(name, setting) is None)
        return _checked(Choice(backend, f"{BACKENDS[backend]}; {_why(backend, setting)}"), setting, True)
    if requested not in BACKENDS:
        raise UnusableBackend(f"unknown attention backend {requested!r}; use auto, {', '.join(BACKENDS)}")
    problem = obstacle(requested, setting)
    if problem is not None:
        usable = [name for name in BACKENDS if obstacle(name, setting) is None]
        raise UnusableBackend(f"attention by {requested} {problem}; use auto or {' or '.join(usable)}")
    return _checked(Choice(requested, f"{BACKENDS[requested]}; as configured"), setting, False)


def _checked(choice: Choice, setting: Setting, automatic: bool) -> Choice:
    """Check the kernels of ``choice`` on this GPU, and make the process use those that work.

    Args:
        choice: of a backend that can be used.
        setting: of the run.
        automatic: add a faster backend for documents of one length.
    """
    if setting.device.type != "cuda":
        return choice
    kernels = setting.device, setting.dtype, max(setting.head_dim, setting.value_head_dim)
    if choice.backend in (VARLEN, FA3, FA4):
        problem = self_check.shared_heads_problem(flash.IMPLEMENTATIONS.get(choice.backend), *kernels)
        flash.share_heads(problem is None)
        if problem is not None:
            choice = _noted(choice, f"keys and values are copied for all heads, because without copies {problem}")
    usual = choice.backend in (VARLEN, FLASH_ATTN) and not setting.windowed
    replaces = automatic and usual and setting.capability[0] >= 9 and not setting.in_blocks
    if (choice.backend == SDPA or replaces) and _suits_cudnn(setting):
        problem = self_check.cudnn_problem(*kernels)
        per_document.use_cudnn(problem is None)
        if problem is not None:
            return _noted(choice, f"without cuDNN, because {problem}")
        if replaces:
            return _noted(choice, "documents of one length: cuDNN through SDPA")._replace(equal_lengths_backend=SDPA)
    return choice


def _noted(choice: Choice, note: str) -> Choice:
    return choice._replace(reason=f"{choice.reason}; {note}")


def _suits_cudnn(setting: Setting) -> bool:
    """Return whether cuDNN has kernels for a run on a GPU, forward and backward."""
    return setting.dtype in _HALF and setting.head_dim <= 128 and not setting.head_dim % 8 and not setting.is_special


def _preferred(backend: str, setting: Setting) -> bool:
    """Return whether ``auto`` chooses ``backend`` if it works."""
    if backend == FLEX:  # Flash attention does the same with less memory.
        return setting.softcap or setting.sinks
    if backend == FA4:  # On Hopper FlashAttention-3 has all the features, and FlashAttention-4 is new.
        return setting.capability[0] >= 10
    if backend == SDPA:  # cuDNN is faster than FlashAttention-2 from Hopper on; a window would need a mask.
        if setting.capability[0] < 9 or setting.windowed or not _suits_cudnn(setting):
            return False
        return self_check.cudnn_problem(setting.device, setting.dtype, setting.head_dim) is None
    return True


def _why(backend: str, setting: Setting) -> str:
    if backend == PER_DOCUMENT:
        if setting.device.type != "cuda":
            return "the backend for CPUs"
        usual = FLEX if _preferred(FLEX, setting) else VARLEN
        return f"{usual} {obstacle(usual, setting)}"
    earlier = [name for name in (FA3, FA4, FLASH_ATTN, VARLEN) if name != backend and _preferred(name, setting)]
    missing = [name for name in earlier if obstacle(name, setting) is not None]
    return "the fastest that works here" + (f" (not usable: {', '.join(missing)})" if missing else "")


@functools.cache
def obstacle(backend: str, setting: Setting) -> str | None:
    """Return why ``backend`` cannot be used, as the end of a sentence that begins with its name; None if it can."""
    if backend == PER_DOCUMENT:
        return None
    if setting.in_blocks and backend not in BLOCK_BACKENDS:
        return "cannot attend to parts of documents, as ring attention does (parallel.context_kind)"
    if setting.softcap and backend not in WITH_SOFTCAP:
        return "cannot cap scores, which this model does (softcap)"
    if setting.sinks and backend not in WITH_SINKS and not setting.in_blocks:
        return "has no attention sinks, which this model uses"
    if backend == SDPA:
        return None if setting.equal_lengths else "is for documents of one length (data.attend_across_documents: true)"
    if setting.device.type != "cuda":
        return f"needs a GPU, and the run is on {setting.device.type}"
    if backend == FLEX:
        return _flex_obstacle(setting)
    return _flash_obstacle(backend, setting)


def _flex_obstacle(setting: Setting) -> str | None:
    smallest = min(setting.head_dim, setting.value_head_dim)
    if smallest < 16:
        return f"needs a head size of at least 16, not {smallest}"
    return import_problem("triton", "jit")


def _flash_obstacle(backend: str, setting: Setting) -> str | None:
    if setting.dtype not in _HALF:
        return f"computes in bf16 or fp16, not {str(setting.dtype).removeprefix('torch.')}"
    largest = 128 if backend == FA4 else 256
    head_dim = max(setting.head_dim, setting.value_head_dim)  # the smaller one is padded
    if head_dim > largest or head_dim % 8:
        return f"needs a head size that is a multiple of 8 and at most {largest}, not {head_dim}"
    generations = {FA3: (9,), FA4: (9, 10)}.get(backend, range(8, 100))
    if setting.capability[0] not in generations:
        wanted = " or ".join(f"{major}.x" for major in generations) if backend in (FA3, FA4) else "8.0 or newer"
        return f"needs compute capability {wanted}, and the GPU has {'.'.join(map(str, setting.capability))}"
    if backend == FLASH_ATTN:
        problem = import_problem("flash_attn", "flash_attn_varlen_func") or _softcap_problem(setting)
        if problem is None and setting.in_blocks:  # since version 2.7
            return import_problem("flash_attn.flash_attn_interface", "_wrapped_flash_attn_varlen_forward")
        return problem
    if backend == VARLEN:
        built = torch.backends.cuda.is_flash_attention_available()
        return None if built else "needs a PyTorch that was built with flash attention"
    if backend.upper() not in _registered_implementations():
        return f"needs a PyTorch that supports {backend.upper()}, and {torch.__version__} does not"
    return import_problem(*_SOURCES[backend])


def _softcap_problem(setting: Setting) -> str | None:
    if setting.softcap and "softcap" not in flash.package_parameters():
        return "needs flash-attn 2.6 or newer to cap scores, which this model does (softcap)"
    return None


_SOURCES = {
    FA3: ("flash_attn_interface", "flash_attn_varlen_func"),
    FA4: ("flash_attn.cute.interface", "_flash_attn_fwd"),
}


def _registered_implementations() -> list[str]:
    return torch.nn.attention.list_flash_attention_impls()


@functools.cache
def import_problem(module: str, attribute: str) -> str | None:
    """Return why ``attribute`` cannot be imported from ``module``.

    Imports it for real: a package that was built for another PyTorch is found, and fails only during the import.
    """
    try:
        getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return f"needs {module}.{attribute}, which cannot be imported ({' '.join(str(error).split())[:120]})"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
