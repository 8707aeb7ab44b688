"""Settings of the model of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from .marks import FilePath


@dataclass(frozen=True)
class RopeConfig:
    """Change of the rotary positions, which lengthens the context of a model."""

    kind: Literal["default", "yarn", "linear", "llama3", "dynamic"] | None = None
    """Kind of rotary positions, by its name in transformers (``rope_type``). default: no scaling, but the larger base
    ``theta`` (adjusted base frequency, Xiong et al., 2023, https://arxiv.org/abs/2309.16039). The others are scalings,
    of which yarn needs the fewest tokens to adapt. Null: the model keeps its own positions."""
    factor: float = 1.0
    """New length divided by the model's ``max_position_embeddings``, which is raised by it."""
    theta: float | None = None
    """Base of the frequencies (``rope_theta``) of kind default, larger than that of the model. A model that has this
    base already stays as it is, also its length."""


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
    """Lengthen the context: ``{kind: yarn, factor: 4}``, or ``{kind: default, theta: 8_000_000, factor: 8}``. The run
    changes the model's ``config.json`` before it builds the model. Checkpoints and exports contain the changed one, so
    the setting may stay when the run resumes."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model whose type transformers does not know (``auto_map`` in its
    ``config.json``). False: no code of a model runs, and such a model is refused. Checkpoints and exports contain the
    code, and commands that read them run it only if they are told so."""
    tokenizer: FilePath | None = None
    """Hugging Face folder with the tokenizer. The datasets must have been made with it, and exports contain it. Null:
    the tokenizer in ``initialize_from``, if it has one."""
