"""Define the providers of each kernel: ours, PyTorch eager and compiled, and installed libraries.

A provider's ``build(inputs)`` returns a function of the same inputs that returns the outputs as a tuple. One-time work
of a library (imports, constants) is done in ``build`` and not timed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.activations import gated
from ...kernels.attention import BACKENDS, Choice, UnusableBackend, attention, choose_attention_backend, plan_attention
from ...kernels.attention.flash import use_implementation
from ...kernels.linear_cross_entropy import backend_refusal, default_backend, linear_cross_entropy
from ...kernels.rms_norm import rms_norm
from ...kernels.rope import apply_rope_to_pair
from . import chunked_loss
from .references import EPS, IGNORE_INDEX

Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Function = Callable[[Tensors], Outputs]
OURS = "retemper"


@dataclass(frozen=True)
class Provider:
    """One way to compute a kernel."""

    build: Callable[[Tensors], Function]
    module: str | None = None
    """Import name of the library; None: PyTorch."""
    gpu_only: bool = False
    uniform_only: bool = False
    """True if it supports only attention of sequences of one length."""
    is_compiled: bool = False
    """True if it uses torch.compile."""
    obstacle: Callable[[Tensors], str | None] | None = None
    """Returns a further reason why it cannot run."""
    describe: Callable[[Tensors], str] | None = None
    """Returns a description of what it does on these inputs, if its name does not tell."""

    @property
    def is_ours(self) -> bool:
        """Return whether it is checked against the bounds."""
        return self.module == OURS

    def refusal(self, inputs: Tensors) -> str | None:
        """Return why it cannot run here on these inputs; None if it can."""
        if self.module not in (None, OURS) and importlib.util.find_spec(self.module or "") is None:
            return f"{self.module} is not installed"
        if self.gpu_only and not next(iter(inputs.values())).is_cuda:
            return "needs a GPU"
        if self.uniform_only and len(set(inputs["cu_seqlens"].diff().tolist())) > 1:
            return "does not support documents of different lengths"
        return self.obstacle(inputs) if self.obstacle else None


def _ours(function: Function) -> Provider:
    return Provider(lambda _: function, OURS)


def _compiled(function: Function) -> Provider:
    def build(_: Tensors) -> Function:
        torch.compiler.reset()
        return torch.compile(function, dynamic=False)

    return Provider(build, is_compiled=True)


# --------------------------------------------------------------------------------------------------------------------
# Cross-entropy of a linear head: the mean over targets


def _our_cross_entropy(backend: str) -> Provider:
    """Return our loss with one backend, or with that of ``auto``."""

    def compute(inputs: Tensors) -> Outputs:
        result: Any = linear_cross_entropy(inputs["x"], inputs["weight"], inputs["targets"], backend=backend)
        return (result.loss_sum / result.count,)

    def obstacle(inputs: Tensors) -> str | None:
        return backend_refusal(backend, inputs["x"], inputs["weight"])

    def describe(inputs: Tensors) -> str:
        return default_backend(inputs["x"], inputs["weight"])

    return Provider(lambda _: compute, OURS, obstacle=obstacle, describe=describe if backend == "auto" else None)


def _logits_cross_entropy(inputs: Tensors) -> Outputs:
    logits = inputs["x"] @ inputs["weight"].t()
    return (F.cross_entropy(logits.float(), inputs["targets"], ignore_index=IGNORE_INDEX),)


def _torch_fused_cross_entropy(_: Tensors) -> Function:
    fused: Any = F.linear_cross_entropy  # type: ignore[attr-defined,unused-ignore]
    return lambda inputs: (fused(inputs["x"], inputs["weight"], inputs["targets"], ignore_index=IGNORE_INDEX),)


def _liger_cross_entropy(accumulate_fp32: bool) -> Callable[[Tensors], Function]:
    def build(_: Tensors) -> Function:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        options = {"accum_dtype": torch.float32} if accumulate_fp32 else {}
        loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, **options)
        return lambda inputs: (loss(inputs["weight"], inputs["x"], inputs["targets"]),)

    return build


def _cut_cross_entropy(exact: bool) -> Callable[[Tensors], Function]:
    def build(_: Tensors) -> Function:
        from cut_cross_entropy import linear_cross_entropy as cut

        options: dict[str, Any] = {"filter_eps": None} if exact else {}
        return lambda inputs: (cut(inputs["x"], inputs["weight"], inputs["targets"], **options),)

    return build


def _chunked_cross_entropy(compiled: bool) -> Callable[[Tensors], Function]:
    def build(_: Tensors) -> Function:
        chunk_loss: chunked_loss.ChunkLoss = chunked_loss.sum_of_losses
        if compiled:
            torch.compiler.reset()
            chunk_loss = torch.compile(chunk_loss, dynamic=False)
        return lambda x: (chunked_loss.chunked_cross_entropy(x["x"], x["weight"], x["targets"], chunk_loss),)

    return build


LINEAR_CROSS_ENTROPY = {
    "retemper": _our_cross_entropy("auto"),
    "retemper, triton": _our_cross_entropy("triton"),
    "retemper, triton-persistent": _our_cross_entropy("triton-persistent"),
    "torch eager": Provider(lambda _: _logits_cross_entropy),
    "torch.compile": _compiled(_logits_cross_entropy),
    "as in torchtitan, 8 chunks": Provider(_chunked_cross_entropy(False)),
    "as in torchtitan, loss compiled": Provider(_chunked_cross_entropy(True), is_compiled=True),
    "Liger": Provider(_liger_cross_entropy(False), "liger_kernel", gpu_only=True),
    "Liger, fp32 accumulation": Provider(_liger_cross_entropy(True), "liger_kernel", gpu_only=True),
    "CCE, exact": Provider(_cut_cross_entropy(True), "cut_cross_entropy", gpu_only=True),
    "CCE": Provider(_cut_cross_entropy(False), "cut_cross_entropy", gpu_only=True),
}
if hasattr(F, "linear_cross_entropy"):  # torch 2.13
    LINEAR_CROSS_ENTROPY["F.linear_cross_entropy"] = Provider(_torch_fused_cross_entropy)


# --------------------------------------------------------------------------------------------------------------------
# Attention


def _choose(backend: str, inputs: Tensors) -> Choice:
    q_TND, lengths = inputs["q"], inputs["cu_seqlens"].diff().tolist()
    return choose_attention_backend(
        backend, q_TND.device, q_TND.dtype, q_TND.shape[-1], equal_lengths=len(set(lengths)) == 1
    )


def _our_attention(backend: str) -> Provider:
    """Return our operation with one backend, or with that of ``auto``; planned once, as for all layers of a step."""

    def obstacle(inputs: Tensors) -> str | None:
        try:
            _choose(backend, inputs)
        except UnusableBackend as error:
            return str(error)
        return None

    def build(inputs: Tensors) -> Function:
        longest = int(inputs["cu_seqlens"].diff().max())
        chosen = _choose(backend, inputs).backend
        use_implementation(None)  # as in a run of its own; plans for FlashAttention-3 or -4 replace it
        plan = plan_attention(chosen, inputs["cu_seqlens"].cpu(), [None], inputs["q"].device)
        return lambda x: (attention(x["q"], x["k"], x["v"], x["cu_seqlens"], longest, plan=plan),)

    def describe(inputs: Tensors) -> str:
        choice = _choose(backend, inputs)
        return f"{choice.backend}: {choice.reason}"

    return Provider(build, OURS, obstacle=obstacle, describe=describe if backend == "auto" else None)


def _with_own_kernels(provider: Provider) -> Provider:
    """Return a peer that uses PyTorch's own flash kernels.

    One of our backends may have replaced them by those of another FlashAttention, for the whole process until it is
    undone.
    """

    def build(inputs: Tensors) -> Function:
        use_implementation(None)
        return provider.build(inputs)

    return dataclasses.replace(provider, build=build)


def _sdpa(inputs: Tensors) -> Function:
    batch = len(inputs["cu_seqlens"]) - 1

    def compute(x: Tensors) -> Outputs:
        q, k, v = (x[name].unflatten(0, (batch, -1)).transpose(1, 2) for name in "qkv")
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1),)

    return compute


def _sdpa_with(backend: str) -> Callable[[Tensors], Function]:
    def build(inputs: Tensors) -> Function:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        compute = _sdpa(inputs)

        def forced(x: Tensors) -> Outputs:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return compute(x)

        return forced

    return build


def _varlen(inputs: Tensors) -> Function:
    from torch.nn.attention import varlen

    # Untyped, because its arguments differ between versions.
    varlen_attn: Any = varlen.varlen_attn

    longest = int(inputs["cu_seqlens"].diff().max())
    # PyTorch 2.11 documents equal numbers of heads.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def compute(x: Tensors) -> Outputs:
        q, k, v = x["q"], x["k"], x["v"]
        if not grouped:
            k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], 1) for y in (k, v))
        offsets = x["cu_seqlens"]
        return (varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0), **grouped),)

    return compute


def _flash_attn(inputs: Tensors) -> Function:
    from flash_attn import flash_attn_varlen_func

    longest = int(inputs["cu_seqlens"].diff().max())
    return lambda x: (
        flash_attn_varlen_func(x["q"], x["k"], x["v"], x["cu_seqlens"], x["cu_seqlens"], longest, longest, causal=True),
    )


ATTENTION = {
    "retemper": _our_attention("auto"),
    **{f"retemper, {backend}": _our_attention(backend) for backend in BACKENDS},
    "torch SDPA": _with_own_kernels(Provider(_sdpa, uniform_only=True)),
    "torch SDPA, cuDNN": Provider(_sdpa_with("CUDNN_ATTENTION"), gpu_only=True, uniform_only=True),
    "torch SDPA, flash": _with_own_kernels(Provider(_sdpa_with("FLASH_ATTENTION"), gpu_only=True, uniform_only=True)),
    "torch varlen_attn": _with_own_kernels(Provider(_varlen, gpu_only=True)),
    "flash-attn": Provider(_flash_attn, "flash_attn", gpu_only=True),
}


# --------------------------------------------------------------------------------------------------------------------
# Norm, rotation, activation


def _our_rms_norm(x: Tensors) -> Outputs:
    if "residual" in x:
        return rms_norm(x["x"], x["weight"], EPS, x["residual"])
    return (rms_norm(x["x"], x["weight"], EPS),)


def _torch_rms_norm(x: Tensors) -> Outputs:
    total = x["x"] + x["residual"] if "residual" in x else x["x"]
    output = F.rms_norm(total, (total.shape[-1],), x["weight"], EPS)
    return (output, total) if "residual" in x else (output,)


def _liger_rms_norm(_: Tensors) -> Function:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x: (LigerRMSNormFunction.apply(x["x"], x["weight"], EPS, 0.0, "llama", False),)


def _liger_add_rms_norm(_: Tensors) -> Function:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda x: LigerFusedAddRMSNormFunction.apply(x["x"], x["residual"], x["weight"], EPS, 0.0, "llama", False)


RMS_NORM = {
    "retemper": _ours(_our_rms_norm),
    "retemper, compiled": _compiled(_our_rms_norm),
    "F.rms_norm": Provider(lambda _: _torch_rms_norm),
    "F.rms_norm, compiled": _compiled(_torch_rms_norm),
    "Liger": Provider(_liger_rms_norm, "liger_kernel", gpu_only=True),
}
RMS_NORM_RESIDUAL = {**RMS_NORM, "Liger": Provider(_liger_add_rms_norm, "liger_kernel", gpu_only=True)}


def _our_rope(x: Tensors) -> Outputs:
    return apply_rope_to_pair(x["q"], x["k"], x["cos"], x["sin"])


def _liger_rope(_: Tensors) -> Function:
    from liger_kernel.ops.rope import LigerRopeFunction

    def compute(x: Tensors) -> Outputs:
        # It rotates in place, so it is given copies; [1, heads, T, D] views as in transformers.
        q, k = (x[name].clone().transpose(0, 1)[None] for name in "qk")
        q, k = LigerRopeFunction.apply(q, k, x["cos"][None], x["sin"][None])
        return q[0].transpose(0, 1), k[0].transpose(0, 1)

    return compute


ROPE = {
    "retemper": _ours(_our_rope),
    "retemper, compiled": _compiled(_our_rope),
    "Liger, with its copy": Provider(_liger_rope, "liger_kernel", gpu_only=True),
}


def _our_swiglu(x: Tensors) -> Outputs:
    return (gated(x["gate"], x["up"]),)


def _liger_swiglu(_: Tensors) -> Function:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda x: (LigerSiLUMulFunction.apply(x["gate"], x["up"]),)


SWIGLU = {
    "retemper": _ours(_our_swiglu),
    "retemper, compiled": _compiled(_our_swiglu),
    "Liger": Provider(_liger_swiglu, "liger_kernel", gpu_only=True),
}
