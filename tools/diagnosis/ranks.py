"""Check that all ranks of a launcher reach each other, and that hosts can be reached from here."""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ...engine.errors import UserError
from .finding import Finding, ok, problem

if TYPE_CHECKING:
    from ...engine.guards.rendezvous import Rendezvous
    from ...engine.parallel.process_group import Ranks

GROUP = "Ranks"
SSH_PORT = 22
_CONNECT_SECONDS = 5.0
_REPETITIONS = 10


def check_hosts(hosts: Sequence[str]) -> list[Finding]:
    """Return a finding for each ``host`` or ``host:port``: whether its name resolves and its port accepts connections.

    The default port is that of ssh.
    """
    return [_check_host(*_split(host)) for host in hosts]


def _split(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon:
        return text, SSH_PORT
    if not (port.isdecimal() and len(port) <= 5 and 0 < int(port) < 2**16):
        raise UserError(f"--hosts {text}: the port is not a number from 1 to 65535; write HOST or HOST:PORT")
    return host, int(port)


def _check_host(host: str, port: int) -> Finding:
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4]
    except (OSError, UnicodeError) as error:
        remedy = "add it to DNS or /etc/hosts, or use its address"
        reason = getattr(error, "strerror", None) or error
        return problem(GROUP, host, f"the name does not resolve ({reason})", remedy)
    start = time.perf_counter()
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        remedy = "check that the machine runs, its firewall, and what listens on that port"
        return problem(GROUP, host, f"{address[0]} port {port}: {error.strerror or error}", remedy)
    return ok(GROUP, host, f"{address[0]} port {port} answers after {(time.perf_counter() - start) * 1000:.1f} ms")


def check_ranks(mine: Sequence[Finding], expected_hosts: Sequence[str], timeout_seconds: int) -> list[Finding]:
    """Let all ranks of the launcher meet and run collectives. All ranks must call this.

    Args:
        mine: findings on this rank's machine, which rank 0 gets; empty on all but one rank of a machine.
        expected_hosts: names of all hosts, if they are known, to name those that are missing.
        timeout_seconds: how long to wait for the last rank.

    Returns:
        On rank 0: findings on the ranks, and those of other machines that are not ok. Elsewhere nothing.
    """
    from ...engine.guards.rendezvous import MissingRanks, join
    from ...engine.parallel.process_group import process_group

    try:
        rendezvous = join({"findings": [finding.to_dict() for finding in mine]}, timeout_seconds)
    except MissingRanks as error:
        came = {_short(host) for host in error.hosts}
        missing = [host for host in expected_hosts if _short(host) not in came]
        remedy = f"nothing came from {', '.join(missing)}: start the command there" if missing else ""
        return [problem(GROUP, "rendezvous", str(error), remedy)]
    except UserError as error:
        return [problem(GROUP, "rendezvous", str(error), "")]
    with process_group("auto", timeout_seconds, rendezvous) as ranks:
        gathered = ranks.all_gather(_latencies(ranks, rendezvous))
    if not ranks.is_main:
        return []
    return [*_of_other_hosts(rendezvous.notes), *_of_ranks(rendezvous.notes, gathered)]


def expected_hosts(given: Sequence[str]) -> list[str]:
    """Return the hosts of ``--hosts``, or else those of the Slurm job."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if given or not nodes or shutil.which("scontrol") is None:
        return [_split(host)[0] for host in given]
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    return listed.stdout.split()


def _short(host: str) -> str:
    return host.partition(".")[0]


def _latencies(ranks: Ranks, rendezvous: Rendezvous) -> tuple[float, float]:
    """Return the median milliseconds of an answer of the launcher's store, and of an all-reduce on the device."""
    import torch
    import torch.distributed as dist

    key = f"doctor/{ranks.rank}"
    rendezvous.store.set(key, "x")
    store = _median_milliseconds(lambda: rendezvous.store.get(key))
    value = torch.ones(1, device=ranks.device)

    def all_reduce() -> None:
        value.fill_(1)
        dist.all_reduce(value)
        if value.item() != ranks.world_size:  # also waits for the GPU
            raise UserError(f"an all-reduce over {ranks.world_size} ranks gave {value.item():g}; check NCCL or gloo")

    all_reduce()
    return store, _median_milliseconds(all_reduce)


def _median_milliseconds(action: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPETITIONS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def _of_other_hosts(notes: Sequence[dict[str, Any]]) -> list[Finding]:
    """Return what is not ok on other machines than that of rank 0."""
    findings = []
    for entry in notes:
        if entry["host"] != notes[0]["host"]:
            found = [Finding(**fields) for fields in entry["findings"]]
            group = f"On {entry['host']}"
            findings += [Finding(group, f.name, f.status, f.text, f.remedy) for f in found if f.status != "ok"]
    return findings


def _of_ranks(notes: Sequence[dict[str, Any]], latencies: Sequence[tuple[float, float]]) -> list[Finding]:
    """Return a finding for each machine, with the slowest of its ranks."""
    by_host: dict[str, list[int]] = defaultdict(list)
    for rank, entry in enumerate(notes):
        by_host[entry["host"]].append(rank)
    findings = [ok(GROUP, "all-reduce", f"the sum over {len(notes)} ranks on {len(by_host)} hosts is right")]
    for host, ranks in by_host.items():
        store, reduced = (max(latencies[rank][part] for rank in ranks) for part in (0, 1))
        numbers = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        text = f"ranks {numbers}: the store answers after {store:.2f} ms, an all-reduce takes {reduced:.2f} ms"
        findings.append(ok(GROUP, host, text))
    return findings
