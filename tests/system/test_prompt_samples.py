"""Prompts continued during training: the texts of transformers' greedy search on the exported checkpoints."""

from __future__ import annotations

import json

import pytest
import sampling_run
import tiny_run
import torch
from sampling_run import PROMPTS, SAMPLING, TOKENS

from retemper.checkpoint_convert import dcp_to_hf

ZERO_BUBBLE = (
    "--parallel.pipeline 2 --parallel.pipeline_stages_per_rank 2 --parallel.pipeline_schedule zbv_zero_bubble "
    "--training.micro_batch_size 1 --parallel.reshard_after_forward false "
    "--model.architecture.tie_word_embeddings false"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The run's YAML file."""
    return sampling_run.write_run(tmp_path_factory.mktemp("text"))


def continued(checkpoint, folder, length):
    """The texts of transformers for the export of ``checkpoint``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dcp_to_hf.main(["--checkpoint", str(checkpoint), "--output", str(folder)])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    texts = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        count = min(TOKENS, length - ids.shape[1])
        made = model.generate(ids, do_sample=False, max_new_tokens=count, eos_token_id=end, pad_token_id=end)
        texts[prompt] = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return texts


def check_samples(run_folder, tmp_path, length=32):
    samples = sampling_run.samples(run_folder)
    assert [*samples] == [0, 10, 20] and len({tuple(texts.values()) for texts in samples.values()}) == 3
    for step in (10, 20):
        checkpoint = run_folder / "checkpoints" / f"step-{step:08d}"
        assert samples[step] == continued(checkpoint, tmp_path / f"hf-{step}", length)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--model.implementation transformers",
        pytest.param("--training.micro_batch_size 1", marks=pytest.mark.slow),
    ],
)
def test_one_rank(options, one_rank, path, tmp_path):
    tiny_run.train(one_rank, path, [*SAMPLING, *options.split(), "--run_folder", str(tmp_path / "run")])
    check_samples(tmp_path / "run", tmp_path)


@pytest.mark.parametrize(
    "layout",
    [
        "--parallel.shard 2",
        "--parallel.tensor 2",
        "--parallel.pipeline 2",
        pytest.param("--parallel.context 2", marks=pytest.mark.slow),
        pytest.param("--model.implementation transformers --parallel.shard 2", marks=pytest.mark.slow),
        pytest.param("--model.implementation transformers --parallel.context 2", marks=pytest.mark.slow),
        pytest.param(ZERO_BUBBLE, id="zero bubble", marks=pytest.mark.slow),
    ],
)
def test_two_ranks(layout, two_ranks, path, tmp_path):
    options = [*SAMPLING, *layout.split(), "--run_folder", str(tmp_path / "run")]
    two_ranks.run(tiny_run.train, path, options)
    check_samples(tmp_path / "run", tmp_path)


@pytest.mark.slow
def test_compiled_blocks(new_ranks, path, tmp_path):
    options = [*SAMPLING, "--parallel.tensor", "2", "--training.compile", "on", "--run_folder", str(tmp_path / "run")]
    new_ranks(2).run(tiny_run.train, path, options)
    check_samples(tmp_path / "run", tmp_path)


def test_a_text_ends_at_the_sequence_length(one_rank, path, tmp_path):
    options = ["--training.sequence_length", "16", "--training.global_batch_size", "16"]
    tiny_run.train(one_rank, path, [*SAMPLING, *options, "--run_folder", str(tmp_path / "run")])
    check_samples(tmp_path / "run", tmp_path, length=16)


@pytest.mark.parametrize("ranks", ["one_rank", pytest.param("two_ranks", marks=pytest.mark.slow)])
def test_the_training_is_the_same_with_and_without(ranks, request, path, tmp_path):
    cluster = request.getfixturevalue(ranks)
    for name, options in (("with", SAMPLING), ("without", [])):
        options = [*options, "--run_folder", str(tmp_path / name)]
        if ranks == "one_rank":
            tiny_run.train(cluster, path, options)
        else:
            cluster.run(tiny_run.train, path, options)
    assert tiny_run.curve(tmp_path / "with") == tiny_run.curve(tmp_path / "without")
    one, other = (
        tiny_run.tensors_of(tmp_path / name / "checkpoints" / "step-00000020") for name in ("with", "without")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "without" / "samples.jsonl").exists()


def test_a_resumed_run_has_each_text_once(one_rank, path, tmp_path):
    options = [*SAMPLING, "--training.eval_interval", "4", "--run_folder", str(tmp_path)]
    tiny_run.train_until(one_rank, path, options, 13)
    assert [*sampling_run.samples(tmp_path)] == [0, 4, 8, 12]
    tiny_run.train(one_rank, path, options)
    assert [*sampling_run.samples(tmp_path)] == [0, 4, 8, 12, 16, 20]
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 6 * len(PROMPTS) and [json.loads(lines[0])["prompt"]] == PROMPTS[:1]
    assert [json.loads(line)["step"] for line in (tmp_path / "samples.12.jsonl").read_text().splitlines()] == [12] * 3


def test_a_request_to_stop_ends_the_samples(one_rank, path, tmp_path, capsys):
    assert sampling_run.train_and_stop(one_rank, path, [*SAMPLING, "--run_folder", str(tmp_path)]) == 10
    assert "samples interrupted" in capsys.readouterr().out
    assert [*sampling_run.samples(tmp_path)] == [0]
    assert (tmp_path / "checkpoints" / "step-00000010").is_dir()


@pytest.mark.parametrize(
    ("prompts", "parts"),
    [
        (["the", ""], ["logging.sample_prompts[1]", "no tokens"]),
        (["the \U0001f642"], ["logging.sample_prompts[0]", "UTF-16"]),  # JSON's escapes are two halves in YAML
        (["the " * 40], ["logging.sample_prompts[0]", "training.sequence_length is 32", "at most 31"]),
    ],
)
def test_a_prompt_that_cannot_be_used_is_refused(prompts, parts, one_rank, path, tmp_path):
    options = ["--logging.sample_prompts", json.dumps(prompts), "--run_folder", str(tmp_path / "run")]
    said = tiny_run.refusal(one_rank, path, options)
    assert all(part in said for part in parts) and "\n" not in said
    assert not (tmp_path / "run").exists()


def test_prompts_without_a_tokenizer_are_refused(two_ranks, run_file, tmp_path):
    options = ["--logging.sample_prompts", '["a"]', "--run_folder", str(tmp_path / "run")]
    for said in two_ranks.run(tiny_run.refusal, run_file, options):
        assert "logging.sample_prompts needs the tokenizer" in said and "model.tokenizer" in said
