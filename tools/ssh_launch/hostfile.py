"""Read hostfiles: lines ``host slots=8`` as of DeepSpeed and Open MPI, or ``host:8`` as of MPICH."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...engine.errors import UserError
from ...engine.files.regular import read_regular

_LINE = re.compile(r"(?P<host>\w[\w.@-]*)(?::(?P<colon>[0-9]+))?(?P<options>(?:\s+[\w-]+\s*=\s*\S+)*)\s*", re.ASCII)
_SLOTS = re.compile(r"(?<![\w-])slots\s*=\s*(\S+)")
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Host:
    """A machine of a hostfile."""

    name: str
    """As ssh takes it: a host name, an address, or user@host."""
    slots: int | None = None
    """Ranks on the machine; None: one for each GPU."""

    @property
    def address(self) -> str:
        """The name without a user, for connections between ranks."""
        return self.name.rpartition("@")[2]


def read_hostfile(path: Path) -> list[Host]:
    """Return the hosts of a hostfile, in its order. Empty lines and comments (``#``) are skipped.

    Raises:
        UserError: it cannot be read, has no host, repeats one, or has a line of another form.
    """
    try:
        text = read_regular(path, _MOST_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}; a hostfile is needed") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if line:
            host = parse_line(line, f"{path}:{number}")
            if host.name in hosts:
                raise UserError(f"{path}:{number}: {host.name} occurs twice; remove one of its lines")
            hosts[host.name] = host
    if not hosts:
        raise UserError(f"{path}: no host; write lines such as: node0 slots=8")
    return [*hosts.values()]


def parse_line(line: str, where: str) -> Host:
    """Return the host of one line; other options than ``slots``, such as Open MPI's ``max_slots``, are ignored.

    Raises:
        UserError: begins with ``where``.
    """
    found = _LINE.fullmatch(line)
    if found is None:
        raise UserError(f"{where}: {line!r} is not a host; write a line such as: node0 slots=8")
    slots = _SLOTS.search(found["options"])
    text = slots[1] if slots else found["colon"]
    if text is not None and not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise UserError(f"{where}: slots={text}: must be a number of ranks from 1 to 9999")
    return Host(found["host"], None if text is None else int(text))


def read_hosts(text: str) -> list[str]:
    """Return ``host`` or ``host:port`` of a list with commas, or the hosts of the hostfile of that name."""
    path = Path(text)
    if path.is_file():
        return [host.address for host in read_hostfile(path)]
    return [host for host in text.split(",") if host]
