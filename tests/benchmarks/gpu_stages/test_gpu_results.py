"""The figures that the table of the GPU check shows, from reports as the commands write them."""

from __future__ import annotations

import pytest

from retemper.benchmarks.gpu_stages.results import headline, outcomes, problem, step_rate

ENGINE = {"engine": "retemper", "rate": 126_012.4, "peak_bytes": 98 * 2**30, "recompute": "none"}
ENGINE["runs"] = [{"step_seconds": [0.1301, 0.128, 0.1333]}]
PEER = {**ENGINE, "engine": "trainer+liger", "recompute": "full", "ours_times_as_fast": 1.234}

PLAIN = """
tests/kernels/test_loss.py::test_equals_float64[16-16-32] PASSED         [ 33%]
tests/kernels/test_attention_gpu.py::test_values[dtype0-one document-auto] FAILED [ 66%]
tests/test_step.py::test_a_step_on_a_gpu_does_not_wait[overrides0] SKIPPED (needs a CUDA GPU) [100%]
tests/test_step.py::test_that_was_running_when_the_time_was_over[a b]
"""
PARALLEL = """
tests/kernels/test_loss.py::test_equals_float64[16-16-32]
[gw0] [ 33%] PASSED tests/kernels/test_loss.py::test_equals_float64[16-16-32]
tests/kernels/test_attention_gpu.py::test_values[dtype0-one document-auto]
[gw1] [ 66%] FAILED tests/kernels/test_attention_gpu.py::test_values[dtype0-one document-auto]
[gw2] [100%] SKIPPED tests/test_step.py::test_a_step_on_a_gpu_does_not_wait[overrides0]
tests/test_step.py::test_that_was_running_when_the_time_was_over[a b]
"""


@pytest.mark.parametrize("log", [PLAIN, PARALLEL])
def test_a_log_that_was_cut_off_says_what_passed(log):
    assert outcomes(log) == {
        "tests/kernels/test_loss.py::test_equals_float64[16-16-32]": "PASSED",
        "tests/kernels/test_attention_gpu.py::test_values[dtype0-one document-auto]": "FAILED",
        "tests/test_step.py::test_a_step_on_a_gpu_does_not_wait[overrides0]": "SKIPPED",
    }
    assert headline("tests", None, log) == "1 failed, 1 passed, 1 skipped"
    assert problem("tests", None, log) == (
        "failed: tests/kernels/test_attention_gpu.py::test_values[dtype0-one document-auto]"
    )
    assert problem("tests", None, log.replace("FAILED", "PASSED")) is None


def test_engines():
    report = {"settings": {"missing": {"litgpt": "litgpt is not installed"}}, "rows": [ENGINE, PEER]}
    assert headline("step", report, "") == (
        "126,012 tokens/s (128.0 to 133.3 ms), 98.0 GiB, recomputation none; "
        "126,012 tokens/s (128.0 to 133.3 ms), 98.0 GiB, recomputation full, ours 1.23 x; "
        "litgpt: litgpt is not installed"
    )
    assert problem("step", report, "") is None and step_rate(report) == ENGINE["rate"]
    report["rows"] = [{"engine": "retemper", "problem": "CUDA out of memory"}]
    assert problem("step", report, "") == "retemper: CUDA out of memory" and step_rate(report) is None
    assert headline("step", report, "") == "CUDA out of memory; litgpt: litgpt is not installed"
    # A peer whose first measurement of ours is missing.
    report["rows"] = [{**PEER, "ours_times_as_fast": None}]
    del report["rows"][0]["ours_times_as_fast"]
    assert headline("step", report, "").startswith("126,012 tokens/s")


def test_kernels():
    row = {"case": "8192 x 896", "provider": "retemper", "milliseconds": 10.44, "wrong": False}
    failed = {**row, "provider": "Liger", "milliseconds": None}
    report = {"rows": [row, failed, {**row, "provider": "CCE, exact", "milliseconds": 15.0}]}
    assert headline("kernels", report, "") == "8192 x 896: retemper 10.4, CCE, exact 15 ms"
    assert problem("kernels", report, "") is None
    report["rows"][0]["wrong"] = True
    assert problem("kernels", report, "") == "outside the bounds of correctness: 8192 x 896: retemper"


def test_ceilings_and_profile():
    report = {"rows": [{"flops_per_second": 7.9e14}], "summary": {"copy_bytes_per_second": 4.3e12}}
    assert headline("ceilings", report, "") == "790 TFLOP/s, 4.3 TB/s"
    profile = {"summary": {"breakdown_seconds": {"forward": 0.0412, "backward": 0.0799}}}
    assert headline("profile", profile, "") == "forward 41.2, backward 79.9 ms"
    assert headline("packages", None, "") == "" == headline("step", None, "")
