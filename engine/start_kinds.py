"""The kinds of starts of a run, opened: random weights, a Hugging Face folder, a checkpoint, a base and an adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from torch import Tensor

from .errors import UserError
from .model import lora
from .model.adapters import AdapterParameters
from .model.architecture import Architecture
from .model.implementations import meta_model
from .model.quantized import QuantizedLoraLinear, load_each, shown_as_parameters, stand_ins
from .optim import TrainingOptimizer, allocate_states
from .parallel.data_parallel import copy_full_
from .parallel.forward_backward import ModelParts
from .weights.adapters.peft_start import PeftStart
from .weights.base_identity import BaseIdentity, content_hash
from .weights.checkpoint.assets import HfAssets
from .weights.checkpoint.manifest import Manifest
from .weights.checkpoint.tensors import (
    STATE_PREFIXES,
    check_casts,
    load_tensors,
    model_tensors,
    open_tensors,
    require_model_tensors,
    require_tensors,
    training_tensors,
)
from .weights.hugging_face.initial import INITIALIZE_FROM, load_hf_tensors
from .weights.hugging_face.model import HfModel
from .weights.parts import TensorParts


@dataclass(frozen=True)
class Start(ABC):
    """What a run starts from: files that travel with the model, its architecture, and a source of weights."""

    assets: HfAssets
    architecture: Architecture
    folder: str | None = None
    """Folder of the weights. None: they are random."""
    resumed_from: Manifest | None = None
    """Manifest of the checkpoint from which the run continues; None for a new run."""

    @abstractmethod
    def load_into(self, model: ModelParts, optimizer: TrainingOptimizer | None) -> list[str]:
        """Initialize or load the weights of ``model``, and return lines about casts. All ranks must call this.

        Args:
            model: this rank's part, without values.
            optimizer: of its parameters; also loaded if the run continues from a checkpoint. None: there is none, and
                the run does not continue.

        Raises:
            UserError: the weights cannot be read.
        """

    @abstractmethod
    def load_base(self, model: ModelParts, names: Collection[str]) -> list[str]:
        """Initialize or load the parameters ``names`` of ``model``, which has an adapter, and return lines about casts.

        Others may get values as well, but not those of the adapter. All ranks must call this.
        """

    @abstractmethod
    def content_hash(self) -> str:
        """Return a hash that identifies the weights; see :mod:`~retemper.engine.weights.base_identity`."""

    @property
    def base_record(self) -> dict[str, str]:
        """For the manifests of checkpoints: ``folder`` and ``hash`` of the base of an adapter; empty without one."""
        return {}

    @property
    def resumed_tensors(self) -> TensorParts | None:
        """The tensors of the checkpoint from which the run continues; None for a new run."""
        return None

    def _continue_routers(self, model: ModelParts) -> list[str]:
        """Continue the load of experts of the checkpoint, and return a line if it has none that the run needs."""
        assert self.resumed_from is not None
        routers = model.routers
        if routers is None or routers.load_state_dict(self.resumed_from.router_load) or not routers.aux_loss_coef:
            return []
        return [
            f"note: {self.folder} has no load of experts: the load-balancing loss has no gradient in the first step, "
            "and continues with the load of that step"
        ]

    def at_checkpoint(self, folder: Path, manifest: Manifest) -> Start:
        """Return the start of the same run from a later checkpoint of it, to which it rolls back."""
        parts = open_tensors(folder)
        return CheckpointStart(self.assets, self.architecture, str(folder), manifest, parts=parts)


@dataclass(frozen=True)
class RandomStart(Start):
    """Random weights, the same in every layout."""

    _: KW_ONLY
    seed: int

    def load_into(self, model: ModelParts, optimizer: TrainingOptimizer | None) -> list[str]:
        """See :class:`Start`."""
        for decoder in model.decoders:
            with shown_as_parameters(decoder, copy_full_) as copy_:
                decoder.initialize_(self.seed, copy_)
        return []

    def load_base(self, model: ModelParts, names: Collection[str]) -> list[str]:
        """See :class:`Start`. All of them have values then."""
        return self.load_into(model, None)

    def content_hash(self) -> str:
        """See :class:`Start`."""
        return f"random weights of seed {self.seed}"


@dataclass(frozen=True)
class HuggingFaceStart(Start):
    """A start from the weights of a Hugging Face folder."""

    _: KW_ONLY
    weights: HfModel

    def load_into(self, model: ModelParts, optimizer: TrainingOptimizer | None) -> list[str]:
        """See :class:`Start`."""
        return self._read(model_tensors(model))

    def load_base(self, model: ModelParts, names: Collection[str]) -> list[str]:
        """See :class:`Start`."""
        tensors = {name: tensor for name, tensor in model_tensors(model).items() if name in names}
        return self._read(tensors, model.quantized_layers)

    def content_hash(self) -> str:
        """See :class:`Start`."""
        return content_hash(self.weights.weights)

    def _read(self, tensors: dict[str, Tensor], layers: Mapping[str, QuantizedLoraLinear] | None = None) -> list[str]:
        assert self.folder is not None
        where = f"weights     {self.folder}: "
        lines = [line if line.startswith("note: ") else where + line for line in self.weights.notes]
        layers = layers or {}
        wanted = {**tensors, **stand_ins(layers)}
        lines += check_casts(self.folder, self.weights.parameters.tensors, wanted, resuming=False)
        load_hf_tensors(self.weights, tensors)
        load_each(layers, lambda some: load_hf_tensors(self.weights, some))
        return lines


@dataclass(frozen=True)
class CheckpointStart(Start):
    """A checkpoint: its weights; its optimizer states too if the run continues from it."""

    _: KW_ONLY
    parts: TensorParts
    """The tensors of the checkpoint."""

    @property
    def resumed_tensors(self) -> TensorParts | None:
        """See :class:`Start`."""
        return None if self.resumed_from is None else self.parts

    def load_into(self, model: ModelParts, optimizer: TrainingOptimizer | None) -> list[str]:
        """See :class:`Start`."""
        if self.resumed_from is None:
            return self._read(model_tensors(model))
        assert optimizer is not None
        allocate_states(optimizer)
        return self._read(training_tensors(model, optimizer)) + self._continue_routers(model)

    def load_base(self, model: ModelParts, names: Collection[str]) -> list[str]:
        """See :class:`Start`."""
        tensors = {name: tensor for name, tensor in model_tensors(model).items() if name in names}
        return self._read(tensors, model.quantized_layers)

    def content_hash(self) -> str:
        """See :class:`Start`."""
        names = [name for name in self.parts.tensors if not name.startswith(STATE_PREFIXES)]
        return content_hash(self.parts.only(names))

    def _read(
        self, tensors: Mapping[str, Tensor], layers: Mapping[str, QuantizedLoraLinear] | None = None
    ) -> list[str]:
        assert self.folder is not None
        folder, layers = self.folder, layers or {}
        require_model_tensors(self.folder, self.parts.tensors, meta_model(self.architecture))
        wanted = {**tensors, **stand_ins(layers)}
        casts = check_casts(folder, self.parts.tensors, wanted, resuming=self.resumed_from is not None)
        load_tensors(folder, tensors, opened=self.parts)
        load_each(layers, lambda some: load_tensors(folder, some, opened=self.parts))
        return casts


@dataclass(frozen=True)
class AdapterStart(Start):
    """A base, whose frozen parameters stay as they are, and an adapter: new, or of a folder or a checkpoint."""

    _: KW_ONLY
    base: Start
    """``model.initialize_from``, or random weights."""
    parameters: AdapterParameters
    seed: int
    identity: BaseIdentity
    peft: PeftStart | None = None
    """``adapter.initialize_from``; None for a new adapter, and for that of a checkpoint."""
    base_of_peft: BaseIdentity | None = None
    """The base that its folder records, if its weights are known."""
    parts: TensorParts | None = None
    """The tensors of the checkpoint from which the run continues: of all that learns, and its optimizer states."""
    base_is_loaded: bool = False
    """Whether the model has the weights of the base, and only what learns is read."""

    @property
    def resumed_tensors(self) -> TensorParts | None:
        """See :class:`Start`."""
        return self.parts

    def load_into(self, model: ModelParts, optimizer: TrainingOptimizer | None) -> list[str]:
        """See :class:`Start`."""
        if self.parts is None and self.peft is not None:
            lines = self.base.load_base(model, self.parameters.frozen) + self._read_folder(self.peft, model)
        elif self.parts is None:
            lines = self.base.load_base(model, {*self.parameters.frozen, *self.parameters.saved})
            for decoder in model.decoders:
                lora.initialize_(decoder, self.seed, copy_full_)
        else:
            lines = [] if self.base_is_loaded else self.base.load_base(model, self.parameters.frozen)
            assert optimizer is not None
            lines += self._resume(self.parts, model, optimizer) + self._continue_routers(model)
        self._require_same_base()
        return lines

    def _resume(self, parts: TensorParts, model: ModelParts, optimizer: TrainingOptimizer) -> list[str]:
        assert self.folder is not None
        require_tensors(self.folder, parts.tensors, self.parameters.trained)
        allocate_states(optimizer)
        tensors = training_tensors(model, optimizer)
        wanted = {name: tensor for name, tensor in tensors.items() if name not in model.base_names}
        casts = check_casts(self.folder, parts.tensors, wanted, resuming=True)
        load_tensors(self.folder, wanted, opened=parts)
        return casts

    def _read_folder(self, peft: PeftStart, model: ModelParts) -> list[str]:
        """Read the adapter of a folder, and return lines about it."""
        tensors = {name: tensor for name, tensor in model_tensors(model).items() if name in self.parameters.trained}
        lines = check_casts(peft.folder, peft.parameters.tensors, tensors, resuming=False)
        peft.load_into(tensors)
        found = self.identity.record()
        if self.base_of_peft is None:
            base = f"its base is {peft.base_name}" if peft.base_name else "it records no base"
            return [f"note: {peft.folder}: {base}, which cannot be compared with {found['folder']}", *lines]
        there = self.base_of_peft.record()
        if there["hash"] != found["hash"]:
            raise UserError(
                f"{INITIALIZE_FROM}: {found['folder']} has other weights (hash {found['hash']}) than the base of "
                f"adapter.initialize_from {peft.folder} (hash {there['hash']}, then {peft.base_name}); name that one"
            )
        return lines

    def _require_same_base(self) -> None:
        """Refuse another base than that of the checkpoint. All ranks must call this."""
        found = self.identity.record()
        if self.resumed_from is not None and found["hash"] != self.resumed_from.base.get("hash"):
            raise UserError(
                f"{INITIALIZE_FROM}: {found['folder']} has other weights (hash {found['hash']}) than the base with "
                f"which {self.folder} was trained (hash {self.resumed_from.base.get('hash')}, then in "
                f"{self.resumed_from.base.get('folder')}); put that one back, or start a new run_folder"
            )

    def load_base(self, model: ModelParts, names: Collection[str]) -> list[str]:
        """See :class:`Start`. An adapter is no base."""
        raise NotImplementedError

    def content_hash(self) -> str:
        """See :class:`Start`. An adapter is no base."""
        raise NotImplementedError

    @property
    def base_record(self) -> dict[str, str]:
        """See :class:`Start`."""
        return self.identity.record()

    def at_checkpoint(self, folder: Path, manifest: Manifest) -> AdapterStart:
        """See :class:`Start`."""
        parts = open_tensors(folder)
        return replace(self, folder=str(folder), resumed_from=manifest, parts=parts, base_is_loaded=True)
