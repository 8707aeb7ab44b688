"""Find changes of single settings with which a run needs less memory, by dry runs of a few blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...engine.config.checks import validate
from ...engine.config.settings import RunConfig
from ...engine.errors import UserError
from ...engine.parallel.layout import Layout
from .experts import sizes_of as expert_sizes
from .layout_plan import LayoutPlan, gib
from .options import ClusterSpec
from .pool import DryRunPool
from .search import plan_briefly, require_possible

_LEAST_TOKENS = 4096
"""Minimum tokens of a sample on each of the context-parallel ranks."""
_LEAST_SAVED = 0.01
"""Smaller shares of the peak are left out."""
_ANOTHER_RESULT, _SLOW = "another result of the training", "slow: weights and states in host memory"
_NEW_RUN = f"{_ANOTHER_RESULT}; a run with checkpoints refuses it"
_ADAPTER = f"{_ANOTHER_RESULT}: only an adapter learns; a run with checkpoints refuses it"
_OTHER_SAMPLES = f"{_ANOTHER_RESULT}; a run with checkpoints needs allow_changes: [training.sequence_length]"


@dataclass(frozen=True)
class Change:
    """A change of settings that may save memory."""

    settings: Mapping[str, Any]
    """Values by key, such as ``parallel.recompute``."""
    drawback: str = ""
    """Empty if the result of the training stays the same up to rounding, and the speed similar."""

    def __str__(self) -> str:
        return ", ".join(f"{key}: {_shown(value)}" for key, value in self.settings.items())

    def applied_to(self, config: RunConfig) -> RunConfig:
        """Return the changed configuration."""
        for key, value in self.settings.items():
            section, _, name = key.partition(".")
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
        return config


@dataclass(frozen=True)
class Saving:
    """What a change saves."""

    change: Change
    plan: LayoutPlan
    """With the change."""
    saved_bytes: float
    """Of the peak of the fullest GPU."""

    @property
    def remark(self) -> str:
        """Return the drawback, and the host memory that the ranks of a node need; empty without either."""
        host = self.plan.host_bytes
        needed = [f"{gib(host)} GiB of host memory in each node"] if host else []
        return ", ".join([*filter(None, [self.change.drawback]), *needed])


def find_savings(config: RunConfig, cluster: ClusterSpec, pool: DryRunPool) -> tuple[LayoutPlan, list[Saving]]:
    """Return the plan of ``config``, and the possible changes that need less memory on the GPU.

    What needs more host memory than a node is known to have is left out.
    Changes without a drawback come first, each group with the largest saving first.

    Raises:
        UserError: the layout of ``config`` is impossible.
    """
    layout = require_possible(config, cluster)
    possible = list(_possible(config, layout, cluster))
    layouts = [(config, layout), *((other, its_layout) for _, other, its_layout in possible)]
    configured, *plans = plan_briefly(layouts, cluster, pool)
    savings = [
        Saving(change, plan, configured.peak_bytes - plan.peak_bytes)
        for (change, _, _), plan in zip(possible, plans, strict=True)
    ]
    least = _LEAST_SAVED * configured.peak_bytes
    found = [saving for saving in savings if saving.saved_bytes >= least and saving.plan.fits_host]
    return configured, sorted(found, key=lambda saving: (bool(saving.change.drawback), -saving.saved_bytes))


def _possible(config: RunConfig, layout: Layout, cluster: ClusterSpec) -> Iterator[tuple[Change, RunConfig, Layout]]:
    for change in changes(config, layout, cluster):
        other = change.applied_to(config)
        try:
            validate(other)
            yield change, other, require_possible(other, cluster)
        except UserError:
            continue


def changes(config: RunConfig, layout: Layout, cluster: ClusterSpec) -> Iterator[Change]:
    """Return the changes to try, not all of which are possible: those of one setting at a time.

    Args:
        config: of the run.
        layout: of its ranks.
        cluster: the cluster.
    """
    training, parallel = config.training, config.parallel
    if training.micro_batch_size > 1:
        yield Change({"training.micro_batch_size": 1})
    yield from _more_recomputation(config)
    if parallel.reduce_gradients == "step" and layout.pipeline == 1:
        yield Change({"parallel.reduce_gradients": "micro_batch"})
    if not parallel.reshard_after_forward:
        yield Change({"parallel.reshard_after_forward": True})
    if parallel.replicate > 1:
        yield Change({"parallel.replicate": 1, **_shared_by_all(config)})
    if 2 * layout.tensor <= cluster.assumptions.gpus_per_node:
        yield Change({"parallel.tensor": 2 * layout.tensor, **_shared_by_all(config)})
    experts = [size for size in expert_sizes(cluster.architecture, layout.shard * layout.context) if size > 1]
    if experts and parallel.expert == 1:
        yield Change({"parallel.expert": experts[-1]})
    if training.sequence_length >= 2 * layout.context * _LEAST_TOKENS:
        yield Change({"parallel.context": 2 * layout.context, **_shared_by_all(config)})
    if config.optimizer.has_state_dtype and config.optimizer.state_dtype != "bf16":
        yield Change({"optimizer.state_dtype": "bf16"}, _NEW_RUN)
    if training.weight_dtype != "bf16":
        yield Change({"training.weight_dtype": "bf16"}, _NEW_RUN)
    if config.adapter.kind is None and training.trainable == "all" and config.model.initialize_from is not None:
        yield Change({"adapter.kind": "lora", "adapter.rank": 64}, _ADAPTER)
    if not parallel.cpu_offload:
        if layout.world_size == layout.pipeline:
            yield Change({"parallel.cpu_offload": "optimizer"}, _SLOW)
        yield Change({"parallel.cpu_offload": True}, _SLOW)
    if not parallel.offload_activations and parallel.recompute != "selective":
        yield Change({"parallel.offload_activations": True})
    if training.sequence_length > 1:
        yield Change({"training.sequence_length": training.sequence_length // 2}, _OTHER_SAMPLES)


def _more_recomputation(config: RunConfig) -> Iterator[Change]:
    parallel = config.parallel
    every = {"parallel.recompute_every": 1} if parallel.recompute_every > 1 else {}
    if parallel.recompute == "none":
        yield Change({"parallel.recompute": "selective", **every})
    if parallel.recompute != "full":
        yield Change({"parallel.recompute": "full", **every})
    elif every:
        yield Change(every)


def _shared_by_all(config: RunConfig) -> dict[str, Any]:
    """Return the setting that divides weights and states over all other ranks, unless it is set already."""
    return {} if config.parallel.shard == "auto" else {"parallel.shard": "auto"}


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
