"""``parallel.cpu_offload: auto`` in tools/plan.py: the first choice that fits, and the record that a run reads."""

from __future__ import annotations

import contextlib
import json

import plan_runs
import pytest

from retemper.engine.errors import UserError
from retemper.tools import plan as command
from retemper.tools.planning import command as planning_command
from retemper.tools.planning.layout_plan import LayoutPlan
from retemper.tools.planning.offload_choice import choose_offload
from retemper.tools.planning.options import PlanOptions, read_architecture
from retemper.tools.planning.pool import DryRunPool
from retemper.tools.planning.search import require_possible

AUTO = "--parallel.cpu_offload auto"
GiB = 2**30


@pytest.fixture(scope="module")
def pool():
    with DryRunPool(1) as processes:
        yield processes


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    return plan_runs.write_config(tmp_path_factory.mktemp("planned_offload"))


def cluster_of(config, room: float = GiB, ranks: int = 1):
    """GPUs of 1 GiB, of which a run may use ``room`` bytes: the size of some buffers depends on that of the GPU."""
    options = PlanOptions(1, ranks, None, 0.55, 1 - room / GiB, None, gpu_memory=1, gpu_tflops=100)
    return options.cluster(read_architecture(config.model))


def peaks(run_file, pool, ranks: int, values) -> dict:
    """Bytes on the GPU at the peak with each value of the setting, by dry runs of all blocks."""
    found = {}
    for value in values:
        config = plan_runs.configure(run_file, f"--parallel.cpu_offload {str(value).lower()}")
        cluster = cluster_of(config, ranks=ranks)
        spec = plan_runs.spec_of(config, ranks, cluster.gpu.capability, ranks, GiB)
        found[value] = LayoutPlan(
            config, require_possible(config, cluster), cluster, pool.run([spec]), False
        ).peak_bytes
    return found


def test_the_fastest_choice_that_fits(run_file, pool):
    needed = peaks(run_file, pool, 1, (False, "optimizer", True))
    assert needed[False] > 1.1 * needed["optimizer"] > 1.2 * needed[True]
    config = plan_runs.configure(run_file, AUTO)
    for room, chosen, tried in (
        (1.03 * needed[False], False, ("false",)),
        (1.03 * needed["optimizer"], "optimizer", ("false", "optimizer")),
        (0.97 * needed["optimizer"], True, ("false", "optimizer", "true")),
    ):
        choice = choose_offload(config, cluster_of(config, room), pool, lambda line: None)
        assert choice.config.parallel.cpu_offload == chosen and choice.plan.fits
        assert choice.record == {"chosen": chosen, "fits": True, "reason": choice.reason}
        assert [name for name in ("false", "optimizer", "true") if f"{name} needs" in choice.reason] == list(tried)
    assert choose_offload(choice.config, cluster_of(config), pool, print) is None


def test_ranks_that_share_parameters_do_not_offload_the_optimizer_alone(run_file, pool, monkeypatch, tmp_path, capsys):
    """The whole command; what it shows is what it writes for a run."""
    monkeypatch.setattr(planning_command, "DryRunPool", lambda: contextlib.nullcontext(pool))
    needed, path = peaks(run_file, pool, 2, (False,)), tmp_path / "plan.json"
    for room, chosen, fits in ((0.97 * needed[False], True, True), (0.1 * needed[False], True, False)):
        gpu = ("--gpu-memory", "1", "--gpu-tflops", "100", "--reserve", str(1 - room / GiB), "--gpus-per-node", "2")
        command.main(["--config", str(run_file), *AUTO.split(), *gpu, "--quick", "--json", str(path)])
        record, text = json.loads(path.read_text()), capsys.readouterr().out
        found = record["cpu_offload"]
        assert (found["chosen"], found["fits"]) == (chosen, fits) and record["parallel"]["cpu_offload"] is chosen
        assert "optimizer is impossible here" in found["reason"]
        shown = "true" if fits else "nothing fits"
        assert text.startswith(f"parallel.cpu_offload auto: {shown}, {found['reason']}\n")


def test_what_is_impossible_without_offload_is_refused(run_file, pool):
    config = plan_runs.configure(run_file, f"{AUTO} --parallel.tensor 8")
    with pytest.raises(UserError, match=r"parallel\.tensor 8 does not divide"):
        choose_offload(config, cluster_of(config, ranks=8), pool, print)
