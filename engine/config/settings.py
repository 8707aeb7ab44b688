"""The settings of a run, each defined once: typed, documented, and checked.

One YAML file describes a run; its keys are the fields below. The command line can override every key
(``--optimizer.learning_rate 3e-5``). :mod:`retemper.engine.config.parser` reads files and options.
:mod:`retemper.engine.config.checks` refuses values that no machine could run. :mod:`retemper.engine.schedule` and
:mod:`retemper.engine.parallel.mesh` check what depends on the number of ranks. :mod:`retemper.engine.config.effects`
finds values without effect; every new setting needs an entry there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ..files.masking import without_signature
from .yaml_loader import dump_yaml

PATH_MARK = "a path: ~ and $VARIABLE are expanded when the configuration is read"
FilePath = Annotated[str, PATH_MARK]
"""Type of every setting that is the name of a file or folder, or can be one."""
URL_MARK = "a URL is also possible"
DataPath = Annotated[str, PATH_MARK, URL_MARK]
"""Type of every setting that is the path of data, or its URL (hf://, s3://, gs://)."""


@dataclass(frozen=True)
class Switch:
    """The values that ``true`` (``yes``, ``on``) and ``false`` (``no``, ``off``) select in a setting with more than two
    values.
    """

    true: str
    false: str


@dataclass(frozen=True)
class SourceConfig:
    """One training dataset of the mixture, or text."""

    path: DataPath
    """A dataset or text. Dataset: its prefix, ``{path}.bin`` and ``{path}.idx``, as written by tools/preprocess.py or
    Megatron-LM. Text: a file, folder, pattern or URL (``hf://namespace/name``, ``s3://``, ``gs://``) that
    tools/preprocess.py reads. Before the training, it is tokenized into ``data.cache_folder``, where the next start
    finds it."""
    weight: float = 1.0
    """Share of the training tokens (or documents, see ``data.weights``) that come from this source, relative to the sum
    of all weights."""
    name: str | None = None
    """Name in logs. It identifies the source, so that it keeps its position when the mixture or the stage changes.
    Default: the last component of ``path``."""
    max_epochs: float | None = None
    """Maximum number of epochs over this source, counted from the start of the run across all stages, and rounded down
    to whole samples. When it is reached, the share of this source goes to the other sources in proportion. Null: no
    limit."""
    max_tokens: int | None = None
    """The same limit in tokens. If both are set, the smaller one applies."""
    column: str | None = None
    """For text: key or column of the text, as ``--json-key`` of tools/preprocess.py. Null: ``text``."""
    split: str | None = None
    """For text from the Hub (``hf://``): split of the dataset. Null: ``train``."""
    subset: str | None = None
    """For text from the Hub (``hf://``): subset (configuration) of the dataset. Null: its default."""
    validation_fraction: float = 0.0
    """For text: fraction of its documents that is held out and evaluated as the validation set with the name of this
    source, before those of ``data.validation``. A hash of each document decides, so copies of a text are on the same
    side."""
    preprocess: dict | None = None
    """For text: more options of tools/preprocess.py, without dashes: ``{dedup: exact, min_chars: 200}``.
    Null: none."""

    @property
    def identity(self) -> str:
        """Name of this source in logs and checkpoints, and key of its sample order."""
        return self.name if self.name is not None else Path(without_signature(self.path)).name

    @property
    def for_text(self) -> dict[str, Any]:
        """Settings of this source that only text has, as far as they are set."""
        keys = ("column", "split", "subset", "validation_fraction", "preprocess")
        return {key: value for key in keys if (value := getattr(self, key))}


@dataclass(frozen=True)
class StageConfig:
    """A part of the run with its own mixture."""

    train: list[SourceConfig]
    """Weighted datasets of the stage. A source that an earlier stage also has (by name) continues from its
    position there."""
    train_tokens: int | None = None
    """Length of the stage in tokens, counted as in ``training.train_tokens``. Stages change between samples: a stage
    ends with the sample that reaches the sum of its tokens and those of all earlier stages. Null, in the last stage
    only: the rest of the run. The last stage also provides the samples that complete the run's last step."""


@dataclass(frozen=True)
class DataConfig:
    """Data of the run, and the order in which it is read."""

    train: list[SourceConfig] = field(default_factory=list)
    """Weighted datasets to train on. Required unless ``stages`` is set."""
    stages: list[StageConfig] = field(default_factory=list)
    """A curriculum: mixtures used one after another, each for a number of tokens. Replaces ``train``."""
    weights: Literal["tokens", "documents"] = "tokens"
    """Unit of the weights. tokens: shares of the tokens. documents: shares of the documents; a source's share of the
    tokens is its weight times the mean length of its documents."""
    shuffle: Literal["windows", "documents"] = "windows"
    """Unit of shuffling in every epoch of a source. windows: all chunks of sequence_length tokens, as they are in the
    file. documents: additionally, the documents within every group of 128 consecutive chunks, before they are cut into
    chunks."""
    packing: Literal["concat", "best_fit"] = "concat"
    """Arrangement of documents in chunks. concat: documents follow each other and are cut every sequence_length
    tokens. best_fit: the documents of 128 consecutive chunks are arranged so that nearly all documents that fit in a
    chunk stay whole. Both use every token and add no padding. Validation sets always use concat in file order."""
    validation: dict[str, DataPath] = field(default_factory=dict)
    """Named validation sets: name -> prefix of a dataset, or text as in ``data.train``."""
    cache_folder: FilePath | None = None
    """Folder in which datasets made from text are kept, named by the content of the text. With several nodes it must
    be on shared storage. Null: the environment variable RETEMPER_CACHE, or ``~/.cache/retemper``."""
    validation_fraction: float = 0.0
    """Fraction of each training source's documents, taken from its end, that is held out and evaluated as the set
    ``held_out``."""
    attend_across_documents: bool = False
    """Let packed documents attend to each other, and predict a document's first token from the document before it.
    False: attention and positions restart at every document, and targets across a document boundary are masked."""
    prefetch_steps: int = 2
    """Number of global batches that a background thread prepares ahead of the step."""


@dataclass(frozen=True)
class RopeConfig:
    """Scaling of the rotary positions, which lengthens the context of a model."""

    kind: Literal["yarn", "linear", "llama3", "dynamic"] | None = None
    """Kind of scaling, by its name in transformers (``rope_type``). yarn needs the fewest tokens to adapt, and is the
    usual choice. Null: the model keeps its own positions."""
    factor: float = 1.0
    """New length divided by the model's ``max_position_embeddings``, which is raised by it."""


@dataclass(frozen=True)
class ModelConfig:
    """Model of the run, and its initial weights."""

    initialize_from: FilePath | None = None
    """Initial weights: a checkpoint folder (from checkpoint_convert/hf_to_dcp.py or an earlier run), a run folder (its
    newest checkpoint), a Hugging Face folder, or a model name on the Hub (namespace/name), which is downloaded. Null:
    random initialization from ``architecture``."""
    architecture: dict | FilePath | None = None
    """Hugging Face ``config.json``: its keys written here, or the path of the file or of its folder. Null: the one in
    ``initialize_from``."""
    implementation: Literal["auto", "native", "transformers"] = "auto"
    """Code that computes the model. native: this program's decoder. transformers: the modules of the transformers
    library with this program's attention and loss, for every causal language model there; without tensor and pipeline
    parallelism. auto: native for the families that it computes exactly, otherwise transformers; the start summary
    shows the choice and its reason. See docs/models.md."""
    dropout: Annotated[float, "0 only"] | None = None
    """0: train without the dropout of the model's ``config.json``, which is set to 0. Null: a config with dropout is
    refused, because dropout is not implemented."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Lengthen the context: ``{kind: yarn, factor: 4}``. The run changes the model's ``config.json`` before it builds
    the model. Checkpoints and exports contain the changed one, so the setting may stay when the run resumes."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model whose type transformers does not know (``auto_map`` in its
    ``config.json``). False: no code of a model runs, and such a model is refused. Checkpoints and exports contain the
    code, and commands that read them run it only if they are told so."""
    tokenizer: FilePath | None = None
    """Hugging Face folder with the tokenizer. The datasets must have been made with it, and exports contain it. Null:
    the tokenizer in ``initialize_from``, if it has one."""


@dataclass(frozen=True)
class TrainingConfig:
    """The token budget and the shape of a step. Progress is measured in tokens; the number of steps is derived."""

    train_tokens: int
    """Total number of tokens to train on, rounded up to complete steps."""
    warmup_tokens: int = 0
    """Number of tokens over which the learning rate rises linearly from zero to its peak."""
    sequence_length: int = 1024
    """Number of tokens in one sample."""
    global_batch_size: int = 32
    """Number of samples in one optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int = 1
    """Number of samples in one forward and backward pass of a rank. It changes memory and speed; results change only by
    rounding."""
    trainable: Literal["all", "embeddings"] = "all"
    """Trainable parameters. embeddings: only those of the tokens (``model.embed_tokens`` and ``lm_head``), as a first
    phase after tools/extend_vocab.py. All other parameters have no gradients and no optimizer states, and stay bitwise
    the same; see docs/vocabulary.md."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute dtype. auto: bf16 where the hardware supports it natively (GPUs since Ampere, CPUs with AVX512-BF16, AMX
    or Arm BF16), else fp32; the start summary shows the choice and its reason. Gradients are reduced over ranks in
    fp32."""
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
    """Compute the blocks' linear layers in float8 (torchao; GPUs of compute capability 8.9 or newer). The head stays in
    ``precision``. Stored weights and optimizer states do not change."""
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
    ends the run; the error names the ranks and the tensor. 0: never."""
    stop_after_minutes: float | None = None
    """Minutes after the start of the command at which the run saves, at the end of the step, and exits with status 0.
    For queues with a time limit: subtract the time of a step and of a checkpoint. The same command continues the run.
    Null: no limit."""
    eval_interval: int = 0
    """Number of steps between evaluations of the validation sets. 0: only at the end."""
    eval_tokens: int = 1_000_000
    """Maximum number of tokens evaluated of each validation set: chunks spread evenly, the same ones each time. They
    are read once and kept in memory (24 bytes a token over all ranks)."""
    eval_at_start: bool = False
    """Evaluate once before the first step of a fresh run, and at the start of a run that has already used up its token
    budget."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    learning_rate: float = 5e-5
    """Peak learning rate."""
    min_learning_rate: float = 5e-6
    """Learning rate at the end of the decay."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after the warm-up. cosine, linear: fall to the minimum at ``train_tokens``. wsd: stay at the peak and fall
    linearly over the last ``decay_tokens``. constant: stay at the peak."""
    decay_tokens: int | None = None
    """Length of the wsd schedule's decay. Null: a tenth of the schedule."""
    schedule_start_tokens: int = 0
    """Token count, on the scale of ``training.train_tokens``, at which the schedule begins. To train on with a
    second warm-up after the budget was raised, set it to the old budget. That warm-up begins at the minimum instead of
    zero. It reaches the peak ``training.warmup_tokens`` later, and the decay lasts until ``train_tokens``."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices. Norms and biases are not decayed."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """AdamW's denominator term."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of AdamW's two moments: 8 or 4 bytes per parameter, see ``training.weight_dtype``. bf16: updates are
    computed in fp32 and stored with stochastic rounding."""
    clip_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down. 0: no clipping."""


@dataclass(frozen=True)
class ParallelConfig:
    """Layout of the ranks: pipeline x replicate x shard x context x tensor = number of ranks.

    Every layout computes the same numbers, up to the order of sums.
    """

    pipeline: int = 1
    """Number of groups of ranks, each with some consecutive layers, that send hidden states to the next group. A step
    needs at least as many micro-batches, to keep all groups busy."""
    replicate: int = 1
    """Number of copies of the sharded model (hybrid sharding when > 1). With ``shard`` 1: plain data parallelism."""
    shard: int | Literal["auto"] = "auto"
    """Number of ranks over which parameters, gradients and optimizer states are sharded (FSDP2). auto: all ranks that
    the other axes do not use."""
    context: int = 1
    """Number of ranks that share the tokens of the same samples, for long sequences. Attention exchanges heads for
    tokens."""
    tensor: int = 1
    """Number of ranks that share every matrix and, between matrices, the tokens (tensor and sequence parallelism). They
    exchange activations in every block: keep them within one node."""
    pipeline_schedule: Literal["1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"] = "1f1b"
    """Order of the micro-batches' forward and backward passes. 1f1b: one group of layers on each rank. The others:
    several groups on each rank, for less idle time and more communication."""
    pipeline_stages_per_rank: int = 1
    """Groups of layers on each rank: 1 with 1f1b, 2 with zbv_zero_bubble, at least 2 with the interleaved schedules."""
    async_tensor: bool = False
    """Overlap the exchange of activations between tensor-parallel ranks with matrix products, piece by piece. For
    GPUs with NVLink and compiled blocks."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in host memory, and run the optimizer there. For models that fit
    in no other layout. Slow."""
    reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward pass (ZeRO-3): less memory, one more all-gather in the
    backward pass. False: shard gradients and states only (ZeRO-2). No effect if no other rank shares this rank's
    parameters; with fp32 weights and bf16 computation, such a rank keeps bf16 copies of them."""
    reduce_gradients: Literal["micro_batch", "step"] = "micro_batch"
    """How often ranks sum their gradients. micro_batch: after each micro-batch. step: after the last micro-batch of a
    step. This needs less communication, but until then every rank holds the full gradients of its layers in fp32.
    Pipelines always use step. No effect without other ranks."""
    prefetch_blocks: int = 1
    """Number of blocks whose parameters are gathered ahead of time, while an earlier block computes, in the forward and
    the backward pass. Each needs the memory of one gathered block. 0: PyTorch decides. Results are the same. No effect
    if no other rank shares this rank's parameters."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass of a block recomputes instead of storing them. selective: norms, rotations and
    activation functions; outputs of matrix products and attention are stored. full: everything except the block's
    input. Results are the same."""
    recompute_every: int = 1
    """Recompute only every n-th block; the others store everything."""
    timeout_seconds: int = 600
    """Timeout in seconds. The run ends when a collective waits longer, a rank is silent for longer, or a step makes no
    progress for longer; see docs/cluster.md."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    save_interval: int = 1000
    """Number of steps between checkpoints. One is always written at the end."""
    asynchronous: bool = True
    """Continue training while a checkpoint is written. Each rank first copies its part of weights and states to host
    memory, which stays reserved: 12 bytes per parameter for each copy of the model, with fp32 weights and states. Only
    the next update waits for these copies, and nothing waits for the disk. False: training waits, and needs no such
    memory."""
    max_failed_saves: int = 2
    """Maximum number of failed saves in a row; one more ends the run. A checkpoint that cannot be written, for example
    because the disk is full, leaves no files behind, and training continues. If the last checkpoint of a run fails, the
    run ends with an error."""
    keep_last: int = 3
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep checkpoints whose step is a multiple of this. 0: keep none for this reason."""
    keep_best: bool | Literal["improved"] = True
    """With validation sets: also keep the checkpoint with the lowest loss on the first set. true: the best among the
    checkpoints that are saved at a step with an evaluation; choose ``save_interval`` as a multiple of
    ``training.eval_interval``. improved: also save after every evaluation with a new lowest loss, which early in a run
    may be every evaluation. false: keep no checkpoint for its loss."""
    export_hf: bool = False
    """When the token budget is used up, also write the final checkpoint as a Hugging Face folder,
    ``{run_folder}/hf/step-...``, as checkpoint_convert/dcp_to_hf.py does."""
    push_to_hub: str | None = None
    """Upload that folder to this model repository (namespace/name). If the repository does not exist, it is created at
    the start. The token comes from HF_TOKEN or `hf auth login`; see docs/hugging_face.md."""
    hub_private: bool = True
    """Whether a new repository is private. One that exists keeps its visibility."""
    hub_message: str | None = None
    """Message of the upload's commit. Null: the name of the folder."""


@dataclass(frozen=True)
class LoggingConfig:
    """Reports of the run."""

    log_interval: int = 1
    """Number of steps between console lines and metric records."""
    stragglers: bool = True
    """With several ranks: record the slowest rank's times for data, blocks and waiting, and report ranks that delay the
    others."""
    tensorboard: bool = True
    """Write TensorBoard events under ``{run_folder}/tensorboard``."""
    trackers: list[Literal["wandb", "mlflow", "swanlab", "trackio", "comet", "csv"]] = field(default_factory=list)
    """Experiment trackers that receive the records as well; see docs/tracking.md. Each but csv needs its package."""
    project: str = "retemper"
    """Name of the project in the trackers (MLflow: of the experiment)."""
    run_name: str | None = None
    """Name of the run in the trackers. Null: the name of ``run_folder``."""
    group: str | None = None
    """Group of runs in the trackers."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run in the trackers."""
    offline: bool = False
    """Trackers write only files, under ``{run_folder}/trackers``, and use no network."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts that the model continues greedily at every evaluation. They begin as documents do in training. The texts
    go to the console, to ``samples.jsonl`` and to the trackers. Every token costs the forward pass of a micro-batch,
    with a pipeline that of a step."""
    sample_tokens: int = 64
    """Maximum number of new tokens for each of ``sample_prompts``. A text also ends with the end of a document, or at
    ``training.sequence_length`` tokens."""
    progress_bar: Annotated[Literal["auto", "on", "off"], Switch("on", "off")] = "auto"
    """Show one live line instead of a line for each step: a bar, the loss, the time left, tokens/s and MFU. auto: if
    standard output is a terminal, unless TERM is dumb. ``log.txt`` always has the line of each reported step."""
    profile_steps: list[int] | None = None
    """First and last step, such as [10, 13]. Every rank writes a trace of these steps with the PyTorch profiler, and a
    table, under ``{run_folder}/profile``; see docs/profiling.md. These steps and the one before are slower, and do not
    count in the speed of the run. Null: none."""
    memory_snapshot: Literal["never", "on_oom"] = "never"
    """on_oom: record allocations on a GPU with their Python stacks, and when its memory runs out write
    ``{run_folder}/memory_snapshot_rank0.pickle`` (of that rank) for https://pytorch.org/memory_viz. Recording takes
    about 2 µs for each allocation, and some hundred MB of host memory for each rank."""
    metrics_port: int | None = None
    """Port on which rank 0 serves the newest numbers for Prometheus, at ``http://HOST:PORT/metrics`` on all interfaces.
    A port that is in use is refused. Null: none."""


@dataclass(frozen=True)
class RunConfig:
    """The run."""

    run_folder: FilePath
    """Folder of the run's checkpoints, metrics, TensorBoard events, log and resolved configuration."""
    data: DataConfig
    training: TrainingConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    callbacks: list[str] = field(default_factory=list)
    """Import paths of classes, such as ``my_module.MyCallback``, that receive the events of the run on rank 0; see
    docs/tracking.md. Modules are also found in the folder of the ``--config`` file and in the working directory."""
    seed: int = 1234
    """Seed of the sample order and of random initialization."""
    allow_changes: list[str] = field(default_factory=list)
    """Settings that may differ from the checkpoint that the run continues from: seed, training.sequence_length,
    data.validation_fraction, data.shuffle, data.packing, and data_files (other tokens or masks in a dataset of the same
    name). Such changes are refused unless listed here. Each source continues from its number of used samples, so some
    samples may repeat before others are seen. All other changes are allowed, and listed at the start."""
    resume: Annotated[FilePath, Switch("auto", "none")] = "auto"
    """auto (or true, yes, on): continue from the newest undamaged checkpoint in ``run_folder``, or start fresh if the
    run never had one. none (or false, no, off): start fresh; refused if checkpoints exist. Any other value: path of the
    checkpoint to continue from. If that run is interrupted, the same command continues from the newest checkpoint
    written since."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Compute device. auto: CUDA if there is a GPU, else the CPU."""


ORDER_KEYS = {
    "seed": None,
    "training.sequence_length": None,
    "data.validation_fraction": None,
    "data.shuffle": "windows",
    "data.packing": "concat",
}
"""Settings that determine the n-th sample of a source, and the behaviour of runs from before each setting existed."""
DATA_FILES = "data_files"
"""Name of the change that a dataset has other tokens or masks under the same name."""
ALLOWABLE_CHANGES = (*ORDER_KEYS, DATA_FILES)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested plain dictionaries, for YAML, JSON and manifests."""
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML text that ``--config`` reads back unchanged."""
    return dump_yaml(to_dict(config))
