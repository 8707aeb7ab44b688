"""Text from models: greedy output equals transformers', sampling follows the probabilities, errors take a line."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from model_table import tiny_config, tiny_model
from oracles.tiny_tokenizer import sample_text, train_tiny_sentencepiece, write_tiny_tiktoken
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from retemper.engine import batch as batch_module
from retemper.engine.errors import UserError, run_command
from retemper.engine.weights.checkpoint.manifest import Manifest
from retemper.engine.weights.conversion import hf_to_dcp
from retemper.kernels import attention
from retemper.kernels.attention import PER_DOCUMENT, plan_attention
from retemper.tools import generate
from retemper.tools.generation import model_loading, prompts, terminal
from retemper.tools.generation.model_loading import find_device, find_model
from retemper.tools.generation.sampling import Sampling
from retemper.tools.generation.text_generator import TextGenerator
from retemper.tools.generation.token_choice import TokenChoice, random_numbers
from retemper.tools.tokenizer.handle import load_tokenizer

CONTEXT = 48
VOCAB_SIZE = 400
PROMPT = "the cat sat on"
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    # Wide enough for the output to depend on every token, rather than repeat one.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def folders(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two Hugging Face folders with tokenizers, and a checkpoint of each."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    }
    found: dict[str, Path] = {}
    for name, model in models.items():
        model.save_pretrained(root / name)
        shutil.copytree(tiny_tokenizer, root / name, dirs_exist_ok=True)
        hf_to_dcp.convert(str(root / name), root / f"{name}-checkpoint", say=lambda line: None)
        found |= {name: root / name, f"{name}-checkpoint": root / f"{name}-checkpoint"}
    # Like Llama's: a text begins with a BOS.
    tokenizer = Tokenizer.from_file(str(root / "llama" / "tokenizer.json"))
    start = tokenizer.token_to_id("<|im_end|>")
    tokenizer.post_processor = TemplateProcessing(single="<|im_end|> $A", special_tokens=[("<|im_end|>", start)])
    tokenizer.save(str(root / "llama" / "tokenizer.json"))
    return found


def test_a_model_with_dropout_and_a_table_of_positions(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """Dropout is for training only, and GPT-2 has no position behind its n_positions."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB_SIZE, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**shape, initializer_range=0.3, bos_token_id=None, eos_token_id=None)
    assert config.resid_pdrop > 0
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    shutil.copytree(tiny_tokenizer, tmp_path, dirs_exist_ok=True)
    model = TextGenerator(tmp_path)
    completion = model.generate(PROMPT, Sampling(max_new_tokens=64))
    num_prompt = len(model.encode(PROMPT))
    assert completion.num_tokens == 16 - num_prompt and completion.ended_by == "full context"
    assert completion.text == greedy(tmp_path, PROMPT, 16 - num_prompt)


def greedy(folder: Path, prompt: str, max_new_tokens: int) -> str:
    """What transformers continues ``prompt`` with."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    stop = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_id": stop, "pad_token_id": 0}
    output = model.generate(ids, do_sample=False, **options)  # type: ignore[misc]
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("model_type", ["qwen3_next", "minicpm3", "modernbert-decoder"])
@pytest.mark.parametrize("form", ["folder", "checkpoint"])
def test_models_of_transformers_continue_alike(model_type, form, tiny_tokenizer, tmp_path):
    """Blocks that compute one document at a time, and heads that are more than a matrix."""
    config = tiny_config(model_type)
    end = Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json")).token_to_id("<|endoftext|>")
    config.update({"vocab_size": VOCAB_SIZE, "eos_token_id": end})
    tiny_model(config).save_pretrained(tmp_path / "model")
    shutil.copytree(tiny_tokenizer, tmp_path / "model", dirs_exist_ok=True)
    folder = tmp_path / "model"
    if form == "checkpoint":
        folder = tmp_path / "converted"
        hf_to_dcp.convert(str(tmp_path / "model"), folder, say=lambda line: None)
    completion = TextGenerator(folder).generate(PROMPT, Sampling(max_new_tokens=12, temperature=0))
    assert completion.text == greedy(tmp_path / "model", PROMPT, 12)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2-checkpoint"])
@pytest.mark.parametrize("prompt", [PROMPT, sample_text(seed=1, words=8), "<|endoftext|>naïve"])
def test_greedy_text_equals_transformers(folders: dict[str, Path], name: str, prompt: str) -> None:
    completion = TextGenerator(folders[name], device="cpu").generate(prompt, Sampling(max_new_tokens=16))
    assert completion.text == greedy(folders[name.removesuffix("-checkpoint")], prompt, 16)
    assert completion.num_tokens == 16 and completion.ended_by == "--max-new-tokens"
    assert len(set(completion.text)) > 5


def test_checkpoint_and_folder_give_the_same(folders: dict[str, Path]) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=1.0, seed=3)
    texts = [TextGenerator(folders[name], device="cpu").generate(PROMPT, sampling).text for name in folders]
    # The llama checkpoint was made before its folder's tokenizer learnt to begin with a BOS.
    assert texts[2] == texts[3]
    own = TextGenerator(folders["llama-checkpoint"], str(folders["llama"]), device="cpu")
    assert own.generate(PROMPT, sampling).text == texts[0] != texts[1]


def test_prompts_begin_with_one_bos_and_do_not_end(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "hf"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = [("<|im_end|>", 1), ("<|endoftext|>", 0)]
    tokenizer.post_processor = TemplateProcessing(single="<|im_end|> $A <|endoftext|>", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    reference = AutoTokenizer.from_pretrained(folder)
    bare = reference(PROMPT, add_special_tokens=False)["input_ids"]
    for bos, expected in (("auto", [1, *bare]), ("yes", [1, *bare]), ("no", bare)):
        model = TextGenerator(folder, device="cpu", bos=bos)
        assert model.encode(PROMPT) == expected
        assert model.encode(f"<|im_end|>{PROMPT}") == [1, *bare]


def test_prompts_begin_as_the_documents_in_training(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = folders["llama-checkpoint"]  # of a tokenizer without a BOS
    bare = TextGenerator(checkpoint, device="cpu").encode(PROMPT)
    for recorded, begin in (([[1], [1]], [1]), ([[1], []], []), ([[1], None], []), ([[]], [])):
        datasets = {str(number): {"bos": ids} for number, ids in enumerate(recorded)}
        manifest = Manifest("training", datasets=datasets)
        monkeypatch.setattr(model_loading, "read_manifest", lambda _, found=manifest: found)
        model = TextGenerator(checkpoint, device="cpu")
        assert model.encode(PROMPT) == [*begin, *bare]
        assert bool(model.notes) is bool(begin)
        assert TextGenerator(checkpoint, device="cpu", bos="no").encode(PROMPT) == bare
        # A tokenizer that the user names speaks for itself.
        assert TextGenerator(checkpoint, str(folders["llama"]), device="cpu").encode(PROMPT) == [1, *bare]


def test_a_tokenizer_model_of_sentencepiece(folders: dict[str, Path], tmp_path: Path) -> None:
    """Named, and as the model's own, with a BOS where transformers puts one."""
    library = sentencepiece.SentencePieceProcessor(
        model_file=str(train_tiny_sentencepiece(tmp_path / "only" / "tokenizer.model"))
    )
    named = TextGenerator(folders["qwen2"], str(tmp_path / "only"), device="cpu")
    assert named.encode(PROMPT) == library.encode(PROMPT) and named.stop_ids == {library.eos_id()}
    assert named.generate(PROMPT, Sampling(max_new_tokens=3)).text
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "hf"))
    (folder / "tokenizer.json").unlink()
    shutil.copy(tmp_path / "only" / "tokenizer.model", folder)
    for settings in ({}, {"add_bos_token": True}, {"add_bos_token": False}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **settings}))
        ids = TextGenerator(folder, device="cpu").encode(PROMPT)
        assert ids == AutoTokenizer.from_pretrained(folder).encode(PROMPT)
        assert (ids[0] == library.bos_id()) is settings.get("add_bos_token", False)


def test_a_tiktoken_file(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["qwen2"], tmp_path / "hf"))
    (folder / "tokenizer.json").unlink()
    write_tiny_tiktoken(folder / "tiny.tiktoken")
    model = TextGenerator(folder, device="cpu")
    handle = load_tokenizer(folder, allow_special_tokens=True)
    prompt = f"{PROMPT}<|endoftext|>a"
    end = handle.eod()[1]
    assert model.encode(prompt) == handle.encode_flat([prompt])[0].tolist() and end in model.encode(prompt)
    assert model.stop_ids == {end}
    assert model.generate(PROMPT, Sampling(max_new_tokens=3)).num_tokens == 3
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>"}')
    assert TextGenerator(folder, device="cpu", bos="yes").encode(PROMPT) == [end, *model.encode(PROMPT)]


def test_bpe_dropout_is_off(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["qwen2"], tmp_path / "hf"))
    expected = TextGenerator(folder, device="cpu").encode(PROMPT)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(content))
    model = TextGenerator(folder, device="cpu")
    assert all(model.encode(PROMPT) == expected for _ in range(5))


def test_attention_is_planned_once_for_all_layers(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layer makes its own plan, it reads the offsets back from the device."""
    plans = []

    def planned(*values, **options):
        plans.append(plan_attention(*values, **options))
        return plans[-1]

    monkeypatch.setattr(batch_module, "plan_attention", planned)
    monkeypatch.setattr(attention, "_plan_now", lambda *_: pytest.fail("a layer plans for itself"))
    TextGenerator(folders["qwen2-checkpoint"], device="cpu").generate(PROMPT, Sampling(max_new_tokens=3))
    # Later tokens attend to the cache, which needs no plan.
    assert [plan.backend for plan in plans] == [PER_DOCUMENT]


def test_computes_in_the_dtype_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    def dtype(folder: Path, **options: str) -> torch.dtype:
        return next(TextGenerator(folder, device="cpu", **options).backend.module.parameters()).dtype

    assert dtype(folders["qwen2"]) == dtype(folders["qwen2-checkpoint"]) == torch.float32
    assert dtype(folders["qwen2"], dtype="bfloat16") == torch.bfloat16
    hf_to_dcp.convert(str(folders["qwen2"]), tmp_path / "half", dtype="bfloat16", say=lambda line: None)
    assert dtype(tmp_path / "half") == torch.bfloat16


@pytest.mark.parametrize("where", ["config.json", "generation_config.json", "list"])
def test_stops_at_the_end_of_text(folders: dict[str, Path], tmp_path: Path, where: str) -> None:
    folder = Path(shutil.copytree(folders["qwen2"], tmp_path / "hf"))
    plain = TextGenerator(folder, device="cpu")
    prompt_ids = plain.encode(PROMPT)
    ids = list(prompt_ids)
    for _ in range(6):
        ids.append(int(plain.next_logits(ids).argmax()))
    # The sixth token becomes the end, so five are left to see.
    assert ids[-1] not in ids[len(prompt_ids) : -1]
    path = folder / ("config.json" if where == "config.json" else "generation_config.json")
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, "eos_token_id": [399, ids[-1]] if where == "list" else ids[-1]}))

    completion = TextGenerator(folder, device="cpu").generate(PROMPT, Sampling(max_new_tokens=16))
    assert (completion.num_tokens, completion.ended_by) == (6, "end of text")
    assert completion.text == plain.generate(PROMPT, Sampling(max_new_tokens=5)).text


def test_the_tokenizers_document_end_stops_too(folders: dict[str, Path]) -> None:
    model = TextGenerator(folders["qwen2"], device="cpu")
    assert model.stop_ids == {model.tokenizer.eod()[1]}


def test_ends_where_the_context_is_full(folders: dict[str, Path]) -> None:
    model = TextGenerator(folders["qwen2"], device="cpu")
    length = len(model.encode(PROMPT))
    completion = model.generate(PROMPT, Sampling(max_new_tokens=1000))
    assert (completion.num_tokens, completion.ended_by) == (CONTEXT - length, "full context")
    long = "cat " * (CONTEXT + 1)
    with pytest.raises(UserError, match=f"context .* is {CONTEXT}"):
        model.generate(long, Sampling())


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def drawn_shares(logits: torch.Tensor, sampling: Sampling, draws: int = 4000) -> torch.Tensor:
    """Share of the draws that each token gets."""
    randoms = [random_numbers(sampling.seed, sample) for sample in range(draws)]
    tokens = TokenChoice(sampling).choose(logits.expand(draws, -1), [[0]] * draws, randoms)
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.4, 0.1, 0.3, 0.2]),
        (Sampling(temperature=0.5), [0.16 / 0.3, 0.01 / 0.3, 0.09 / 0.3, 0.04 / 0.3]),
        (Sampling(temperature=1.0, top_k=2), [4 / 7, 0, 3 / 7, 0]),
        (Sampling(temperature=1.0, top_k=9), [0.4, 0.1, 0.3, 0.2]),
        (Sampling(temperature=1.0, top_p=0.6), [4 / 7, 0, 3 / 7, 0]),
        (Sampling(temperature=1.0, top_p=0.75), [4 / 9, 0, 3 / 9, 2 / 9]),
        (Sampling(temperature=1.0, top_p=0.01), [1, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.7), [4 / 7, 0, 3 / 7, 0]),
        (Sampling(temperature=1.0, min_p=0.6), [4 / 7, 0, 3 / 7, 0]),
        (Sampling(), [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(sampling: Sampling, expected: list[float]) -> None:
    shares = drawn_shares(torch.tensor([0.4, 0.1, 0.3, 0.2]).log(), sampling)
    target = torch.tensor(expected, dtype=torch.float32)
    assert torch.equal(shares > 0, target > 0)
    assert (shares - target).abs().max() < 0.03


def test_a_seed_repeats_its_text(folders: dict[str, Path]) -> None:
    model = TextGenerator(folders["qwen2"], device="cpu")
    texts = [model.generate(PROMPT, Sampling(8, temperature=1.0, seed=seed)).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"temperature": -0.1}, "--temperature -0.1"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "--top-p 1.1"),
        ({"temperature": 1.0, "top_k": -1}, "--top-k -1"),
        ({"temperature": 1.0, "seed": -1}, "--seed -1"),
        ({"top_p": 0.9}, "--temperature above 0"),
        ({"top_k": 5}, "--temperature above 0"),
        ({"min_p": 0.1}, "--temperature above 0"),
        ({"temperature": 1.0, "min_p": 1.5}, "--min-p 1.5"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0"),
        ({"samples": 2}, "--samples 2"),
        ({"stop": ("a", "")}, "--stop"),
    ],
)
def test_refuses_impossible_sampling(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Sampling(**options)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command: arguments and stdin in, status, stdout and stderr out."""

    def run_generate(*arguments: object, stdin: str = "", terminal: bool = False) -> tuple[int, str, str]:
        source = io.StringIO(stdin)
        source.isatty = lambda: terminal  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", source)
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments), "--device", "cpu"])
        with pytest.raises(SystemExit) as exit_:
            run_command(generate.main)
        return int(exit_.value.code or 0), *capsys.readouterr()

    return run_generate


def test_prompts_from_options_lines_and_a_terminal(folders: dict[str, Path], run: Callable[..., tuple]) -> None:
    model, prompts = TextGenerator(folders["qwen2"], device="cpu"), [PROMPT, "old roofs"]
    expected = "".join(f"{text}{model.generate(text, Sampling(max_new_tokens=4)).text}\n\n" for text in prompts)
    options = ("--model", folders["qwen2"], "--max-new-tokens", 4)
    status, out, err = run(*options, "--prompt", prompts[0], "--prompt", prompts[1])
    assert (status, out) == (0, expected)
    assert err.count("[4 tokens, ") == 2 and err.count("ended by --max-new-tokens") == 2
    status, out, _ = run(*options, stdin="\n".join(prompts) + "\n")
    assert (status, out) == (0, expected)
    # A mistake at the terminal is told, and the session goes on; an empty line is asked again.
    long = "cat " * (CONTEXT + 1)
    status, out, err = run(*options, stdin=f"{prompts[0]}\n\n{long}\n{prompts[1]}\n", terminal=True)
    assert status == 0 and out.replace("prompt> ", "").strip() == expected.strip()
    assert err.count("error: ") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_the_texts_that_are_done(
    number: int, folders: dict[str, Path], tmp_path: Path, run: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, partial = tmp_path / "results.jsonl", tmp_path / "results.jsonl.partial"
    generate_batch, calls = TextGenerator._generate_batch, 0

    def interrupted(self: TextGenerator, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            assert len(partial.read_text().splitlines()) == 4  # also what a SIGKILL would leave
            signal.raise_signal(number)
        return generate_batch(self, *arguments)

    prompts = "".join(f"the cat sat on {count}\n" for count in range(7))
    options = ("--model", folders["qwen2"], "--max-new-tokens", 4, "--batch-size", 2, "--output", output)
    with monkeypatch.context() as patched:
        patched.setattr(TextGenerator, "_generate_batch", interrupted)
        status, _, err = run(*options, stdin=prompts)
    assert status == 130 and f"4 of 7 texts are in {partial}" in err and not output.exists()
    kept = partial.read_text()
    status, _, err = run(*options, stdin=prompts)
    assert status == 1 and f"{partial} has the texts of an interrupted command; rename or remove it" in err
    partial.rename(tmp_path / "kept")
    status, _, _ = run(*options, stdin=prompts)
    assert status == 0 and output.read_text().startswith(kept) and len(output.read_text().splitlines()) == 7
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "results.jsonl"}


def test_results_are_in_order_whatever_is_computed_first(tmp_path: Path) -> None:
    said: list[str] = []
    path, partial = tmp_path / "r.jsonl", tmp_path / "r.jsonl.partial"
    with prompts.ResultFile(path, 3, said.append) as results:
        for number in (1, 2, 0):
            results.add(number, {"n": number})
        assert partial.read_text() == '{"n": 1}\n{"n": 2}\n{"n": 0}\n' and not path.exists()
    assert path.read_text() == '{"n": 0}\n{"n": 1}\n{"n": 2}\n' and not partial.exists() and not said
    with pytest.raises(UserError), prompts.ResultFile(tmp_path / "none.jsonl", 3, said.append):
        raise UserError("before the first text")
    assert [one.name for one in tmp_path.iterdir()] == ["r.jsonl"] and not said


def test_files_of_prompts_and_results(folders: dict[str, Path], tmp_path: Path, run: Callable[..., tuple]) -> None:
    model, prompts = TextGenerator(folders["qwen2"], device="cpu"), [PROMPT, "old\u2028roofs", "a"]
    (tmp_path / "prompts.jsonl").write_text(
        "".join(f"{json.dumps({'prompt': prompt, 'id': 1})}\n" for prompt in prompts)
    )
    options = (
        "--model",
        folders["qwen2"],
        "--max-new-tokens",
        6,
        "--temperature",
        1,
        "--samples",
        2,
        "--batch-size",
        4,
    )
    output = tmp_path / "results.jsonl"
    files = ("--input", tmp_path / "prompts.jsonl", "--output", output)
    status, out, _ = run(*options, *files)
    records = [json.loads(line) for line in output.read_text("utf-8").split("\n")[:-1]]
    assert (status, out) == (0, "")
    expected = model.generate_all(
        [model.encode(prompt) for prompt in prompts], Sampling(6, temperature=1, samples=2), 1
    )
    for number, (record, completion) in enumerate(zip(records, expected, strict=True)):
        assert record == {
            "prompt": prompts[number // 2],
            "sample": number % 2,
            "text": completion.text,
            "tokens": completion.num_tokens,
            "reason": completion.ended_by,
        }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    # An output is not replaced, and lines of plain text are prompts.
    status, _, err = run(*options, *files)
    assert status == 1 and "exists already" in err
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\na\n")
    status, out, err = run("--model", folders["qwen2"], "--max-new-tokens", 4, "--input", tmp_path / "prompts.txt")
    assert status == 0 and out.startswith(PROMPT) and err.count("[4 tokens, ended by") == 2


def test_a_gpu_without_memory_takes_one_line(
    folders: dict[str, Path], run: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(TextGenerator, "generate_one", fail)
    status, _, err = run("--model", folders["qwen2"], "--prompt", PROMPT)
    assert status == 1 and len(err.splitlines()) == 1
    assert err.startswith("error: ") and "2 GiB; lower --batch-size" in err


@pytest.mark.parametrize("source", ["piped_prompts", "typed_lines"])
def test_refuses_bytes_that_are_not_utf_8(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe the cat\n"), encoding="utf-8"))
    with pytest.raises(UserError, match=r"^stdin is not UTF-8"):
        prompts.piped_prompts() if source == "piped_prompts" else next(terminal.typed_lines("", ""))


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("", "is empty"),
        ('{"prompt": "a"}\n{"prompt": ""}\n', "line 2"),
        ('{"text": "a"}\n', "line 1"),
        ("{}\n{\n", "line 1"),
        ('{"prompt": "a"}\n\n', "line 2"),
    ],
)
def test_refuses_bad_files_of_prompts(
    folders: dict[str, Path], tmp_path: Path, run: Callable[..., tuple], content: str, fragment: str
) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    status, out, err = run(
        "--model", folders["qwen2"], "--input", tmp_path / "p.jsonl", "--output", tmp_path / "r.jsonl"
    )
    assert (status, out) == (1, "") and not (tmp_path / "r.jsonl").exists()
    assert len(err.splitlines()) == 1 and err.startswith("error: --input") and fragment in err


@pytest.mark.parametrize(
    ("arguments", "stdin", "fragment"),
    [
        (["--prompt", "a", "--input", "p.txt"], "", "--input"),
        (["--input", "nowhere.txt"], "", "nowhere.txt"),
        (["--prompt", "a", "--batch-size", "0"], "", "--batch-size 0"),
        (["--prompt", "a", "--system", "b"], "", "--system"),
        (["--prompt", "a", "--output", "nowhere/r.jsonl"], "", "nowhere"),
        (["--prompt", PROMPT, "--prompt", ""], "", "the prompt is empty"),
        ([], "", "stdin is empty"),
        ([], "a\n\nb\n", "stdin, line 2"),
        (["--prompt", "cat " * 60], "", "max_position_embeddings"),
        (["--prompt", PROMPT, "--top-p", "0.5"], "", "--temperature"),
        (["--prompt", PROMPT, "--tokenizer", "nowhere/at/all"], "", "--tokenizer"),
    ],
)
def test_refuses_bad_prompts(
    folders: dict[str, Path], run: Callable[..., tuple], arguments: list[str], stdin: str, fragment: str
) -> None:
    status, out, err = run("--model", folders["qwen2"], *arguments, stdin=stdin)
    assert (status, out) == (1, ""), "nothing is generated before all prompts are known to be good"
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and fragment in err


def larger_vocabulary(folder: Path) -> None:
    """A tokenizer whose ids go beyond the model's vocabulary."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {token: number + 300 for token, number in tokenizer["model"]["vocab"].items()}
    for added in tokenizer["added_tokens"]:
        added["id"] += 300
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("kind", "spoil", "fragment"),
    [
        ("qwen2", lambda folder: (folder / "tokenizer.json").unlink(), "--tokenizer"),
        ("qwen2", larger_vocabulary, "vocab_size is 400"),
        ("qwen2", lambda folder: (folder / "config.json").unlink(), "neither a Hugging Face folder"),
        ("qwen2", lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        ("qwen2", lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json"),
        ("qwen2-checkpoint", lambda folder: (folder / "manifest.json").unlink(), "not a complete checkpoint"),
        ("qwen2-checkpoint", lambda folder: (folder / "hf" / "config.json").unlink(), "hf/config.json"),
        ("qwen2-checkpoint", lambda folder: (folder / "tensor-00000.safetensors").unlink(), "missing or unreadable"),
        ("qwen2", shutil.rmtree, "no such folder"),
    ],
)
def test_refuses_bad_models(
    folders: dict[str, Path],
    tmp_path: Path,
    run: Callable[..., tuple],
    kind: str,
    spoil: Callable[[Path], None],
    fragment: str,
) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    spoil(folder)
    status, out, err = run("--model", folder, "--prompt", PROMPT)
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and fragment in err


def test_a_run_folder_stands_for_its_newest_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    for step in (1, 2):
        shutil.copytree(folders["qwen2-checkpoint"], tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    assert find_model(tmp_path / "run").path == tmp_path / "run" / "checkpoints" / "step-00000002"
    assert find_model(tmp_path / "run").is_checkpoint


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "mps"])
def test_refuses_devices_that_are_not_there(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name}"):
        find_device(name)
