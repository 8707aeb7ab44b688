"""tools/benchmark_kernels.py: its references against torch's own float64, its verdicts on kernels that are wrong, and
the command on tiny sizes. Its figures are not looked at."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
import torch.nn.functional as F

from retemper.benchmarks.kernel import cases as cases_module
from retemper.benchmarks.kernel import command, providers
from retemper.benchmarks.kernel.cases import cases
from retemper.benchmarks.kernel.chunked_loss import chunked_cross_entropy
from retemper.benchmarks.kernel.measure import KernelBenchmarkOptions, measure_case, run_once
from retemper.benchmarks.kernel.names import KERNELS
from retemper.benchmarks.kernel.providers import OURS, Provider
from retemper.engine.errors import UserError
from retemper.kernels.attention import BACKENDS
from retemper.tools import benchmark_kernels

CPU = torch.device("cpu")
TINY = {f"{case.kernel}: {case.name}": case for case in cases("tiny")}
SETTINGS = KernelBenchmarkOptions(CPU, torch.float32, seconds=0.0, least_calls=1, most_calls=1)
# Each kernel by PyTorch's own operators, none of which the references use.
ORACLES = {
    "linear_cross_entropy": lambda x: (F.cross_entropy(F.linear(x["x"], x["weight"]), x["targets"]),),
    "rms_norm": lambda x: (
        (F.rms_norm(x["x"] + x["residual"], (24,), x["weight"], 1e-6), x["x"] + x["residual"])
        if "residual" in x
        else (F.rms_norm(x["x"], (24,), x["weight"], 1e-6),)
    ),
    "swiglu": lambda x: (F.silu(x["gate"]) * x["up"],),
}


def attention_oracle(x):
    """One masked attention over all tokens, where the mask keeps documents apart."""
    document = torch.repeat_interleave(torch.arange(len(x["cu_seqlens"]) - 1), x["cu_seqlens"].diff())
    mask = (document[:, None] == document[None, :]).tril()
    q, k, v = (x[name].transpose(0, 1)[None] for name in "qkv")
    return (F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1),)


def rope_oracle(x):
    """transformers' rotation."""
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    q, k = (x[name].transpose(0, 1)[None] for name in "qk")
    q, k = apply_rotary_pos_emb(q, k, x["cos"][None], x["sin"][None])
    return q[0].transpose(0, 1), k[0].transpose(0, 1)


ORACLES |= {"attention": attention_oracle, "rope": rope_oracle}


@pytest.mark.parametrize("name", TINY)
def test_references_are_what_torch_computes_in_float64(name):
    case = TINY[name]
    inputs = {
        key: x.double() if x.is_floating_point() else x for key, x in case.make_inputs(CPU, torch.float32).items()
    }
    oracle = ORACLES[case.kernel]
    gradients = tuple(None if out.ndim == 0 else torch.randn_like(out) for out in oracle(inputs))
    reference = case.reference(inputs, gradients)
    outputs, found = run_once(oracle, inputs, gradients, case.leaves)
    expected = dict(zip([*case.outputs, *(f"d{leaf}" for leaf in case.leaves)], [*outputs, *found], strict=True))
    assert reference.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(reference[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", TINY)
def test_ours_is_measured_and_right(name):
    results = measure_case(TINY[name], SETTINGS, compiled=False)
    ours = [result for result in results if result.is_ours and result.milliseconds is not None]
    assert ours
    for result in ours:
        assert not result.wrong and result.problem is None and result.same_bits
        assert set(result.errors) == {*TINY[name].outputs, *(f"d{leaf}" for leaf in TINY[name].leaves)}
        assert max(result.errors.values()) < 1e-5
    assert results[0].again_milliseconds is not None


def broken(function):
    case = next(case for case in TINY.values() if case.kernel == "swiglu")
    return dataclasses.replace(case, providers={"broken": Provider(lambda _: function, OURS)})


def unwritten(x):
    output = torch.empty_like(x["gate"])
    right = F.silu(x["gate"]) * x["up"]
    output[:-1] = right.detach()[:-1]
    # The gradients are right, one row of the output is whatever was there.
    return (right + (output - right.detach()),)


def overwriting(x):
    output = F.silu(x["gate"]) * x["up"]
    with torch.no_grad():
        x["up"].data.mul_(1.0).add_(0.5)
    return (output,)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: (F.silu(x["gate"]) * x["up"] * 1.001,), "outside its bounds: output 1.0e-03"),
        (lambda x: (F.silu(x["gate"]) * x["up"].detach() + 0 * x["up"],), "outside its bounds: dup"),
        (lambda x: (F.silu(x["gate"]) * x["up"].detach(),), "up got no gradient"),
        (unwritten, "results hold NaN"),
        (overwriting, "overwrites its input up"),
        (lambda x: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["output", "gradient", "no gradient", "unwritten", "overwritten", "failing"],
)
def test_a_wrong_kernel_is_found(function, said):
    (result,) = measure_case(broken(function), SETTINGS)
    assert result.wrong and said in result.problem


def test_a_result_that_changes_is_told():
    factors = itertools.cycle([1.0, 1.000001])
    (result,) = measure_case(broken(lambda x: (F.silu(x["gate"]) * x["up"] * next(factors),)), SETTINGS)
    assert result.same_bits is False and not result.wrong


@pytest.mark.parametrize(
    ("case", "runs"),
    [
        (cases_module.attention(24, 2, 4, 2, 16, mean_document=9), {"per_document"}),
        (cases_module.attention(24, 2, 4, 2, 16), {"per_document", "sdpa"}),
    ],
    ids=["documents", "equal lengths"],
)
def test_each_attention_backend_is_measured_or_says_why_not(case, runs):
    results = {result.provider: result for result in measure_case(case, SETTINGS)}
    for backend in BACKENDS:
        result = results[f"retemper, {backend}"]
        if backend in runs:
            assert result.problem is None and result.milliseconds is not None and result.peak_bytes is not None
            assert set(result.errors) == {"output", "dq", "dk", "dv"} and max(result.errors.values()) < 1e-5
        else:
            assert result.milliseconds is None and not result.wrong
            assert f"attention by {backend} " in result.problem
    assert results["retemper"].detail.partition(":")[0] in runs


def test_a_backend_that_is_wrong_is_found(monkeypatch):
    right = providers.attention
    monkeypatch.setattr(providers, "attention", lambda *args, plan: right(*args, plan=plan) * 1.001)
    (case,) = (case for case in TINY.values() if case.kernel == "attention")
    results = {result.provider: result for result in measure_case(case, SETTINGS)}
    assert results["retemper, per_document"].wrong and not results["retemper, varlen"].wrong


def test_what_is_chosen_for_the_process_is_chosen_by_each_provider_anew(monkeypatch):
    chosen, timed = [], []

    def choosing(name):
        def build(_):
            chosen.append(name)
            return lambda x: timed.append((name, chosen[-1])) or (F.silu(x["gate"]) * x["up"],)

        return build

    case = next(case for case in TINY.values() if case.kernel == "swiglu")
    case = dataclasses.replace(case, providers={name: Provider(choosing(name)) for name in ("first", "second")})
    first, _ = measure_case(case, SETTINGS)
    assert first.again_milliseconds is not None and timed[-1] == ("first", "first")
    assert all(name == choice for name, choice in timed)
    # PyTorch's attention is timed with PyTorch's kernels, whatever a backend of ours has put in their place.
    monkeypatch.setattr(providers, "use_implementation", chosen.append)
    case = cases_module.attention(8, 2, 4, 2, 16)
    for name in ("torch SDPA", "retemper", "retemper, sdpa", "retemper, per_document"):
        chosen.append(name)
        providers.ATTENTION[name].build(case.make_inputs(CPU, torch.float32))
        assert chosen[-1] is None


@pytest.mark.parametrize("tokens", [3, 33, 64])
def test_the_chunked_loss_beside_ours_is_cross_entropy(tokens):
    generator = torch.Generator().manual_seed(tokens)
    hidden, weight = (torch.randn(rows, 16, generator=generator).requires_grad_() for rows in (tokens, 50))
    targets = torch.randint(50, (tokens,), generator=generator)
    targets[1] = -100
    (3 * chunked_cross_entropy(hidden, weight, targets)).backward()
    found = hidden.grad, weight.grad
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = 3 * F.cross_entropy(hidden @ weight.t(), targets)
    loss.backward()
    for value, expected in zip(found, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        value = chunked_cross_entropy(hidden.float(), weight.float(), targets)
    torch.testing.assert_close(3 * value.double(), loss.detach(), rtol=1e-6, atol=0.0)


def test_figures_are_kept_after_every_case(tmp_path, monkeypatch):
    path, seen = tmp_path / "kernels.json", []

    def watch(case, *_, **__):
        seen.append(len(json.loads(path.read_text())["rows"]) if path.exists() else None)
        return measure_case(case, SETTINGS, compiled=False)

    monkeypatch.setattr(command, "measure_case", watch)
    benchmark_kernels.main(["--sizes", "tiny", "--kernels", "rms_norm", "--device", "cpu", "--json", str(path)])
    assert seen[0] is None and seen[1] > 0


def test_inputs_are_random_and_some_targets_are_ignored():
    for case in TINY.values():
        first, second = (case.make_inputs(CPU, torch.float32) for _ in range(2))
        for leaf in case.leaves:
            assert first[leaf].count_nonzero() == first[leaf].numel()
            assert not torch.equal(first[leaf], second[leaf])
    peaked = cases_module.linear_cross_entropy(2000, 64, 50, logit_std=6.0)
    inputs = peaked.make_inputs(CPU, torch.float32)
    logits = inputs["x"] @ inputs["weight"].t()
    valid = inputs["targets"] != -100
    assert 0.01 < (~valid).float().mean() < 0.1
    assert 5 < logits.std() < 7
    assert 0.5 < (logits.argmax(-1) == inputs["targets"])[valid].float().mean() < 0.7


def test_the_sizes_of_qwen_cover_every_kernel(capsys):
    assert {case.kernel for case in cases("qwen2.5")} == set(KERNELS)
    assert benchmark_kernels.parse_arguments(["--sizes", "issue"]).sizes == "qwen2.5"
    assert "--sizes qwen2.5" in capsys.readouterr().err


def test_command(tmp_path, capsys):
    json_path, plot_path = tmp_path / "kernels.json", tmp_path / "kernels.png"
    options = ["--sizes", "tiny", "--kernels", "swiglu,rope", "--seconds", "0", "--no-compile", "--device", "cpu"]
    benchmark_kernels.main([*options, "--json", str(json_path), "--plot", str(plot_path)])
    printed = capsys.readouterr().out
    assert "swiglu: 33 x 24" in printed and "| retemper " in printed
    record = json.loads(json_path.read_text())
    assert {result["kernel"] for result in record["rows"]} == {"swiglu", "rope"}
    assert record["machine"]["versions"]["torch"]
    assert plot_path.read_bytes().startswith(b"\x89PNG")


def test_command_names_what_it_did_not_do(capsys):
    benchmark_kernels.main(["--sizes", "tiny", "--kernels", "swiglu", "--time-limit", "-1", "--device", "cpu"])
    assert "not measured, no time left: swiglu: 33 x 24" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kernels", "swiglu,softmax"], "--kernels softmax"),
        (["--kernels", "swiglu", "--cases", "33 x 24", "33 x 25"], "--cases '33 x 25': there are '33 x 24'"),
        (["--kernels", "swiglu", "--providers", "mine"], "--providers 'mine': there are 'Liger', 'retemper'"),
        pytest.param(
            ["--device", "cuda"],
            "no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_refusals(options, said):
    with pytest.raises(UserError, match=said):
        benchmark_kernels.main(["--sizes", "tiny", *options])


def test_cases_and_providers_are_selected_by_their_names(tmp_path):
    path = tmp_path / "kernels.json"
    select = ["--cases", "33 x 16 x 131", "--providers", "retemper", "torch eager"]
    benchmark_kernels.main(["--sizes=tiny", "--device=cpu", "--seconds=0", *select, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["kernel"], row["provider"]) for row in rows] == [
        ("linear_cross_entropy", "retemper"),
        ("linear_cross_entropy", "torch eager"),
    ]


def test_a_wrong_kernel_fails_the_command(monkeypatch):
    case = broken(lambda x: (F.silu(x["gate"]) * x["up"] * 1.001,))
    monkeypatch.setattr(command, "cases", lambda sizes: [case])
    with pytest.raises(UserError, match="outside the bounds of correctness: swiglu 33 x 24 broken"):
        benchmark_kernels.main(["--device", "cpu"])
