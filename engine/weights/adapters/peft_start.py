"""Start a run from the adapter in a folder of PEFT (``adapter.initialize_from``).

The folder may be an export of a run, see :mod:`.peft`, or one that PEFT has saved. The tensors get the names of the
run's parameters, and stay in the file: every rank reads its shards of them.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import UserError
from ...files.regular import read_regular
from ...model.adapters import LORA_A, LORA_B, MAGNITUDE
from ...model.config_file import ADAPTER_FILE, read_hf_config
from ...parallel.process_group import Ranks
from ..base_identity import BaseIdentity, content_hash
from ..checkpoint.assets import is_hf_folder
from ..checkpoint.tensors import describe_difference
from ..finite import require_finite
from ..hugging_face.folder import open_file
from ..hugging_face.layout import Layout
from ..hugging_face.model import open_hf_model
from ..parts import Part, TensorParts, all_ranks, load_parts
from ..tensor_source import StoredTensor
from .peft import PEFT_WEIGHTS, PREFIX
from .peft_config import WEIGHT, PeftConfig
from .peft_settings import PeftNames, is_stacked, require_same

INITIALIZE_FROM = "adapter.initialize_from"
_CONVERSION_FILE = "conversion.json"


@dataclass(frozen=True)
class PeftStart:
    """The adapter in a folder of PEFT, opened."""

    folder: Path
    parameters: TensorParts
    """All that trains, under the names of the run."""
    base_name: str
    """Of the base model, as the folder records it; may be empty."""
    base_hash: str | None
    """Of that base, if an export has recorded it."""

    def base_identity(self, here: BaseIdentity, names: Collection[str], ranks: Ranks) -> BaseIdentity | None:
        """Return the identity of the base that the folder records; None if it cannot be known here.

        Args:
            here: the base of the run.
            names: of the base of the run.
            ranks: all ranks. One of them begins to hash the recorded base, if that is another folder.
        """
        recorded, name = self.base_hash, self.base_name
        if recorded is not None:
            return BaseIdentity(name, lambda: recorded, ranks)
        if name and (name in names or Path(name).resolve() in [Path(each).resolve() for each in names]):
            return here
        if name and is_hf_folder(name):
            return BaseIdentity(name, lambda: content_hash(open_hf_model(name).weights), ranks)
        return None

    def load_into(self, tensors: dict[str, Tensor]) -> None:
        """Read ``tensors`` in place, cast to their dtypes; each may be sharded in any way. All ranks must call this.

        Raises:
            UserError: on every rank, if a file cannot be read, or holds values that are not finite.
        """
        check = lambda name, values: require_finite(name, values, "train the adapter again")  # noqa: E731
        load_parts(self.parameters, tensors, self.folder, all_ranks(None, True), check)


def open_peft_start(folder: str | Path, peft: PeftConfig, model_config: dict[str, Any]) -> PeftStart:
    """Open the ``folder`` of PEFT from which a run starts to train its adapter.

    Args:
        folder: of PEFT.
        peft: the adapter of the run, in the terms of PEFT.
        model_config: content of the ``config.json`` of the model.

    Raises:
        UserError: it cannot be read, or holds another adapter; names the setting.
    """
    folder = Path(folder)
    try:
        peft.require_names(model_config, f"remove {INITIALIZE_FROM}")
        return _open(folder, peft)
    except UserError as error:
        raise UserError(f"{INITIALIZE_FROM}: {error}") from None


def require_values(start: PeftStart, peft: PeftConfig) -> None:
    """Refuse values in the file that no parameter of the run has.

    These are elements of the B of a fused projection, and a head next to a tied embedding.

    Raises:
        UserError: names the tensor.
    """
    stored = open_file(start.folder / PEFT_WEIGHTS, "it holds the adapter")
    rank = peft.parameters.config.rank
    for module, names in peft.modules.items():
        if not peft.is_fused(module):
            continue
        outside = stored.read(f"{PREFIX}{module}.{LORA_B}").clone()
        stacked = is_stacked(outside.shape[1], rank, len(names))
        for piece in peft.pieces[module + WEIGHT]:
            name = piece.tensor.removesuffix(WEIGHT)
            if name in names:
                first = names.index(name) * rank if stacked else 0
                outside[piece.at[0] : piece.at[0] + piece.sizes[0], first : first + rank] = 0
        if outside.any():
            raise UserError(
                f"{INITIALIZE_FROM}: {start.folder}: {module} has an adapter for more than {', '.join(names)} of this "
                "run; add the other layers to adapter.targets, or merge it into its base first"
            )
    if peft.trains_tied:
        names_of_tied = (PREFIX + peft.architecture.embedding_name, PREFIX + peft.architecture.head_name)
        both = [stored.read(name) for name in names_of_tied if name in stored.tensors]
        if len(both) == 2 and not both[0].equal(both[1]):
            raise UserError(
                f"{INITIALIZE_FROM}: {start.folder}: {names_of_tied[1]} differs from {names_of_tied[0]}, but the model "
                "has tied embeddings; merge it into its base first"
            )


def _open(folder: Path, peft: PeftConfig) -> PeftStart:
    if not (folder / ADAPTER_FILE).is_file():
        raise UserError(f"{folder}: no folder with {ADAPTER_FILE}; name a folder that PEFT or an export has written")
    content = read_hf_config(folder / ADAPTER_FILE)
    if not (folder / PEFT_WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise UserError(
            f"{folder}: only pickled weights (adapter_model.bin), which can run code when loaded; load them with PEFT "
            "and save them with save_pretrained"
        )
    stored = open_file(folder / PEFT_WEIGHTS, f"{ADAPTER_FILE} is next to it")
    if foreign := next((name for name in stored.tensors if not name.startswith(PREFIX)), None):
        raise UserError(f"{folder / PEFT_WEIGHTS}: holds {foreign}, and names of PEFT begin with {PREFIX}")
    plain = stored.renamed({name.removeprefix(PREFIX): name for name in stored.tensors})
    require_same(folder, content, PeftNames.of(plain.tensors), peft)
    parameters = _parameters(plain, peft)
    if difference := describe_difference(parameters.tensors, peft.parameters.trained):
        raise UserError(f"{folder}: does not fit the adapter of this run: {difference}; name another folder")
    name = content.get("base_model_name_or_path")
    name = name if isinstance(name, str) else ""
    return PeftStart(folder, parameters, name, _recorded_hash(folder))


def _parameters(stored: TensorParts, peft: PeftConfig) -> TensorParts:
    """Return what the file holds under the names of the run's parameters."""
    tensors: dict[str, StoredTensor] = {}
    parts: dict[str, list[Part]] = {}
    kinds = (LORA_A, LORA_B, MAGNITUDE) if peft.parameters.config.dora else (LORA_A, LORA_B)
    for module, names in peft.modules.items():
        for kind in kinds:
            whole = f"{module}.{kind}"
            if whole not in stored.tensors:  # the comparison with the model reports it
                continue
            for number, name in enumerate(names):
                found = _part_of_layer(stored, peft, whole, name, number) if peft.is_fused(module) else None
                tensor, part = found or (stored.tensors[whole], stored.parts[whole])
                tensors[f"{name}.{kind}"], parts[f"{name}.{kind}"] = tensor, part
    saved = {name: peft.layout.shapes[name] for name in peft.parameters.saved}
    fully = Layout(saved, {name: peft.own_layout.pieces[name] for name in saved}).parameters(stored)
    return TensorParts(stored.where, {**tensors, **fully.tensors}, {**parts, **fully.parts})


def _part_of_layer(
    stored: TensorParts, peft: PeftConfig, whole: str, name: str, number: int
) -> tuple[StoredTensor, list[Part]] | None:
    """Return what the tensor ``whole`` of a fused projection holds of the layer ``name``, its adapter ``number``.

    None: all of it.
    """
    kind = next(kind for kind in (LORA_A, LORA_B, MAGNITUDE) if whole.endswith(f".{kind}"))
    module = whole.removesuffix(f".{kind}")
    tensor, (source,) = stored.tensors[whole], stored.parts[whole]
    config, names = peft.parameters.config, peft.modules[module]
    stacked = is_stacked(stored.tensors[f"{module}.{LORA_A}"].shape[0], config.rank, len(names))
    first = number * config.rank if stacked else 0

    def box(at: int, sizes: tuple[int, ...], row: int, column: tuple[int, ...]) -> Part:
        return Part((at, *(0 for _ in column)), sizes, source.path, source.find, ((row, *column), tensor.shape))

    if kind == LORA_A:
        if not stacked:
            return None
        shape: tuple[int, ...] = (config.rank, tensor.shape[1])
        return StoredTensor(shape, tensor.dtype), [box(0, shape, first, (0,))]
    rest, column = ((config.rank,), (first,)) if kind == LORA_B else ((), ())
    pieces = [piece for piece in peft.pieces[module + WEIGHT] if piece.tensor == name + WEIGHT]
    boxes = [box(piece.offsets[0], (piece.sizes[0], *rest), piece.at[0], column) for piece in pieces]
    return StoredTensor((sum(piece.sizes[0] for piece in pieces), *rest), tensor.dtype), boxes


def _recorded_hash(folder: Path) -> str | None:
    """Return the hash of the base that an export has recorded in ``folder``; None if it is no export."""
    try:
        found = json.loads(read_regular(folder / _CONVERSION_FILE))["source"]["base"]["hash"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None
