"""Losses of routers: their gradients against transformers and float64 autograd, their counts, biases and state."""

from __future__ import annotations

from dataclasses import replace

import mixtures
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.engine.config.settings import ParallelConfig, TrainingConfig
from retemper.engine.model.expert_settings import ExpertSettings
from retemper.engine.model.experts import Router
from retemper.engine.parallel import recompute, router_losses
from retemper.engine.parallel.forward_backward import ModelParts
from retemper.engine.parallel.router_losses import WINDOW, RouterLosses

CPU = torch.device("cpu")
TOKENS = 40
APPLIED, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def training(**changes) -> TrainingConfig:
    return TrainingConfig(**{"sequence_length": TOKENS, "global_batch_size": 1, **changes})


def with_losses(model, **changes) -> ModelParts:
    return ModelParts([model], router_losses.attach([model], training(**changes), CPU, counts=True))


def step(parts: ModelParts, batches, num_targets: int, skip: Tensor = APPLIED, scale: Tensor | None = None):
    """Gradients of a step without an optimizer."""
    [model] = parts.decoders
    model.zero_grad()
    parts.begin_step(scale)
    for batch in batches:
        (model(batch) / num_targets * (1 if scale is None else scale)).backward()
    parts.end_step(skip)
    return mixtures.gradients(model)


def second_step(parts: ModelParts, *arguments, **options):
    """Gradients of a step whose f are those of the same tokens."""
    step(parts, *arguments)
    return step(parts, *arguments, **options)


def numbers(parts: ModelParts):
    assert parts.routers is not None and parts.routers.numbers is not None
    return parts.routers.read(parts.routers.numbers.tolist())


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name] - tensor).norm() <= bound * tensor.norm(), name


@pytest.mark.parametrize("family", mixtures.FAMILIES)
def test_gradients_of_one_layer_are_those_of_transformers(family):
    coefficient = 0.7
    theirs = mixtures.library_mixture(family, 1, router_aux_loss_coef=coefficient)
    ours = mixtures.native_mixture(theirs)
    tokens, batch = mixtures.documents(TOKENS)
    result = theirs(input_ids=tokens[None], labels=tokens[None], output_router_logits=True)
    result.loss.backward()
    expected = mixtures.by_native_name(mixtures.gradients(theirs))

    parts = with_losses(ours)  # the coefficient is that of the config
    first = step(parts, [batch], TOKENS - 1)
    assert numbers(parts).aux_loss == pytest.approx(result.aux_loss.item(), rel=1e-5)
    assert_close(step(parts, [batch], TOKENS - 1), expected)
    without = step(with_losses(ours, router_aux_loss_coef=0.0), [batch], TOKENS - 1)
    assert_close(first, without, 0.0)  # the load before the first step counts as uniform
    gate = "model.layers.0.mlp.gate.weight"
    assert (without[gate] - expected[gate]).norm() > 0.1 * expected[gate].norm()


def formula(model, tokens: Tensor, aux_coef: float, z_coef: float) -> tuple[dict[str, Tensor], float, float]:
    """Gradients of the documented formula by autograd in float64, and both losses."""
    logits = []
    for block in model.model.layers:
        block.mlp.gate.register_forward_hook(lambda module, inputs, outputs: logits.append(outputs[0]))
    loss = model(input_ids=tokens[None], labels=tokens[None]).loss
    aux, z = [], []
    for of_layer in logits:
        scores, per_token, experts = of_layer.softmax(-1), model.config.num_experts_per_tok, of_layer.shape[1]
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(per_token).indices, 1.0)
        aux.append(experts * (chosen.mean(0) * scores.mean(0)).sum())
        z.append(torch.logsumexp(of_layer, -1).square().mean())
    aux_loss, z_loss = torch.stack(aux).mean(), torch.stack(z).mean()
    (loss + aux_coef * aux_loss + z_coef * z_loss).backward()
    return mixtures.by_native_name(mixtures.gradients(model)), aux_loss.item(), z_loss.item()


@pytest.mark.parametrize("recomputed", ["none", "full", "selective"])
def test_several_layers_and_micro_batches_equal_the_formula_in_float64(recomputed):
    coefs = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.03}
    theirs = mixtures.library_mixture("qwen3_moe", 3, torch.float64)
    ours = mixtures.native_mixture(theirs)
    recompute.apply(ours, ParallelConfig(recompute=recomputed))
    tokens, whole = mixtures.documents(TOKENS)
    parts = with_losses(ours, **coefs)
    actual = second_step(parts, [whole], TOKENS - 1)
    expected, aux_loss, z_loss = formula(theirs, tokens, *coefs.values())
    assert_close({name: gradient.double() for name, gradient in actual.items()}, expected)
    found = numbers(parts)
    assert (found.aux_loss, found.z_loss) == pytest.approx((aux_loss, z_loss), rel=1e-5)
    assert len(found.loads) == 3 and all(1 < load <= 6 for load in found.loads.values())

    # Four micro-batches of documents of their own are one step.
    batches = [mixtures.documents(TOKENS // 4, seed)[1] for seed in range(4)]
    together = with_losses(mixtures.native_mixture(theirs), **coefs)
    joined = type(whole).of_documents(
        torch.cat([batch.tokens for batch in batches]),
        [TOKENS // 4] * 4,
        torch.cat([batch.targets for batch in batches]),
    )
    assert_close(second_step(parts, batches, 36), second_step(together, [joined], 36))
    assert numbers(parts).loads == numbers(together).loads


def test_scaled_losses_have_scaled_gradients_and_the_same_numbers():
    ours = mixtures.native_mixture(mixtures.library_mixture("qwen3_moe", 2))
    parts = with_losses(ours, router_aux_loss_coef=0.5, router_z_loss_coef=0.03)
    batches = [mixtures.documents(TOKENS)[1]]
    expected, before = second_step(parts, batches, 39), numbers(parts)
    scaled = step(parts, batches, 39, scale=torch.tensor(1024.0))
    assert_close({name: gradient / 1024 for name, gradient in scaled.items()}, expected, 1e-6)
    assert numbers(parts) == before


def test_evaluations_and_passes_outside_of_a_step_do_not_count():
    ours = mixtures.native_mixture(mixtures.library_mixture("qwen3_moe", 2))
    parts, [batch] = with_losses(ours, router_z_loss_coef=1.0), [mixtures.documents(TOKENS)[1]]
    assert parts.routers is not None
    parts.begin_step(None)
    with torch.no_grad():
        ours(batch)
    assert parts.routers._totals.count_nonzero() == 0
    ours(batch).backward()
    assert parts.routers._totals[:, :6].sum(-1).tolist() == [2 * TOKENS] * 2
    parts.end_step(APPLIED)
    state = parts.routers.state_dict()
    ours.zero_grad()
    ours(batch).backward()
    outside = mixtures.gradients(ours)
    assert parts.routers.state_dict() == state
    without = step(with_losses(ours), [batch], 1)
    assert_close(outside, without, 0.0)


def test_a_skipped_step_leaves_the_state():
    ours = mixtures.native_mixture(mixtures.library_mixture("qwen3_moe", 2))
    parts, batches = with_losses(ours), [mixtures.documents(TOKENS)[1]]
    step(parts, batches, 39)
    assert parts.routers is not None
    state = parts.routers.state_dict()
    assert {"0", "1"} == {name for name in state if "window" not in name} and sum(
        map(int, state["0"].split())
    ) == 2 * TOKENS
    others = [mixtures.documents(TOKENS, 5)[1]]
    step(parts, others, 39, SKIPPED)
    assert parts.routers.state_dict() == state
    step(parts, others, 39)
    assert parts.routers.state_dict() != state


def test_a_continued_state_gives_the_same_bits():
    theirs = mixtures.library_mixture("qwen3_moe", 2, router_aux_loss_coef=0.5)
    parts, batches = with_losses(mixtures.native_mixture(theirs)), [mixtures.documents(TOKENS)[1]]
    step(parts, batches, 39)
    assert parts.routers is not None
    continued = with_losses(mixtures.native_mixture(theirs))
    assert continued.routers is not None and continued.routers.state_dict() == {}
    assert continued.routers.load_state_dict(parts.routers.state_dict())
    assert continued.routers.state_dict() == parts.routers.state_dict()
    assert_close(step(continued, batches, 39), step(parts, batches, 39), 0.0)
    assert not continued.routers.load_state_dict({})
    assert continued.routers.state_dict() == {}


SIGMOID = ExpertSettings(
    layers=(True,), num_experts=4, per_token=2, intermediate_size=8, scoring="sigmoid", groups=1, selection_bias=True
)


def sigmoid_router(**changes) -> tuple[Router, RouterLosses]:
    torch.manual_seed(0)
    router = Router(SIGMOID, 8)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.zeros_(router.e_score_correction_bias)
    return router, RouterLosses({0: router}, SIGMOID, training(**changes), CPU)


def test_sigmoid_scores_are_normalized_for_the_loss():
    router, losses = sigmoid_router(router_aux_loss_coef=0.5, router_z_loss_coef=0.2, router_bias_update_rate=0.0)
    hidden = torch.randn(TOKENS, 8)
    for _ in range(2):
        router.zero_grad()
        losses.begin_step(None)
        routing = router(hidden)
        (routing.weights_TK * torch.arange(2.0)).sum().backward()
        losses.update(APPLIED)
    weight = router.weight.detach().double().requires_grad_()
    logits = hidden.double() @ weight.t()
    scores = logits.sigmoid()
    chosen = scores.topk(2).indices
    weights = scores.gather(1, chosen) / scores.gather(1, chosen).sum(-1, keepdim=True)
    shares = torch.zeros_like(scores).scatter(1, chosen, 1.0).mean(0)
    aux = 4 * (shares * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()
    z = torch.logsumexp(logits, -1).square().mean()
    ((weights * torch.arange(2.0)).sum() + 0.5 * aux + 0.2 * z).backward()
    assert router.weight.grad is not None and weight.grad is not None
    torch.testing.assert_close(router.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-6)
    assert losses.numbers is not None
    found = losses.read(losses.numbers.tolist())
    assert (found.aux_loss, found.z_loss) == pytest.approx((aux.item(), z.item()), rel=1e-5)


def test_biases_rise_with_too_few_tokens_and_stay_in_skipped_steps():
    router, losses = sigmoid_router(router_bias_update_rate=0.25)
    hidden = torch.randn(5, 8)

    def route(skip: Tensor) -> Tensor:
        losses.begin_step(None)
        routing = router(hidden)
        routing.weights_TK.sum().backward()
        losses.update(skip)
        return torch.bincount(routing.experts_TK.flatten(), minlength=4).double()

    expected = torch.zeros(4)
    for _ in range(5):
        route(SKIPPED)
        assert torch.equal(router.e_score_correction_bias, expected)
        counts = route(APPLIED)
        expected += 0.25 * (counts.mean() - counts).sign().float()
        assert torch.equal(router.e_score_correction_bias, expected)
    assert expected.any()


def test_biases_of_frozen_routers_stay():
    router, _ = sigmoid_router()
    router.weight.requires_grad_(False)
    losses = RouterLosses({0: router}, SIGMOID, training(), CPU)
    losses.begin_step(None)
    router(torch.randn(3, 8, requires_grad=True)).weights_TK.sum().backward()
    losses.update(APPLIED)
    assert losses.state_dict() and not router.e_score_correction_bias.any()


def test_experts_starve_over_a_window():
    settings = replace(SIGMOID, layers=(False, True, True), selection_bias=False)
    losses = RouterLosses({}, settings, training(), CPU)
    for number in range(WINDOW):
        losses.begin_step(None)
        # Expert 3 of the first layer gets less than a tenth of the mean load of 1000 / 4, expert 2 a tenth.
        losses._totals[0, :4] = torch.tensor([800.0, 151.0, 25.0, 24.0])
        losses._totals[1, :4] = 250.0
        losses.update(APPLIED)
        assert losses.numbers is not None
        found = losses.read(losses.numbers.tolist())
        assert found.starving == ({1: 1} if number == WINDOW - 1 else {})
    assert found.loads == pytest.approx({1: 3.2, 2: 1.0})


def test_models_without_experts_have_no_losses():
    from packed_model import tiny_decoder

    assert router_losses.attach([tiny_decoder()], training(), CPU, counts=True) is None


def test_one_layer_has_k_times_the_loss_of_megatron():
    """The relation that docs/training_methods.md gives; Megatron-Core sums over layers."""
    from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func, z_loss_func

    _, losses = sigmoid_router()
    losses.begin_step(None)
    logits = torch.randn(TOKENS, 4)
    scores, experts = logits.softmax(-1), logits.topk(2).indices
    lse = logits.logsumexp(-1)
    losses.settings = replace(SIGMOID, scoring="softmax")
    losses.add(0, scores, scores, lse, experts)
    losses.update(APPLIED)
    counts = torch.bincount(experts.flatten(), minlength=4)
    aux = switch_load_balancing_loss_func(scores, counts, TOKENS, 2, 4, 1.0)
    assert losses.numbers is not None
    found = losses.read(losses.numbers.tolist())
    assert found.aux_loss == pytest.approx(2 * aux.item(), rel=1e-5)
    assert found.z_loss == pytest.approx(z_loss_func(logits, 1.0).item(), rel=1e-5)


class HostReads(TorchDispatchMode):
    """Counts reads of values of tensors, which wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device():
    _, losses = sigmoid_router(router_aux_loss_coef=0.5)
    with HostReads() as reads:
        losses.begin_step(torch.tensor(2.0))
        losses.update(APPLIED)
    assert reads.count == 0
