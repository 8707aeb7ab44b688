"""The names and boxes under which Hugging Face files hold the decoder's parameters, by the table of families."""

from __future__ import annotations

from collections.abc import Mapping

from .architecture import Piece
from .family_table import Family


def stored_pieces(family: Family, shapes: Mapping[str, tuple[int, ...]], head_dim: int) -> dict[str, list[Piece]]:
    """Return the parameters that files of ``family`` hold under other names or divided differently.

    Args:
        family: of the model.
        shapes: of all parameters of the decoder, by name.
        head_dim: size of a head.

    Returns:
        By parameter, the pieces that cover it.
    """
    pieces = {}
    for name, shape in shapes.items():
        fused = _fused_part(family, name)
        if family.experts is not None and ".experts." in name:
            pieces[name] = _pieces_of_experts(family, name, shape)
        elif fused is not None:
            pieces[name] = _pieces_of_part(family, name, fused, shapes, head_dim)
        elif (stored := _stored_name(family, name)) != name:
            start = (0,) * len(shape)
            pieces[name] = [Piece(stored, start, shape, start)]
    return pieces


def _stored_name(family: Family, name: str) -> str:
    for ours, theirs in family.names.items():
        name = name.replace(ours, theirs)
    return name


def _fused_part(family: Family, name: str) -> tuple[str, str] | None:
    """Return the fused projection that has the parameter ``name``, and the projection of the decoder."""
    for fused, parts in family.fused.items():
        for part in parts:
            if f".{part}." in name:
                return fused, part
    return None


def _pieces_of_experts(family: Family, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """Return where the matrix of each expert is stored, as a tensor of its own."""
    sizes, start = shape[1:], (0,) * (len(shape) - 1)
    return [
        Piece(_stored_name(family, name.replace(".experts.", f".experts.{expert}.")), start, sizes, (expert, *start))
        for expert in range(shape[0])
    ]


def _pieces_of_part(
    family: Family, name: str, fused: tuple[str, str], shapes: Mapping[str, tuple[int, ...]], head_dim: int
) -> list[Piece]:
    """Return where a projection's rows are among those of the fused one."""
    whole, part = fused
    parts = family.fused[whole]
    stored, shape = _stored_name(family, name.replace(part, whole)), shapes[name]
    rows = [shapes[name.replace(part, other)][0] for other in parts]
    place = parts.index(part)
    if family.fused_by_head:
        sources = [((head * len(parts) + place) * head_dim, head_dim) for head in range(shape[0] // head_dim)]
    else:
        sources = [(sum(rows[:place]), shape[0])]
    rest, zeros = shape[1:], (0,) * (len(shape) - 1)
    pieces, at = [], 0
    for start, count in sources:
        pieces.append(Piece(stored, (start, *zeros), (count, *rest), (at, *zeros)))
        at += count
    return pieces
