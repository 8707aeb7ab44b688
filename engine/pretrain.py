"""Train: ``python engine/pretrain.py --config run.yaml``, or the same under ``torchrun`` for many ranks."""

from retemper.engine.config_parser import parse_config
from retemper.engine.errors import run_command
from retemper.engine.parallel.agreement import agree_on_config
from retemper.engine.parallel.process_group import process_group, world_size_from_environment
from retemper.engine.trainer import Trainer, check_layout


def main() -> None:
    config, meeting = agree_on_config(parse_config, several=world_size_from_environment() > 1)
    with process_group(config.device, config.parallel.timeout_seconds, meeting) as ranks:
        # Inside the group, so that the first rank to fail does not have the launcher end the others unheard.
        ranks.everywhere(lambda: check_layout(config))
        Trainer(config, ranks).run()


if __name__ == "__main__":
    run_command(main)
