"""Save checkpoints in the background: tensors are copied to host memory and written by a thread during training.

One checkpoint is written at a time. The thread communicates over a process group of its own, so that its messages never
mix with those of the training. All ranks notice its errors at the same step.
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
    """Writes checkpoints while it is entered. All ranks must call each method.

    Args:
        store: the checkpoints of the run.
        ranks: that save together.
        config: whether training continues meanwhile, and how many failures in a row end the run.
        say: receives lines for the log.
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
        self._thread: threading.Thread | None = None
        """The thread that writes the checkpoint of ``_task``."""

    def __enter__(self) -> Saver:
        self._store = self._store.of(self._ranks.with_own_group())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A UserError has been raised on all ranks, so the checkpoint can still be completed. After another error the
        # other ranks may be gone: this one must not wait for them, but a rank alone completes it.
        if kind is None or issubclass(kind, UserError) or self._store.ranks.world_size == 1:
            with nullcontext() if kind is None else suppress(Exception):  # the error that is being raised says more
                if self._task is not None:
                    self._finish()
            dist.destroy_process_group(self._store.ranks.group)

    def reserve_host_memory(self, tensors: Mapping[str, Tensor]) -> None:
        """Allocate host memory for copies of ``tensors``, so that a lack of it is noticed before the first save.

        Raises:
            UserError: on every rank, if any of them has too little.
        """
        if self._staging is not None:
            staging = self._staging
            self._ranks.fail_together(lambda: staging.reserve(tensors))

    def save(self, tensors: Mapping[str, Tensor], assets: HfAssets, manifest: Manifest, best_step: int | None) -> None:
        """Begin to write a checkpoint, after the previous one is complete; then prune the others.

        Args:
            tensors: every tensor by name; they may change after :meth:`hold_update`.
            assets: Hugging Face files of the checkpoint.
            manifest: of the checkpoint.
            best_step: step of the best evaluation so far; see :meth:`CheckpointStore.prune`.

        Raises:
            UserError: too many checkpoints in a row have failed.
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
            self._thread = threading.Thread(target=_run, args=arguments, name="checkpoint", daemon=True)
            self._thread.start()

    @property
    def ranks(self) -> Ranks:
        """The ranks with the process group of this saver. To be used only while nothing is being written."""
        return self._store.ranks

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, without communication. Its errors are ignored."""
        if self._task is not None:
            wait_for([self._task])
            self._task = None
            self._join()

    def at_step(self, step: int) -> Path | None:
        """Return the complete checkpoint of ``step``, if there is one. To be called after :meth:`settle`."""
        complete = self.ranks.broadcast(self._store.complete() if self._ranks.is_main else None)
        return next((folder for folder in complete if step_of(folder) == step), None)

    def save_now(self, tensors: Mapping[str, Tensor], assets: HfAssets, manifest: Manifest) -> Path:
        """Write a checkpoint synchronously, and prune none. To be called after :meth:`settle`.

        Raises:
            UserError: on every rank, if any of them cannot write.
        """
        return self._store.save(tensors, assets, manifest)

    def hold_update(self) -> None:
        """Wait until tensors may be changed because they have been copied. Never waits for a GPU."""
        if self._staging:
            self._staging.hold_update()

    def poll(self) -> None:
        """Notice a checkpoint that has been written, or has failed. To be called at every step.

        Raises:
            UserError: too many checkpoints in a row have failed.
        """
        if self._task is None:
            return
        self._raise_fault(self._task)
        if self._ranks.all_reduce(not self._task.done()) == 0:
            self.wait()

    def wait(self, raise_on_failure: bool = False) -> None:
        """Wait for the checkpoint that is being written.

        Args:
            raise_on_failure: whether a failure ends the run, because no later checkpoint follows.

        Raises:
            UserError: it failed and ``raise_on_failure`` is set, or too many in a row have failed.
        """
        if self._task is None:
            return
        problem = self._finish()
        if problem is not None and (raise_on_failure or self._failures > self._max_failures):
            raise UserError(problem)

    def _finish(self) -> str | None:
        """Return the error of the checkpoint, if it could not be written; only details differ between ranks."""
        task, self._task = self._task, None
        assert task is not None
        # Ranks communicate every second instead of waiting in one collective, so that dead ranks are noticed.
        while self._ranks.all_reduce(not task.done()):
            wait_for([task], timeout=1.0)
            self._raise_fault(task)
        self._join()
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

    def _join(self) -> None:
        """Wait until the thread has released its tensors: releasing them while Python exits would abort the process."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise_fault(self, task: Future[list[str]]) -> None:
        """Raise an error other than UserError at once: the other ranks may not have it, and must not be waited for."""
        if task.done() and not isinstance(task.exception(), UserError | None):
            task.result()


def _run(write: Callable[[], list[str]], task: Future[list[str]], device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # threads do not inherit it
    try:
        task.set_result(write())
    except BaseException as error:
        task.set_exception(error)
