"""Run transformers' Trainer: eager, with torch.compile, with regional compilation, with Liger's kernels, or with a
chunked loss as in torchtitan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainingArguments
from transformers import Trainer as HuggingFaceTrainer

from ..kernel.chunked_loss import chunked_cross_entropy, sum_of_losses
from .job import Clock, Job, draw


class OrderedTrainer(HuggingFaceTrainer):
    """The Trainer, reading its samples in order and reporting its losses."""

    loss: Tensor
    train_dataset: Any

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        """Run a micro-batch and keep its loss."""
        self.loss = super().training_step(*arguments, **keywords)
        return self.loss


class _Timer(TrainerCallback):
    def __init__(self, trainer: OrderedTrainer, clock: Clock):
        self.trainer, self.clock = trainer, clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.ready()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.step_done(self.trainer.loss)


class ChunkedLossModel(nn.Module):
    """The model with its head and loss computed in chunks of the sequence, as in torchtitan."""

    decoder: Any

    def __init__(self, model: Any, compiled: bool):
        super().__init__()
        self.model = model
        decoder = model.model
        # A plain attribute, so that the parameters are registered only once.
        self.__dict__["decoder"] = torch.compile(decoder) if compiled else decoder
        self.chunk_loss = torch.compile(sum_of_losses) if compiled else sum_of_losses

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the mean loss over all tokens but the first of each sample."""
        hidden = self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        loss = chunked_cross_entropy(
            hidden.flatten(0, 1), self.model.lm_head.weight, targets.flatten(), self.chunk_loss
        )
        return {"loss": loss}


def build_model(job: Job) -> Any:
    """Return transformers' model with the job's weights, in bf16 if the job's weights are."""
    options = {key: value for key, value in job.architecture.items() if key != "model_type"}
    config = AutoConfig.for_model(job.architecture["model_type"], **options)
    config.use_cache = False
    dtype = torch.bfloat16 if job.precision == "bf16-states" else torch.float32
    with torch.device(job.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw(name, parameter.shape, job))
    return model


def run(job: Job, engine: str) -> dict[str, Any]:
    """Train and measure. ``engine``: trainer, then any of +compile, +regional, +liger, +chunked."""
    extras, model = engine.split("+")[1:], build_model(job)
    if "regional" in extras:  # as PyTorch recommends for repeated blocks: all of them share the compiled code
        for block in model.model.layers:
            block.compile()
    checkpointing = {"use_reentrant": False}
    chunked = "chunked" in extras
    if chunked:
        if job.recompute:
            model.gradient_checkpointing_enable(checkpointing)
        model = ChunkedLossModel(model, "compile" in extras)
    arguments = TrainingArguments(
        output_dir=str(Path(job.folder) / "trainer"),
        per_device_train_batch_size=job.batch_size,
        max_steps=job.total_steps,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=job.weight_decay,
        adam_beta1=job.beta1,
        adam_beta2=job.beta2,
        adam_epsilon=job.eps,
        max_grad_norm=job.clip_grad_norm,
        optim="adamw_torch_fused",
        bf16=job.precision == "bf16",
        use_cpu=job.device == "cpu",
        gradient_checkpointing=job.recompute and not chunked,
        gradient_checkpointing_kwargs=checkpointing if job.recompute and not chunked else None,
        torch_compile="compile" in extras and not chunked,
        use_liger_kernel="liger" in extras,
        # In the Trainer's favour: it logs nothing, and no step waits to check for NaN.
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job.seed,
    )
    rows = torch.from_numpy(job.batches()).flatten(0, 1)
    # Each sample is a document: the model shifts the labels, so the last token of each has no target, as in ours.
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    clock = Clock(job)
    trainer = OrderedTrainer(model=model, args=arguments, train_dataset=dataset)
    trainer.add_callback(_Timer(trainer, clock))
    trainer.train()
    return clock.record()
