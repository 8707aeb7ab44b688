"""Compute every kernel in float64 by its formula, in pieces so that full sizes fit. Slow on purpose.

Each function takes the inputs by name and the gradients of the outputs (None: one). It returns outputs by name and the
gradients of inputs by ``d`` + name, all float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

IGNORE_INDEX = -100
EPS = 1e-6
Tensors = dict[str, Tensor]
Gradients = Sequence[Tensor | None]
ROWS = 512
"""Rows of logits or scores computed at a time."""


def linear_cross_entropy(inputs: Tensors, _: Gradients) -> Tensors:
    """Return the mean over targets of logsumexp(logits) - logit of the target; its gradient by softmax minus
    one-hot.
    """
    weight = inputs["weight"].double()
    valid = inputs["targets"] != IGNORE_INDEX
    count = valid.sum()
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    dx = torch.zeros(inputs["x"].shape, dtype=torch.float64, device=weight.device)
    dweight = torch.zeros_like(weight)
    for start in range(0, len(valid), ROWS):
        part = slice(start, start + ROWS)
        rows = valid[part].nonzero()[:, 0]
        x, target = inputs["x"][part].double()[rows], inputs["targets"][part][rows]
        logits = x @ weight.t()
        own = torch.arange(len(rows), device=weight.device)
        loss += (torch.logsumexp(logits, -1) - logits[own, target]).sum()
        gradient = torch.softmax(logits, -1)
        gradient[own, target] -= 1
        gradient /= count
        dx[part.start + rows] = gradient @ weight
        dweight += gradient.t() @ x
    return {"loss": loss / count, "dx": dx, "dweight": dweight}


def attention(inputs: Tensors, gradients: Gradients) -> Tensors:
    """Return causal softmax(q k / sqrt(D)) v inside each document, one query head and document at a time, by
    autograd.
    """
    (gradient,) = gradients
    assert gradient is not None
    q, k, v = (inputs[name] for name in "qkv")
    group = q.shape[1] // k.shape[1]
    output, dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float64, device=q.device) for x in (q, q, k, v))
    for start, stop in itertools.pairwise(inputs["cu_seqlens"].tolist()):
        mask = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
        for head in range(q.shape[1]):
            part = (x[start:stop, index] for x, index in ((q, head), (k, head // group), (v, head // group)))
            qd, kd, vd = (x.double().requires_grad_() for x in part)
            with torch.enable_grad():
                scores = (qd @ kd.t() * q.shape[2] ** -0.5).masked_fill(mask, -torch.inf)
                result = torch.softmax(scores, -1) @ vd
                result.backward(gradient[start:stop, head].double())
            assert qd.grad is not None and kd.grad is not None and vd.grad is not None
            output[start:stop, head] = result.detach()
            dq[start:stop, head] = qd.grad
            dk[start:stop, head // group] += kd.grad
            dv[start:stop, head // group] += vd.grad
    return {"output": output, "dq": dq, "dk": dk, "dv": dv}


def rms_norm(inputs: Tensors, gradients: Gradients) -> Tensors:
    """Return x / sqrt(mean(x^2) + eps) * weight, of x + residual if there is one; the sum is an output too."""

    def formula(values: Tensors) -> Tensors:
        total = values["x"] + values["residual"] if "residual" in values else values["x"]
        output = total / (total.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * values["weight"]
        return {"output": output, "sum": total} if "residual" in values else {"output": output}

    return _by_autograd(inputs, gradients, tuple(inputs), formula)


def rope(inputs: Tensors, gradients: Gradients) -> Tensors:
    """Rotate each pair (x_i, x_{i + D/2}) by its angle, as complex numbers."""

    def turn(x: Tensor, values: Tensors) -> Tensor:
        half = x.shape[-1] // 2
        angle = torch.complex(values["cos"], values["sin"])[:, None, :half]
        turned = torch.complex(x[..., :half], x[..., half:]) * angle
        return torch.cat((turned.real, turned.imag), -1)

    return _by_autograd(inputs, gradients, ("q", "k"), lambda x: {"q_out": turn(x["q"], x), "k_out": turn(x["k"], x)})


def swiglu(inputs: Tensors, gradients: Gradients) -> Tensors:
    """Return gate / (1 + exp(-gate)) * up."""
    return _by_autograd(
        inputs, gradients, ("gate", "up"), lambda x: {"output": x["gate"] / (1 + torch.exp(-x["gate"])) * x["up"]}
    )


def _by_autograd(
    inputs: Tensors, gradients: Gradients, leaves: Sequence[str], formula: Callable[[Tensors], Tensors]
) -> Tensors:
    values = {name: value.double() for name, value in inputs.items()}
    for name in leaves:
        values[name].requires_grad_()
    with torch.enable_grad():
        outputs = formula(values)
        torch.autograd.backward(list(outputs.values()), [None if g is None else g.double() for g in gradients])
    results = {name: value.detach() for name, value in outputs.items()}
    for name in leaves:
        gradient = values[name].grad
        assert gradient is not None
        results[f"d{name}"] = gradient
    return results
