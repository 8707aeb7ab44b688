"""Settings of adapters: few new parameters that train while the model stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .marks import FilePath


@dataclass(frozen=True)
class AdapterConfig:
    """Adapter: small matrices at the linear layers, which train while the weights of the model stay frozen.

    The model in ``model.initialize_from`` is the base; without one, the random weights of the run's seed. Checkpoints
    hold only what learns, and the hash of the base.
    """

    kind: Literal["lora"] | None = None
    """Kind of adapter. lora: add the product of two low-rank matrices to linear layers (arXiv 2106.09685). Null: no
    adapter; the parameters in ``training.trainable`` train."""
    initialize_from: FilePath | None = None
    """Folder of PEFT whose adapter the run continues to train: an export (``adapter.export``), or one that PEFT has
    saved. ``rank``, ``alpha``, ``targets``, ``rslora``, ``dora`` and ``modules_to_save`` must be those of the folder.
    Null: a new adapter, with which the model computes what its base does at first."""
    rank: int = 16
    """Rank of the product. Trained parameters and their memory grow in proportion; continued pretraining usually needs
    more than instruction tuning, such as 64 to 256."""
    alpha: float = 32
    """Scale of the product: it is multiplied by ``alpha`` / ``rank``."""
    dropout: float = 0.0
    """Probability with which an element of the product's input is zero in training. The mask depends only on the seed,
    the token and the element, so it is the same in every layout and after every resume."""
    targets: list[str] = field(default_factory=lambda: ["*"])
    """Shell patterns of the names of the linear layers that get an adapter, such as ``"*.q_proj"``. ``"*"``: every
    linear layer of the blocks, in a mixture also those of each expert, but no router."""
    rslora: bool = False
    """Multiply the product by ``alpha`` / sqrt(``rank``) instead (rsLoRA, arXiv 2312.03732): updates keep their size at
    high ranks."""
    dora: bool = False
    """Also train the length of every row of the adapted matrices, apart from its direction (DoRA, arXiv 2402.09353).
    Often better at low ranks; every pass computes the adapted matrices, which costs time and memory."""
    quantize_base: Literal["none", "nf4", "int8"] = "none"
    """Format of the frozen matrices of layers with an adapter, except for experts, on one rank; needs bitsandbytes.
    nf4: 4 bits with double quantization (QLoRA, arXiv 2305.14314). int8: 8 bits, closer to the base. Every pass
    computes them again."""
    export: Literal["merged", "peft", "both"] = "merged"
    """What ``checkpoint.export_hf`` writes at the end of the run. merged: the model with the adapter added to its
    weights, in ``hf/``. peft: the adapter alone as a folder of PEFT, in ``peft/``. both: both."""
    modules_to_save: list[str] = field(default_factory=list)
    """Shell patterns of the names of parameters or modules of the base that train fully alongside, such as
    ``[model.embed_tokens, lm_head, "*norm*"]``. They and the adapter have ``training.weight_dtype``; frozen weights
    have the dtype of ``training.precision``."""
