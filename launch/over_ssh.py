"""Train on the machines of a hostfile, started from here over ssh (or pdsh).

    python launch/over_ssh.py --hostfile hosts --config megatron_configs/qwen2_72b.yaml

The hostfile has lines such as ``node0 slots=8`` (ranks; without slots one for each GPU). All other options are those of
engine/pretrain.py. Files that they name, this folder and the interpreter are at the same paths on all machines. See
docs/cluster.md. The work is done by retemper.tools.ssh_launch; this file is the command line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from retemper.engine.config.command_line import CommandParser
from retemper.engine.config.parser import parse_config
from retemper.engine.errors import UserError, run_command
from retemper.tools.ssh_launch.hostfile import read_hostfile
from retemper.tools.ssh_launch.job import ROOT, Settings, forwarded
from retemper.tools.ssh_launch.session import require_hosts, run_session
from retemper.tools.ssh_launch.transport import TRANSPORTS

_PRETRAIN = ROOT / "engine" / "pretrain.py"


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        description="Train on the machines of a hostfile, started from here over ssh or pdsh.",
        epilog="All other options are those of the program, by default engine/pretrain.py, such as --config run.yaml.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--hostfile", required=True, type=Path, metavar="FILE", help="lines such as: node0 slots=8 (ranks)"
    )
    parser.add_argument("--launcher", choices=sorted(TRANSPORTS), default="ssh", help="default: %(default)s")
    parser.add_argument(
        "--ssh-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="option of ssh or pdsh, once for each word, as --ssh-option=-p --ssh-option=2222",
    )
    parser.add_argument("--program", type=Path, default=_PRETRAIN, metavar="FILE", help="default: engine/pretrain.py")
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="interpreter (default: this one)")
    parser.add_argument(
        "--export", action="append", default=[], metavar="NAME", help="send this environment variable as well"
    )
    parser.add_argument(
        "--logs", type=Path, metavar="DIR", help="folder of hosts/HOST.log (default: the run folder, else this folder)"
    )
    parser.add_argument("--port", type=int, default=29400, help="of the first host (default: %(default)s)")
    parser.add_argument("--max-restarts", type=int, default=0, metavar="N", help="of failed ranks (default: 0)")
    parser.add_argument(
        "--grace",
        type=int,
        default=300,
        metavar="SECONDS",
        help="time for a checkpoint when the run is asked to stop (default: %(default)s)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, by default that of this process. Return the largest exit status of a host."""
    options, rest = build_parser().parse_known_args(arguments)
    rest = rest[1:] if rest[:1] == ["--"] else rest
    _require_numbers(options)
    settings = Settings(
        hosts=read_hostfile(options.hostfile),
        program=options.program.absolute(),
        arguments=rest,
        python=options.python,
        folder=Path.cwd(),
        environment=forwarded(os.environ, options.export),
        port=options.port,
        max_restarts=options.max_restarts,
        grace=options.grace,
    )
    logs = options.logs or _run_folder(settings)
    transport = TRANSPORTS[options.launcher](options.ssh_option)
    if held := transport.withheld(settings.job(0)):
        print(
            f"note: {', '.join(held)} not sent, because {transport.name} puts variables into command lines, which "
            "others can read; use --launcher ssh, or log in on the hosts",
            file=sys.stderr,
        )
    require_hosts(settings, transport)
    return run_session(settings, transport, logs / "hosts")


def _run_folder(settings: Settings) -> Path:
    """Return the run folder; of another program than engine/pretrain.py, the working directory."""
    if settings.program != _PRETRAIN:
        return settings.folder
    return Path(parse_config(settings.arguments).run_folder)


def _require_numbers(options: argparse.Namespace) -> None:
    if not 0 < options.port < 2**16:
        raise UserError(f"--port {options.port}: must be from 1 to 65535")
    for name in ("max_restarts", "grace"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 0")


if __name__ == "__main__":
    run_command(main)
