"""Settings of the token budget, of a step and of its safeguards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from .marks import Switch


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """End the run before its budget is used up, when a validation loss no longer falls."""

    patience: int | None = None
    """Number of evaluations in a row, none of which has a new lowest loss, after which the run ends: all ranks save the
    same step as the final one, and export it if configured. The same command does not continue it; a higher patience or
    null does. Null: no early stopping."""
    min_delta: float = 0.0
    """How much a loss must be below the lowest one before to count as a new lowest one, in nats per token."""
    metric: str | None = None
    """Name of the validation set whose loss decides. Null: the first one, as for ``checkpoint.keep_best``."""


@dataclass(frozen=True)
class TrainingConfig:
    """The token budget and the shape of a step. Progress is measured in tokens; the number of steps is derived."""

    train_tokens: int | None = None
    """Total number of tokens to train on, rounded up to complete steps. Give this, ``train_steps`` or ``train_epochs``.
    Those of a later file or option replace the ones before it."""
    train_steps: int | None = None
    """Instead of ``train_tokens``: number of optimizer steps of the whole run. It is converted to tokens with the
    present ``global_batch_size`` and ``sequence_length``."""
    train_epochs: float | None = None
    """Instead of ``train_tokens``: number of epochs, such as 3 or 0.5. An epoch is as many tokens as all training
    sources have together. Weights decide how much each source gives to it; the start summary shows the epochs of each.
    Not with ``data.stages``."""
    warmup_tokens: int | None = None
    """Number of tokens over which the learning rate rises linearly from zero to its peak. Null, without
    ``warmup_steps`` and ``warmup_ratio``: no warm-up."""
    warmup_steps: int | None = None
    """Instead of ``warmup_tokens``: number of steps of the warm-up."""
    warmup_ratio: float | None = None
    """Instead of ``warmup_tokens``: warm-up as a fraction of the schedule, which is the whole run unless
    ``optimizer.schedule_start_tokens`` is set."""
    sequence_length: int = 1024
    """Number of tokens in one sample."""
    global_batch_size: int = 32
    """Number of samples in one optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int = 1
    """Number of samples in one forward and backward pass of a rank. It changes memory and speed; results change only by
    rounding."""
    trainable: Literal["all", "embeddings"] | list[str] = "all"
    """Trainable parameters. embeddings: only those of the tokens (``model.embed_tokens`` and ``lm_head``), as a first
    phase after tools/extend_vocab.py; see docs/vocabulary.md. A list: those whose names match one of its shell
    patterns, in which ``*`` is any text: ``["model.layers.2[0-9].*", "*norm*"]`` trains layers 20 to 29 and all norms.
    All other parameters have no gradients and no optimizer states, and stay bitwise the same."""
    neftune_alpha: float | None = None
    """Strength of noise on the embeddings during training (NEFTune), such as 5: uniform in [-1, 1] times neftune_alpha
    / sqrt(``sequence_length`` x hidden size). It makes fine-tuning on few examples overfit less. The noise is a
    function of seed, sample and place, the same in every layout. Null: none."""
    z_loss: float = 0.0
    """Factor of a penalty on large logits, such as 1e-4: z_loss x (log of the sum of exp(logits))^2 of each token. It
    keeps long runs in bf16 stable. Only gradients contain it; the losses that are shown are those of the language
    model. The metrics show its mean over all targets as ``z_loss``, without the factor. 0: none."""
    router_aux_loss_coef: float | None = None
    """Factor of the load-balancing loss of a mixture of experts, a mean over its layers and over all tokens of the
    global batch. It keeps the load of the experts even. Null: ``router_aux_loss_coef`` of the model's config.json, or
    0 if it has none. 0: no loss. Only gradients contain it; the metrics show it as ``router_aux_loss``. See "Router
    losses" in docs/training_methods.md."""
    router_z_loss_coef: float = 0.0
    """Factor of a penalty on large logits of routers, such as 1e-3: (log of the sum of exp(logits))^2, a mean over the
    layers with experts and over all tokens. Only gradients contain it; the metrics show it as ``router_z_loss``.
    0: none."""
    router_bias_update_rate: float = 0.001
    """For models whose routers choose experts with a bias (DeepSeek-V3): how much the bias of an expert rises after a
    step in which the expert had less than the mean load, or falls after one with more. 0.001 is the rate with which
    such models are pretrained. A bias moves only if the weight of its router is trained. 0: it stays as it is."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Compute dtype. auto: bf16 where the hardware supports it natively (GPUs since Ampere, CPUs with AVX512-BF16, AMX
    or Arm BF16), else fp16 on a GPU (V100, T4) and fp32 on a CPU; the start summary shows the choice and its reason.
    fp16: with dynamic loss scaling and fp32 weights. Gradients are reduced over ranks in fp32."""
    initial_loss_scale: float = 65536.0
    """Factor of the loss in the backward pass of the first step with ``precision`` fp16, a power of two. A step whose
    gradients overflow is skipped and halves the factor; ``loss_scale_window`` steps without overflow double it. These
    steps do not count towards ``max_skipped_steps``; the metrics have both numbers (``loss_scale``,
    ``overflow_steps``)."""
    loss_scale_window: int = 2000
    """Number of steps without overflow after which the loss scale of ``precision`` fp16 is doubled."""
    min_loss_scale: float = 1.0
    """Smallest loss scale of ``precision`` fp16. If gradients overflow with it as well, the run ends."""
    weight_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the weights between steps. fp32: exact master weights. bf16: no fp32 copy exists. Each update is
    computed in fp32 and written back with stochastic rounding, so that small updates are kept on average. A run can
    resume with wider dtypes than those of its checkpoint, never with narrower ones.

    Bytes per parameter for weight, both moments and gradient, over all ranks that share a copy of the model: 4 + 8 + 4
    = 16 with fp32 (7.6 billion parameters: 122 GB), 4 + 4 + 4 = 12 with ``optimizer.state_dtype`` bf16 (91 GB), 2 + 8 +
    2 = 12 with ``weight_dtype`` bf16 (91 GB), 2 + 4 + 2 = 8 with both (61 GB). With bf16 weights, several micro-batches
    in a step need 2 more, because their gradients are accumulated in fp32. With ``precision`` bf16, each rank needs 2
    more for the parameters that it gathers."""
    attention_backend: Literal["auto", "fa4", "fa3", "sdpa", "flash_attn", "varlen", "flex", "per_document"] = "auto"
    """Attention implementation. auto: the fastest that works here; the start summary shows the choice and its reason.
    It may be another one for micro-batches whose documents have one length. fa4, fa3: FlashAttention-4 or -3 through
    PyTorch. sdpa: PyTorch's fused kernels, cuDNN's first, only with ``data.attend_across_documents``. flash_attn: the
    flash-attn package. varlen: the FlashAttention-2 in PyTorch. flex: FlexAttention. per_document: PyTorch's SDPA for
    one document at a time, works everywhere. Only flash_attn, flex, sdpa and per_document can cap scores (Gemma 2),
    and only the last three have attention sinks (gpt-oss)."""
    compile: Annotated[Literal["auto", "on", "off"], Switch("on", "off")] = "auto"
    """Compile every block with torch.compile. Steps are faster after about a minute of compilation, and results differ
    by rounding. auto: on for a GPU if the attention kernel can be part of a compiled block."""
    float8: bool = False
    """Compute the blocks' linear layers in float8 (torchao; GPUs of compute capability 8.9 or newer). The head and
    the experts of a mixture stay in ``precision``. Stored weights and optimizer states do not change."""
    fuse_projections: bool = False
    """Compute queries, keys and values by one matrix product, and gate and up by another. Their weights are views of
    one matrix; parameters and checkpoints do not change, and results differ by rounding. Only for native models on one
    data-parallel rank, without tensor and pipeline parallelism. The gain on a GPU has not been measured."""
    gc_interval: int = 50
    """Number of steps between runs of Python's garbage collector on all ranks. Otherwise it is off during training: if
    ranks collected at different times, all would wait for each of them. 0: Python decides when to collect."""
    max_skipped_steps: int = 10
    """Maximum number of skipped steps in a row. A step with a non-finite loss or gradient is skipped: it changes no
    weights on any rank, and its samples and tokens count as used. One more ends the run, which names its newest
    checkpoint. 0: the first one ends the run."""
    loss_spike_zscore: float | None = None
    """Also skip steps whose loss is more than this many (robust) standard deviations above the median of the 64 losses
    before it, such as 10. They count towards ``max_skipped_steps``. Every step then waits for its loss before its
    update, which costs some time on a GPU. Null: no check."""
    loss_spike_action: Literal["skip", "rewind"] = "skip"
    """Reaction to a loss spike. skip: skip the step and continue. rewind: return to the newest undamaged checkpoint
    that is at least ``rewind_steps`` older, and train from there without the samples up to the spike. If no such
    checkpoint exists, the step is skipped."""
    rewind_steps: int = 100
    """Minimum number of steps to rewind after a loss spike. The actual number depends on the checkpoints that are kept:
    about twice as many if ``checkpoint.keep_last`` keeps none that old, else up to ``checkpoint.save_interval``
    more."""
    max_rewinds: int = 3
    """Maximum number of rewinds. The next loss spike ends the run."""
    check_replicas_interval: int = 0
    """Number of steps between checks that compare replicated weights and optimizer states bit for bit. A difference
    ends the run; the error names the ranks and the tensor. Copies and ranks that share matrices hold the same values;
    with plain sharding these are only constants, such as the biases by which routers choose experts. 0: never."""
    stop_after_minutes: float | None = None
    """Minutes after the start of the command at which the run saves, at the end of the step, and exits with status 0.
    For queues with a time limit: subtract the time of a step and of a checkpoint. The same command continues the run.
    Null: no limit."""
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    ema_decay: float | None = None
    """Also keep an exponential moving average of the trained weights, with this decay per step, such as 0.999: about
    the mean of the last 1 / (1 - decay) steps. It begins as the weights that the run starts from. Checkpoints contain
    it as ``ema.{parameter}``; ``eval_ema`` and ``checkpoint.export_ema`` use it. Null: none."""
    ema_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the average: 4 or 2 more bytes per trained parameter. bf16 is written with stochastic rounding."""
    eval_ema: bool = False
    """Evaluate the average instead of the weights, also for ``logging.sample_prompts`` and to find the best
    checkpoint, whose average ``best_model`` then contains. The weights are kept in host memory meanwhile."""
    eval_interval: int | Literal["epoch"] = 0
    """Number of steps between evaluations of the validation sets. epoch: evaluate at the end of every epoch, see
    ``train_epochs``. 0: only at the end."""
    eval_tokens: int = 1_000_000
    """Maximum number of tokens evaluated of each validation set: chunks spread evenly, the same ones each time. They
    are read once and kept in memory (24 bytes a token over all ranks)."""
    eval_at_start: bool = False
    """Evaluate once before the first step of a fresh run, and at the start of a run that has already used up its token
    budget."""

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens that one step consumes over all ranks."""
        return self.global_batch_size * self.sequence_length

    @property
    def budget(self) -> int:
        """``train_tokens``, given or derived; see :func:`retemper.engine.config.budget.with_budget`."""
        assert self.train_tokens is not None, "with_budget() has not derived it"
        return self.train_tokens

    @property
    def warmup(self) -> int:
        """``warmup_tokens``, given or derived; 0 without a warm-up."""
        return self.warmup_tokens or 0

    @property
    def average_bytes(self) -> int:
        """Bytes of the average of the weights for each trained parameter."""
        return 0 if self.ema_decay is None else {"fp32": 4, "bf16": 2}[self.ema_dtype]
