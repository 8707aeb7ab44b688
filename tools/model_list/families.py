"""List the model types that can be trained, without importing PyTorch or transformers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from ...engine.model.family_table import FAMILIES
from .checked_types import ONE_AT_A_TIME, OWN_ATTENTION, PACKED, REFUSED

Implementation = Literal["native", "transformers", "refused"]


@dataclass(frozen=True)
class Family:
    """A ``model_type`` of a ``config.json``."""

    model_type: str
    implementation: Implementation
    documents: str
    """How packed documents are computed; see docs/models.md."""
    axes: tuple[str, ...]
    """Axes of a layout that it can use."""

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain values."""
        return asdict(self)


_SHARDED = ("shard", "replicate")


def list_families() -> list[Family]:
    """Return the types by implementation, and then by name."""
    native = [Family(name, "native", "packed", (*_SHARDED, "context", "tensor", "pipeline")) for name in FAMILIES]
    library = [Family(name, "transformers", "packed", (*_SHARDED, "context")) for name in PACKED.split()]
    library += [Family(name, "transformers", "one at a time", _SHARDED) for name in ONE_AT_A_TIME.split()]
    library += [
        Family(name, "transformers", "one at a time, own attention", _SHARDED) for name in OWN_ATTENTION.split()
    ]
    refused = [Family(name, "refused", "", ()) for name in REFUSED.split()]
    checked = [family for family in (*library, *refused) if family.model_type not in FAMILIES]
    return [*sorted(native, key=_name), *sorted(checked, key=_name)]


def find_family(model_type: str) -> Family | None:
    """Return the family of that ``model_type``."""
    return next((family for family in list_families() if family.model_type == model_type), None)


def _name(family: Family) -> tuple[str, str]:
    return family.implementation, family.model_type
