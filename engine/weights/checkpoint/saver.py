"""Saving behind the training: tensors are copied to host memory and written by a thread, while training goes on.

One checkpoint is on its way at a time. The thread's messages to other ranks go over a process group of its own, so that
they never mix with those of the training. What goes wrong in it is noticed by all ranks at the same step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from ...config.settings import CheckpointConfig
from ...errors import UserError
from ...parallel.process_group import Ranks
from .assets import HfAssets
from .manifest import Manifest
from .names import step_of
from .staging import Staging
from .store import CheckpointStore


class Saver:
    """Writes checkpoints while it is entered. All ranks call every method alike.

    Args:
        store: where to.
        ranks: that save together.
        config: whether training goes on meanwhile, and how many failures in a row end the run.
        say: takes lines for the log.
    """

    def __init__(
        self,
        store: CheckpointStore,
        ranks: Ranks,
        config: CheckpointConfig,
        say: Callable[[str], None],
    ):
        self._store, self._ranks, self._say = store, ranks, say
        self._staging = Staging() if config.asynchronous else None
        self._max_failures, self._failures = config.max_failed_saves, 0
        self._task: Future[list[str]] | None = None

    def __enter__(self) -> Saver:
        self._store = self._store.of(self._ranks.with_own_group())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A UserError has been raised on all ranks: what is on its way can still be completed. After anything else the
        # other ranks may be gone, and nobody must wait for them.
        if kind is None or issubclass(kind, UserError):
            with nullcontext() if kind is None else suppress(Exception):  # what is leaving already says more
                if self._task is not None:
                    self._finish()
            dist.destroy_process_group(self._store.ranks.group)

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the host memory for copies of ``tensors``, so that what is too little shows before the first save.

        Raises:
            UserError: on every rank, when any of them cannot have it.
        """
        if self._staging is not None:
            staging = self._staging
            self._ranks.run_on_all(lambda: staging.reserve(tensors))

    def save(self, tensors: Mapping[str, Tensor], assets: HfAssets, manifest: Manifest, best_step: int | None) -> None:
        """Begin to write a checkpoint, after the one before it is complete; then remove those that nothing keeps.

        Args:
            tensors: every tensor by name; they may change after :meth:`hold_update`.
            assets: Hugging Face files that travel with it.
            manifest: what the checkpoint is.
            best_step: step of the best evaluation so far; see :meth:`CheckpointStore.prune`.

        Raises:
            UserError: more checkpoints in a row have failed than is allowed.
        """
        self.wait()
        staging = self._staging
        if staging:
            staging.begin(tensors)

        def write() -> list[str]:
            staged = staging.copy() if staging else None
            lines = [f"  saved {self._store.save(tensors, assets, manifest, staged)}"]
            try:
                lines += [f"  {line}" for line in self._store.prune(best_step)]
            except UserError as error:  # the next one tries again
                lines.append(f"  older checkpoints could not be removed: {error}")
            return lines

        self._task = Future()
        if staging is None:
            _run(write, self._task, self._ranks.device)
            self.wait()
        else:
            arguments = (write, self._task, self._ranks.device)
            threading.Thread(target=_run, args=arguments, name="checkpoint", daemon=True).start()

    @property
    def ranks(self) -> Ranks:
        """The ranks, with the process group of this saver, for use while nothing is being written."""
        return self._store.ranks

    def settle(self) -> None:
        """Wait for what is being written, without a message to another rank. Whether it succeeded does not matter."""
        if self._task is not None:
            wait_for([self._task])
            self._task = None

    def at_step(self, step: int) -> Path | None:
        """The complete checkpoint of ``step``, if there is one. All ranks must call this after :meth:`settle`."""
        complete = self.ranks.broadcast(self._store.complete() if self._ranks.is_main else None)
        return next((folder for folder in complete if step_of(folder) == step), None)

    def save_now(self, tensors: Mapping[str, Tensor], assets: HfAssets, manifest: Manifest) -> Path:
        """Write a checkpoint at once and remove none. All ranks must call this after :meth:`settle`.

        Raises:
            UserError: on every rank, when any of them cannot write.
        """
        return self._store.save(tensors, assets, manifest)

    def hold_update(self) -> None:
        """To be called before tensors change: they must have been copied. Waits for host memory, never for a GPU."""
        if self._staging:
            self._staging.hold_update()

    def poll(self) -> None:
        """Notice a checkpoint that has been written, or has failed. To be called at every step.

        Raises:
            UserError: more checkpoints in a row have failed than is allowed.
        """
        if self._task is None:
            return
        self._raise_fault(self._task)
        if self._ranks.all_reduce(not self._task.done()) == 0:
            self.wait()

    def wait(self, required: bool = False) -> None:
        """Wait until nothing is on its way.

        Args:
            required: whether the run ends where that checkpoint has failed: it was the last one.

        Raises:
            UserError: it was ``required``, or more in a row have failed than is allowed.
        """
        if self._task is None:
            return
        problem = self._finish()
        if problem is not None and (required or self._failures > self._max_failures):
            raise UserError(problem)

    def _finish(self) -> str | None:
        """The line of a checkpoint that could not be written; the same on all ranks but for who saw it."""
        task, self._task = self._task, None
        assert task is not None
        # All meet every second instead of waiting in one collective: who is silent or has ended is then found out.
        while self._ranks.all_reduce(not task.done()):
            wait_for([task], timeout=1.0)
            self._raise_fault(task)
        try:
            lines = task.result()
        except UserError as error:
            self._failures += 1
            self._say(f"  not saved, {self._failures} in a row: {error}")
            return str(error)
        self._failures = 0
        for line in lines:
            self._say(line)
        return None

    def _raise_fault(self, task: Future[list[str]]) -> None:
        """A fault of the program, which the other ranks may not share: they must not be waited for."""
        if task.done() and not isinstance(task.exception(), UserError | None):
            task.result()


def _run(write: Callable[[], list[str]], task: Future[list[str]], device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # which a thread does not take over from the one that starts it
    try:
        task.set_result(write())
    except BaseException as error:
        task.set_exception(error)
