"""What ranks are asked to do with tensors that are laid out over them: save them, load them into another layout."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from retemper.engine.errors import UserError
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.weights.checkpoint.tensors import load_tensors
from retemper.engine.weights.conversion.dcp_reader import CheckpointReader
from retemper.engine.weights.saving import save_tensors

LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "whole": ((1,), (Replicate(),)),
    "rows of 2": ((2,), (Shard(0),)),
    "columns of 2": ((2,), (Shard(1),)),
    "rows of 4": ((4,), (Shard(0),)),
    "2 x 2": ((2, 2), (Shard(0), Shard(1))),
    "copies of rows": ((2, 2), (Replicate(), Shard(0))),
    "strided": ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
}
"""Shape of the mesh, and how tensors of two dimensions lie on it."""


def whole_tensors() -> dict[str, Tensor]:
    """Uneven, small, empty, of any dtype and dimension."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    tensors = {
        "uneven": random(7, 5),
        "fewer rows than ranks": random(1, 6),
        "bf16": random(6, 9).bfloat16(),
        "fp16": random(8, 4).half(),
        "fp64": random(5, 3).double(),
        "fp8": random(4, 4).to(torch.float8_e4m3fn),
        "int64": torch.arange(12).reshape(4, 3),
        "bool": torch.arange(12).reshape(3, 4) % 3 == 0,
        "nothing": torch.zeros(0, 3),
        "even": random(16, 8),
        "transposed": random(4, 6).t(),
        "vector": random(5),
        "cube": random(4, 3, 2),
        "step": torch.tensor(4.0),
    }
    return {**tensors, "tied": tensors["uneven"], "nan": torch.full((3, 3), torch.nan)}


def lay_out(ranks: Ranks, layout: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` of two dimensions over all ranks; others are on every rank alike."""
    shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", shape)
    laid_out = {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2:
            laid_out[name] = tensor.clone()
        elif layout == "strided" and tensor.shape[0] % 4 == 0:  # tensor parallelism cuts first, then FSDP
            shard, part = mesh.get_coordinate() or (0, 0)
            local = tensor.chunk(2)[part].chunk(2)[shard].clone()
            laid_out[name] = DTensor.from_local(
                local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.contiguous().stride()
            )
        else:
            plain = [Shard(p.dim) if isinstance(p, _StridedShard) else p for p in placements]
            plain = [Replicate(), Shard(0)] if layout == "strided" else plain
            laid_out[name] = distribute_tensor(tensor.contiguous(), mesh, plain, src_data_rank=None)
    # A part whose rows do not lie one after another, as a transposed weight has.
    if not isinstance(laid_out["transposed"], DTensor) or layout == "whole":
        laid_out["transposed"] = tensors["transposed"]
    return laid_out


def save(ranks: Ranks, folder: Path, layout: str) -> list[str]:
    """Save in ``layout``; the files that this rank has written."""
    return sorted(save_tensors(folder, lay_out(ranks, layout, whole_tensors())))


def load(ranks: Ranks, folder: Path, layout: str) -> list[str]:
    """Names of the tensors of which this rank has not got, bit for bit, its part when it loads into ``layout``."""
    whole = whole_tensors()
    expected = lay_out(ranks, layout, whole)
    found = lay_out(ranks, layout, {name: torch.full_like(tensor, 1) for name, tensor in whole.items()})
    load_tensors(folder, found)
    return [name for name in whole if _bits(found[name]) != _bits(expected[name])]


def _bits(tensor: Tensor) -> tuple[torch.Size, bytes]:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.shape, local.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def refusals(ranks: Ranks, folder: Path, failing: int) -> list[str]:
    """What is said when rank ``failing`` can neither write nor read; then that the ranks are still together."""
    lines = []
    tensors = {"a": distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (2,)), [Shard(0)])}
    save_tensors(folder, tensors)
    place = folder if ranks.rank != failing else folder / "nowhere"
    for action in (lambda: save_tensors(place, tensors), lambda: load_tensors(place, {})):
        try:
            action()
        except UserError as error:
            lines.append(str(error))
    assert ranks.all_reduce(1) == ranks.world_size
    return lines


def disagreement(ranks: Ranks, folder: Path) -> str:
    """What is said when ranks hold tensors of one name and different shapes."""
    try:
        save_tensors(folder, {"a": torch.ones(2 + ranks.rank)})
    except UserError as error:
        return str(error)
    return ""


def load_with_dcp(ranks: Ranks, folder: Path, layout: str) -> list[str]:
    """As :func:`load`, through PyTorch's distributed checkpoint (DCP)."""
    whole = whole_tensors()
    expected = lay_out(ranks, layout, whole)
    found = lay_out(ranks, layout, {name: torch.full_like(tensor, 1) for name, tensor in whole.items()})
    dcp.load(found, storage_reader=CheckpointReader(folder, verify=False))  # only tensors were saved, no manifest
    return [name for name in whole if _bits(found[name]) != _bits(expected[name])]
