"""Open a model for an evaluation, in any layout of ranks, as a run opens what it starts from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ...engine.config.settings import RunConfig
from ...engine.errors import UserError
from ...engine.model.architecture import Architecture
from ...engine.model.attention_choice import choose_attention
from ...engine.model.config_file import read_hf_config
from ...engine.model.implementations import checked
from ...engine.model.wrappers import context_length
from ...engine.observe.waiting import Say, report_if_slow
from ...engine.parallel import build
from ...engine.parallel import compile as block_compile
from ...engine.parallel.forward_backward import ForwardBackward, ModelParts
from ...engine.parallel.memory_check import require_memory_for_weights
from ...engine.parallel.mesh import Mesh
from ...engine.parallel.precision import with_precision
from ...engine.parallel.process_group import Ranks
from ...engine.run_folder import run_store
from ...engine.schedule import BatchPlan, plan_batches
from ...engine.start import Start, find_weights, open_start
from ...engine.tokenizer.files import find_local_tokenizer, tokenizer_file_name
from ...engine.weights.checkpoint.assets import asset_folder
from ...engine.weights.checkpoint.manifest import read_manifest
from ...engine.weights.hugging_face.config_source import architecture_source

LONGEST_SEQUENCE = 2048
"""Default length of windows for a model that can have longer ones."""


@dataclass(frozen=True)
class EvaluatedModel:
    """This rank's part of a model with its weights."""

    config: RunConfig
    ranks: Ranks
    mesh: Mesh
    start: Start
    parts: ModelParts
    forward_backward: ForwardBackward
    facts: dict[str, str]
    """How it is computed, for people."""
    notes: list[str]

    @property
    def batches(self) -> BatchPlan:
        """Batch sizes."""
        return plan_batches(self.config.training, self.mesh.layout.data_parallel)

    @property
    def num_micro_batches(self) -> int:
        """Batches that a rank computes in one step of a pipeline."""
        return self.batches.num_micro_batches

    @property
    def architecture(self) -> Architecture:
        """Of the model."""
        return self.start.architecture

    @property
    def tokenizer_file(self) -> Path | None:
        """The file of its tokenizer, if it has one."""
        if self.config.model.tokenizer is not None:
            return find_local_tokenizer(self.config.model.tokenizer)
        assert self.start.folder is not None
        folder = asset_folder(self.start.folder)
        name = tokenizer_file_name([path.name for path in folder.iterdir()])
        return None if name is None else folder / name


def open_model(config: RunConfig, ranks: Ranks, mesh: Mesh, say: Say) -> EvaluatedModel:
    """Find, build and load the model ``model.initialize_from``. All ranks must call this.

    Raises:
        UserError: it cannot be used, or not in this layout.
    """
    with report_if_slow("finding and verifying the model", say):
        found = find_weights(config.model, ranks, run_store(config, ranks))
    with report_if_slow("opening the weights", say):
        start = ranks.fail_together(lambda: open_start(config, found))
    config, start, choices = _choose(config, start, ranks, mesh)
    with report_if_slow("building the model", say):
        parts, forward_backward = build.build_model(config, start.architecture, ranks, mesh, choices)
    for decoder in parts.decoders:
        decoder.eval()
    with report_if_slow("loading the weights", say):
        casts = ranks.fail_together(lambda: start.load_into(parts, None))
    facts = {
        "parameters": f"{start.architecture.num_parameters:,}",
        "precision": f"{config.training.precision} ({choices.precision_reason})",
        "attention": f"{choices.attention.backend}: {choices.attention.reason}",
        "layout": str(mesh),
    }
    notes = [line.removeprefix("note: ") for line in (*found.remarks, *casts)]
    return EvaluatedModel(config, ranks, mesh, start, parts, forward_backward, facts, notes)


def _choose(config: RunConfig, start: Start, ranks: Ranks, mesh: Mesh) -> tuple[RunConfig, Start, build.Choices]:
    """Decide what the configuration leaves open, as a run does, but without memory for training."""
    config, precision = with_precision(config, ranks)
    architecture = ranks.broadcast(ranks.run_on_rank0(lambda: checked(start.architecture)))
    plan = plan_batches(config.training, mesh.layout.data_parallel)

    def decide() -> build.Choices:
        attention = choose_attention(config, architecture, ranks.device)
        compiled = block_compile.enabled(config, ranks.device, attention.backend)
        choices = build.Choices(attention, compiled, plan.num_micro_batches, precision.reason)
        build.check(config, architecture, choices, ranks.device, ranks.world_size)
        require_memory_for_weights(config, architecture, ranks.device, ranks.world_size)
        return choices

    return config, replace(start, architecture=architecture), ranks.fail_together(decide)


def default_sequence_length(config: RunConfig, longest: int | None) -> int:
    """Return the sequence length of the run that trained a checkpoint, else ``longest`` up to 2048."""
    try:
        recorded = read_manifest(config.model.initialize_from or "").config.get("training", {}).get("sequence_length")
    except UserError:  # not a checkpoint
        recorded = None
    return recorded if type(recorded) is int else min(LONGEST_SEQUENCE, longest or LONGEST_SEQUENCE)


def longest_sequence(config: RunConfig) -> int | None:
    """Return the maximum number of tokens of the model, if its config has it.

    Raises:
        UserError: there is no such model.
    """
    return context_length(read_hf_config(architecture_source(config.model)))
