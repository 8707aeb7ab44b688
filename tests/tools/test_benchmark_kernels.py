"""tools/benchmark_kernels.py: its references against torch's own float64, its verdicts on kernels that are wrong, and
the command on tiny sizes. Its figures are not looked at."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from retemper.engine.errors import UserError
from retemper.tools import benchmark_kernels
from retemper.tools.kernel_benchmark import cases as cases_module
from retemper.tools.kernel_benchmark.cases import KERNELS, cases
from retemper.tools.kernel_benchmark.measure import Settings, measure_case, run_once
from retemper.tools.kernel_benchmark.providers import OURS, Provider

CPU = torch.device("cpu")
TINY = {f"{case.kernel}: {case.name}": case for case in cases("tiny")}
SETTINGS = Settings(CPU, torch.float32, seconds=0.0, least_calls=1, most_calls=1)
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
        (overwriting, "writes over its input up"),
        (lambda x: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["output", "gradient", "no gradient", "unwritten", "overwritten", "failing"],
)
def test_a_wrong_kernel_is_found(function, said):
    (result,) = measure_case(broken(function), SETTINGS)
    assert result.wrong and said in result.problem


def test_a_result_that_changes_is_told():
    (result,) = measure_case(broken(lambda x: (F.silu(x["gate"]) * x["up"] * (1 + 1e-7 * torch.rand(())),)), SETTINGS)
    assert result.same_bits is False and not result.wrong


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


def test_issue_sizes_are_there():
    names = {case.name for case in cases("issue")}
    assert {"8192 x 896 x 151936", "8192 x 3584 x 152064"} <= names
    assert {case.kernel for case in cases("issue")} == set(KERNELS)


def test_command(tmp_path, capsys):
    json_path, plot_path = tmp_path / "kernels.json", tmp_path / "kernels.png"
    options = ["--sizes", "tiny", "--kernels", "swiglu,rope", "--seconds", "0", "--no-compile", "--device", "cpu"]
    benchmark_kernels.main([*options, "--json", str(json_path), "--plot", str(plot_path)])
    printed = capsys.readouterr().out
    assert "swiglu: 33 x 24" in printed and "| retemper, torch |" in printed
    record = json.loads(json_path.read_text())
    assert {result["kernel"] for result in record["results"]} == {"swiglu", "rope"}
    assert record["machine"]["versions"]["torch"]
    assert plot_path.read_bytes().startswith(b"\x89PNG")


def test_command_names_what_it_did_not_do(capsys):
    benchmark_kernels.main(["--sizes", "tiny", "--kernels", "swiglu", "--time-limit", "-1", "--device", "cpu"])
    assert "not measured, no time left: swiglu: 33 x 24" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kernels", "swiglu,softmax"], "--kernels softmax"),
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


def test_a_wrong_kernel_fails_the_command(monkeypatch):
    case = broken(lambda x: (F.silu(x["gate"]) * x["up"] * 1.001,))
    monkeypatch.setattr(benchmark_kernels, "cases", lambda sizes: [case])
    with pytest.raises(UserError, match="outside the bounds of correctness: swiglu 33 x 24 broken"):
        benchmark_kernels.main(["--device", "cpu"])
