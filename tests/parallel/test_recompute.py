"""Recomputation keeps less and gives the same bits."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from packed_model import MIXTURES, gradients, packed, tiny_decoder
from torch._dynamo.backends.common import aot_autograd
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from retemper.engine.config.settings import ParallelConfig
from retemper.engine.parallel import compile as block_compile
from retemper.engine.parallel import recompute
from retemper.kernels import grouped_linear as grouped_linear_module
from retemper.kernels.attention import plan_attention

BATCH = packed(10, 11, 60)
FLEX = torch.ops.higher_order.flex_attention


def decoder(mode: str, every: int = 1, **changes):
    model = tiny_decoder(num_layers=4, **changes)
    recompute.apply(model, ParallelConfig(recompute=mode, recompute_every=every))
    return model


class Watch(TorchDispatchMode):
    """Counts operators, and remembers the storages that they make without keeping them alive."""

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.counts: Counter = Counter()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.counts[getattr(func, "overloadpacket", func)] += 1
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages[reference.cdata] = (reference, storage.nbytes())
        return output

    def bytes_alive(self) -> int:
        return sum(size for reference, size in self._storages.values() if not reference.expired())


def kept_and_repeated(mode: str, every: int = 1, **changes) -> tuple[int, Counter]:
    """Bytes that are alive between forward and backward pass, and how often the backward pass ran each operator."""
    model = decoder(mode, every, **changes)
    with Watch() as forward:
        loss = model(BATCH)
        kept = forward.bytes_alive()
    with Watch() as backward:
        loss.backward()
    return kept, backward.counts


@pytest.mark.parametrize(
    "changes",
    [{}, {"model_type": "qwen2"}, {"attention_bias": True}, {"model_type": "olmo2"}, *MIXTURES.values()],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
@pytest.mark.parametrize(("mode", "every"), [("selective", 1), ("full", 1), ("selective", 2), ("full", 3)])
def test_gradients_are_bitwise_the_same(mode, every, changes, each_version):
    expected = gradients(decoder("none", **changes), BATCH)
    actual = gradients(decoder(mode, every, **changes), BATCH)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_a_block_can_run_twice_before_its_backward_pass():
    """As micro-batches of a pipeline do: each pass keeps its own."""
    other = packed(50, seed=1)
    for mode in ("selective", "full"):
        model, plain = decoder(mode), decoder("none")
        for each in (model, plain):
            first, second = each(BATCH), each(other)
            (first + second).backward()
        for (name, one), two in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(one.grad, two.grad), name


def test_full_keeps_less_than_selective_and_selective_less_than_none():
    kept = {mode: kept_and_repeated(mode)[0] for mode in ("none", "selective", "full")}
    assert 1.5 * kept["full"] < kept["selective"] < 0.75 * kept["none"]
    assert kept["full"] < kept_and_repeated("full", every=2)[0] < kept["none"]


def test_the_last_product_of_a_block_is_not_kept(monkeypatch):
    """Only the residual sum reads it, and the sum is kept as the next block's input."""
    kept_and_repeated("none")  # makes what all passes share
    kept, _ = kept_and_repeated("selective")
    policy = recompute._keep_results
    monkeypatch.setattr(recompute, "_keep_results", lambda kept, *others: policy((True,) * len(kept), *others))
    with_last, _ = kept_and_repeated("selective")
    tokens, hidden, fp32, blocks = len(BATCH.tokens), 32, 4, 4
    assert with_last - kept == blocks * tokens * hidden * fp32


class AskingAgain(TorchDispatchMode):
    """A pass through a block whose policy also decides during recomputation, as before PyTorch 2.13."""

    def __init__(self, policy, kept: dict, is_recompute: bool):
        super().__init__()
        self.policy, self.kept = policy, kept
        self.context = SelectiveCheckpointContext(is_recompute=is_recompute)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "detach" in func.name():  # as PyTorch ignores it
            return func(*args, **(kwargs or {}))
        keep = self.policy(self.context, func, *args) == CheckpointPolicy.MUST_SAVE
        if keep and self.context.is_recompute:
            return self.kept[func].pop(0)
        output = func(*args, **(kwargs or {}))
        if keep:
            self.kept[func].append(tree_map_only(torch.Tensor, torch.Tensor.detach, output))
        return output


@pytest.fixture(params=["as installed", "policy asked again"])
def each_version(request, monkeypatch):
    """Selective recomputation of this PyTorch, and of those before 2.13."""

    def contexts(policy):
        kept = defaultdict(list)
        return AskingAgain(policy, kept, False), AskingAgain(policy, kept, True)

    if request.param == "policy asked again":
        monkeypatch.setattr(recompute, "create_selective_checkpoint_contexts", contexts)


def test_selective_repeats_no_product_and_no_attention(each_version):
    _, none = kept_and_repeated("none")
    _, selective = kept_and_repeated("selective")
    _, full = kept_and_repeated("full")
    products = [torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu]
    assert [selective[op] for op in products] == [none[op] for op in products]
    # q, k, v, o, gate and up of four blocks; the backward pass of down needs only its input.
    assert full[torch.ops.aten.mm] == none[torch.ops.aten.mm] + 6 * 4
    assert selective[torch.ops.aten.rsqrt] == full[torch.ops.aten.rsqrt] == 4 * 4
    assert none[torch.ops.aten.rsqrt] == 0


def test_selective_repeats_no_product_of_a_block_with_a_norm_at_its_end(each_version):
    olmo = {"model_type": "olmo2"}
    repeated = [kept_and_repeated(mode, **olmo)[1][torch.ops.aten.mm] for mode in ("none", "selective", "full")]
    assert repeated[0] == repeated[1] == repeated[2] - 7 * 4


@pytest.mark.parametrize("family", MIXTURES)
def test_selective_repeats_no_product_and_no_choice_of_a_mixture(family, each_version, monkeypatch):
    """Nor the last product, that of the experts: the backward pass does not read it. With the operator of GPUs."""
    aten, grouped = torch.ops.aten, torch.ops.aten._grouped_mm
    monkeypatch.setattr(grouped_linear_module, "_has_grouped_kernel", lambda x, weight: True)
    none, selective, full = (kept_and_repeated(mode, **MIXTURES[family])[1] for mode in ("none", "selective", "full"))
    for operator in (aten.mm, grouped, aten.topk, aten.sort):
        assert selective[operator] == none[operator], operator
    layers, dense = (4, 0) if family == "qwen3_moe" else (3, 1)
    assert full[grouped] == none[grouped] + 2 * layers
    assert full[aten.sort] == layers and full[aten.topk] >= layers
    others = {"qwen3_moe": 1, "qwen2_moe": 5, "glm4_moe": 4}[family]  # the router, the shared expert and its gate
    repeated = full[aten.mm] - none[aten.mm] + full[aten.addmm] - none[aten.addmm]
    assert repeated == 4 * 4 + others * layers + 2 * dense


@pytest.mark.parametrize("family", MIXTURES)
def test_without_a_grouped_kernel_only_the_last_product_is_repeated(family):
    none, selective, full = (kept_and_repeated(mode, **MIXTURES[family])[1] for mode in ("none", "selective", "full"))
    grouped, layers = torch.ops.retemper.grouped_linear, 4 if family == "qwen3_moe" else 3
    assert (selective[grouped], full[grouped]) == (none[grouped] + layers, none[grouped] + 3 * layers)
    assert selective[torch.ops.aten.topk] == selective[torch.ops.aten.sort] == 0


def test_every_second_block_repeats_half():
    _, full = kept_and_repeated("full")
    _, half = kept_and_repeated("full", every=2)
    assert 2 * half[torch.ops.aten.rsqrt] == full[torch.ops.aten.rsqrt]


def test_evaluation_is_the_same():
    with torch.no_grad():
        losses = [decoder(mode)(BATCH) for mode in ("none", "selective", "full")]
    assert losses[0] == losses[1] == losses[2]


# ---------------------------------------------------------------------------------------------------------------------
# FlexAttention: an operator of higher order


def flex_operator(q, k, v, *, block_mask, scale, enable_gqa):
    """What ``flex_attention`` is to a compiled block; the function itself refuses gradients on a CPU."""
    options = {"OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return FLEX(q, k, v, lambda score, b, h, i, j: score, block_mask.as_tuple(), scale, options)[0]


@pytest.fixture(scope="module")
def flex_batch():
    plan = plan_attention("flex", BATCH.cu_seqlens, (None,), BATCH.tokens.device)
    return BATCH._replace(attention=replace(plan, function=flex_operator))


@pytest.mark.parametrize(("mode", "repeats"), [("none", 0), ("selective", 0), ("full", 4)])
def test_selective_keeps_what_flex_attention_gives(mode, repeats, flex_batch):
    model = decoder(mode)
    loss = model(flex_batch)
    with Watch() as backward:
        loss.backward()
    assert backward.counts[FLEX] == repeats
    for name, value in gradients(decoder("none"), BATCH).items():
        actual = loss if name == "loss" else model.get_parameter(name).grad
        assert (actual - value).norm() <= 3e-6 * value.norm(), name


@pytest.mark.parametrize(("mode", "repeats", "products"), [("none", 0, 0), ("selective", 0, 0), ("full", 1, 6)])
def test_a_compiled_block_keeps_it_too(mode, repeats, products, flex_batch):
    """The backward pass of a block is one graph, and has 14 matrix products of its own."""
    backward: Counter = Counter()

    def count(graph, inputs):
        backward.update(node.target for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    model = decoder(mode)
    options = {"bw_compiler": count, "partition_fn": min_cut_rematerialization_partition}
    block_compile.apply(model, aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), **options))
    gradients(model, flex_batch)
    torch._dynamo.reset()
    assert (backward[FLEX], backward[torch.ops.aten.mm.default]) == (repeats, 14 + products)
