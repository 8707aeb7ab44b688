"""``training.precision: auto``: which hardware computes bf16 natively, and that all ranks decide alike."""

from types import SimpleNamespace

import pytest
import torch

from retemper.engine.config.settings import RunConfig
from retemper.engine.parallel import precision
from retemper.engine.parallel.precision import choose_precision, native_bf16, with_named_precision
from retemper.engine.parallel.process_group import Ranks

CPU = torch.device("cpu")


class OtherRanks(Ranks):
    """One rank that hears of others."""

    others: tuple = ()

    def all_gather(self, value):
        return [value, *self.others]


def ranks(*others) -> Ranks:
    found = OtherRanks(0, 1 + len(others), CPU)
    object.__setattr__(found, "others", others)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: Xeon 4\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile\n", "AVX512-BF16 and AMX-BF16"),
        ("flags\t\t: fpu avx512f avx512_bf16 avx512_vnni\n", "AVX512-BF16"),
        ("processor\t: 0\nFeatures\t: fp asimd i8mm bf16 sve\n", "Arm BF16"),
        ("flags\t\t: fpu avx2 avx512f avx512bw avx512_vnni\n", None),
        ("Features\t: fp asimd\n", None),
        ("", None),
    ],
)
def test_cpus(text, expected, tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text(text)
    monkeypatch.setattr(precision, "_CPU_INFO", info)
    assert native_bf16(CPU) == (expected and f"this CPU has {expected}")
    chosen = choose_precision("auto", ranks())
    assert chosen.name == ("bf16" if expected else "fp32")
    assert (expected or "the CPU has no native bf16") in chosen.reason
    assert choose_precision("fp32", ranks()) == precision.Precision("fp32", "as set")
    asked = choose_precision("bf16", ranks())
    assert asked.name == "bf16" and ("computes it slowly" in asked.reason) == (expected is None)


def test_a_machine_without_cpuinfo_takes_fp32(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "_CPU_INFO", tmp_path / "absent")
    assert choose_precision("auto", ranks()).name == "fp32"


def test_this_machine_as_pytorch_sees_it():
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("architecture") != "x86_64":
        pytest.skip("PyTorch does not list this CPU's capabilities")
    assert bool(native_bf16(CPU)) == (capabilities["avx512_bf16"] or capabilities["amx_bf16"])


@pytest.mark.parametrize(
    ("supported", "weights", "expected"),
    [(True, "fp32", "bf16"), (True, "bf16", "bf16"), (False, "fp32", "fp16"), (False, "bf16", "fp32")],
)
def test_gpus(supported, weights, expected, monkeypatch):
    """Older ones emulate bf16, which PyTorch counts as supported unless asked. They take fp16, with fp32
    weights only."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or supported
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    on_gpu = Ranks(0, 1, torch.device("cuda", 0))
    assert choose_precision("auto", on_gpu, weights).name == expected


def test_one_rank_without_bf16_makes_all_take_fp32(monkeypatch):
    monkeypatch.setattr(precision, "native_bf16", lambda device: "this CPU has it")
    assert choose_precision("auto", ranks("this CPU has it")).name == "bf16"
    chosen = choose_precision("auto", ranks("this CPU has it", None))
    assert chosen == precision.Precision("fp32", "auto: the CPU of rank 2 has no native bf16")


def test_what_is_set_is_kept():
    config = RunConfig("x", data=SimpleNamespace(), training=SimpleNamespace(precision="fp32"))
    assert with_named_precision(config, "bf16") is config
