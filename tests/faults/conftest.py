"""Where the fault tests find their modules, and the undisturbed run that the judge is tried on."""

from __future__ import annotations

import fault_judge as judge
import pytest
import tiny_run
from fault_setup import SAMPLES_PER_STEP, write_run_file

FEW_STEPS = 8


@pytest.fixture(scope="session")
def short_run(two_ranks, tmp_path_factory):
    """Function: run folder of ``FEW_STEPS`` undisturbed steps, with the options given."""
    run_file = write_run_file(tmp_path_factory.mktemp("short") / "data")
    tokens = str(FEW_STEPS * SAMPLES_PER_STEP * 32)

    def make(*options):
        folder = tmp_path_factory.mktemp("short") / "run"
        two_ranks.run(
            tiny_run.train, run_file, ["--run_folder", str(folder), "--training.train_tokens", tokens, *options]
        )
        return folder

    return make


@pytest.fixture(scope="session")
def kept_run(short_run):
    """Run folder with the checkpoints of all steps."""
    return short_run("--checkpoint.save_interval", "1", "--checkpoint.keep_last", "100")


@pytest.fixture(scope="session")
def short_reference(kept_run):
    """What the judge knows of it."""
    return judge.read_reference(kept_run, SAMPLES_PER_STEP)
