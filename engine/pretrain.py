"""Train: ``python engine/pretrain.py --config run.yaml``, or the same under ``torchrun`` for many ranks."""

import os
from contextlib import suppress

from retemper.engine.config import RunConfig
from retemper.engine.config_parser import parse_config
from retemper.engine.errors import run_command
from retemper.engine.garbage import uncollected
from retemper.engine.observe.console import Console
from retemper.engine.open_files import raise_open_files_limit
from retemper.engine.parallel.agreement import agree_on_config
from retemper.engine.parallel.launcher import read_launcher
from retemper.engine.parallel.layout import check_layout
from retemper.engine.stopping import StoppedBeforeTraining, StopRequest


def main(console: Console | None = None) -> None:
    with StopRequest() as stop:
        launcher = read_launcher()
        raise_open_files_limit()
        config, meeting = agree_on_config(lambda: prepare(launcher.world_size), several=launcher.world_size > 1)
        from retemper.engine.parallel.process_group import process_group
        from retemper.engine.trainer import Trainer

        stop.hold()
        with process_group(config.device, config.parallel.timeout_seconds, meeting) as ranks:
            stop.hold(ranks)
            with suppress(StoppedBeforeTraining):  # leaves the group as all do
                Trainer(config, ranks, stop, console).run()


def prepare(world_size: int) -> RunConfig:
    """The configuration of this run on ``world_size`` ranks; all that the run needs is imported then.

    A wrong configuration is reported at once, without PyTorch. An installation that is broken fails before any rank
    waits for this one.

    Raises:
        UserError: the configuration is wrong.
    """
    config = parse_config()
    check_layout(config, world_size)
    with uncollected():
        import retemper.engine.trainer  # noqa: F401
    return config


if __name__ == "__main__":
    printed = Console(logged=os.environ.get("RANK", "0") == "0")
    printed.install()
    run_command(lambda: main(printed))
