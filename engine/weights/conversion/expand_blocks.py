"""Add blocks to a model that do not change what it computes: copies of blocks whose output projections are zero.

Training only the new blocks on another corpus keeps the old ones as they are (LLaMA Pro: Wu et al., 2024,
https://arxiv.org/abs/2401.02415). Of every group of blocks, the last one is copied and put behind it. A block adds the
results of two output projections to the hidden states, so with zeros there it adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import UserError
from ...files.atomic import require_absent
from ...files.outputs import Use, require_separate
from ...model.expert_keys import layer_keys
from ...model.families import DecoderArchitecture, parse_decoder_architecture
from ...model.family_table import FAMILIES
from ...model.implementations import meta_model
from ...model.wrappers import text_config_of
from ..checkpoint.assets import is_hf_folder
from ..hugging_face.hub_download import find_model_folder
from ..hugging_face.layout import Layout
from ..hugging_face.weight_options import DEFAULT_MAX_SHARD_SIZE, parse_shard_size
from ..parts import TensorParts
from ..tensor_source import ReadRows, StoredTensor, TensorSource
from ..workers import parse_workers
from .pipeline import Conversion, hf_target
from .provenance import ConversionRecord
from .stored_model import StoredModel, open_hf

_BLOCKS = "model.layers."
_OUTPUT_PROJECTIONS = (
    "self_attn.o_proj.",
    "mlp.down_proj.",
    "mlp.experts.down_proj.",
    "mlp.shared_expert.down_proj.",
)
"""The modules of the native decoder whose results a block adds to the hidden states."""


class WithZeros:
    """Tensors of which some are zero (a ``TensorSource``)."""

    def __init__(self, source: TensorSource, zero: frozenset[str]):
        self.tensors: Mapping[str, StoredTensor] = source.tensors
        self._source, self._zero = source, zero

    @contextmanager
    def rows(self, name: str) -> Iterator[ReadRows]:
        """Read rows, see :class:`~retemper.engine.weights.tensor_source.TensorSource`."""
        if name in self._zero:
            yield lambda first, rows: _fill_with_zeros(rows)
            return
        with self._source.rows(name) as read:
            yield read


def _fill_with_zeros(rows: Tensor) -> None:
    rows.zero_()


def origins(num_layers: int, num_new: int) -> list[tuple[int, bool]]:
    """Return for every block of the expanded model the number of the old one, and whether it is a new copy.

    The old blocks are divided into ``num_new`` groups of equal size, with a copy of its last block behind each.

    Raises:
        UserError: they cannot be divided.
    """
    if num_new < 1 or num_layers % num_new:
        fitting = [number for number in range(1, num_layers + 1) if num_layers % number == 0]
        raise UserError(
            f"--num-blocks {num_new} does not divide the model's {num_layers} blocks into groups of equal size; use "
            f"one of {', '.join(map(str, fitting))}"
        )
    size = num_layers // num_new
    return [
        (block, copied)
        for block in range(num_layers)
        for copied in ((False, True) if block % size == size - 1 else (False,))
    ]


def expand_blocks(
    name: str,
    output: str | Path,
    num_new: int,
    max_shard_size: str = DEFAULT_MAX_SHARD_SIZE,
    workers: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Write the Hugging Face model ``name`` with ``num_new`` more blocks to ``output``.

    Values are streamed and hashed, and ``conversion.json`` records the source and the new blocks.

    Args:
        name: a Hugging Face folder, or the name of a model on the Hub.
        output: the folder to write; it must not exist.
        num_new: number of new blocks, a divisor of the number of blocks.
        max_shard_size: largest safetensors file, such as 5GB.
        workers: threads that copy; None: one for each CPU, up to 8.
        say: receives the lines about source and output.

    Raises:
        UserError: the model cannot be expanded, or ``output`` exists or cannot be written.
    """
    output, threads, shard_bytes = require_absent(output), parse_workers(workers), parse_shard_size(max_shard_size)
    folder = find_model_folder(name, "--model")
    if not is_hf_folder(folder):
        raise UserError(f"--model {name}: not a Hugging Face folder; export the checkpoint first (retemper export)")
    require_separate([Use("--model", folder)], folders=[Use(f"--output {output}", output)])
    model = open_hf(name, folder)
    places = origins(model.architecture.num_layers, num_new)
    config = _expanded_config(model, name, places)
    new = [number for number, (_, copied) in enumerate(places) if copied]
    expanded = _expanded(model, config, places)
    record = ConversionRecord(
        "expand_blocks", model.identify(), {"new_blocks": new, "copies_of": [places[number][0] for number in new]}
    )
    record.left_out = model.left_out
    patterns = ", ".join(f'"{_BLOCKS}{number}.*"' for number in new)
    conversion = Conversion(
        model=model,
        source=expanded,
        tensors=expanded.tensors,
        target=hf_target(expanded.tensors, shard_bytes, model.assets.with_config(config)),
        record=record,
        stored={**expanded.tensors, **model.unused},
        notes=[
            f"{len(places) - num_new} blocks become {len(places)}: new are {', '.join(map(str, new))}, copies with "
            "output projections of zero",
            f"train them alone with --training.trainable '[{patterns}]'",
        ],
    )
    conversion.write(output, threads, allow_nonfinite=False, say=say)


def _expanded_config(model: StoredModel, name: str, places: Sequence[tuple[int, bool]]) -> dict[str, Any]:
    """Return the config of the expanded model, in which every block computes what its origin does."""
    before, (text, wrapped) = model.architecture, text_config_of(model.config)
    if wrapped or not isinstance(before, DecoderArchitecture):
        raise UserError(
            f"--model {name}: model_type {model.config.get('model_type')} is not one of the native families, whose "
            "output projections are known; choose a model of the families of 'retemper models'"
        )
    if before.block_norms.after_attention or before.block_norms.after_mlp:
        raise UserError(
            f"--model {name}: the blocks of {before.model_type} normalize what they add to the hidden states; the "
            "gradient of a norm of zeros is not usable, so such a model cannot be expanded"
        )
    key = next(key for key in ("num_hidden_layers", "n_layer") if key in text)
    config = {
        name: [value[block] for block, _ in places] if _is_by_block(value, before.num_layers) else value
        for name, value in model.config.items()
    } | {key: len(places)}
    experts = before.experts
    if experts is not None:
        experts = replace(experts, layers=tuple(experts.layers[block] for block, _ in places))
        row = FAMILIES[before.model_type].experts
        assert row is not None
        config |= layer_keys(row, experts.layers)
    after = parse_decoder_architecture(config, name)
    by_block = {"sliding_windows", "ropes"}
    known = {"num_layers": len(places), "experts": experts}
    expected = {
        **{fact: value for fact, value in before.facts().items() if fact not in by_block},
        **known,
        **{fact: tuple(getattr(before, fact)[block] for block, _ in places) for fact in by_block},
    }
    different = [fact for fact, value in after.facts().items() if expected[fact] != value]
    if different:
        raise UserError(
            f"--model {name}: {', '.join(different)} of {before.model_type} depends on the number of blocks, so its "
            "old blocks would compute something else; such a model cannot be expanded"
        )
    return config


def _is_by_block(value: Any, num_layers: int) -> bool:
    return isinstance(value, list) and len(value) == num_layers


def _expanded(model: StoredModel, config: dict[str, Any], places: Sequence[tuple[int, bool]]) -> WithZeros:
    """Return the tensors of the expanded model's files."""
    old, tensors, parts, zero = model.parameters, {}, {}, set()
    assert isinstance(old, TensorParts)
    architecture = parse_decoder_architecture(config)
    made = meta_model(architecture)
    for name, _ in made.named_parameters():
        source = name
        if name.startswith(_BLOCKS):
            number, _, rest = name.removeprefix(_BLOCKS).partition(".")
            block, copied = places[int(number)]
            source = f"{_BLOCKS}{block}.{rest}"
            if copied and rest.startswith(_OUTPUT_PROJECTIONS):
                zero.add(name)
        tensors[name], parts[name] = old.tensors[source], old.parts[source]
    assert len(zero) >= 2 * sum(copied for _, copied in places)
    layout = Layout.of(architecture, made)
    published = layout.published(TensorParts(old.where, tensors, parts))
    # No file fuses an output projection with others, so all of these tensors are zero.
    return WithZeros(published, frozenset(piece.tensor for name in zero for piece in layout.pieces[name]))
