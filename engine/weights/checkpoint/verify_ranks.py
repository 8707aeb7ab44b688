"""Verify a checkpoint with all ranks of a run; :mod:`.verify` has what one process does, without PyTorch."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from ...errors import UserError
from ...parallel.process_group import Ranks
from .manifest import Manifest
from .verify import Damage, find_damage


def verify_together(folder: Path, ranks: Ranks) -> tuple[Manifest | None, str | None]:
    """Verify ``folder`` with all ranks, each a share of the files; return its manifest and its first damage.

    Raises:
        UserError: on every rank, if a rank cannot read the checkpoint, or only some of them see a damage.
    """
    share = (ranks.rank, ranks.world_size)
    description, silent = f"verifying {folder.name}", None if ranks.is_main else True
    with tqdm(desc=description, unit="B", unit_scale=True, disable=silent, leave=False, delay=2) as bar:
        manifest, mine = ranks.fail_together(lambda: find_damage(folder, share, on_bytes=bar.update))
    reports = ranks.all_gather(mine)
    damage = reports[0] or _seen_by_main(folder, reports, ranks)
    return manifest, damage[0].what if damage else None


def _seen_by_main(folder: Path, reports: list[list[Damage]], ranks: Ranks) -> list[Damage]:
    """Let the main rank check files that others find damaged, since a node may have a stale view of them."""
    suspects = [(rank, damage) for rank, found in enumerate(reports) for damage in found]
    if not suspects:
        return []
    files = {damage.file for _, damage in suspects}
    found: list[Damage] = ranks.broadcast(ranks.run_on_rank0(lambda: find_damage(folder, only=files)[1]))
    if not found:
        rank, damage = suspects[0]
        raise UserError(
            f"rank {rank}: {damage.what}, but rank 0 finds it undamaged; make sure that all nodes see the "
            "same run_folder"
        )
    return found
