"""What Prometheus scrapes during a run, read by an HTTP client and by the parser of its own client."""

from __future__ import annotations

import socket
import sys
import urllib.error
import urllib.request

import pytest
from helpers import tiny_run
from prometheus_client.parser import text_string_to_metric_families

from retemper.engine import pretrain
from retemper.engine.errors import UserError
from retemper.engine.observe.metrics_server import MetricsServer, require_server
from retemper.engine.observe.observer import RunDescription, StepRecord
from retemper.engine.schedule import Progress


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """Values by (name, values of its labels in the order of their names), as Prometheus reads them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_newest_numbers_are_served_until_the_end(port, tmp_path):
    server = MetricsServer(port)
    server.open(RunDescription(tmp_path, {}, {"model_type": "qwen2"}, {}, {"retemper": "1"}, 2, False))
    assert scrape(port) == {("retemper_run_info", "qwen2", str(tmp_path), "1", "2"): 1.0}
    values = {"loss": 3.5, "tokens_per_second": 1e6, "mfu": 0.4, "slowest_rank": 3, "grad_norm": None}
    server.step(StepRecord(Progress(6, 48, 600), {"loss": 9.0}, 2, 7.0, []))
    server.step(StepRecord(Progress(7, 56, 700), values, 1, 3.0, []))
    for name, loss in (("news", 2.0), ('a "set"', 5.0), ("news/web", float("inf")), ("news", 1.5)):
        server.evaluation(Progress(7, 56, 700), name, {"loss": loss})
    found = scrape(port)
    found.pop(("retemper_run_info", "qwen2", str(tmp_path), "1", "2"))
    assert found == {
        ("retemper_steps_total",): 7.0,
        ("retemper_tokens_total",): 700.0,
        ("retemper_loss",): 3.5,
        ("retemper_tokens_per_second",): 1e6,
        ("retemper_mfu",): 0.4,
        ("retemper_slowest_rank",): 3.0,
        ("retemper_remaining_steps",): 1.0,
        ("retemper_remaining_seconds",): 3.0,
        ("retemper_evaluation_loss", "news", ""): 1.5,
        ("retemper_evaluation_loss", 'a "set"', ""): 5.0,
        ("retemper_evaluation_loss", "news", "web"): float("inf"),
    }
    server.end({})
    with pytest.raises(urllib.error.URLError, match="refused"):
        scrape(port)
    require_server(port)


def test_a_port_in_use_and_a_missing_package_are_refused_before_anything_is_loaded(
    port, monkeypatch, one_rank, tmp_path
):
    path = tiny_run.write_config(tmp_path)
    config = tiny_run.configure(path, "--logging.metrics_port", str(port), "--model.initialize_from", "nowhere")
    with (
        socket.create_server(("", port)),
        pytest.raises(UserError, match=f"metrics_port {port} cannot be used.*in use"),
    ):
        pretrain.build(config, one_rank)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UserError, match=r"needs prometheus_client: pip install '.*\[prometheus\]'"):
        pretrain.build(config, one_rank)
    assert not (tmp_path / "run").exists()


def test_a_run_serves_its_numbers(port, one_rank, tmp_path):
    config = tiny_run.configure(tiny_run.write_config(tmp_path), "--logging.metrics_port", str(port))
    run, seen = pretrain.build(config, one_rank), []
    tiny_run.before_step(run, lambda: seen.append(scrape(port)))
    pretrain.train(run)
    assert len(seen) == 20
    records = tiny_run.records(tmp_path / "run")
    losses = {record["step"]: record["loss"] for record in records if "evaluation" not in record}
    assert [now.get(("retemper_loss",)) for now in seen[1:]] == [losses[step] for step in range(1, 20)]
    assert [now.get(("retemper_steps_total",)) for now in seen[1:]] == list(range(1, 20))
    [last] = [record["loss"] for record in records if record["step"] == 15 and "evaluation" in record]
    assert seen[-1]["retemper_evaluation_loss", "validation", ""] == last
    require_server(port)  # free again
