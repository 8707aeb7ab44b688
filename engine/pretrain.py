"""Train: ``python engine/pretrain.py --config run.yaml``, or the same under ``torchrun`` for many ranks."""

import os
from contextlib import suppress

from retemper.engine.config_parser import parse_config
from retemper.engine.errors import run_command
from retemper.engine.observe.console import Console
from retemper.engine.open_files import raise_open_files_limit
from retemper.engine.parallel.agreement import agree_on_config
from retemper.engine.parallel.launcher import read_launcher
from retemper.engine.parallel.process_group import process_group
from retemper.engine.stopping import StoppedBeforeTraining, StopRequest
from retemper.engine.trainer import Trainer, check_layout


def main(console: Console | None = None) -> None:
    with StopRequest() as stop:
        launcher = read_launcher()
        raise_open_files_limit()
        config, meeting = agree_on_config(parse_config, several=launcher.world_size > 1)
        stop.hold()
        with process_group(config.device, config.parallel.timeout_seconds, meeting) as ranks:
            stop.hold(ranks)
            # Inside the group, so that the first rank to fail does not have the launcher end the others unheard.
            ranks.everywhere(lambda: check_layout(config))
            with suppress(StoppedBeforeTraining):  # leaves the group as all do
                Trainer(config, ranks, stop, console).run()


if __name__ == "__main__":
    printed = Console(logged=os.environ.get("RANK", "0") == "0")
    printed.install()
    run_command(lambda: main(printed))
