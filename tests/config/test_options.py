"""Options at any depth give what the same edit of the file gives, or a refusal; all problems are reported together."""

import dataclasses
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import pytest

from retemper.engine.config.files import SHIPPED
from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import RunConfig, to_yaml
from retemper.engine.config.types_check import bare, hints_of, is_path
from retemper.engine.errors import UserError, report_user_error

CONFIG = """
run_folder: runs/x
data:
  stages:
    - train: [{path: a}, {path: b, weight: 2}]
      train_tokens: 500_000
    - train: [{path: c}]
  validation: {news: corpora/news, wiki.en: w}
training: {train_tokens: 1_000_000}
model:
  architecture:
    model_type: llama
    layer_types: [x, y]
    a.b: {c: 1}
    rope_scaling: {rope_type: llama3, factor: 8.0}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def parse(path: Path, *options: str) -> RunConfig:
    return parse_config(["--config", str(path), *options])


def refusals(*arguments: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_config(arguments)
    assert not any("\n" in problem for problem in caught.value.problems)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("options", "old", "new"),
    [
        ("model.architecture.rope_scaling.factor 32.0", "factor: 8.0", "factor: 32.0"),
        ("model.architecture.rope_scaling.factor 32", "factor: 8.0", "factor: 32"),
        (
            "model.architecture.rope_scaling.factor 32.0 --model.architecture.rope_scaling.low 1e0",
            "factor: 8.0",
            "factor: 32.0, low: 1e0",
        ),
        ("model.architecture.layer_types.1 z", "[x, y]", "[x, z]"),
        ("model.architecture.layer_types[0] 3", "[x, y]", "[3, y]"),
        ("model.architecture.layer_types+ z", "[x, y]", "[x, y, z]"),
        ("model.architecture.a.b.c null", "{c: 1}", "{c: null}"),
        ("model.architecture.a.b.d.e [1e-5]", "{c: 1}", "{c: 1, d: {e: [1e-5]}}"),
        ("data.stages.0.train.1.weight 3", "weight: 2", "weight: 3"),
        ("data.stages[0].train[1].weight=3", "weight: 2", "weight: 3"),
        ("data.stages.1.train.0.path other/c", "{path: c}", "{path: other/c}"),
        ("data.stages.1.train.0 {path: d, weight: 4}", "{path: c}", "{path: d, weight: 4}"),
        ("data.stages.1.train+ {path: d}", "[{path: c}]", "[{path: c}, {path: d}]"),
        ("data.stages.1.train+ {path: d} --data.stages.1.train.1.name n", "{path: c}", "{path: c}, {path: d, name: n}"),
        ("data.stages.0.train_tokens 400_000", "500_000", "400_000"),
        ("data.stages.0.train.0.name 7", "{path: a}", "{path: a, name: '7'}"),
        ("data.validation.wiki.en v", "wiki.en: w", "wiki.en: v"),
        ("data.validation.web.de 2024", "wiki.en: w", "wiki.en: w, web.de: '2024'"),
        (
            "training {eval_interval: 5} --training.eval_tokens 7",
            "train_tokens: 1_",
            "eval_interval: 5, eval_tokens: 7, train_tokens: 1_",
        ),
    ],
)  # fmt: skip
def test_an_option_is_an_edit_of_the_file(config_file, options, old, new, tmp_path):
    words = []
    for option in options.split(" --"):
        key, _, value = option.partition("=" if "=" in option else " ")
        words += [f"--{key}", value]
    assert CONFIG.count(old) == 1
    edited = tmp_path / "edited.yaml"
    edited.write_text(CONFIG.replace(old, new), encoding="utf-8")
    assert parse(config_file, *words) == parse(edited)
    assert parse(config_file, *words) != parse(config_file)
    joined = [f"{option}={value}" for option, value in zip(words[::2], words[1::2], strict=True)]
    assert parse(config_file, *joined) == parse(edited)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        (
            "data.stages.2.train.0.path",
            "x",
            "'2' is not the number of an item: data.stages has 2 items, counted from 0",
        ),
        ("data.stages.1.train.1.path", "x", "'1' is not the number of an item: data.stages[1].train has 1 item,"),
        ("data.stages.-1.train_tokens", "3", "'-1' is not the number of an item"),
        ("data.train.0.path", "x", "data.train has 0 items"),
        ("model.architecture.layer_types.two", "x", "'two' is not the number of an item"),
        ("data.stages.0.train.0.wieght", "3", "did you mean 'data.stages[0].train[0].weight'?"),
        ("data.stages.0.train.0.weight", "abc", "data.stages[0].train[0].weight is 'abc'; expected float"),
        ("data.stages.0.train.0.max_tokens", "1e6", "a whole number is needed: write 1_000_000"),
        ("data.stages.0.train.0", "{weight: 2}", "data.stages[0].train[0].path is missing"),
        ("data.stages.0.train.0", "x", "data.stages[0].train[0] is 'x'; expected 'key: value' lines"),
        ("data.stages.0.train.0.weight.x", "3", "unknown option --data.stages.0.train.0.weight.x"),
        ("model.architecture.rope_scaling.factor.x", "3", "rope_scaling.factor is 8.0, which has no entries"),
        ("model.architecture.x", "{a: ", "--model.architecture.x {a: : not valid YAML: line 1"),
        ("model.architecture.x", ".nan", "model.architecture.x is not a finite number"),
        ("data.validation.news", "[a]", None),
        ("seed.x", "3", "unknown option --seed.x"),
        ("optimizer.eps.", "3", "unknown option --optimizer.eps."),
        ("seed+", "3", "--seed+ appends to a list, but seed is null"),
        ("data.validation", "{news: [a]}", "data.validation.news is ['a']; expected text"),
        ("data.validation.news", "null", "data.validation.news is null; expected text"),
        ("run_folder", "null", "run_folder is null; expected text"),
        ("resume", "null", "resume is null; expected text"),
        ("training.compile", "1", "training.compile is 1; expected 'auto' or 'on' or 'off'"),
    ],
)
def test_a_place_that_is_not_there_is_refused(config_file, option, value, expected):
    if expected is None:  # text is taken as it is
        assert parse(config_file, f"--{option}", value).data.validation["news"] == value
        return
    [problem] = refusals("--config", str(config_file), f"--{option}", value)
    assert expected in problem


def test_an_entry_of_an_architecture_in_a_file_is_merged_with_the_file(config_file, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    kept = {"model_type": "qwen2", "vocab_size": 5, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(kept))
    for path in (folder, folder / "config.json"):
        options = ("--model.architecture", str(path), "--model.architecture.rope_scaling.factor", "4.0")
        expected = {**kept, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
        assert parse(config_file, *options, "--model.architecture.vocab_size", "7").model.architecture == {
            **expected,
            "vocab_size": 7,
        }
        assert f"changes one entry of what {path} holds" in capsys.readouterr().err
    [problem] = refusals("--config", str(config_file), "--model.architecture=none", "--model.architecture.x=1")
    assert problem == "none: No such file or directory; a Hugging Face config.json is needed"


def test_an_entry_of_no_architecture(config_file):
    assert parse(config_file, "--model.architecture=null", "--model.architecture.a.b=1").model.architecture == {
        "a": {"b": 1}
    }
    options = ("--model.architecture.a=1", "--model.initialize_from", "ckpt/x")
    [problem] = refusals("--config", str(config_file), "--model.architecture=null", *options)
    assert problem.startswith("--model.architecture.a sets one entry of model.architecture, which is null")


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (["--data.validation.nwes=p"], "adds the entry 'nwes' to data.validation, which has 'news'"),
        (["--model.architecture.rope_scaling.facter=2"], "to model.architecture.rope_scaling, which has 'factor'"),
        (["--model.architecture.a=1", "--model.architecture={b: 1}"], "--model.architecture.a has no effect: --model."),
        (
            ["--data.stages.0.train.0.weight=5", "--data.stages=[{train: [{path: x}]}]"],
            "0.weight has no effect: --data",
        ),
        (
            ["--data.stages+={train: [{path: x}]}", "--data={stages: [{train: [{path: x}]}]}"],
            "--data.stages+ has no ef",
        ),
        (["--data.validation.other_set=p"], None),
        (["--model.architecture.vocab_size=1"], None),
    ],
)
def test_what_may_be_a_slip_is_noted(config_file, options, note, capsys):
    parse(config_file, *options, *(["--data.stages.0.train_tokens=1_000_000"] if "stages+" in options[0] else []))
    found = capsys.readouterr().err
    assert found.startswith("note: ") and note in found if note else not found


def test_all_problems_are_reported_together(config_file, capsys):
    config_file.write_text(CONFIG + "sead: 1\noptimizer: {eps: x, learning_rate: -1.0}\n", encoding="utf-8")
    options = ("--optimizer.lr=3", "--training.sequence_length=0", "--training.warmup_tokens=2_000_000", "stray")
    problems = refusals("--config", str(config_file), *options)
    expected = [
        f"{config_file}: unknown key 'sead'; did you mean 'seed'?",
        f"{config_file}: optimizer.eps is 'x'; expected float",
        "unknown option --optimizer.lr; did you mean 'optimizer.learning_rate'?",
        "unexpected argument 'stray'",
        "training.sequence_length is 0; it must be at least 1",
        "optimizer.learning_rate is -1.0; it must be at least 0",
        "training.warmup_tokens 2,000,000 is more than training.train_tokens 1,000,000",
    ]
    assert len(problems) == len(expected)
    for problem, start in zip(problems, expected, strict=True):
        assert problem.startswith(start)
    report_user_error(UserError(*problems))
    assert capsys.readouterr().err == "".join(f"error: {problem}\n" for problem in problems)


def test_a_report_stays_short(capsys):
    report_user_error(UserError(*(f"problem {number}" for number in range(30))))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21 and lines[-1] == "error: and 10 more problems"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--training.train_tokens=abc", "--seed=10**9"], ["train_tokens is 'abc'", "seed is '10**9'"]),
        (["--data.stages=[{train: x}]"], ["data.stages[0].train is 'x'; expected a list"]),
        (["--data.stages=[{train: [{}], train_tokens: 5}]"], ["stages[0].train[0].path is missing", "is 5; it must"]),
        (["--optimizer.learning_rate=fast", "--optimizer.min_learning_rate=1.0"], ["learning_rate is 'fast'"]),
        (["--optimizer.decay_tokens=-5"], ["optimizer.decay_tokens is -5, but only optimizer.schedule wsd"]),
    ],
)  # fmt: skip
def test_a_problem_hides_what_follows_from_it_and_nothing_else(config_file, options, expected):
    problems = refusals("--config", str(config_file), *options)
    assert len(problems) == len(expected)
    for problem, part in zip(problems, expected, strict=True):
        assert part in problem


# --------------------------------------------------------------------------------------------------------------------
# Which file --config means


@pytest.mark.parametrize("name", ["qwen2_72b.yaml", "qwen2_72b", "qwen2.5_7b", "megatron_configs/llama3_8b.yaml"])
def test_a_name_that_is_no_file_is_looked_up_in_the_shipped_configurations(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = SHIPPED / (Path(name).name.removesuffix(".yaml") + ".yaml")
    assert parse_config(["--config", name]) == parse_config(["--config", str(found)])
    assert capsys.readouterr().err == f"note: --config {name} is {found}\n"
    # A file of that name comes first, a folder does not.
    (tmp_path / Path(name).name).mkdir()
    assert parse_config([f"--config={Path(name).name}"]).run_folder == parse_config(["--config", str(found)]).run_folder
    (tmp_path / Path(name).name).rmdir()
    (tmp_path / Path(name).name).write_text(CONFIG)
    assert parse_config([f"--config={Path(name).name}"]).run_folder == "runs/x"


def test_an_unknown_name_lists_the_shipped_configurations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("qwen", "qwen.yaml", "megatron_configs/qwen.yaml"):
        [problem] = refusals("--config", name)
        assert problem.startswith(f"--config {name}: No such file or directory, and no configuration of that name in ")
        for file in SHIPPED.glob("*.yaml"):
            assert file.stem in problem
    assert refusals("--config", "elsewhere/qwen.yaml") == ["--config elsewhere/qwen.yaml: No such file or directory"]


# --------------------------------------------------------------------------------------------------------------------
# Paths and switches


def test_paths_are_expanded_as_the_shell_does(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("DATA", "/data/of mine")
    spellings = ["~/x", "$HOME/x", "${DATA}/x", "$DATA-x", "a~b", "./~x", "~"]
    script = 'printf "%s\\n" ~/x "$HOME"/x "${DATA}/x" "$DATA-x" a~b ./~x ~'
    expected = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    for text, path in zip(spellings, expected, strict=True):
        quoted = json.dumps(text)
        config = tmp_path / "run.yaml"
        config.write_text(
            f"run_folder: {quoted}\n"
            f"data:\n  stages: [{{train: [{{path: {quoted}}}]}}]\n  validation: {{v: {quoted}}}\n"
            f"model: {{initialize_from: {quoted}, architecture: {quoted}, tokenizer: {quoted}}}\n"
            f"training: {{train_tokens: 10_000}}\nresume: {quoted}\n"
        )
        run = parse_config(["--config", "~/../run.yaml"])
        found = [run.run_folder, run.data.stages[0].train[0].path, run.data.validation["v"], run.resume]
        found += [run.model.initialize_from, run.model.architecture, run.model.tokenizer]
        assert found == [path] * 7
        assert parse_config(["--config", str(config), "--run_folder", text]).run_folder == path
        appended = f"--data.stages.0.train+={{path: {quoted}, name: n}}"
        assert parse_config(["--config", str(config), appended]).data.stages[0].train[1].path == path
        assert parse_config(["--config", str(config), "--data.validation.w.x", text]).data.validation["w.x"] == path


def test_names_that_are_no_paths_stay(config_file):
    options = ("--checkpoint.push_to_hub=a/b", "--checkpoint.export_hf=true", "--model.initialize_from=Qwen/Qwen2-7B")
    run = parse(config_file, *options, "--data.stages.0.train.0.name=$x ~/y")
    assert (run.model.initialize_from, run.data.stages[0].train[0].name) == ("Qwen/Qwen2-7B", "$x ~/y")


def test_an_unset_variable_is_refused(config_file):
    options = (
        "--run_folder=$NOT_SET_HERE/x",
        "--data.validation.a=~no_such_user/x",
        "--model.tokenizer=${NOT_SET_HERE}",
    )
    problems = refusals("--config", str(config_file), *options)
    keys = ["run_folder $NOT_SET_HERE/x: ", "data.validation.a ~no_such_user/x: ", "model.tokenizer ${NOT_SET_HERE}: "]
    assert sorted(re.match(r"\S+ \S+ ", problem)[0] for problem in problems) == sorted(keys)


def test_every_setting_that_is_text_is_declared_a_path_or_known_to_be_none():
    """A new path must be of type ``FilePath``, or ``~`` and ``$VARIABLE`` would not be expanded in it."""

    def plain_texts(hint, name: str) -> Iterator[str]:
        if is_path(hint) and get_origin(hint) is Annotated:
            return
        kind = bare(hint)
        if dataclasses.is_dataclass(kind):
            for item in dataclasses.fields(kind):
                yield from plain_texts(hints_of(kind)[item.name], f"{name}.{item.name}".removeprefix("."))
        elif kind is str:
            yield name
        else:
            members = get_args(kind)[1:] if get_origin(kind) is dict else get_args(kind)
            for member in members if get_origin(kind) is not Literal else ():
                yield from plain_texts(member, name)

    found = set(plain_texts(RunConfig, ""))
    of_sources = {f"data.{x}train.{key}" for x in ("", "stages.") for key in ("name", "column", "split", "subset")}
    of_sources |= {f"data.validation.{key}" for key in ("column", "split", "subset")}
    of_trackers = {f"logging.{key}" for key in ("project", "run_name", "group", "tags", "sample_prompts")}
    plain = {"checkpoint.push_to_hub", "checkpoint.hub_message", "allow_changes", "callbacks"}
    plain.add("training.early_stopping.metric")
    of_names = {"adapter.targets", "adapter.modules_to_save", "training.trainable"}
    of_optimizers = {f"optimizer.{key}" for key in ("name", "groups.match", "muon.exclude")}
    assert found == {*of_sources, *of_trackers, *of_names, *of_optimizers, *plain}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("true", "auto"), ("True", "auto"), ("yes", "auto"), ("ON", "auto"), ("auto", "auto"), ("Auto", "auto")),
        *(("false", "none"), ("no", "none"), ("Off", "none"), ("None", "none")),
        *(("./none", "./none"), ("a/Yes", "a/Yes")),
    ],
)
def test_true_and_false_mean_what_people_mean(config_file, text, expected):
    assert parse(config_file, f"--resume={text}").resume == expected
    config_file.write_text(CONFIG + f"resume: {text}\n")
    assert parse(config_file).resume == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("true", "on"), ("false", "off"), ("on", "on"), ("auto", "auto"), ("Yes", "on"), ("no", "off"), ("OFF", "off")],
)
def test_compile_is_a_switch_too(config_file, text, expected):
    assert parse(config_file, f"--training.compile={text}").training.compile == expected
    config_file.write_text(CONFIG.replace("training: {", f"training: {{compile: {text}, "))
    assert parse(config_file).training.compile == expected
    assert parse_config(["--config", str(config_file)]) == parse(config_file)
    config_file.write_text(to_yaml(parse(config_file)))
    assert parse(config_file).training.compile == expected


# --------------------------------------------------------------------------------------------------------------------
# The guide


def test_the_commands_of_the_guide_do_what_it_says(tmp_path, monkeypatch):
    guide = (SHIPPED.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(re.search(r"```yaml\n(.*?)```", guide, re.S)[1])
    commands = re.search(r"```bash\n(.*?)```", guide, re.S)[1].splitlines()
    runs = [parse_config(shlex.split(command)[2:]) for command in commands]
    before = parse_config(["--config", "run.yaml"])
    assert [(source.path, source.weight) for source in before.data.train] == [("corpora/web", 2), ("corpora/code", 2)]
    assert (runs[0].optimizer.learning_rate, runs[0].training.train_tokens) == (3e-5, 20_000_000)
    assert runs[1].model.architecture["rope_scaling"] == {
        **before.model.architecture["rope_scaling"],
        "factor": 32.0,
    }
    assert [source.weight for source in runs[2].data.train] == [3.0, 2.0, 1.0]
    assert runs[3].data.validation == {"news": "corpora/news", "wiki.en": "corpora/other_wiki"}
    assert [source.weight for source in runs[4].data.train] == [1.0, 0.5]
