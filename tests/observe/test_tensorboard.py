"""Texts, hyperparameters and the order of curves, as TensorBoard's own readers see them."""

from __future__ import annotations

from pathlib import Path

import yaml
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer as PluginEventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler

from retemper.engine.observe.observer import RunDescription, Sample, StepRecord
from retemper.engine.observe.tensorboard import TensorBoard
from retemper.engine.schedule import Progress


def description(folder: Path, rate: float, **more) -> RunDescription:
    config = {
        "run_folder": str(folder),
        "data": {"train": [{"path": "a", "weight": 2.0}], "validation": {}},
        "training": {"train_tokens": 1000, "compile": True, "stop_after_minutes": None},
        "model": {"rope": {"kind": "yarn"}},
        "optimizer": {"learning_rate": rate, **more},
        "parallel": {"shard": "auto"},
        "seed": 7,
        "logging": {"tags": ["x"]},
    }
    return RunDescription(
        folder=folder, config=config, model={"parameters": 123}, datasets={}, code={}, world_size=1, resumed=False
    )


def write_run(folder: Path, rate: float, loss: float, after_step: int | None = None, **more) -> RunDescription:
    run = description(folder, rate, **more)
    board = TensorBoard(folder)
    board.open(run)
    board.start(after_step, False)
    for step in range((after_step or 0) + 1, 4):
        progress = Progress(step, step, 10 * step)
        board.step(StepRecord(progress, {"loss": loss + 3 - step}, 3 - step, 0.0, []))
        for name in ("news", "news/web", "wiki", "news/paper"):
            board.evaluation(progress, name, {"loss": loss, "perplexity": 7.0})
        board.samples(progress, [Sample("# Once", f"upon\n*{step}* times"), Sample("Why", "<b>not</b>")])
    board.end({})
    return run


def read(folder: Path) -> EventMultiplexer:
    return EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()


def text_at(accumulator, tag: str, step: int) -> str:
    [text] = [event.tensor_proto.string_val[0].decode() for event in accumulator.Tensors(tag) if event.step == step]
    return text


def test_sources_of_a_set_are_next_to_each_other(tmp_path):
    write_run(tmp_path, 0.1, 1.0)
    tags = sorted(read(tmp_path).GetAccumulator("tensorboard").Tags()["scalars"])
    keys = [f"{key}{source}" for key in ("loss", "perplexity") for source in ("", "/paper", "/web")]
    expected = [f"evaluation/news/{key}" for key in keys]
    assert tags == [*expected, "evaluation/wiki/loss", "evaluation/wiki/perplexity", "train/loss"]


def test_configuration_and_generated_texts_are_shown_as_they_are(tmp_path):
    run = write_run(tmp_path, 0.1, 1.0)
    events = read(tmp_path).GetAccumulator("tensorboard")
    block = text_at(events, "configuration/text_summary", 0)
    assert yaml.safe_load("".join(line.removeprefix("    ") for line in block.splitlines(keepends=True))) == run.config
    assert text_at(events, "samples/1/text_summary", 2).splitlines() == [
        "Prompt:", "", "    # Once", "", "Continuation:", "", "    upon", "    *2* times"
    ]  # fmt: skip
    assert "    <b>not</b>" in text_at(events, "samples/2/text_summary", 3)


def test_runs_are_compared_by_their_settings_and_last_losses(tmp_path):
    write_run(tmp_path / "first", 0.1, 1.0)
    write_run(tmp_path / "second", 0.2, 2.0, schedule="linear")
    write_run(tmp_path / "second", 0.2, 0.5, after_step=1, schedule="linear")  # resumed
    multiplexer = PluginEventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    backend = Context(
        TBContext(logdir=str(tmp_path), data_provider=MultiplexerDataProvider(multiplexer, str(tmp_path)))
    )
    context = RequestContext()
    metadata = backend.hparams_metadata(context, "")
    experiment = backend.experiment_from_metadata(context, "", True, metadata, [])
    metrics = {info.name.tag: info.name for info in experiment.metric_infos}
    wanted = ["train/loss", "evaluation/news/loss/web"]
    columns = [api_pb2.ColParams(metric=metrics[tag]) for tag in wanted]
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=10,
        col_params=columns,
        allowed_statuses=[api_pb2.STATUS_SUCCESS],
        include_metrics=True,
    )
    groups = Handler(context, backend, "", request).run().session_groups
    shown = {
        group.hparams["optimizer.learning_rate"].number_value: (
            {metric.name.tag: metric.value for metric in group.metric_values}, group.hparams,
        )
        for group in groups
    }  # fmt: skip
    assert shown.keys() == {0.1, 0.2} and len(groups) == 2
    assert [shown[0.1][0][tag] for tag in wanted] == [1.0, 1.0]
    assert [shown[0.2][0][tag] for tag in wanted] == [0.5, 0.5]
    settings = shown[0.2][1]
    assert settings["optimizer.schedule"].string_value == "linear" and settings["parameters"].number_value == 123
    assert settings["training.compile"].string_value == "true"
    assert settings["data.train"].string_value == '[{"path": "a", "weight": 2.0}]'
    assert not any(name.startswith(("logging", "run_folder")) for name in settings)
    names = {info.name for info in experiment.hparam_infos}
    assert {"optimizer.schedule", "optimizer.learning_rate"} <= names
