"""Tiny runs in which one step goes wrong on one rank, and their oracle: the same run with that update left out."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import tiny_run
import torch
from torch.distributed.tensor import DTensor

from retemper.engine import pretrain
from retemper.engine.errors import UserError
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.weights.checkpoint.tensors import optimizer_tensors


def train(ranks: Ranks, path: Path, overrides: list[str], faults: dict[int, str], rank: int = 0) -> str | None:
    """The run, with a fault on ``rank`` in the steps that are keys of ``faults``; what it says if it gives up.

    Faults: ``gradient``, a NaN in one place of one gradient; ``loss``, an infinite loss with sound gradients;
    ``spike``, loss and gradients 50 times as large (on all ranks); ``weight``, a NaN in a weight.
    """
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
    accumulate_gradients = run.forward_backward.accumulate_gradients

    def faulty(*arguments):
        fault = faults.get(run.progress.step + 1)
        if fault == "weight":
            _break(next(iter(run.model.parameters())))
        loss = accumulate_gradients(*arguments)
        if fault == "spike":
            for parameter in run.model.parameters():
                parameter.grad.mul_(50)
            return 50 * loss
        if ranks.rank != rank:
            return loss
        if fault == "gradient":
            _break(next(iter(run.model.parameters())).grad)
        return loss * float("inf") if fault == "loss" else loss

    run.forward_backward.accumulate_gradients = faulty
    try:
        pretrain.train(run)
    except UserError as error:
        return str(error)
    return None


def _break(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        _local(tensor).view(-1)[3] = float("nan")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_short(ranks: Ranks, path: Path, overrides: list[str], file: Path) -> str:
    """What the run says when ``file`` of its data is emptied behind its back, after the first step."""
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)

    def cut():
        if run.progress.step == 1 and ranks.is_main:
            os.truncate(file, 0)

    tiny_run.before_step(run, cut)
    try:
        pretrain.train(run)
    except UserError as error:
        return str(error)
    raise AssertionError("the run went through")


def train_without(ranks: Ranks, path: Path, overrides: list[str], left_out: set[int]) -> None:
    """The oracle: an undisturbed run, of whose steps ``left_out`` every weight and moment is put back afterwards.

    PyTorch's AdamW does not count the steps that it leaves out; ours counts them.
    """
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
    update = run.optimizer.step
    counts = isinstance(run.optimizer, torch.optim.AdamW)

    def step():
        if run.progress.step + 1 not in left_out:
            return update()
        tensors = dict(run.model.named_parameters()) | optimizer_tensors(run.model, run.optimizer)
        tensors = {name: t for name, t in tensors.items() if counts or not name.startswith("optimizer.step.")}
        before = {name: _local(tensor).clone() for name, tensor in tensors.items()}
        update()
        with torch.no_grad():
            for name, tensor in tensors.items():
                _local(tensor).copy_(before[name])

    run.optimizer.step = step
    pretrain.train(run)


class Killed(BaseException):
    """The end of a run that nobody could prepare for."""


def train_on_bad_samples(
    ranks: Ranks, path: Path, overrides: list[str], bad: set[int], killed_in: str | int | None = None
) -> str | None:
    """The run, in which loss and gradients are 50 times as large in steps that begin with one of the samples ``bad``;
    what it says if it gives up.

    Args:
        ranks: that train together.
        path: of the configuration.
        overrides: of it.
        bad: numbers of samples.
        killed_in: what the run dies of: ``rewind``, before weights are read; a number: so many steps after a rewind.
    """
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
    accumulate_gradients, discard_after = run.forward_backward.accumulate_gradients, run.store.discard_after
    left = math.inf

    def train(*arguments):
        loss = accumulate_gradients(*arguments)
        if run.progress.samples not in bad:
            return loss
        for parameter in run.model.parameters():
            parameter.grad.mul_(50)
        return 50 * loss

    def abandoning(step):
        nonlocal left
        lines = discard_after(step)
        if killed_in == "rewind":
            raise Killed
        left = killed_in or math.inf
        return lines

    def count_down():
        nonlocal left
        if left == 0:
            run.saver.wait()
            raise Killed
        left -= 1

    run.forward_backward.accumulate_gradients, run.store.discard_after = train, abandoning
    tiny_run.before_step(run, count_down)
    try:
        pretrain.train(run)
    except Killed:
        return "killed"
    except UserError as error:
        return str(error)
    return None


def train_from_sample(ranks: Ranks, path: Path, overrides: list[str], first_sample: int) -> None:
    """The run, which goes on from its checkpoint with sample ``first_sample``: an oracle."""
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
    run.progress = dataclasses.replace(run.progress, samples=first_sample)
    pretrain.train(run)
