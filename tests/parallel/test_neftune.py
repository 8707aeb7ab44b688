"""NEFTune against numpy and against transformers with a hook as TRL has it; its layouts and resumes, with a z-loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny_run
import torch
import torch.nn.functional as F
import yaml
from family_models import hf_config, hf_model, our_model
from generic_models import architecture_of_type, documents, reference
from packed_model import packed, tiny_decoder

from retemper.engine import pretrain
from retemper.engine.batch import Batch
from retemper.engine.evaluation import count_targets
from retemper.engine.model.generic.model import TransformersModel
from retemper.engine.parallel.neftune import EmbeddingNoise, noise_bound
from retemper.kernels.linear_cross_entropy import IGNORE_INDEX
from retemper.kernels.random_bits import stream_key, token_uniform

STEPS = 8
METHODS = ["--training.neftune_alpha", "30", "--training.z_loss", "0.05"]
BUDGET = ["--training.train_tokens", str(STEPS * 8 * 32)]


def numbered(batch: Batch, first: int = 4096) -> Batch:
    return batch._replace(token_numbers=torch.arange(first, first + len(batch.tokens)))


def expected_noise(numbers: torch.Tensor, width: int, alpha: float, length: int, seed: int) -> np.ndarray:
    """The formula of the paper in numpy; the hash itself is tested in tests/kernels/test_random_bits.py."""
    keys = torch.tensor(stream_key(seed, 0, "neftune"), dtype=torch.int32)
    uniform = token_uniform(numbers, torch.arange(width), keys).numpy().astype(np.float64)
    return (2 * uniform - 1) * alpha / np.sqrt(length * width)


def test_bounds_and_moments_are_those_of_the_paper():
    length, width, alpha = 512, 256, 5.0
    noise = EmbeddingNoise(noise_bound(alpha, length, width), 3)
    batch = numbered(Batch.of_documents(torch.zeros(length, dtype=torch.int64), [100, 412]))
    added = noise(torch.zeros(length, width), batch).double()
    bound = alpha / math.sqrt(length * width)
    assert 0.999 * bound < added.abs().max() <= bound
    assert abs(added.mean()) < 5 * bound / math.sqrt(3 * length * width)
    # The norm of the noise of a sample is alpha / sqrt(3), whatever its length and width.
    assert added.norm().item() == pytest.approx(alpha / math.sqrt(3), rel=0.01)
    torch.testing.assert_close(
        added.numpy(), expected_noise(batch.token_numbers, width, alpha, length, 3), rtol=1e-6, atol=1e-9
    )
    assert not torch.equal(added, EmbeddingNoise(bound, 4)(torch.zeros(length, width), batch).double())
    half = noise(torch.zeros(length, width, dtype=torch.bfloat16), batch)
    assert half.dtype == torch.bfloat16 and torch.equal(half, added.bfloat16())


def test_parts_of_a_batch_get_their_noise():
    """Tokens of a rank of context parallelism, and of sequence parallelism inside of it."""
    batch, zeros = numbered(packed(7, 40)), torch.zeros(96, 16)
    whole = EmbeddingNoise(1.0, 5)(zeros, batch)
    for first in (0, 48):
        of_rank = batch.tokens_in(slice(first, first + 48))
        assert torch.equal(EmbeddingNoise(1.0, 5)(zeros[:48], of_rank), whole[first : first + 48])
        for part in range(2):
            start = first + 24 * part
            assert torch.equal(EmbeddingNoise(1.0, 5, part)(zeros[:24], of_rank), whole[start : start + 24])


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_native_decoder_adds_it_where_trl_does(name):
    """TRL hooks the embedding module of transformers, inside of which Gemma scales and Granite does not."""
    hf = hf_model(hf_config(name))
    ours, width = our_model(hf), hf.config.hidden_size
    tokens = torch.randint(3, 200, (24,), generator=torch.Generator().manual_seed(1))
    batch = numbered(Batch.of_documents(tokens, [24]))
    noise = torch.from_numpy(expected_noise(batch.token_numbers, width, 20.0, 24, 3)).float()
    handle = hf.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output + noise)
    with torch.no_grad():
        expected = hf(input_ids=tokens[None]).logits[0]
        handle.remove()
        plain = hf(input_ids=tokens[None]).logits[0]
        ours.change_embeddings(EmbeddingNoise(noise_bound(20.0, 24, width), 3))
        torch.testing.assert_close(ours.logits(batch), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.logits(batch._replace(token_numbers=None)), plain, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_transformers_implementation(model_type):
    model = TransformersModel(architecture_of_type(model_type)).materialize(torch.device("cpu"))
    model.load_state_dict(reference(model_type).state, strict=False)
    batch, width = numbered(documents()), model.architecture.hidden_size
    plain, seen = model(batch), []
    model.embedding.register_forward_hook(lambda module, inputs, output: seen.append(output[0].detach()))
    model.change_embeddings(EmbeddingNoise(noise_bound(20.0, 24, width), 3))
    model.embedding.register_forward_hook(lambda module, inputs, output: seen.append(output[0].detach()))
    assert torch.equal(model(batch._replace(token_numbers=None)), plain)
    seen.clear()
    assert not torch.equal(model(batch), plain)
    expected = torch.from_numpy(expected_noise(batch.token_numbers, width, 20.0, 24, 3)).float()
    torch.testing.assert_close(seen[1] - seen[0], expected, rtol=1e-4, atol=1e-6)


def test_z_loss_of_the_decoder_is_in_the_gradients_only():
    model, batch = tiny_decoder(initializer_range=0.5), packed(11, 50)
    plain = model(batch).detach()
    model.z_loss = 0.1
    with torch.no_grad():
        assert torch.equal(model(batch), plain)
    loss = model(batch)
    loss.backward()
    torch.testing.assert_close(loss.detach(), plain, rtol=1e-5, atol=0)
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model.logits(batch).double()
    penalty = 0.1 * (logits.logsumexp(-1).square() * (batch.targets != IGNORE_INDEX)).sum()
    (F.cross_entropy(logits, batch.targets, ignore_index=IGNORE_INDEX, reduction="sum") + penalty).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)
    assert penalty > 0.05 * plain


@pytest.mark.parametrize("fused", [True, False], ids=["matrix", "any head"])
def test_z_loss_of_the_transformers_implementation(fused):
    model = TransformersModel(architecture_of_type("gpt2")).materialize(torch.device("cpu"))
    model.load_state_dict(reference("gpt2").state, strict=False)
    assert model._form is not None
    model._form, batch = model._form if fused else None, documents()
    plain, model.z_loss = model(batch).detach(), 0.1
    with torch.no_grad():
        assert torch.equal(model(batch), plain)
    loss = model(batch)
    loss.backward()
    torch.testing.assert_close(loss.detach(), plain, rtol=1e-5, atol=0)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    logits = model.logits(batch).double()
    penalty = 0.1 * (logits.logsumexp(-1).square() * (batch.targets != IGNORE_INDEX)).sum()
    (F.cross_entropy(logits, batch.targets, ignore_index=IGNORE_INDEX, reduction="sum") + penalty).backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-4)
    assert penalty > 0.05 * plain


def gradients(ranks, path, overrides: list[str]) -> dict[str, torch.Tensor]:
    """Full gradients of the first global batch, by name."""
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
    batches = run.data.micro_batches(0)
    num_targets = ranks.all_reduce(count_targets(batches, run.mesh))
    run.forward_backward.accumulate_gradients(batches, num_targets, lambda phase: None)
    return tiny_run.gradients(run)


@pytest.fixture(scope="module")
def expected_gradients(one_rank, even_file, tmp_path_factory):
    """Of one rank, with both methods and with none."""
    folder = ["--run_folder", str(tmp_path_factory.mktemp("one"))]
    return gradients(one_rank, even_file, [*folder, *METHODS]), gradients(one_rank, even_file, folder)


@pytest.fixture(scope="module")
def even_file(run_file, tmp_path_factory):
    """The tiny run with a vocabulary that two ranks can share."""
    config = yaml.safe_load(run_file.read_text())
    config["model"]["architecture"] |= {"vocab_size": tiny_run.VOCAB_SIZE + 1}
    path = tmp_path_factory.mktemp("even") / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.mark.parametrize("micro_batch_size", ["1", "8"])
def test_micro_batches_do_not_matter(one_rank, even_file, expected_gradients, tmp_path, micro_batch_size):
    options = ["--run_folder", str(tmp_path), *METHODS, "--training.micro_batch_size", micro_batch_size]
    for name, gradient in gradients(one_rank, even_file, options).items():
        torch.testing.assert_close(gradient, expected_gradients[0][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("axis", ["shard", "tensor", "context", "pipeline"])
def test_two_ranks_give_the_same_gradients(two_ranks, even_file, expected_gradients, tmp_path, axis):
    options = ["--run_folder", str(tmp_path), *METHODS, f"--parallel.{axis}", "2"]
    expected, plain = expected_gradients
    for part in two_ranks.run(gradients, even_file, options):
        for name, gradient in part.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    assert all((expected[name] - plain[name]).norm() > 0.02 * plain[name].norm() for name in plain)


def test_resumed_bitwise_and_off_in_evaluations(one_rank, even_file, tmp_path):
    both = [*METHODS, *BUDGET, "--training.eval_at_start", "true"]
    folders = [tmp_path / name for name in ("whole", "resumed", "plain")]
    tiny_run.train(one_rank, even_file, ["--run_folder", str(folders[0]), *both])
    tiny_run.train_until(one_rank, even_file, ["--run_folder", str(folders[1]), *both], 6)
    tiny_run.train(one_rank, even_file, ["--run_folder", str(folders[1]), *both])
    assert tiny_run.curve(folders[0]) == tiny_run.curve(folders[1])
    last = f"checkpoints/step-{STEPS:08d}"
    mine, theirs = (tiny_run.tensors_of(folder / last) for folder in folders[:2])
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    tiny_run.train(one_rank, even_file, ["--run_folder", str(folders[2]), *BUDGET, "--training.eval_at_start", "true"])
    first = [next(r for r in tiny_run.records(folder) if "validation" in str(r)) for folder in (folders[0], folders[2])]
    losses = [{key: value for key, value in record.items() if "loss" in key} for record in first]
    assert losses[0] and losses[0] == losses[1]
    assert tiny_run.curve(folders[0]) != tiny_run.curve(folders[2])
