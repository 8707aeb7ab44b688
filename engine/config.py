"""Every setting of a run, once: typed, documented, and checked.

A run is described by one YAML file whose keys are the fields below; every key can be overridden on the command line
(``--optimizer.learning_rate 3e-5``). How files and options are read is in :mod:`retemper.engine.config_parser`, what
no machine could run is refused in :mod:`retemper.engine.config_checks`; what depends on the number of ranks is checked
in :mod:`retemper.engine.budget` and :mod:`retemper.engine.parallel.mesh`. Values without effect are found by
:mod:`retemper.engine.config_effect`, where every new setting needs an entry.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from .config_yaml import dump_yaml

PATH_MARK = "a path: ~ and $VARIABLE are expanded when the configuration is read"
FilePath = Annotated[str, PATH_MARK]
"""Type of every setting that names a file or folder, or may do so."""


@dataclass(frozen=True)
class Switch:
    """What ``true`` (``yes``, ``on``) and ``false`` (``no``, ``off``) mean to a setting with more than two values."""

    true: str
    false: str


@dataclass(frozen=True)
class SourceConfig:
    """One training dataset of the blend."""

    path: FilePath
    """Prefix of the dataset: ``{path}.bin`` and ``{path}.idx``, as written by tools/preprocess.py or Megatron-LM."""
    weight: float = 1.0
    """Share of the training tokens (or documents, see ``data.weights``) that come from this source, relative to the sum
    of all weights."""
    name: str | None = None
    """Name in logs, and the identity that keeps the source's place when the blend or the stage changes. Default: the
    prefix's last component."""
    max_epochs: float | None = None
    """Go through the source at most so often, counted from the start of the run over all stages, in whole samples
    rounded down; from then on its share goes to the others in proportion. Null: as often as its weight asks for."""
    max_tokens: int | None = None
    """The same as a number of tokens. With both, the smaller one counts."""

    @property
    def identity(self) -> str:
        """The name that stands for this source in logs, checkpoints and the key of its sample order."""
        return self.name if self.name is not None else Path(self.path).name


@dataclass(frozen=True)
class StageConfig:
    """A part of the run with a blend of its own."""

    train: list[SourceConfig]
    """Weighted datasets of the stage. A source of a former stage (by name) goes on from its place there."""
    train_tokens: int | None = None
    """Length of the stage, on the clock of ``training.train_tokens``. Stages change between samples: a stage ends with
    the sample that reaches the sum of its and all former stages' tokens. Null, in the last stage only: the rest. The
    last stage also fills the run's last step, which is a whole one."""


@dataclass(frozen=True)
class DataConfig:
    """What is read, and in which order."""

    train: list[SourceConfig] = field(default_factory=list)
    """Weighted datasets to train on. Needed unless there are ``stages``."""
    stages: list[StageConfig] = field(default_factory=list)
    """A curriculum: blends that follow one another, each for a number of tokens. Instead of ``train``."""
    weights: Literal["tokens", "documents"] = "tokens"
    """What weights are shares of. documents: a source's share of the tokens is its weight times the mean length of its
    documents."""
    shuffle: Literal["windows", "documents"] = "windows"
    """What is shuffled anew in every epoch of a source. windows: all windows of sequence_length tokens of the source,
    read as they lie in the file. documents: besides, the documents within every group of 128 consecutive windows, of
    which the windows are then made."""
    packing: Literal["concat", "best_fit"] = "concat"
    """How windows are made of documents. concat: one behind the other, cut every sequence_length tokens. best_fit: the
    documents of 128 consecutive windows are put together so that nearly all that fit in a window stay whole. Both use
    every token and pad nothing. Validation sets are read with concat, as they lie in the file."""
    validation: dict[str, FilePath] = field(default_factory=dict)
    """Named validation datasets: name -> prefix."""
    validation_fraction: float = 0.0
    """Share of each training source's last documents that is held out and evaluated as the set ``held_out``."""
    attend_across_documents: bool = False
    """Let packed documents see each other, and predict a document's first token from its neighbour. Off: attention and
    positions restart at every document, and targets that would cross a boundary are masked."""
    prefetch_steps: int = 2
    """Global batches that a background thread prepares ahead of the step."""


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and which weights it starts from."""

    initialize_from: FilePath | None = None
    """What the run starts from: a checkpoint folder (made by checkpoint_convert/hf_to_dcp.py, or by a former run), the
    folder of a run, which means its newest checkpoint, a Hugging Face folder, or a model's name on the Hub
    (namespace/name), which is downloaded. Null: random initialization from ``architecture``."""
    architecture: dict | FilePath | None = None
    """Hugging Face ``config.json``: its keys written here, or the path of the file or its folder. Null: the one kept in
    ``initialize_from``."""
    tokenizer: FilePath | None = None
    """Hugging Face folder with the tokenizer that the datasets must have been made with, and that exports carry. Null:
    the one kept in ``initialize_from``, if any."""


@dataclass(frozen=True)
class TrainingConfig:
    """The token budget and the shape of a step. The clock of a run is tokens; steps are derived."""

    train_tokens: int
    """Tokens to train on in total; the last step is always a whole one."""
    warmup_tokens: int = 0
    """Tokens over which the learning rate rises linearly from zero to its peak."""
    sequence_length: int = 1024
    """Tokens in one sample."""
    global_batch_size: int = 32
    """Samples in one optimizer step, over all ranks and all micro-batches."""
    micro_batch_size: int = 1
    """Samples that one rank runs forward and backward at a time. Changes memory and speed, never the result's
    meaning."""
    trainable: Literal["all", "embeddings"] = "all"
    """Which parameters learn. embeddings: those of the tokens, in and out (``model.embed_tokens`` and ``lm_head``): a
    first stage after tools/extend_vocab.py. The others have no gradients and no states, and stay bitwise as they are;
    see docs/vocabulary.md."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute dtype. auto: bf16 where the hardware computes it natively (GPUs since Ampere, CPUs with AVX512-BF16, AMX
    or Arm BF16), else fp32; the start summary says which and why. Gradients are reduced over ranks in fp32."""
    weight_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which weights are kept between steps. fp32: exact master weights. bf16: there are no others; each update
    is computed in fp32 and written back with stochastic rounding, so that small updates are kept on average.

    Bytes per parameter over all ranks that share a copy, as weight + both moments + gradient (and on each rank 2 more
    for what is gathered in precision bf16):

    - weight_dtype fp32, optimizer.state_dtype fp32: 4 + 8 + 4 = 16 (7.6 billion parameters: 122 GB)
    - weight_dtype fp32, optimizer.state_dtype bf16: 4 + 4 + 4 = 12 (91 GB)
    - weight_dtype bf16, optimizer.state_dtype fp32: 2 + 8 + 2 = 12 (91 GB); 14 with several micro-batches in a step
    - weight_dtype bf16, optimizer.state_dtype bf16: 2 + 4 + 2 = 8 (61 GB); 10 with several micro-batches in a step

    Several micro-batches are added up in an fp32 gradient. A run resumes with wider dtypes than its checkpoint's, never
    with narrower ones."""
    attention_backend: Literal["auto", "fa4", "fa3", "sdpa", "flash_attn", "varlen", "flex", "per_document"] = "auto"
    """What computes the attention. auto: the fastest that works here; the start summary says which and why. fa4, fa3:
    FlashAttention-4 or -3 through PyTorch. sdpa: PyTorch's fused kernels, cuDNN's first, only with
    ``data.attend_across_documents``. flash_attn: the flash-attn package. varlen: the FlashAttention-2 in PyTorch. flex:
    FlexAttention. per_document: PyTorch's SDPA for one document after the other, everywhere."""
    compile: Annotated[Literal["auto", "on", "off"], Switch("on", "off")] = "auto"
    """Compile every block with torch.compile: faster steps after a minute of compiling, other roundings. auto: on a GPU
    whose attention kernel can be part of a compiled block."""
    float8: bool = False
    """Compute the blocks' linear layers in float8 (torchao; GPUs of compute capability 8.9 or newer). The head is left
    out, and weights and states are kept as without."""
    gc_interval: int = 50
    """Steps between collections of Python's garbage, which does not collect by itself while training: collections at
    different moments on different ranks make all of them wait each time. 0 leaves it to Python."""
    max_skipped_steps: int = 10
    """A step whose loss or gradient is not finite changes no weight on any rank; its samples and tokens count as used.
    With more than this many such steps in a row the run ends, and names its newest checkpoint. 0: with the first."""
    loss_spike_zscore: float | None = None
    """Also skip steps whose loss lies more than this many (robust) standard deviations above the median of the 64
    losses before it, such as 10. They count for ``max_skipped_steps``. Every step then waits for its loss before its
    update, which costs a GPU some time. Null: no guard."""
    loss_spike_action: Literal["skip", "rewind"] = "skip"
    """What follows a loss spike. skip: the next step. rewind: going back to the newest undamaged checkpoint that is at
    least ``rewind_steps`` older, and from there on around all samples up to the spike; where there is none, as skip."""
    rewind_steps: int = 100
    """Steps, at least, to go back before a loss spike. The checkpoints that are kept decide how many more: about as
    many again where ``checkpoint.keep_last`` keeps none that old; else up to ``checkpoint.save_interval``."""
    max_rewinds: int = 3
    """A loss spike after so many rewinds ends the run."""
    check_replicas_interval: int = 0
    """Steps between comparisons of what several ranks hold alike: weights and optimizer states, bit for bit. A
    difference ends the run and names ranks and tensor. 0: never."""
    stop_after_minutes: float | None = None
    """Save and end with status 0 at the first step after so many minutes since the command's start, as if asked by a
    signal: for queues with a time limit, less what a step and a checkpoint take. The same command goes on. Null: no
    limit."""
    eval_interval: int = 0
    """Steps between evaluations of the validation sets; 0 evaluates only at the end."""
    eval_tokens: int = 1_000_000
    """At most this many tokens of each validation set are evaluated: windows spread evenly, the same ones each time,
    read once and kept in memory (24 bytes a token over all ranks)."""
    eval_at_start: bool = False
    """Evaluate once before the first step of a fresh run, and when a run is started whose budget is used up."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    learning_rate: float = 5e-5
    """Peak learning rate."""
    min_learning_rate: float = 5e-6
    """Learning rate at the end of the decay."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after warm-up: cosine or linear down to the minimum at ``train_tokens``; wsd stays at the peak and falls
    linearly over the last ``decay_tokens``; constant stays at the peak."""
    decay_tokens: int | None = None
    """Length of the wsd schedule's decay. Null: a tenth of the schedule."""
    schedule_start_tokens: int = 0
    """Where the schedule begins, on the clock of ``training.train_tokens``: to warm up once more when a run that has
    used up its budget gets a larger one, this is the former budget. That warm-up begins at the minimum instead of
    zero, ``training.warmup_tokens`` later the peak is reached, and the decay goes on until ``train_tokens``."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases have none."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """AdamW's denominator term."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of AdamW's two moments: 8 or 4 bytes per parameter, see ``training.weight_dtype``. bf16 is written with
    stochastic rounding after a step computed in fp32."""
    clip_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks are laid out: pipeline x replicate x shard x context x tensor = number of ranks

    Every layout computes the same numbers, up to the order of sums.
    """

    pipeline: int = 1
    """Groups of ranks that hold consecutive layers and pass hidden states on. The micro-batches of a step keep them
    busy, so there must be at least as many."""
    replicate: int = 1
    """Copies of the sharded model (hybrid sharding when > 1). With ``shard`` 1: plain data parallelism."""
    shard: int | Literal["auto"] = "auto"
    """Ranks over which parameters, gradients and states are sharded (FSDP2). auto: what the other axes leave."""
    context: int = 1
    """Ranks that share the tokens of the same samples, for long sequences: attention exchanges heads for tokens."""
    tensor: int = 1
    """Ranks that share every matrix, and, outside of them, the tokens (tensor and sequence parallelism). They exchange
    activations in every block: keep them in one node."""
    pipeline_schedule: Literal["1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"] = "1f1b"
    """Order of the micro-batches' passes. 1f1b: one group of layers on each rank. The others: several, which leaves
    ranks less idle and sends more."""
    pipeline_stages_per_rank: int = 1
    """Groups of layers on each rank: 1 with 1f1b, 2 with zbv_zero_bubble, 2 or more with the interleaved schedules."""
    async_tensor: bool = False
    """Exchange activations of tensor parallelism in pieces, while the products of other pieces compute. On GPUs with
    NVLink whose blocks are compiled."""
    cpu_offload: bool = False
    """Keep parameters, gradients and states in host memory, and step the optimizer there: for models that no other
    layout fits. Slow."""
    reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward pass (ZeRO-3): less memory, one more all-gather in the
    backward. False shards gradients and states only (ZeRO-2)."""
    reduce_gradients: Literal["micro_batch", "step"] = "micro_batch"
    """When ranks add up their gradients. step: once, after the last micro-batch: less communication, but every rank
    holds whole gradients of its layers in fp32 until then. Pipelines always do."""
    prefetch_blocks: int = 1
    """Blocks whose parameters are gathered while the block before them computes, forward and backward; each costs the
    memory of one gathered block. 0 leaves the order to PyTorch. Changes speed, never the result."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What a block's backward pass computes again instead of keeping it. selective: norms, rotations and activations,
    while the outputs of matrix products and attention are kept. full: all but the block's input. Same numbers."""
    recompute_every: int = 1
    """Recompute in every n-th block only; the others keep everything."""
    timeout_seconds: int = 600
    """A collective that waits longer than this, a rank that is silent for longer, or a step that comes no further ends
    the run; see docs/cluster.md."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    save_interval: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    asynchronous: bool = True
    """Go on training while a checkpoint is written. This rank's part of weights and states is copied to host memory
    meanwhile, which is kept for that (12 bytes per parameter for each copy of the model, with fp32 weights and states);
    the next update waits for the copies, nothing waits for the disk. False: training waits, and needs no memory."""
    max_failed_saves: int = 2
    """A checkpoint that cannot be written, as when the disk is full, leaves nothing behind, and the next one is tried.
    With more than this many in a row the run ends. A checkpoint at which the run would stop must succeed."""
    keep_last: int = 3
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Also keep the checkpoints whose step is a multiple of this; 0: none for that."""
    keep_best: bool | Literal["improved"] = True
    """With validation sets: also keep the checkpoint with the lowest loss of the first one. true: the best of the
    checkpoints that are saved at a step with an evaluation; choose ``save_interval`` as a multiple of
    ``training.eval_interval``. improved: also save at every evaluation that is the best so far, which early in a run
    can be each of them. false: no checkpoint is kept for its loss."""
    export_hf: bool = False
    """When the budget is used up, also write the final checkpoint as a Hugging Face folder,
    ``{run_folder}/hf/step-...``: what checkpoint_convert/dcp_to_hf.py makes of it."""
    push_to_hub: str | None = None
    """Upload that folder to this model repository (namespace/name), which is made at the start if there is none:
    private, as long as you do not change that. The token comes from HF_TOKEN or `hf auth login`; see
    docs/hugging_face.md."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is reported."""

    log_interval: int = 1
    """Steps between console lines and metric records."""
    stragglers: bool = True
    """With several ranks: record the slowest rank's times for data, blocks and waiting; say who keeps the others."""
    tensorboard: bool = True
    """Write TensorBoard events under ``{run_folder}/tensorboard``."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    run_folder: FilePath
    """Folder of checkpoints, metrics, TensorBoard events, the log and the resolved config."""
    data: DataConfig
    training: TrainingConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    seed: int = 1234
    """Seed of the sample order and of random initialization."""
    allow_changes: list[str] = field(default_factory=list)
    """Changes since the checkpoint that a run goes on from which are refused unless they are named here: seed,
    training.sequence_length, data.validation_fraction, data.shuffle, data.packing, and data_files (other tokens or
    masks in a dataset of the same name). Each source goes on after as many samples as it has given, so that some may
    come again before others come at all. What else changes is listed at the start."""
    resume: Annotated[FilePath, Switch("auto", "none")] = "auto"
    """auto (or true, yes, on): continue from the newest undamaged checkpoint in ``run_folder``, or start fresh if there
    never was one. none (or false, no, off): start fresh, refused where checkpoints exist. Anything else: path of the
    checkpoint to continue from. The same command again, after an interruption, continues from the newest checkpoint
    that the run has written since."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA where there is a GPU, else CPU."""


ORDER_KEYS = {
    "seed": None,
    "training.sequence_length": None,
    "data.validation_fraction": None,
    "data.shuffle": "windows",
    "data.packing": "concat",
}
"""Settings that decide what the n-th sample of a source is, and what runs did before there was the setting."""
DATA_FILES = "data_files"
"""Name of a change of the tokens or masks of a dataset that keeps its name."""
ALLOWABLE_CHANGES = (*ORDER_KEYS, DATA_FILES)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionary of a configuration, for YAML, JSON and manifests."""
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as a YAML text that ``--config`` reads back unchanged."""
    return dump_yaml(to_dict(config))
