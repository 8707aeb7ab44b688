"""Facts about the experts of a planned model: their memory, and the numbers of ranks that can share them."""

from __future__ import annotations

from ...engine.config.settings import RunConfig
from ...engine.model.architecture import Architecture
from ...engine.model.expert_settings import ExpertSettings
from ...engine.model.families import DecoderArchitecture
from ...engine.parallel import trainable
from .layout_plan import LayoutPlan, gib
from .prediction import bytes_of, gradient_bytes


def settings_of(architecture: Architecture) -> ExpertSettings | None:
    """Return the experts of a model; None if it has none, or if transformers computes it."""
    return architecture.experts if isinstance(architecture, DecoderArchitecture) else None


def parameters_of_layer(architecture: Architecture) -> int:
    """Return the number of parameters of the experts of one layer."""
    experts = settings_of(architecture)
    return 0 if experts is None else 3 * architecture.hidden_size * experts.intermediate_size * experts.num_experts


def parameters_of(architecture: Architecture) -> int:
    """Return the number of parameters of all experts."""
    experts = settings_of(architecture)
    return 0 if experts is None else experts.num_layers * parameters_of_layer(architecture)


def sizes_of(architecture: Architecture, ranks: int) -> list[int]:
    """Return the powers of two by which ``ranks`` and the experts can be divided: values of ``parallel.expert``."""
    experts = settings_of(architecture)
    most = 1 if experts is None else min(ranks, experts.num_experts)
    count = 1 if experts is None else experts.num_experts
    return [1 << n for n in range(most.bit_length()) if ranks % (1 << n) == 0 and count % (1 << n) == 0]


def describe_missing(plan: LayoutPlan) -> str | None:
    """Return a line about the memory of the experts, and what helps, if a plan of a mixture does not fit."""
    architecture, config, layout = plan.cluster.architecture, plan.config, plan.layout
    if plan.fits or settings_of(architecture) is None:
        return None
    ranks = layout.shard * layout.context
    share = parameters_of(architecture) / (layout.pipeline * layout.tensor * ranks)
    held = share * (_bytes_of_state(config, architecture) + gradient_bytes(config, plan.batches.num_micro_batches))
    gathered = _gathered_bytes(plan, config.parallel.expert)
    return (
        f"experts     do not fit: with gradients and states this rank's share of them takes {gib(held)} GiB, and the "
        f"experts and gradients of a layer, while it computes, up to {gib(gathered)} GiB; what helps: "
        f"{', '.join(_remedies(plan, ranks))}"
    )


def _remedies(plan: LayoutPlan, ranks: int) -> list[str]:
    shown, found = plan.config.parallel.expert, []
    larger = [size for size in sizes_of(plan.cluster.architecture, ranks) if size > shown]
    if larger:
        saved = _gathered_bytes(plan, shown) - _gathered_bytes(plan, larger[-1])
        found.append(f"parallel.expert {larger[-1]} (gathers {gib(saved)} GiB less)")
    return [*found, "more ranks to share them", "optimizer.state_dtype bf16", "parallel.cpu_offload true"]


def _gathered_bytes(plan: LayoutPlan, expert: int) -> float:
    """Return the bytes of the gathered experts of a layer and of those prefetched, in bf16, and of a layer's gradients
    in fp32.
    """
    layer = parameters_of_layer(plan.cluster.architecture) / (plan.layout.tensor * expert)
    return 2 * layer * (1 + plan.config.parallel.prefetch_blocks) + 4 * layer


def _bytes_of_state(config: RunConfig, architecture: Architecture) -> float:
    """Return the bytes of a parameter with its optimizer states, on average over all parameters."""
    trained = trainable.count(architecture, config.training, config.adapter)
    states = trainable.state_bytes(architecture, config) / trained + config.training.average_bytes
    return bytes_of(config.training.weight_dtype) + states * trained / architecture.num_parameters
