"""Settings of other training programs: the names exist there, the answers exist here, and each is one line."""

import dataclasses
import inspect

import pytest
import yaml

from retemper.engine.config.other_tools import LORA, MEGATRON, NAMES, OF_SCHEDULES, TRANSFORMERS, keys_in
from retemper.engine.config.parser import parse_config
from retemper.engine.config.spelling import known_keys
from retemper.engine.errors import UserError
from retemper.tools.training.command import plan_training
from retemper.tools.training.options import TrainOptions

KNOWN = {name for name, _ in known_keys()}


def refusal(*arguments: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_config(arguments)
    return caught.value.problems


def test_every_answer_names_a_setting_that_exists():
    for name, hint in NAMES.items():
        keys = keys_in(hint)
        assert keys <= KNOWN, name
        assert keys or hint.split(",")[0].split(":")[0] in KNOWN, name
        assert name not in {known.rpartition(".")[2] for known in KNOWN}, f"{name} has this name here as well"


def test_the_schedules_of_transformers_have_these_arguments():
    transformers = pytest.importorskip("transformers")
    schedules = (transformers.get_wsd_schedule, transformers.get_cosine_with_min_lr_schedule_with_warmup)
    assert OF_SCHEDULES.keys() <= {name for schedule in schedules for name in inspect.signature(schedule).parameters}


def test_transformers_and_peft_have_these_names():
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    assert TRANSFORMERS.keys() <= {item.name for item in dataclasses.fields(transformers.TrainingArguments)}
    names = {item.name for item in dataclasses.fields(peft.LoraConfig)}
    assert {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "peft_type"} <= names
    assert {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "peft_type"} <= LORA.keys()


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("num_train_epochs", "use training.train_epochs"),
        ("training.num-train-epochs", "use training.train_epochs"),
        ("max_steps", "use training.train_steps"),
        ("per_device_train_batch_size", "use training.micro_batch_size, the samples of a rank in one pass"),
        (
            "gradient_accumulation_steps",
            "use training.global_batch_size, the samples of a step over all ranks: training.micro_batch_size x "
            "data-parallel ranks x gradient_accumulation_steps",
        ),
        ("lr_scheduler_type", "use optimizer.schedule"),
        ("bf16", "use training.precision, which is bf16 by itself where the hardware has it"),
        ("lora_rank", "use adapter.rank"),
        ("r", "use adapter.rank"),
        ("model_name_or_path", "use model.initialize_from"),
        ("cutoff_len", "use training.sequence_length"),
        ("save_steps", "use checkpoint.save_interval, in steps"),
        ("train_iters", "use training.train_steps"),
        ("lr_decay_style", "use optimizer.schedule"),
        ("lr_wsd_decay_iters", "use optimizer.decay_steps"),
        ("lr_wsd_decay_samples", "use optimizer.decay_tokens: samples x training.sequence_length"),
        ("num_decay_steps", "use optimizer.decay_steps"),
        ("decay_ratio", "did you mean 'optimizer.decay_ratio'?"),
        (
            "lr_scheduler_kwargs",
            "use optimizer.decay_steps, optimizer.decay_shape and optimizer.min_learning_rate_ratio",
        ),
        ("tensor_model_parallel_size", "use parallel.tensor"),
        ("warmup_ratio", "did you mean 'training.warmup_ratio'?"),
        ("global_batch_size", "did you mean 'training.global_batch_size'?"),
        ("micro_batch_size", "did you mean 'training.micro_batch_size'?"),
        ("learning_rate", "did you mean 'optimizer.learning_rate'?"),
        ("seq_length", "did you mean 'training.sequence_length'?"),
        ("lr", "did you mean 'optimizer.learning_rate'?"),
        ("min_lr", "did you mean 'optimizer.min_learning_rate'?"),
    ],
)
def test_they_are_answered_in_one_line(name, answer, tmp_path):
    assert f"unknown option --{name}; {answer}" in refusal(f"--{name}", "3")
    section, _, leaf = name.rpartition(".")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({section: {leaf: 3}} if section else {leaf: 3}))
    assert f"{file}: unknown key '{name}'; {answer}" in refusal("--config", str(file))


def test_a_whole_file_of_another_program_gets_a_line_for_each_name(tmp_path):
    """The example of LLaMA-Factory for continued pretraining with LoRA (examples/train_lora, abridged)."""
    content = {
        "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "dataset": "c4_demo",
        "cutoff_len": 2048,
        "output_dir": "saves/llama3-8b/lora/pretrain",
        "logging_steps": 10,
        "save_steps": 500,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1.0e-4,
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "bf16": True,
        "ddp_timeout": 180000000,
        "deepspeed": {"zero_optimization": {"stage": 3}},
    }
    file = tmp_path / "llamafactory.yaml"
    file.write_text(yaml.safe_dump(content))
    lines = refusal("--config", str(file))
    for name in content:
        [line] = [line for line in lines if f"'{name}'" in line]
        assert line.startswith(f"{file}: unknown key '{name}'; ") and ("use " in line or "did you mean" in line)


def test_an_answer_about_a_setting_that_does_not_exist_is_not_given(monkeypatch):
    monkeypatch.setitem(NAMES, "some_name", "training.some_day")
    assert "some_day" not in refusal("--some_name", "3")[0]


def test_retemper_train_answers_alike():
    request = TrainOptions(model="x", data=({"path": "y"},))
    with pytest.raises(UserError) as caught:
        plan_training(request, [], ["--max_steps", "3"], dry=True)
    assert caught.value.problems == ("unknown option --max_steps; use training.train_steps",)


def test_megatron_has_these_names():
    """megatron-core has the names of the layout's settings; the rest is in Megatron-LM's arguments.py."""
    config = pytest.importorskip("megatron.core.model_parallel_config").ModelParallelConfig
    names = {item.name for item in dataclasses.fields(config)}
    assert {"tensor_model_parallel_size", "pipeline_model_parallel_size"} <= names & MEGATRON.keys()
