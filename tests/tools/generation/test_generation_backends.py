"""Logits of the next token, with caches and batches, against transformers without either."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from family_models import MODELS, VOCAB, hf_config, hf_model, our_model
from model_table import TYPES, sampled, tiny_config, tiny_model

from retemper.engine.model.implementations import checked, meta_model, parse_architecture
from retemper.engine.weights.checkpoint.tensors import model_tensors
from retemper.engine.weights.hugging_face.model import open_hf_model
from retemper.tools.generation.backend import Backend
from retemper.tools.generation.decoder_backend import DecoderBackend, own_backend
from retemper.tools.generation.library_backend import LibraryBackend, library_backend

CPU = torch.device("cpu")
LENGTHS = (3, 19, 11)
"""Of prompts: shorter and longer than the windows of the tiny models."""
STEPS = 6
LIMIT = max(LENGTHS) + 2 * STEPS
TOLERANCE = 5e-4
"""Relative. Rounding causes about 1e-6, and up to 3e-4 in the recurrence of nemotron_h."""


def prompts(vocab_size: int, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def alone(hf: Any, ids: Sequence[int]) -> torch.Tensor:
    """What transformers computes for one text, without a cache."""
    # A copy, because some types keep a state in their modules.
    return copy.deepcopy(hf)(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to rounding."""
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@torch.inference_mode()
def check(backend: Backend, hf: Any, texts: list[list[int]]) -> None:
    """Compare every step of a session: the prompts, more tokens, and fewer and repeated sequences."""
    session = backend.open(LIMIT)
    logits = session.append(texts)
    for step in range(2 * STEPS):
        for row, ids in enumerate(texts):
            assert_close(logits[row], alone(hf, ids))
        if step == STEPS:
            rows = [2, 0, 0] if len(texts) > 2 else [0, 0]
            session.keep(rows)
            texts = [texts[row] for row in rows]
        new = [3 + (7 * step + 5 * row) % 80 for row in range(len(texts))]
        texts = [[*ids, token] for ids, token in zip(texts, new, strict=True)]
        logits = session.append([[token] for token in new])


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_of_native_models(name: str) -> None:
    hf = hf_model(hf_config(name)).eval()
    backend = DecoderBackend(our_model(hf).eval(), CPU)
    check(backend, hf, prompts(VOCAB))


@pytest.mark.parametrize("name", ["llama", "qwen2 with windows", "gemma2", "cohere2", "phi3"])
def test_the_caches_of_transformers(name: str) -> None:
    hf = hf_model(hf_config(name)).eval()
    check(LibraryBackend(hf, parse_architecture(hf.config.to_dict())), hf, prompts(VOCAB))


def test_several_new_tokens_at_once() -> None:
    hf = hf_model(hf_config("mistral with window")).eval()
    whole = prompts(VOCAB, (23,))[0]
    for backend in (
        DecoderBackend(our_model(hf).eval(), CPU),
        LibraryBackend(hf, parse_architecture(hf.config.to_dict())),
    ):
        with torch.inference_mode():
            session = backend.open(LIMIT)
            for first, last in ((0, 9), (9, 11), (11, 22), (22, 23)):
                assert_close(session.append([whole[first:last]])[0], alone(hf, whole[:last]))


def test_a_scaling_that_depends_on_the_length_is_not_cached() -> None:
    hf = hf_model(hf_config("dynamic rope")).eval()
    backend = DecoderBackend(our_model(hf).eval(), CPU)
    text = prompts(VOCAB, (30,))
    with torch.inference_mode():
        # Up to the unscaled length of 32 the frequencies are constant.
        cached, recomputed = backend.open(32), backend.open(40)
        assert type(cached) is not type(recomputed)
        recomputed.append(text)
        for token in (9, 8, 7, 6):
            text[0].append(token)
            assert_close(recomputed.append([[token]])[0], alone(hf, text[0]))


UNSUPPORTED = {"deepseek_v4", "dots3_note_text", "inkling2_text", "zamba", "zamba2"}
"""Types that Retemper refuses to open."""
GENERIC = ["gpt_oss", "minicpm3", "qwen3_next", "gpt2", "bloom", "deepseek_v3", "mamba2", "recurrent_gemma"]


@pytest.mark.parametrize("model_type", sampled([name for name in TYPES if name not in UNSUPPORTED], GENERIC))
def test_models_of_transformers(model_type: str, tmp_path) -> None:
    """Through transformers, and with our attention, where either supports the type."""
    hf = tiny_model(tiny_config(model_type)).eval()
    hf.save_pretrained(tmp_path)
    model = open_hf_model(tmp_path)
    decoder = meta_model(checked(model.architecture)).cast_parameters(torch.float32).materialize(CPU).eval()
    for name, parameter in model_tensors(decoder).items():
        model.parameters.load(name, parameter)
    texts = prompts(model.architecture.vocab_size)
    check(own_backend(decoder, CPU), hf, texts)
    library = library_backend(hf, model.architecture)
    check(library, hf, texts[:1] if library.needs_equal_lengths else texts)
