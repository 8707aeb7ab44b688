"""Reading and checking a run's configuration: what is accepted, and that every refusal is one line with a remedy."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retemper.engine.config.parser import USUAL_SETTINGS, parse_config
from retemper.engine.config.settings import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    TrainingConfig,
    to_yaml,
)
from retemper.engine.config.yaml_loader import load_yaml
from retemper.engine.errors import UserError
from retemper.engine.pretrain import build

CONFIG = """
run_folder: runs/x
data:
  train:
    - path: corpora/web
      weight: 3
    - path: corpora/code
      weight: 0.5
      name: code
  validation: {news: corpora/news}
training:
  train_tokens: 1_000_000
  warmup_tokens: 1_000
model:
  architecture: {model_type: llama, rms_norm_eps: 1e-5}
optimizer:
  learning_rate: 1e-4
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def parse(path: Path, *arguments: str) -> RunConfig:
    return parse_config(["--config", str(path), *arguments])


def refusal(*arguments: str) -> str:
    """The message with which the command line is refused, which must be one line."""
    with pytest.raises(UserError) as caught:
        parse_config(arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def with_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def all_fields(kind: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of all leaves."""
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from all_fields(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


# --------------------------------------------------------------------------------------------------------------------
# What is accepted


def test_file_and_defaults(config_file):
    run = parse(config_file)
    assert run == RunConfig(
        run_folder="runs/x",
        data=DataConfig(
            train=[SourceConfig("corpora/web", 3.0), SourceConfig("corpora/code", 0.5, "code")],
            validation={"news": "corpora/news"},
        ),
        training=TrainingConfig(train_tokens=1_000_000, warmup_tokens=1_000),
        model=ModelConfig(architecture={"model_type": "llama", "rms_norm_eps": 1e-5}),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
    assert [source.identity for source in run.data.train] == ["web", "code"]


@pytest.mark.parametrize("equals", [True, False])
@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optimizer.learning_rate", "3e-5", 3e-5),
        ("training.train_tokens", "2_000_000", 2_000_000),
        ("parallel.shard", "4", 4),
        ("parallel.shard", "auto", "auto"),
        ("checkpoint.keep_best", "false", False),
        ("optimizer.decay_tokens", "null", None),
        ("run_folder", "2024", "2024"),
        ("resume", "none", "none"),
        ("data.train", "[{path: a}, {path: b, weight: 2}]", [SourceConfig("a"), SourceConfig("b", 2.0)]),
        ("model.architecture", "{hidden_size: 8}", {"hidden_size": 8}),
        ("model.architecture", "models/x", "models/x"),
        ("model.architecture.layers", "3", {"model_type": "llama", "rms_norm_eps": 1e-5, "layers": 3}),
        ("model.architecture.note", "'3'", {"model_type": "llama", "rms_norm_eps": 1e-5, "note": "3"}),
        ("data.validation.web", "3", {"news": "corpora/news", "web": "3"}),
    ],
)
def test_the_command_line_overrides(config_file, key, text, value, equals):
    run = parse(config_file, *([f"--{key}={text}"] if equals else [f"--{key}", text]))
    for name in key.split(".")[:2]:
        run = getattr(run, name)
    assert run == value
    assert type(run) is type(value)


def test_the_last_override_wins_wherever_the_file_stands(config_file):
    assert parse(config_file, "--seed", "1", "--seed=2").seed == 2
    assert parse_config(["--seed=2", "--config", str(config_file), "--seed=3"]).seed == 3


def test_a_list_is_replaced_whole(config_file, tmp_path):
    """Items of a former list lend nothing to those that replace them, whether by option or by a second file."""
    expected = [SourceConfig("a"), SourceConfig("b")]
    assert parse(config_file, "--data.train=[{path: a}, {path: b}]").data.train == expected
    second = with_text(tmp_path / "second.yaml", "data: {train: [{path: a}, {path: b}]}")
    assert parse(config_file, "--config", str(second)).data.train == expected


def test_entries_are_added_to_the_dictionary_as_it_stands(config_file, tmp_path):
    second = with_text(tmp_path / "second.yaml", "model: {architecture: {model_type: qwen2}}")
    options = ("--model.architecture.a=1", "--config", str(second), "--model.architecture.b", "{c: [1e-5, x]}")
    assert parse(config_file, *options).model.architecture == {"model_type": "qwen2", "b": {"c": [1e-5, "x"]}}
    options = ("--model.architecture={x: 1}", "--model.architecture.y=no", "--model.architecture.x=2")
    assert parse(config_file, *options).model.architecture == {"x": 2, "y": "no"}


def test_a_source_can_be_appended(config_file):
    run = parse(config_file, "--data.train+", "{path: c}", "--data.train+=[{path: d, weight: 2}]")
    assert [source.path for source in run.data.train] == ["corpora/web", "corpora/code", "c", "d"]
    assert [source.weight for source in run.data.train] == [3.0, 0.5, 1.0, 2.0]


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-05", "0.00001", "10_0e-7"])
def test_floats(config_file, text):
    path = with_text(config_file, CONFIG.replace("1e-4", text) + f"  min_learning_rate: {text}\n")
    assert parse(path).optimizer.learning_rate == pytest.approx(1e-5, rel=1e-12)
    assert parse(config_file, "--optimizer.eps", text).optimizer.eps == pytest.approx(1e-5, rel=1e-12)


@pytest.mark.parametrize(
    "text", ["12:30:00", "no", "on", "off", "yes", "y", "2024-01-01", "0x10", "1.2.3", "=", "._", "1e", "-_1", "+"]
)
def test_yaml_1_1_traps_stay_text(config_file, text):
    assert load_yaml(f"a: {text}") == {"a": text}
    assert parse(with_text(config_file, CONFIG.replace("runs/x", text))).run_folder == text
    assert parse(config_file, f"--run_folder={text}").run_folder == text


def test_yaml_numbers_are_decimal():
    assert load_yaml("[010, 1_000, -5, +5, .5, 1., 1_0.5, ~, null, true, False]") == [
        *(10, 1000, -5, 5, 0.5, 1.0, 10.5, None, None, True, False)
    ]


def test_print_config_is_read_back(config_file, capsys, tmp_path):
    options = ("--optimizer.eps=1e-7", "--data.validation={a: b}", "--run_folder=1e-5")
    with pytest.raises(SystemExit) as caught:
        parse(config_file, *options, "--print_config")
    assert not caught.value.code
    printed = with_text(tmp_path / "printed.yaml", capsys.readouterr().out)
    assert parse(printed) == parse(config_file, *options)


def test_to_yaml_is_read_back(config_file, tmp_path):
    run = parse(config_file, "--parallel.shard=2", "--optimizer.schedule=wsd", "--optimizer.decay_tokens=10_000")
    assert parse(with_text(tmp_path / "again.yaml", to_yaml(run))) == run


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(
    # Without what is expanded in paths.
    text=st.one_of(
        st.text().filter(lambda text: not re.match("~", text) and "$" not in text),
        st.from_regex(r"[-+.0-9:_a-zA-Z][-+~.0-9:_a-zA-Z]{0,7}", fullmatch=True),
    ),
    learning_rate=st.floats(5e-6, 1e9),
    tokens=st.integers(1000, 10**15),
)
def test_to_yaml_keeps_any_text_and_number(tmp_path_factory, text, learning_rate, tokens):
    run = RunConfig(
        run_folder="runs/" + text.replace("\0", ""),
        data=DataConfig(train=[SourceConfig(text)], validation={text: text}),
        training=TrainingConfig(train_tokens=tokens),
        model=ModelConfig(architecture={"key": text, "number": learning_rate}),
        optimizer=OptimizerConfig(learning_rate=learning_rate),
    )
    path = with_text(tmp_path_factory.getbasetemp() / "any.yaml", to_yaml(run))
    assert parse(path) == run
    # Other programs read the file of the run folder with YAML 1.1 rules.
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["train"][0]["path"] == text


# --------------------------------------------------------------------------------------------------------------------
# Help


def test_every_field_has_its_docstring_in_help(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help-all"])
    assert not caught.value.code
    # An option's entry begins with its name at the start of a line and runs to the next one.
    entries = dict(
        re.findall(r"^  --([\w.]+)[^\n]*?(?=\n|  )(.*?)(?=^  -|^\S|\Z)", capsys.readouterr().out, re.M | re.S)
    )
    fields = list(all_fields())
    assert len(fields) > 70
    for name in fields:
        text = re.sub(r"\((?:required|default|type)[^)]*\)|\{[^}]*\}", "", entries[name]).strip()
        assert len(text.split()) >= 2, f"--{name} has no text in --help-all"


def test_the_usual_settings_are_a_part_of_all(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            parse_config([option])
        shown[option] = capsys.readouterr().out
    names = {option: set(re.findall(r"^  --([\w.]+)", text, re.M)) for option, text in shown.items()}
    assert names["--help"] == {"config", *USUAL_SETTINGS} and names["--help"] < names["--help-all"]
    assert len(shown["--help"].splitlines()) <= 45
    rest = len(
        names["--help-all"]
        - names["--help"]
        - {"print_config"}
        - {n for n in names["--help-all"] if n.endswith(".help")}
    )
    assert f"{rest} more settings" in shown["--help"]


def test_the_help_options_that_help_names_print_help(capsys):
    entries = {
        "--data.train.help": ("--data.train.", SourceConfig),
        "--data.stages.help": ("--data.stages.", StageConfig),
        "--data.stages.train.help": ("--data.train.", SourceConfig),
    }
    waiting, printed = ["--help"], set()
    while waiting:
        option = waiting.pop()
        printed.add(option)
        with pytest.raises(SystemExit) as caught:
            parse_config([option])
        assert not caught.value.code
        shown = capsys.readouterr().out
        if option in entries:
            prefix, kind = entries[option]
            assert all(f"{prefix}{field.name} " in shown for field in dataclasses.fields(kind))
        waiting += set(re.findall(r"--[\w.]+\.help\b", shown)) - printed
    assert printed == {"--help", *entries}


def test_every_field_of_every_section_has_a_docstring():
    """The same from the source: list items, which are no options of their own, included."""
    kinds, waiting = set(), [RunConfig]
    while waiting:
        kind = waiting.pop()
        kinds.add(kind)
        for hint in get_type_hints(kind).values():
            hint = get_args(hint)[0] if get_origin(hint) is list else hint
            if dataclasses.is_dataclass(hint):
                waiting.append(hint)
    for kind in kinds:
        body = inspect.getsource(kind)
        for item in dataclasses.fields(kind):
            if not dataclasses.is_dataclass(get_type_hints(kind)[item.name]):
                assert re.search(rf'^    {item.name}: .*\n    """', body, re.M), f"{kind.__name__}.{item.name}"


# --------------------------------------------------------------------------------------------------------------------
# What is refused: files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2\n", "duplicate key 'seed' in line 19"),
        ("optimizer: {eps: 1e-8}\n", "duplicate key 'optimizer' in line 18"),
        ("checkpoint: {keep_last: 1, keep_last: 2}\n", "duplicate key 'keep_last' in line 18"),
        ("sead: 1\n", "unknown key 'sead'; did you mean 'seed'?"),
        ("optimzer: {eps: 1e-8}\n", "unknown key 'optimzer'; did you mean 'optimizer'?"),
        ("checkpoint: {save_intervall: 5}\n", "did you mean 'checkpoint.save_interval'?"),
        ("checkpoint: {eval_interval: 5}\n", "did you mean 'training.eval_interval'?"),
        ("lr: 3\n", "unknown key 'lr'; did you mean 'optimizer.learning_rate'?"),
        ("parallel: {gbs: 3}\n", "did you mean 'training.global_batch_size'?"),
        ("optimizer.eps: 3\n", "unknown key 'optimizer.eps'; set it in a file, as optimizer: {eps: ...}"),
        ("zzz: 1\n", "unknown key 'zzz'; see --help for all keys"),
        ("1: 1\n", "unknown key '1'; see --help"),
        ("? [a]\n: 1\n", "line 18: a list cannot be a key"),
        ("seed: null\n", "seed is null; expected int"),
        ("seed: true\n", "seed is true; expected int"),
        ("seed: '5'\n", "seed is '5'; expected int"),
        ("seed: 1e3\n", "seed is 1000.0; a whole number is needed: write 1_000"),
        ("seed: 1.5\n", "seed is 1.5; expected int"),
        ("resume: 3\n", "resume is 3; expected text"),
        ("device: tpu\n", "device is 'tpu'; expected 'auto' or 'cpu' or 'cuda'"),
        ("logging:\n", "logging is null; expected 'key: value' lines"),
        ("logging: {tensorboard: yes}\n", "logging.tensorboard is 'yes'; expected true or false"),
        ("parallel: {shard: 1.5}\n", "parallel.shard is 1.5; expected int or 'auto'"),
        ("parallel: {shard: 2.0}\n", "parallel.shard is 2.0; a whole number is needed: write 2"),
        ("seed: [\n", "not valid YAML"),
        ("seed: !!python/object:os.system x\n", "line 18: the tag !!python/object:os.system is not supported"),
    ],
)
def test_refused_lines_name_the_file(config_file, text, expected):
    path = with_text(config_file, CONFIG + text)
    message = refusal("--config", str(path))
    assert message.startswith(f"{path}: ")
    assert expected in message


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("weight: 3", "weight: abc", "data.train[0].weight is 'abc'; expected float"),
        ("name: code", "name: 3", "data.train[1].name is 3; expected text or null"),
        ("weight: 3", "wieght: 3", "unknown key 'data.train[0].wieght'; did you mean 'data.train[0].weight'?"),
        ("path: corpora/code", "label: x", "unknown key 'data.train[1].label'"),
        ("- path: corpora/code\n      weight", "- weight", "data.train[1].path is missing"),
        ("{news: corpora/news}", "corpora/news", "data.validation is 'corpora/news'; expected 'key: value' lines"),
        ("{news: corpora/news}", "{news: 3}", "data.validation.news is 3; expected text"),
        ("{model_type: llama, rms_norm_eps: 1e-5}", "[1]", "model.architecture is [1]; expected"),
    ],
)
def test_refused_values_deep_in_the_file(config_file, old, new, expected):
    assert old in CONFIG
    assert expected in refusal("--config", str(with_text(config_file, CONFIG.replace(old, new))))


def test_a_removed_key_is_named_with_what_holds_instead(config_file):
    reason = ", which was removed: PyTorch's operators compute norms, rotary positions and SwiGLU; delete it"
    path = with_text(config_file, CONFIG.replace("\ntraining:\n", "\ntraining:\n  fused_elementwise: auto\n"))
    assert refusal("--config", str(path)) == f"{path}: unknown key 'training.fused_elementwise'{reason}"
    option = refusal("--config", str(path), "--training.fused_elementwise", "torch")
    assert f"unknown option --training.fused_elementwise{reason}" in option


def test_refused_files(tmp_path):
    absent = tmp_path / "absent.yaml"
    assert refusal("--config", str(absent)) == f"--config {absent}: No such file or directory"
    assert "directory" in refusal("--config", str(tmp_path))
    listing = with_text(tmp_path / "list.yaml", "- a\n")
    assert "expected 'key: value' lines, found ['a']" in refusal(f"--config={listing}")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not a UTF-8 text file" in refusal("--config", str(binary))
    assert "expected 'key: value' lines, found nothing" in refusal(
        "--config", str(with_text(tmp_path / "empty.yaml", ""))
    )


def test_missing_keys(config_file):
    message = refusal()
    for key in ("run_folder", "training.train_tokens"):
        assert key in message
    without = re.sub(r"  train:\n(    .*\n)+", "", CONFIG)
    message = refusal("--config", str(with_text(config_file, without)))
    assert message == "data.train is empty; name at least one dataset there, or data.stages"
    path = with_text(config_file, CONFIG.replace("train_tokens: 1_000_000", "sequence_length: 8"))
    assert refusal("--config", str(path)) == (
        "missing: training.train_tokens; set it in the file given with --config or as --training.train_tokens"
    )


# --------------------------------------------------------------------------------------------------------------------
# What is refused: the command line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--optimizer.lr", "3"], "unknown option --optimizer.lr; did you mean 'optimizer.learning_rate'?"),
        (["--optimizer.min_lr", "3"], "did you mean 'optimizer.min_learning_rate'?"),
        (["--optimizer.wd=3"], "did you mean 'optimizer.weight_decay'?"),
        (["--optimizer.learn", "3"], "did you mean 'optimizer.learning_rate'?"),
        (["--optimizr.learning_rate", "3"], "did you mean 'optimizer.learning_rate'?"),
        (["--learning-rate", "3"], "did you mean 'optimizer.learning_rate'?"),
        (["--training.seq_len", "3"], "did you mean 'training.sequence_length'?"),
        (["--mbs", "3"], "did you mean 'training.micro_batch_size'?"),
        (["--training.save_interval", "3"], "did you mean 'checkpoint.save_interval'?"),
        (["--optimizer.xyz", "3"], "unknown option --optimizer.xyz; see --help for all keys"),
        (["stray"], "unexpected argument 'stray'"),
        (["--training.train_tokens", "1e6"], "training.train_tokens is 1000000.0; a whole number is needed: write 1_"),
        (["--parallel.shard", "x"], "parallel.shard is 'x'; expected int or 'auto'"),
        (["--optimizer.learning_rate=fast"], "optimizer.learning_rate is 'fast'; expected float"),
        (["--optimizer.eps="], "optimizer.eps is null; expected float"),
        (["--optimizer.schedule", "cosin"], "optimizer.schedule is 'cosin'; expected 'cosine' or 'linear' or 'wsd'"),
        (["--checkpoint.keep_best", "maybe"], "checkpoint.keep_best is 'maybe'; expected true or false"),
        (["--seed", "null"], "seed is null; expected int"),
        (["--seed"], "--seed"),
        (["--config"], "--config"),
        (["--data.train", "corpus"], "data.train is 'corpus'; expected a list"),
        (["--data.train", "[{path: a, weight: abc}]"], "data.train[0].weight is 'abc'; expected float"),
        (["--data.train", "[{path: a, path: b}]"], "--data.train: duplicate key 'path'"),
        (["--data.train", "[{weight: 3}]"], "data.train[0].path is missing"),
        (["--data.train+", "{paht: x}"], "did you mean 'data.train[2].path'?"),
        (["--training", "3"], "training is 3; expected 'key: value' lines"),
        (["--optimizer", "{eps: 1e-7, lrr: 3}"], "unknown key 'optimizer.lrr'"),
    ],
)
def test_refused_options(config_file, arguments, expected):
    assert expected in refusal("--config", str(config_file), *arguments)


# --------------------------------------------------------------------------------------------------------------------
# What is refused: impossible arithmetic


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((f"training.{key}", "0") for key in ("train_tokens", "sequence_length", "global_batch_size")),
        *(("training.micro_batch_size", "0"), ("training.warmup_tokens", "-1"), ("training.eval_interval", "-1")),
        *(("training.eval_tokens", "0"), ("data.prefetch_steps", "0"), ("data.validation_fraction", "1.0")),
        *(("data.validation_fraction", "-0.1"), ("data.validation_fraction", ".nan"), ("parallel.replicate", "0")),
        *(("parallel.timeout_seconds", "0"), ("parallel.shard", "0"), ("checkpoint.save_interval", "0")),
        *(("checkpoint.keep_last", "0"), ("logging.log_interval", "0"), ("optimizer.learning_rate", "-1.0")),
        *(("optimizer.learning_rate", ".inf"), ("optimizer.learning_rate", ".nan"), ("optimizer.eps", "0.0")),
        *(("optimizer.min_learning_rate", "-1.0"), ("optimizer.weight_decay", "-0.1"), ("optimizer.eps", ".inf")),
        *(("optimizer.clip_grad_norm", "-1.0"), ("optimizer.beta1", "1.0"), ("optimizer.beta2", "-0.5")),
        *(("optimizer.beta2", ".nan"), ("seed", "-1"), ("seed", str(2**63))),
        *(("training.max_skipped_steps", "-1"), ("training.loss_spike_zscore", "0.0")),
        *(("training.stop_after_minutes", "-1.0"), ("training.stop_after_minutes", ".inf")),
        *(("training.max_rewinds", "-1"), ("training.rewind_steps", "0"), ("training.check_replicas_interval", "-1")),
    ],
)
def test_values_out_of_range(config_file, option, value):
    message = refusal("--config", str(config_file), f"--{option}={value}")
    assert message.startswith(f"{option} is {value.removeprefix('.')}; ")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--training.warmup_tokens=2_000_000"],
            "training.warmup_tokens 2,000,000 is more than training.train_tokens 1,000,000",
        ),
        (
            ["--optimizer.min_learning_rate=1e-3"],
            "optimizer.min_learning_rate 0.001 is above optimizer.learning_rate 0.0001",
        ),
        (["--optimizer.decay_tokens=5"], "optimizer.decay_tokens is 5, but only optimizer.schedule wsd uses it"),
        (
            ["--optimizer.schedule=wsd", "--optimizer.decay_tokens=999_001"],
            "optimizer.decay_tokens 999,001 is not between 1 and the 999,000 tokens after the warm-up "
            "(training.train_tokens 1,000,000, training.warmup_tokens 1,000); change optimizer.decay_tokens",
        ),
        (["--optimizer.schedule=wsd", "--optimizer.decay_tokens=0"], "optimizer.decay_tokens 0 is not between 1 and"),
        (["--data.train=[]"], "data.train is empty"),
        (["--data.train=[{path: a/x}, {path: b/x}]"], "data.train has two sources named 'x'"),
        (["--data.train=[{path: a, weight: 0}]"], "data.train[0].weight is 0.0; it must be positive"),
        (["--data.train=[{path: a}, {path: b, weight: -1.5}]"], "data.train[1].weight is -1.5"),
        (["--data.train=[{path: a, weight: .inf}]"], "data.train[0].weight is inf"),
        (
            ["--data.validation={held_out: x}", "--data.validation_fraction=0.1"],
            "data.validation names a set 'held_out'",
        ),
        (
            ["--training.loss_spike_action=rewind"],
            "training.loss_spike_action is rewind, but ",
        ),
        (["--model.architecture=null"], "model.initialize_from and model.architecture are both null"),
    ],
)
def test_impossible_combinations(config_file, options, expected):
    assert refusal("--config", str(config_file), *options).startswith(expected)


def built_in_python(**changes):
    """A configuration that no file was read for."""
    data = DataConfig(train=[SourceConfig(path="data")])
    training = TrainingConfig(train_tokens=5120, sequence_length=32, global_batch_size=8)
    return replace(RunConfig(run_folder="run", data=data, training=training), **changes)


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"parallel": ParallelConfig(recompute_every=0)}, "parallel.recompute_every is 0; it must be at least 1"),
        ({"seed": "7"}, "seed is '7'"),
        ({"device": "gpu"}, "device is 'gpu'"),
    ],
)
def test_settings_built_in_python_are_validated_as_those_of_a_file(changes, start, one_rank):
    """By the run itself, before it looks at model or data."""
    with pytest.raises(UserError) as refused:
        build(built_in_python(**changes), one_rank)
    assert str(refused.value).startswith(start)
