"""Run transformers' model in a plain PyTorch loop: eager, compiled, or with a chunked loss as in torchtitan."""

from __future__ import annotations

from typing import Any

import torch

from .hugging_face import ChunkedLossModel, build_model
from .job import Clock, Job, optimizer_groups


def run(job: Job, engine: str) -> dict[str, Any]:
    """Train and measure. ``engine``: loop, then any of +compile, +chunked."""
    extras, model = engine.split("+")[1:], build_model(job)
    if job.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(
        optimizer_groups(model, job), lr=job.learning_rate, betas=(job.beta1, job.beta2), eps=job.eps, fused=True
    )
    compiled = "compile" in extras
    if "chunked" in extras:
        model = ChunkedLossModel(model, compiled)
    elif compiled:
        model = torch.compile(model)
    clock = Clock(job)
    clock.ready()
    for tokens in torch.from_numpy(job.batches()):
        on_device = tokens.to(job.device, non_blocking=True)
        with torch.autocast(job.device, torch.bfloat16, enabled=job.precision == "bf16"):
            # Each sample is a document: the model shifts the labels, so the last token of each has no target.
            loss = model(input_ids=on_device, labels=on_device)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        clock.step_done(loss.detach())
    return clock.record()
