"""Train: ``python engine/pretrain.py --config run.yaml``, or the same under ``torchrun`` for many ranks."""

from contextlib import suppress

from retemper.engine.config_parser import parse_config
from retemper.engine.errors import run_command
from retemper.engine.parallel.agreement import agree_on_config
from retemper.engine.parallel.process_group import process_group, world_size_from_environment
from retemper.engine.stopping import StoppedBeforeTraining, StopRequest
from retemper.engine.trainer import Trainer, check_layout


def main() -> None:
    with StopRequest() as stop:
        config, meeting = agree_on_config(parse_config, several=world_size_from_environment() > 1)
        stop.hold()
        with process_group(config.device, config.parallel.timeout_seconds, meeting) as ranks:
            stop.hold(ranks)
            # Inside the group, so that the first rank to fail does not have the launcher end the others unheard.
            ranks.everywhere(lambda: check_layout(config))
            with suppress(StoppedBeforeTraining):  # leaves the group as all do
                Trainer(config, ranks, stop).run()


if __name__ == "__main__":
    run_command(main)
