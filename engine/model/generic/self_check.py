"""Find out how the documents of a batch are kept apart in a model of transformers: by computing a tiny one.

The tiny model has the type and options of the real one. Its loss and logits over packed documents must equal those that
transformers computes for the same documents alone.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....kernels.attention import PER_DOCUMENT
from ...batch import Batch
from ...errors import UserError
from .architecture import DocumentMode, TransformersArchitecture, parse_transformers_architecture
from .library import library_attention, library_config, library_model, missing_kernel_packages
from .model import TransformersModel
from .tiny import tiny_config

MODES: tuple[DocumentMode, ...] = ("packed", "one_by_one", "library_attention")
"""In the order in which they are tried: the fastest first."""
_LENGTHS = (13, 1, 22, 9, 10)
"""Longer and shorter than the window of a tiny model."""
_TOLERANCE = 1e-4
"""Of logits, relative to the largest one. Rounding causes about 1e-6, a leak between documents above 1e-2."""
_SPREAD, _NOISE = 6.0, 0.1
"""Factor on initial matrices, with which tokens hardly influence each other; and noise on all else, such as biases,
which begin as 0."""


@dataclass(frozen=True)
class Finding:
    """The result of the check."""

    documents: DocumentMode | None
    """The first way that is exact; None if there is none."""
    problems: tuple[str, ...] = ()
    """Why those before it are not, a line each."""


def check_documents(architecture: TransformersArchitecture) -> Finding:
    """Compute a tiny model of the type of ``architecture`` in every way until one is exact."""
    problems = []
    try:
        tiny = tiny_config(library_config(dict(architecture.config), "config.json").to_dict())
        reference = _Reference(tiny)
    except Exception as error:  # whatever the code of the type raises
        return Finding(None, (f"a tiny model of this type cannot be built: {_described(error)}",))
    for mode in MODES:
        try:
            difference = reference.difference(replace(reference.architecture, documents=mode))
        except Exception as error:
            problems.append(_described(error))
            continue
        if difference <= _TOLERANCE:
            return Finding(mode, tuple(problems))
        problems.append(f"packed documents differ from the same documents alone by {difference:.1e} of the logits")
    return Finding(None, tuple(problems))


def with_exact_documents(architecture: TransformersArchitecture) -> TransformersArchitecture:
    """Return ``architecture`` with the fastest exact way to keep the documents of a batch apart.

    Raises:
        UserError: there is none.
    """
    finding = _find(json.dumps(dict(architecture.config), sort_keys=True, default=str))
    if finding.documents is None:
        raise UserError(
            f"model_type {architecture.model_type} cannot be trained: {'; '.join(finding.problems)}; a tiny model of "
            "this type is compared with transformers at every start"
        )
    remark = finding.problems[0] if finding.problems else ""
    missing = missing_kernel_packages(library_config(dict(architecture.config), architecture.model_type))
    if missing:
        remark += f"; its kernels for GPUs are not installed: pip install {' '.join(missing)}"
    return replace(architecture, documents=finding.documents, remark=remark)


def tiny_models(architecture: TransformersArchitecture) -> tuple[Any, TransformersModel]:
    """Return a tiny random model of the type and options of ``architecture``: that of transformers, and ours.

    Ours has the same weights, and keeps documents apart as ``architecture`` does.
    """
    reference = _Reference(tiny_config(library_config(dict(architecture.config), "config.json").to_dict()))
    return reference.library, reference.model(replace(reference.architecture, documents=architecture.documents))


@functools.cache
def _find(config: str) -> Finding:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are so small that threads only wait for each other
    try:
        return check_documents(parse_transformers_architecture(json.loads(config), "config.json", ""))
    finally:
        torch.set_num_threads(threads)


class _Reference:
    """A tiny model of transformers, and its logits for each document alone."""

    def __init__(self, config: dict[str, Any]):
        self.architecture = parse_transformers_architecture(config, "a tiny model", "")
        made = library_config(config, "a tiny model")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            self.library = model = library_model(made, library_attention(made))
            tokens = torch.randint(self.architecture.vocab_size, (sum(_LENGTHS),))
            self.state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            for name in model.state_dict():
                _spread_(self.state.get(name))
            documents = tokens.split(_LENGTHS)
            alone = [model(input_ids=document[None], use_cache=False).logits[0] for document in documents]
        self.logits = torch.cat(alone)
        targets = torch.cat([F.pad(document[1:], (0, 1), value=-100) for document in documents])
        self.batch = Batch.of_documents(tokens, _LENGTHS, targets)
        self.loss = F.cross_entropy(self.logits.double(), targets, reduction="sum")

    @torch.no_grad()
    def model(self, architecture: TransformersArchitecture) -> TransformersModel:
        """Return our model with the same weights."""
        model = TransformersModel(architecture)
        model.materialize(torch.device("cpu"))
        for name, parameter in model.named_parameters():
            parameter.copy_(self.state[name])
        return model

    @torch.no_grad()
    def difference(self, architecture: TransformersArchitecture) -> float:
        """Return the relative difference of logits and loss of our model."""
        model = self.model(architecture)
        batch = self.batch.prepare(torch.device("cpu"), PER_DOCUMENT, architecture.sliding_windows)
        return max(_relative(model.logits(batch), self.logits), _relative(model(batch), self.loss))


def _spread_(tensor: Tensor | None) -> None:
    if tensor is None or not tensor.is_floating_point():
        return
    if tensor.dim() > 1:
        tensor.mul_(_SPREAD)
    else:
        tensor.add_(torch.randn_like(tensor), alpha=_NOISE)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    difference = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    return float("inf") if difference.isnan() else difference.item()


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
