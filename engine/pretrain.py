"""Train: ``python engine/pretrain.py --config run.yaml``, or the same under ``torchrun`` for many ranks."""

from retemper.engine.config_parser import parse_config
from retemper.engine.errors import run_command
from retemper.engine.parallel.process_group import process_group
from retemper.engine.trainer import Trainer, check_layout


def main() -> None:
    config = parse_config()
    check_layout(config)
    with process_group(config.device, config.parallel.timeout_seconds) as ranks:
        Trainer(config, ranks).run()


if __name__ == "__main__":
    run_command(main)
