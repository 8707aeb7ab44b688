"""Four machines on this one: network namespaces with an address and a host name each, joined by a bridge."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_run
from launch_runs import NUM_STEPS, ROOT, assert_same_curve, has_step

LAUNCH = ROOT / "launch" / "many_nodes.sh"
NUM_NODES = 4
TIMEOUT_SECONDS = 8
SLACK_SECONDS = 20
"""For the ranks to say what happened, for torchrun to end, and for a busy machine; far below torch's own limits."""


class Cluster:
    """``NUM_NODES`` namespaces. Names are short (an interface's has at most 15 characters) and used once."""

    def __init__(self, folder: Path) -> None:
        self.id = f"rt{uuid.uuid4().hex[:6]}"
        self.folder = folder
        self.processes: list[subprocess.Popen] = []

    def build(self) -> None:
        names = "".join(f"{address(node)} node{node}\n" for node in range(NUM_NODES))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        ip("link", "add", f"{self.id}b", "type", "bridge")
        ip("link", "set", f"{self.id}b", "up")
        for node in range(NUM_NODES):
            ip("netns", "add", self.space(node))
            ip("link", "add", self.link(node), "type", "veth", "peer", "name", "eth0", "netns", self.space(node))
            ip("link", "set", self.link(node), "master", f"{self.id}b", "up")
            ip("-n", self.space(node), "addr", "add", f"{address(node)}/24", "dev", "eth0")
            # As docs/cluster.md says: else torchrun itself waits for a store that is gone for a quarter of an hour.
            ip("netns", "exec", self.space(node), "sysctl", "-qw", "net.ipv4.tcp_retries2=5")
            for name in ("lo", "eth0"):
                ip("-n", self.space(node), "link", "set", name, "up")

    def remove(self) -> None:
        """End what runs there and take all away, as far as it was built."""
        self.end()
        for node in range(NUM_NODES):
            ip("link", "del", self.link(node), check=False)
            ip("netns", "del", self.space(node), check=False)
        ip("link", "del", f"{self.id}b", check=False)

    def space(self, node: int) -> str:
        return f"{self.id}n{node}"

    def link(self, node: int) -> str:
        return f"{self.id}v{node}"

    def launch(self, *arguments: str) -> None:
        """The same command on every node."""
        settings = {"NNODES": str(NUM_NODES), "NPROC_PER_NODE": "1", "RDZV_ENDPOINT": "node0:29400"}
        environment = {**os.environ, **settings, "PYTHON": sys.executable, "GLOO_SOCKET_IFNAME": "eth0"}
        for node in range(NUM_NODES):
            as_node = f'hostname node{node} && mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
            command = [
                "ip",
                "netns",
                "exec",
                self.space(node),
                "unshare",
                "--uts",
                "--mount",
                "sh",
                "-c",
                as_node,
                "sh",
            ]
            with self.log(node).open("w") as log:
                process = subprocess.Popen(
                    [*command, str(LAUNCH), *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            self.processes.append(process)

    def log(self, node: int) -> Path:
        return self.folder / f"node{node}.log"

    def wait(self, nodes: list[int], seconds: float | None = None) -> list[int]:
        """Exit codes of the launchers."""
        limit = time.monotonic() + seconds if seconds else None
        return [self.processes[node].wait(limit and max(0.1, limit - time.monotonic())) for node in nodes]

    def end(self) -> None:
        """End the launchers and their ranks, which are sessions of their own."""
        for node in range(NUM_NODES):
            listed = ip("netns", "pids", self.space(node), check=False)
            for pid in listed.split():
                kill(int(pid))
        for process in self.processes:
            process.wait()
        self.processes.clear()


def ip(*arguments: str, check: bool = True) -> str:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True).stdout


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def address(node: int) -> str:
    return f"10.77.9.{node + 1}"


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    missing = [tool for tool in ("ip", "unshare", "hostname") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"network namespaces need {', '.join(missing)} (packages iproute2, util-linux, hostname)")
    built = Cluster(tmp_path)
    try:
        try:
            built.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        yield built
    finally:
        built.remove()


def wait_for_step(cluster: Cluster, run_folder: Path, step: int) -> None:
    while not has_step(run_folder, step):
        for node, process in enumerate(cluster.processes):
            assert process.poll() is None, cluster.log(node).read_text()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_cut_link_is_named_and_the_same_command_goes_on(cluster, run_file, undisturbed, tmp_path):
    folder = tmp_path / "run"
    command = ["--config", str(run_file), "--run_folder", str(folder)]
    command += ["--parallel.timeout_seconds", str(TIMEOUT_SECONDS)]
    cluster.launch(*command)
    wait_for_step(cluster, folder, 15)
    cut = 2
    ip("link", "set", cluster.link(cut), "down")
    others = [node for node in range(NUM_NODES) if node != cut]
    assert 0 not in cluster.wait(others, TIMEOUT_SECONDS + SLACK_SECONDS)
    for node in others:
        output = cluster.log(node).read_text()
        found = re.findall(r"\[rank \d\] error: .*", output)
        assert len(found) == 1, output
        named = re.search(r"rank (\d) \((\w+)\) sent no heartbeat for (\d+) s", found[0])
        assert named and named[2] == f"node{cut}", output
        assert TIMEOUT_SECONDS - 2 <= int(named[3]) <= TIMEOUT_SECONDS + SLACK_SECONDS
    assert not has_step(folder, NUM_STEPS)

    ip("link", "set", cluster.link(cut), "up")
    cluster.end()
    cluster.launch(*command)
    codes = cluster.wait(list(range(NUM_NODES)))
    output = "".join(cluster.log(node).read_text() for node in range(NUM_NODES))
    assert codes == [0] * NUM_NODES, output
    assert "resumed from" in output
    assert_same_curve(tiny_run.curve(folder), undisturbed)
