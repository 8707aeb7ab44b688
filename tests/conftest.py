"""What all tests share: one thread per process, and ranks that are started once."""

from __future__ import annotations

import contextlib
import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed as dist
from rank_cluster import CPU, RankCluster, share_meshes

from retemper.engine.parallel.process_group import Ranks

pytest_plugins = tuple(f"fixtures.{name}" for name in ("checkpoints", "generation", "models", "runs", "tokenizers"))

# Without a GPU, Triton runs kernels in Python. It decides that when it is imported, which other libraries do as well.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
# Started in the background of a shell, this process ignores Ctrl-C, and so would every process that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What has been imported stays: without it, a garbage collection takes milliseconds instead of half a second."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test with the mark ``gpu`` is skipped, and says so, where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """Two gloo ranks."""
    cluster = RankCluster(2, tmp_path_factory.mktemp("two_ranks"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory):
    """Four gloo ranks."""
    cluster = RankCluster(4, tmp_path_factory.mktemp("four_ranks"))
    yield cluster
    cluster.close()


@pytest.fixture
def new_ranks(tmp_path):
    """Starts gloo ranks of a number, for this test alone.

    Tensor parallel layouts that compile need them, and runs have them. DTensor's caches hold the meshes of earlier
    tests; PyTorch 2.13 makes such a mesh a node of a compiled graph, which Inductor cannot lower.
    """
    with contextlib.ExitStack() as clusters:

        def start(world_size: int) -> RankCluster:
            return clusters.enter_context(contextlib.closing(RankCluster(world_size, tmp_path)))

        yield start


@pytest.fixture(scope="session")
def one_rank():
    """A single rank in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    share_meshes()
    yield Ranks(0, 1, CPU)
    dist.destroy_process_group()
