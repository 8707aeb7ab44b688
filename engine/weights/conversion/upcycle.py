"""Make a mixture of experts of a dense model: every expert begins as a copy of the feed-forward layer.

Sparse upcycling (Komatsuzaki et al., 2022, https://arxiv.org/abs/2212.05055). The routers are random. The weights of a
token's experts are normalized, so that they sum to one: the mixture computes the same logits as the dense model,
whatever the routers choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....kernels.random_bits import stream_key
from ...errors import UserError
from ...files.atomic import require_absent
from ...files.outputs import Use, require_separate
from ...model.families import DecoderArchitecture, parse_decoder_architecture
from ...model.family_table import FAMILIES
from ...model.implementations import meta_model
from ...model.rope_settings import PARAMETERS, SCALING
from ...model.wrappers import text_config_of
from ..checkpoint.assets import is_hf_folder
from ..hugging_face.hub_download import find_model_folder
from ..hugging_face.layout import Layout
from ..hugging_face.weight_options import DEFAULT_MAX_SHARD_SIZE, parse_shard_size
from ..tensor_source import ReadRows, StoredTensor, TensorSource
from ..workers import parse_workers
from .pipeline import Conversion, hf_target
from .provenance import ConversionRecord
from .stored_model import StoredModel, open_hf

_EXPERTS, _ROUTER = ".experts.", "mlp.gate.weight"
_TARGETS = {
    "llama": ("mixtral", "MixtralForCausalLM", ("attention_bias", "mlp_bias", "pretraining_tp")),
    "mistral": ("mixtral", "MixtralForCausalLM", ()),
    "qwen3": ("qwen3_moe", "Qwen3MoeForCausalLM", ("layer_types", "max_window_layers")),
}
"""By dense ``model_type``: that of the mixture with the same blocks, its class in transformers, and keys that it does
not have. Without them, the facts of both models are compared."""


class Upcycled:
    """The tensors of a mixture's files: those of a dense model, and random routers (a ``TensorSource``).

    Args:
        dense: parameters of the dense model.
        layout: of the mixture.
        std: standard deviation of the routers' elements.
        seed: of the routers.
    """

    def __init__(self, dense: TensorSource, layout: Layout, std: float, seed: int):
        self._dense, self._std, self._seed = dense, std, seed
        self._origins: dict[str, str] = {}
        self.tensors: Mapping[str, StoredTensor] = {}
        tensors = {}
        for name, shape in layout.published_shapes.items():
            (piece,) = layout.parameters_in[name]
            if piece.tensor.endswith(_ROUTER):
                feed_forward = piece.tensor.replace(_ROUTER, "mlp.up_proj.weight")
                tensors[name] = StoredTensor(shape, dense.tensors[feed_forward].dtype)
                continue
            self._origins[name] = piece.tensor.replace(_EXPERTS, ".")
            tensors[name] = StoredTensor(shape, dense.tensors[self._origins[name]].dtype)
            assert shape == dense.tensors[self._origins[name]].shape, name
        self.tensors = tensors

    @contextmanager
    def rows(self, name: str) -> Iterator[ReadRows]:
        """Read rows, see :class:`~retemper.engine.weights.tensor_source.TensorSource`."""
        if name in self._origins:
            with self._dense.rows(self._origins[name]) as read:
                yield read
            return
        values = self._router(name)
        yield lambda first, rows: _copy(values[first : first + len(rows)], rows)

    def _router(self, name: str) -> Tensor:
        """Return the whole matrix of a router, a function of the seed and its name."""
        low, high = stream_key(self._seed, 0, name)
        generator = torch.Generator().manual_seed((high % 2**31 << 32) + low % 2**32)
        return torch.empty(self.tensors[name].shape).normal_(0.0, self._std, generator=generator)


def _copy(values: Tensor, rows: Tensor) -> None:
    rows.copy_(values)


def upcycle(
    name: str,
    output: str | Path,
    num_experts: int,
    per_token: int,
    seed: int = 0,
    max_shard_size: str = DEFAULT_MAX_SHARD_SIZE,
    workers: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Write the dense Hugging Face model ``name`` as a mixture of experts to ``output``.

    Values are streamed and hashed, and ``conversion.json`` records the source.

    Args:
        name: a Hugging Face folder, or the name of a model on the Hub.
        output: the folder to write; it must not exist.
        num_experts: of every block, at least 2.
        per_token: experts of a token.
        seed: of the routers.
        max_shard_size: largest safetensors file, such as 5GB.
        workers: threads that copy; None: one for each CPU, up to 8.
        say: receives the lines about source and output.

    Raises:
        UserError: no mixture has the blocks of the model, a number is impossible, or ``output`` exists or cannot be
            written.
    """
    output, threads, shard_bytes = require_absent(output), parse_workers(workers), parse_shard_size(max_shard_size)
    _check_numbers(num_experts, per_token, seed)
    folder = find_model_folder(name, "--model")
    if not is_hf_folder(folder):
        raise UserError(f"--model {name}: not a Hugging Face folder; export the checkpoint first (retemper export)")
    require_separate([Use("--model", folder)], folders=[Use(f"--output {output}", output)])
    model = open_hf(name, folder)
    config = _mixture_config(model, name, num_experts, per_token)
    architecture = parse_decoder_architecture(config, name)
    layout = Layout.of(architecture, meta_model(architecture))
    source = Upcycled(model.parameters, layout, architecture.initializer_range, seed)
    settings = {"num_experts": num_experts, "experts_per_token": per_token, "seed": seed}
    record = ConversionRecord("upcycle", model.identify(), settings)
    record.left_out = model.left_out
    conversion = Conversion(
        model=model,
        source=source,
        tensors=source.tensors,
        target=hf_target(source.tensors, shard_bytes, model.assets.with_config(config)),
        record=record,
        stored={**source.tensors, **model.unused},
        notes=[
            f"{config['model_type']} with {num_experts} experts in each of {architecture.num_layers} blocks, "
            f"{per_token} for each token: {model.architecture.num_parameters:,} parameters become "
            f"{architecture.num_parameters:,}"
        ],
    )
    conversion.write(output, threads, allow_nonfinite=False, say=say)


def _check_numbers(num_experts: int, per_token: int, seed: int) -> None:
    if num_experts < 2:
        raise UserError(f"--num-experts {num_experts}: a mixture has at least 2 experts")
    if not 1 <= per_token <= num_experts:
        raise UserError(f"--experts-per-token {per_token}: use 1 to --num-experts {num_experts}")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: use 0 to 2^63 - 1")


def _mixture_config(model: StoredModel, name: str, num_experts: int, per_token: int) -> dict[str, Any]:
    """Return the config of the mixture, whose blocks compute what those of the dense model do."""
    before, (_, wrapped) = model.architecture, text_config_of(model.config)
    if wrapped or before.model_type not in _TARGETS or not isinstance(before, DecoderArchitecture):
        raise UserError(
            f"--model {name}: no mixture has the blocks of model_type {model.config.get('model_type')}; supported: "
            f"{', '.join(_TARGETS)}"
        )
    model_type, kind, without = _TARGETS[before.model_type]
    config = _with_defaults(model.config, before)
    config = {key: value for key, value in config.items() if key not in without}
    config |= {"model_type": model_type, "architectures": [kind], "num_experts_per_tok": per_token}
    config |= {"head_dim": before.head_dim, "router_aux_loss_coef": 0.001}
    if model_type == "mixtral":
        config |= {"num_local_experts": num_experts, "sliding_window": before.sliding_windows[0]}
    else:
        config |= {"num_experts": num_experts, "moe_intermediate_size": before.intermediate_size}
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    after = parse_decoder_architecture(config, f"--model {name}, as {model_type}")
    changed = {"model_type", "experts"}
    there = after.facts()
    different = [fact for fact, value in before.facts().items() if fact not in changed and there[fact] != value]
    if different:
        raise UserError(
            f"--model {name}: {model_type} cannot express {', '.join(different)} of this {before.model_type} model, so "
            "it would compute something else; choose another model"
        )
    assert after.experts is not None and after.experts.normalize
    return config


def _with_defaults(config: dict[str, Any], architecture: DecoderArchitecture) -> dict[str, Any]:
    """Return ``config`` with the keys that it leaves to the defaults of its type; those of other types differ."""
    family, scaling = FAMILIES[architecture.model_type], config.get(SCALING) or config.get(PARAMETERS) or {}
    values = {**family.defaults, family.norm_eps: architecture.norm_eps}
    values["num_key_value_heads"] = architecture.num_key_value_heads
    rope = architecture.ropes[0]
    if rope is not None and family.rope_theta_key not in scaling:
        values[family.rope_theta_key] = rope.theta
    return {**config, **{key: value for key, value in values.items() if config.get(key) is None}}
