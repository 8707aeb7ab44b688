"""Texts of batches, samples and stop strings: those of transformers, and independent of the batch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluating import save_model
from model_table import tiny_config, tiny_model
from oracles.tiny_tokenizer import sample_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from retemper.engine.model.decoder import Decoder
from retemper.engine.weights.conversion import hf_to_dcp
from retemper.tools.generation.decoder_backend import DecoderBackend
from retemper.tools.generation.sampling import Sampling
from retemper.tools.generation.text_generator import Completion, TextGenerator

PROMPTS = ["the cat sat on", sample_text(seed=2, words=20), "a", sample_text(seed=4, words=9), "<|endoftext|>naïve"]
NEW = 16


@pytest.fixture(scope="module", params=["folder", "checkpoint"])
def model(request: pytest.FixtureRequest, chat_models: dict[str, Path]) -> TextGenerator:
    """Through transformers, and through our own model."""
    return TextGenerator(chat_models[request.param], device="cpu")


def library_text(folder: Path, prompt: str, **options: Any) -> tuple[str, int]:
    """The text of ``transformers.generate`` for one prompt, and its number of tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    ends = [tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    fixed: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
    output = model.generate(ids, **fixed, **options, tokenizer=tokenizer)  # type: ignore[misc]
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)), output.shape[1] - ids.shape[1]


def texts(model: TextGenerator, sampling: Sampling, batch_size: int, prompts: list[str] = PROMPTS) -> list[Completion]:
    """The continuations of the prompts."""
    return list(model.generate_all([model.encode(prompt) for prompt in prompts], sampling, batch_size))


@pytest.mark.parametrize("penalty", [1.0, 1.7])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_batches_equal_transformers(
    model: TextGenerator, chat_models: dict[str, Path], batch_size: int, penalty: float
) -> None:
    found = texts(model, Sampling(NEW, repetition_penalty=penalty), batch_size)
    expected = [library_text(chat_models["folder"], prompt, repetition_penalty=penalty) for prompt in PROMPTS]
    assert [(completion.text, completion.num_tokens) for completion in found] == expected
    assert len({completion.text for completion in found}) == len(PROMPTS)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe", "glm4_moe"])
def test_greedy_batches_of_native_mixtures_equal_transformers(
    model_type: str, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """From a checkpoint, with the key/value cache: texts of different lengths in a batch."""
    folder = save_model(tmp_path / "folder", model_type, tiny_tokenizer, vocab_size=400)
    hf_to_dcp.convert(str(folder), tmp_path / "checkpoint", say=lambda line: None)
    model = TextGenerator(tmp_path / "checkpoint", device="cpu")
    assert isinstance(model.backend, DecoderBackend) and isinstance(model.backend.module, Decoder)
    expected = [library_text(folder, prompt) for prompt in PROMPTS]
    for batch_size in (1, 3):
        found = texts(model, Sampling(NEW), batch_size)
        assert [(completion.text, completion.num_tokens) for completion in found] == expected
    assert len({text for text, _ in expected}) == len(PROMPTS)


def test_stop_strings_equal_transformers(model: TextGenerator, chat_models: dict[str, Path]) -> None:
    """Transformers' text ends with the stop string, ours before it."""
    whole = [completion.text for completion in texts(model, Sampling(NEW), 1)]
    seen = 0
    for prompt, text in zip(PROMPTS, whole, strict=True):
        # Two characters, often of different tokens. Transformers finds none next to bytes that are no text.
        stop = next((text[at : at + 2] for at in range(3, len(text) - 3) if text[at - 1 : at + 3].isascii()), None)
        if stop is None:
            continue
        found = texts(model, Sampling(NEW, stop=("nowhere in it", stop)), 1, [prompt])[0]
        expected, num_tokens = library_text(chat_models["folder"], prompt, stop_strings=[stop])
        assert (found.text, found.num_tokens) == (expected[: expected.index(stop)], num_tokens)
        assert found.ended_by == "--stop" and found.text == text[: text.index(stop)]
        seen += 1
    assert seen >= 3


def test_a_special_token_as_stop_string(chat_models: dict[str, Path], tmp_path: Path) -> None:
    """The text of a special token never appears, so its id ends the text."""
    folder = Path(shutil.copytree(chat_models["folder"], tmp_path / "model"))
    model = TextGenerator(folder, device="cpu")
    model.stop_ids = set()
    sampling = Sampling(50, temperature=3.0, samples=30)
    end = model.tokenizer.encode_flat(["<|im_end|>"])[0].tolist()
    assert len(end) == 1
    plain = texts(model, sampling, 30, ["the cat"])
    stopped = texts(model, replace(sampling, stop=("<|im_end|>",)), 30, ["the cat"])
    reasons = {completion.ended_by for completion in stopped}
    assert reasons == {"--stop", "--max-new-tokens"} and {completion.num_tokens for completion in plain} == {50}
    model.stop_ids = set(end)
    by_id = texts(model, sampling, 30, ["the cat"])
    assert [completion.text for completion in by_id] == [completion.text for completion in stopped]


def test_samples_depend_on_seed_and_number_only(model: TextGenerator) -> None:
    options: dict[str, Any] = {"temperature": 1.1, "top_p": 0.95, "top_k": 60, "min_p": 0.01, "samples": 2}
    sampling = Sampling(8, **options, seed=7)
    together = texts(model, sampling, 8)
    assert together == texts(model, sampling, 4) == texts(model, sampling, 1)
    assert together[2:4] == texts(model, sampling, 2, PROMPTS[1:2])
    assert len({completion.text for completion in together[:2]}) == 2
    other = texts(model, Sampling(8, **options, seed=8), 8)
    assert [completion.text for completion in together] != [completion.text for completion in other]


def test_every_sequence_ends_at_its_own_context(model: TextGenerator) -> None:
    context, lengths = model.context, [len(model.encode(prompt)) for prompt in PROMPTS]
    assert context is not None
    found = texts(model, Sampling(context - lengths[0]), 8)
    for completion, length in zip(found, lengths, strict=True):
        expected = (
            (context - lengths[0], "--max-new-tokens") if length <= lengths[0] else (context - length, "full context")
        )
        assert (completion.num_tokens, completion.ended_by) == expected
    assert {completion.ended_by for completion in found} == {"--max-new-tokens", "full context"}


def test_pieces_are_the_text(model: TextGenerator) -> None:
    """On the way to a terminal: many pieces, none with a part of a character, joined the text without streaming."""
    for seed, prompt in enumerate(PROMPTS):
        sampling = Sampling(40, temperature=1.0, seed=seed, stop=("cat", "naïve roofs"))
        pieces: list[str] = []
        completion = model.generate(prompt, sampling, pieces.append)
        assert "".join(pieces) == completion.text == texts(model, sampling, 8, [prompt])[0].text
        assert len(pieces) > 3


def test_results_keep_their_order_without_padding(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """Prompts of different lengths of a recurrent model are computed apart."""
    config = tiny_config("recurrent_gemma")
    config.update({"vocab_size": 400, "eos_token_id": 399})
    tiny_model(config).save_pretrained(tmp_path)
    shutil.copytree(tiny_tokenizer, tmp_path, dirs_exist_ok=True)
    model = TextGenerator(tmp_path, device="cpu")
    assert model.backend.needs_equal_lengths
    sampling = Sampling(6, temperature=0.9, samples=2)
    alone = [completion for prompt in PROMPTS for completion in texts(model, sampling, 1, [prompt])]
    assert texts(model, sampling, 3) == alone


def test_settings_of_the_folder_that_change_texts_are_named(chat_models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(chat_models["folder"], tmp_path / "model"))
    assert not TextGenerator(folder, device="cpu").notes
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 1.05}))
    assert any("repetition_penalty 1.05" in note for note in TextGenerator(folder, device="cpu").notes)


@pytest.mark.parametrize(("key", "value"), [("num_beams", 4), ("begin_suppress_tokens", [7]), ("stop_strings", ["x"])])
def test_other_settings_that_transformers_obeys(key: str, value: Any, chat_models: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(chat_models["folder"], tmp_path / "model"))
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert any(f"{key} {value}" in note for note in TextGenerator(folder, device="cpu").notes)


def test_a_large_cache_is_announced(model: TextGenerator) -> None:
    one = model.backend.cache_bytes(1, 1)
    # Keys and values of 2 layers with 2 heads of 8 numbers in fp32.
    assert one == 2 * 2 * 2 * 8 * 4
    assert model.backend.describe_cache(8, 128) is None
    assert "2.0 GiB" in str(model.backend.describe_cache(1024, 2**31 // one // 1024))
