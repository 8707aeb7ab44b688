"""The Triton kernels of rms_norm, rope and swiglu: float64 formulas, the reference's roundings, odd shapes, strides.

Without a GPU they run in Triton's interpreter (tests/conftest.py).

Bounds, relative to the norm of the float64 result. fp32: a handful of roundings of 2^-24. bf16: at most four roundings
in a row, each at most 2^-8 of an element and less than half of that in norm. Besides, in bf16 the interpreter's result
must be the reference's bit for bit; a GPU's exp and rsqrt may move one value in a thousand to its neighbour.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton, which there is for Linux only")

from retemper.engine.errors import UserError
from retemper.engine.model.architecture import parse_architecture
from retemper.engine.model.decoder import Decoder, elementwise_implementation
from retemper.engine.model.packing import Packing
from retemper.kernels import elementwise_triton
from retemper.kernels.rms_norm import rms_norm
from retemper.kernels.rope import apply_rope_to_pair, rope_cos_sin
from retemper.kernels.swiglu import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
DIFFERENT = 0.0 if DEVICE == "cpu" else 1e-3
"""Share of bf16 values that may differ from the reference's."""
dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=["fp32", "bf16"])


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def results(function, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradient of every input for a fixed upstream gradient of the outputs' dtype."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    upstream = [random(*y.shape, seed=90 + i, dtype=inputs[0].dtype).to(y.dtype) for i, y in enumerate(outputs)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def check(function, exact, inputs: list[Tensor], sums: tuple[int, ...] = ()) -> None:
    """``function(implementation, *inputs)`` with Triton against ``exact`` in float64 and against the reference.

    Results at ``sums`` are sums over rows, which the kernels round once and the reference more often.
    """
    actual = results(lambda *x: function("triton", *x), inputs)
    reference = results(lambda *x: function("torch", *x), inputs)
    expected = results(exact, [x.double() for x in inputs])
    dtype = inputs[0].dtype
    for place, (value, other, wanted) in enumerate(zip(actual, reference, expected, strict=True)):
        assert value.dtype == other.dtype == dtype, place
        assert value.shape == wanted.shape, place
        assert (value.double() - wanted).norm() <= BOUNDS[dtype] * wanted.norm(), place
        if dtype == torch.bfloat16 and place not in sums and value.numel():
            assert (value != other).double().mean() <= DIFFERENT, place


# ---------------------------------------------------------------------------------------------------------------------
# rms_norm


EPS = 0.1
"""Large, so that the gradient of a row of one element does not cancel."""


def normed(implementation, x, weight):
    return rms_norm(x, weight, EPS, implementation=implementation)


def normed_sum(implementation, x, weight, residual):
    return rms_norm(x, weight, EPS, residual, implementation=implementation)


def exact_norm(x, weight):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS) * weight


def exact_norm_of_sum(x, weight, residual):
    # The sum that is normalized has been rounded to the inputs' dtype, which no later step can undo.
    total = x + residual
    return exact_norm(total, weight), total


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (1, 100), (37, 70), (5, 3, 8), (3, 2049), (0, 8)])
def test_rms_norm(shape, dtype):
    inputs = [random(*shape, seed=1, dtype=dtype), random(shape[-1], seed=2, dtype=dtype)]
    check(normed, exact_norm, inputs, sums=(2,))


@dtypes
@pytest.mark.parametrize("shape", [(1, 16), (19, 70), (5, 3, 8)])
def test_rms_norm_of_a_sum(shape, dtype):
    inputs = [random(*shape, seed=1, dtype=dtype), random(shape[-1], seed=2, dtype=dtype)]
    check(normed_sum, exact_norm_of_sum, [*inputs, random(*shape, seed=3, dtype=dtype)], sums=(3,))


@pytest.mark.parametrize("used", ["norm", "sum"])
def test_rms_norm_when_only_one_result_is_used(used):
    inputs = [random(4, 6, seed=1), random(6, seed=2), random(4, 6, seed=3)]
    for implementation in ("torch", "triton"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y, total = normed_sum(implementation, *leaves)
        (y if used == "norm" else total).square().sum().backward()
        if implementation == "torch":
            expected = [x.grad for x in leaves]
    for leaf, wanted in zip(leaves, expected, strict=True):
        if wanted is None:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_rms_norm_with_one_of_its_inputs_frozen(frozen):
    inputs = [random(4, 6, seed=1), random(6, seed=2)]
    upstream = random(4, 6, seed=90)
    expected = results(lambda *x: normed("triton", *x), inputs)
    x, weight = inputs
    (weight if frozen == "x" else x).requires_grad_()
    normed("triton", x, weight).backward(upstream)
    assert torch.equal(weight.grad, expected[2]) if frozen == "x" else torch.equal(x.grad, expected[1])
    assert (x if frozen == "x" else weight).grad is None


def test_weight_gradient_is_exact_over_many_rows_and_the_same_every_time(monkeypatch):
    """More rows than one program takes: partial sums, then their sum, in fp32 even for bf16 inputs."""
    monkeypatch.setattr(elementwise_triton, "PARTIAL_SUMS", 3)
    x, weight = random(1500, 24, seed=1, dtype=torch.bfloat16), random(24, seed=2, dtype=torch.bfloat16)
    first, again = (results(lambda *x: normed("triton", *x), [x, weight])[2] for _ in range(2))
    assert torch.equal(first, again)
    normalized = rms_norm(x, torch.ones_like(weight), EPS)
    expected = (random(1500, 24, seed=90, dtype=torch.bfloat16).double() * normalized.double()).sum(0)
    # One rounding to bf16 at the end, and those of the fp32 sum.
    assert ((first.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-3).all()


# ---------------------------------------------------------------------------------------------------------------------
# rope


@dtypes
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 2), (3, 2, 12), (5, 1, 6)])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_rope(num_tokens, heads, kv_heads, head_dim, dtype):
    q, k = (random(num_tokens, n, head_dim, seed=n, dtype=dtype) for n in (heads, kv_heads))
    positions = torch.arange(num_tokens, device=DEVICE) * 11
    cos, sin = rope_cos_sin(positions, random(head_dim // 2, seed=4).abs())

    def turned(implementation, q, k):
        return apply_rope_to_pair(q, k, cos, sin, implementation=implementation)

    def exact(q, k):
        half = head_dim // 2
        turns = torch.complex(cos.double(), sin.double())[:, None, :half]
        products = (torch.complex(x[..., :half], x[..., half:]) * turns for x in (q, k))
        return tuple(torch.cat((z.real, z.imag), dim=-1) for z in products)

    check(turned, exact, [q, k])


def test_rope_with_angles_that_are_not_repeated_has_the_transposed_matrix_as_gradient():
    """<rope x, y> = <x, gradient of y> for any cos and sin, not only those of a rotation."""
    x, y, cos, sin = random(3, 2, 8, seed=1), random(3, 2, 8, seed=2), random(3, 8, seed=3), random(3, 8, seed=4)
    ours = results(lambda q, k: apply_rope_to_pair(q, k, cos, sin, implementation="triton"), [x, y])
    theirs = results(lambda q, k: apply_rope_to_pair(q, k, cos, sin), [x, y])
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# swiglu


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (9, 33), (3, 2, 700), (0, 4)])
def test_swiglu(shape, dtype):
    inputs = [random(*shape, seed=1, dtype=dtype) * 4, random(*shape, seed=2, dtype=dtype)]
    check(
        lambda implementation, gate, up: swiglu(gate, up, implementation=implementation),
        lambda gate, up: gate / (1 + torch.exp(-gate)) * up,
        inputs,
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, in the interpreter.
def test_swiglu_of_large_values_is_finite():
    gate = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0], device=DEVICE)
    y, *gradients = results(lambda g, u: swiglu(g, u, implementation="triton"), [gate, torch.ones_like(gate)])
    torch.testing.assert_close(y, gate.clamp(min=0))
    assert all(torch.isfinite(g).all() for g in gradients)


# ---------------------------------------------------------------------------------------------------------------------
# Strides, refusals, torch.compile, the model


def strided(x: Tensor, kind: str) -> Tensor:
    """The same values in another layout: a part of a wider tensor, transposed memory, or one row repeated."""
    if kind == "part":
        return torch.cat((x, x + 1), dim=-1)[..., : x.shape[-1]]
    if kind == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x[:1].expand_as(x)


@pytest.mark.parametrize("kind", ["part", "transposed", "repeated"])
def test_strides_do_not_matter(kind):
    q, k = random(4, 3, 6, seed=1), random(4, 2, 6, seed=2)
    weight, (cos, sin) = random(6, seed=3), rope_cos_sin(torch.arange(4, device=DEVICE), random(3, seed=4))
    functions = {
        "rms_norm": lambda x, y: rms_norm(x, weight, 1e-3, y, implementation="triton"),
        "rope": lambda x, y: apply_rope_to_pair(x, y[:, :2], cos, sin, implementation="triton"),
        "swiglu": lambda x, y: swiglu(x, y, implementation="triton"),
    }
    other = torch.cat((k, q[:, :1]), dim=1)
    upstream = strided(random(4, 3, 6, seed=5), kind)
    for name, function in functions.items():
        outcomes = []
        for change in (lambda x: strided(x, kind), lambda x: strided(x, kind).contiguous()):
            leaves = [change(x).detach().requires_grad_() for x in (q, other)]
            outputs = function(*leaves)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            gradients = [change(upstream)[:, : y.shape[1]] for y in outputs]
            outcomes.append([*outputs, *torch.autograd.grad(outputs, leaves, gradients)])
        for actual, expected in zip(*outcomes, strict=True):
            assert torch.equal(actual, expected), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rms_norm(x, x[0].bfloat16(), 1e-6, implementation="triton"), "weight is torch.bfloat16"),
        (lambda x: rms_norm(x, x[0, :3], 1e-6, implementation="triton"), r"weight has shape \(3,\)"),
        (lambda x: rms_norm(x, x[0], 1e-6, x[:1], implementation="triton"), r"residual has shape \(1, 4\)"),
        (lambda x: rms_norm(x.double(), x[0].double(), 1e-6, implementation="triton"), "dtype torch.float64"),
        (lambda x: rms_norm(x.new_empty(1, 65537), x.new_empty(65537), 1e-6, implementation="triton"), "65,537"),
        (lambda x: apply_rope_to_pair(x[:, None], x[:1, None], x, x, implementation="triton"), "must agree"),
        (lambda x: apply_rope_to_pair(x[:, None], x[:, None], x[:1], x, implementation="triton"), "constants"),
        (lambda x: swiglu(x, x[:1], implementation="triton"), r"up \(1, 4\)"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(random(2, 4, seed=1))


def test_the_setting_is_refused_where_triton_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for setting in ("auto", "torch"):
        assert elementwise_implementation(setting, "cpu") == "torch"
    assert elementwise_implementation("triton", "cuda") == "triton"
    with pytest.raises(UserError, match=r"training\.fused_elementwise is triton, but .*device 'cpu'"):
        elementwise_implementation("triton", "cpu")


@pytest.mark.parametrize("name", ["rms_norm", "rms_norm_backward", "rope", "swiglu", "swiglu_backward"])
def test_operators_keep_their_promises_to_torch_compile(name):
    """Schema, shapes without data, and gradients through a traced graph: PyTorch's own check of a custom operator."""
    x, w, y = (random(*shape, seed=1).requires_grad_(not name.endswith("backward")) for shape in ((3, 8), (8,), (3, 8)))
    heads, angles = random(3, 2, 8, seed=1).requires_grad_(), random(3, 8, seed=2)
    arguments = {
        "rms_norm": (x, w, 1e-3, y),
        "rms_norm_backward": (y, x, x, w, random(3, seed=3), True),
        "rope": (heads, heads[:, :1], angles, angles, False),
        "swiglu": (x, y),
        "swiglu_backward": (x, y, y),
    }[name]
    torch.library.opcheck(getattr(torch.ops.retemper, name).default, arguments)


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter takes programs that the compiler refuses: types that change in a loop, shapes that do not fit."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_elementwise.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) == 5


CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_has_the_same_loss_and_gradients(compiled):
    tokens = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6], device=DEVICE)
    packing = Packing(
        torch.tensor([0, 1, 2, 0, 1, 2, 3, 4], device=DEVICE),
        torch.tensor([0, 3, 8], dtype=torch.int32, device=DEVICE),
        5,
    )
    outcomes = []
    for implementation in ("torch", "triton"):
        model = Decoder(parse_architecture(CONFIG), implementation).to(DEVICE)
        model.initialize_(7)
        if compiled and implementation == "triton":
            for layer in model.model.blocks:
                layer.mlp.compile(backend="aot_eager", fullgraph=True)
                layer.post_attention_layernorm.compile(backend="aot_eager", fullgraph=True)
        loss = model(tokens, packing, tokens.roll(-1))
        loss.backward()
        outcomes.append({"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()})
    reference, fused = outcomes
    for name, expected in reference.items():
        assert (fused[name] - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name
