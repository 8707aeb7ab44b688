"""Save the state before a step that fails with an exception, if possible.

Saving needs three things: the failed step has not started to change weights and optimizer states, their values are
finite, and all ranks failed in the same step. Ranks agree on the last through the launcher's store, because a rank that
did not fail waits in a collective and cannot join another one. If only some ranks failed, nothing is saved. Collectives
use the process group of the :class:`~..weights.checkpoint.saver.Saver`, which the failed step did not use. If a rank
hangs meanwhile, :mod:`.liveness` ends all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..optim import TrainingOptimizer
from ..optim.local import local_part
from ..parallel.process_group import Ranks
from ..weights.checkpoint.assets import HfAssets
from ..weights.checkpoint.manifest import Manifest
from ..weights.checkpoint.saver import Saver
from ..weights.checkpoint.tensors import checkpoint_tensors
from .liveness import is_connection_error

_OTHERS_SECONDS = 10.0
"""How long a rank waits for the other ranks to fail as well."""
_CHUNK = 1 << 24  # elements checked at a time


class EmergencySave:
    """Saves a run whose step has failed.

    Args:
        ranks: that train together.
        parameters: of this rank that checkpoints contain, by name, taken between steps: after a failure the model may
            show gathered copies.
        saver: of the run's checkpoints.
        say: prints a line for people, on the main rank.
        timeout_seconds: time limit of a wait for other ranks.
    """

    def __init__(
        self,
        ranks: Ranks,
        parameters: Mapping[str, nn.Parameter],
        saver: Saver,
        say: Callable[[str], None],
        timeout_seconds: float,
    ):
        self._ranks, self._saver, self._say = ranks, saver, say
        self._parameters = dict(parameters)
        self._patience = min(_OTHERS_SECONDS, timeout_seconds / 2)
        self._first_here = 0
        """The first failed rank, which prints."""
        self.state_consistent = True
        """False while a step changes weights and optimizer states."""

    @property
    def base_names(self) -> frozenset[str]:
        """No names: the parameters are those that checkpoints contain."""
        return frozenset()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return every parameter of this rank with its name."""
        return iter(self._parameters.items())

    def __call__(
        self,
        error: Exception,
        step: int,
        optimizer: TrainingOptimizer,
        assets: HfAssets,
        manifest: Callable[[str], Manifest],
    ) -> None:
        """Save, or log why not. Never raises: ``error`` ends the run.

        Args:
            error: raised by the step.
            step: number of the last complete step.
            optimizer: with the states of the parameters.
            assets: see :meth:`CheckpointStore.save`.
            manifest: returns the manifest of the state before the step, given a description of the failure.
        """
        if self._ranks.world_size > 1 and is_connection_error(error):
            return  # a rank has died, and the others report it
        kind = UserError if isinstance(error, UserError) else type(error)
        what = " ".join(f"{kind.__name__}: {error}".split())[:300]
        try:
            self._require_all_ranks(step)
            line = self._save(manifest(what), optimizer, assets)
        except Exception as problem:
            line = f"not saved: {' '.join(str(problem).split())[:300]}"
        line = f"  after step {step} the run failed ({what}): {line}"
        if self._ranks.is_main:
            self._say(line)
        elif self._ranks.rank == self._first_here:
            print(f"[rank {self._ranks.rank}]{line}", flush=True)

    def _save(self, manifest: Manifest, optimizer: TrainingOptimizer, assets: HfAssets) -> str:
        self._saver.settle()
        if saved := self._saver.at_step(manifest.step):
            return f"{saved} has that step"
        if self._ranks.device.type == "cuda":
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        tensors = checkpoint_tensors(self, optimizer)
        if self._saver.ranks.all_reduce(not all(map(_is_finite, tensors.values()))):
            raise UserError("weights or optimizer states are not finite")
        folder: Path = self._saver.save_now(tensors, assets, manifest)
        return f"saved {folder}; resume: auto continues from there"

    def _require_all_ranks(self, step: int) -> None:
        """Raise UserError unless all ranks failed after the same step, with consistent weights."""
        store, world_size = self._ranks.store, self._ranks.world_size
        if world_size == 1:
            here = {0: self.state_consistent}
        elif store is None:
            raise UserError("these ranks have no common store")
        else:
            store.set(f"emergency/{step}/{self._ranks.rank}", str(int(self.state_consistent)))
            keys = [f"emergency/{step}/{rank}" for rank in range(world_size)]
            until = time.monotonic() + self._patience
            while not (complete := store.check(keys)) and time.monotonic() < until:
                time.sleep(0.05)
            came = [rank for rank, key in enumerate(keys) if complete or store.check([key])]
            self._first_here = came[0]
            here = {rank: store.get(keys[rank]) == b"1" for rank in came}
        if len(here) < world_size:
            missing = sorted(set(range(world_size)) - set(here))
            shown = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            raise UserError(
                f"rank {shown} did not fail in the same step within {self._patience:g} s, and saving needs all ranks"
            )
        if not all(here.values()):
            raise UserError("the update of the weights had begun")


@torch.no_grad()
def _is_finite(tensor: Tensor) -> bool:
    # In chunks: after an out-of-memory error there may be no space for a mask of the whole tensor.
    held = local_part(tensor).reshape(-1)
    return all(bool(chunk.isfinite().all()) for chunk in held.split(_CHUNK))
