"""The losses of routers and the load of experts, for the records of a run, and warnings about experts that starve."""

from __future__ import annotations

from ..parallel.router_losses import STARVING, WINDOW, RouterLosses
from .host_copy import HostCopy

_MOST_NAMED = 8
"""Number of layers that a warning names."""


class ExpertLoad:
    """Reports the routers of a run.

    Args:
        routers: of the model; None: it has no experts, and nothing is reported.
    """

    def __init__(self, routers: RouterLosses | None):
        self._routers = routers
        self._warned: dict[int, int] = {}

    def copy(self) -> HostCopy | None:
        """Copy the numbers of the last step to the host, without waiting for the device; None if there are none."""
        if self._routers is None or self._routers.numbers is None:
            return None
        return HostCopy(self._routers.numbers)

    def report(self, copy: HostCopy | None) -> tuple[dict[str, float], list[str]]:
        """Return values for the record of a step, and lines for people, of what :meth:`copy` returned."""
        if copy is None or self._routers is None:
            return {}, []
        numbers = self._routers.read(copy.wait())
        values = {"router_aux_loss": numbers.aux_loss, "router_z_loss": numbers.z_loss}
        if numbers.loads:
            values["expert_load_max"] = max(numbers.loads.values())
            values |= {f"expert_load/layer_{layer}": load for layer, load in numbers.loads.items()}
        return values, self._warnings(numbers.starving)

    def _warnings(self, starving: dict[int, int]) -> list[str]:
        """Return a line about layers in which more experts starve than in the window before."""
        new = {layer: count for layer, count in starving.items() if count > self._warned.get(layer, 0)}
        self._warned = starving
        if not new:
            return []
        assert self._routers is not None
        settings = self._routers.settings
        named = ", ".join(f"layer {layer} ({count})" for layer, count in list(new.items())[:_MOST_NAMED])
        more = f" and {len(new) - _MOST_NAMED} more layers" if len(new) > _MOST_NAMED else ""
        remedy = "training.router_bias_update_rate or " if settings.selection_bias else ""
        return [
            f"  note: experts starve: in the last {WINDOW} updates, experts of {named}{more} had less than "
            f"{STARVING:.0%} of the mean load of the layer's {settings.num_experts} experts; raise {remedy}"
            f"training.router_aux_loss_coef, now {self._routers.aux_loss_coef:g}"
        ]
