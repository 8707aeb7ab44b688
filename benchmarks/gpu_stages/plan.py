"""Define the stages of both parts of the GPU check: their commands, hard time limits and goals."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from .packages import install_command, wheel_files

PART_SECONDS = {1: 400.0, 2: 360.0}
"""Hard limit of each part. Together with the start of the machine they fit 900 s."""
RESERVE_SECONDS = 6.0
"""Seconds of a part that no stage may use, for the command's own start and its last files. They scale, too."""
Kind = Literal["packages", "ceilings", "tests", "step", "kernels", "profile", "mixture"]


@dataclass(frozen=True)
class Stage:
    """A command with its time limit. It may write ``{name}.json`` in the work folder of the part."""

    name: str
    kind: Kind
    command: list[str]
    limit_seconds: float
    goal: str = ""
    checks: bool = False
    """True if its failure means an error of correctness."""
    is_fixed: bool = False
    """False if it may also use the time that stages before it left."""
    baseline: Path | None = None
    """Report of an earlier stage, whose tokens/s are compared with this one's."""
    benign_codes: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Setting:
    """What the commands of the stages depend on."""

    work: Path
    """Folder of the check; each part has a folder in it, with the outputs of its stages."""
    wheels: Path | None
    """Folder of the wheels to install; None: nothing is missing."""
    rehearse: bool = False
    """True for tiny sizes on a CPU."""
    scale: float = 1.0
    """Factor of all time limits."""


MODEL = {
    "0.5b": [
        *("--model", "qwen2.5-0.5b", "--batch", "4", "--sequence", "4096", "--precision", "bf16"),
        *("--warmup", "6", "--steps", "30"),
    ],
    "7b": [
        *("--model", "qwen2.5-7b", "--batch", "2", "--sequence", "4096", "--precision", "bf16-states"),
        *("--warmup", "3", "--steps", "8"),
    ],
}
"""Options of peers.py. The states of 7B are bf16, because fp32 states do not fit on one GPU."""
TINY_MODEL = ["--layers=2", "--hidden=64", "--vocab=300", "--batch=2", "--sequence=32", "--warmup=1", "--steps=2"]
TINY_MODEL += ["--threads=1"]
TOKENS_PER_SECOND = {"0.5b": 125_000.0, "7b": 13_500.0}
TIMES_AS_FAST = 1.2
"""Goal for tokens/s, as a multiple of the best peer's."""
CROSS_ENTROPY_MS = {"8192 x 896 x 151936": 10.5, "8192 x 3584 x 152064": 37.0}
ATTENTION_CASES = ["4 x 4096, 14/2 heads of 64", "2 x 4096, 28/4 heads of 128"]
TINY_CASES = {"linear_cross_entropy": ["33 x 16 x 131"], "attention": ["2 x 32, 4/2 heads of 16, documents of about 9"]}
CROSS_ENTROPY_PROVIDERS = [
    *("retemper", "retemper, triton"),
    *("Liger", "Liger, fp32 accumulation", "CCE, exact", "torch eager"),
]
ATTENTION_PROVIDERS = [
    *("retemper", "retemper, varlen", "retemper, sdpa"),
    *("torch SDPA", "torch SDPA, cuDNN", "torch SDPA, flash", "torch varlen_attn"),
]
TESTS = [
    "tests/kernels/test_linear_cross_entropy_triton.py",
    "tests/kernels/test_cross_entropy_products.py",
    "tests/test_step.py::test_a_step_on_a_gpu_does_not_wait[overrides0]",
    "tests/kernels/test_attention_gpu.py",
    "tests/kernels/test_mixture_gpu.py",
]
"""Tests of the correctness stage, which take about a minute."""
TEST_MARKS = "gpu and not slow"
"""``pytest -m``: selects from them."""
LEFT_OUT_TESTS = {
    "tests/parallel/test_float8.py": "needs torchao",
    "tests/tools/planning/test_plan.py": "takes minutes of processor time for the memory that a plan predicts",
}
"""Other files with tests for a GPU, and why the check has no time for them: ``pytest -m gpu FILE`` runs one."""


def stages(part: int, setting: Setting) -> list[Stage]:
    """Return the stages of a part, the most valuable first."""
    found = _first_part(setting) if part == 1 else _second_part(setting)
    if setting.wheels is not None:
        command = install_command(wheel_files(setting.wheels), site_folder(setting.work))
        found = [Stage("packages", "packages", command, 8, is_fixed=True), *found]
    return [replace(stage, limit_seconds=stage.limit_seconds * setting.scale) for stage in found]


def part_folder(work: Path, part: int) -> Path:
    """Return the folder of a part's outputs."""
    return work / f"part{part}"


def site_folder(work: Path) -> Path:
    """Return the folder in which the carried packages are installed."""
    return work / "site"


@dataclass(frozen=True)
class _Stages:
    """Builds the stages of one part."""

    part: int
    setting: Setting
    python: str = field(default=sys.executable)

    def ceilings(self, limit: float) -> Stage:
        seconds = "0.01" if self.setting.rehearse else "1"
        command = [self.python, "benchmarks/hardware_limits.py", *self._device(), "--seconds", seconds]
        command += self._json("ceilings")
        return Stage("ceilings", "ceilings", command, limit, "790 TFLOP/s, 4.3 TB/s", is_fixed=True)

    def correctness(self, limit: float) -> Stage:
        # -vv: the configured -q takes one away, and a run that is cut off must have named what passed.
        command = [self.python, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "--timeout=60"]
        command += ["-m", TEST_MARKS, *TESTS]
        # Most of the time is compilation on the host, so several processes share the tests.
        command += ["-n", "2" if self.setting.rehearse else "6", "--dist", "worksteal"]
        # 5: no test was left. Without a GPU all are skipped, which is no failure.
        codes = (0, 5) if self.setting.rehearse else (0,)
        return Stage("correctness", "tests", command, limit, "all pass", True, is_fixed=True, benign_codes=codes)

    def ours(self, model: str, limit: float) -> Stage:
        command = self._peers(model, model, "--engines", "retemper")
        return Stage(model, "step", command, limit, f"{TOKENS_PER_SECOND[model]:,.0f} tokens/s", checks=True)

    def varlen(self, model: str, limit: float) -> Stage:
        backend = "per_document" if self.setting.rehearse else "varlen"
        return self._variant(f"{model}-varlen", model, f'training.attention_backend="{backend}"', "at most", limit)

    def fused(self, model: str, limit: float) -> Stage:
        """Return the measurement that decides the default of ``training.fuse_projections``."""
        return self._variant(f"{model}-fused", model, "training.fuse_projections=true", "at least", limit)

    def again(self, model: str, limit: float) -> Stage:
        """Return the first part's measurement of a model again, which shows the drift of the machine."""
        command, baseline = self._peers(f"{model}-again", model, "--engines", "retemper"), self._report(1, model)
        return Stage(f"{model}-again", "step", command, limit, "as in part 1", checks=True, baseline=baseline)

    def peer(self, engine: str, model: str, limit: float) -> Stage:
        name = f"{model}-{engine}"
        options = ["--engines", engine, "--recompute", "auto", "--compare", str(self._report(self.part, model))]
        command = self._peers(name, model, *options)
        goal = f"ours at least {1 if engine.startswith('retemper') else TIMES_AS_FAST:g} x"
        return Stage(name, "step", command, limit, goal)

    def profile(self, name: str, limit: float, *options: str) -> Stage:
        command = [self.python, "tools/benchmark.py", "--config", "megatron_configs/qwen2.5_0.5b.yaml"]
        command += ["--training.global_batch_size", "4", "--steps", "5", "--warmup-steps", "4", "--matmul-seconds", "0"]
        command += ["--profile", str(part_folder(self.setting.work, self.part) / name), *self._json(name), *options]
        if self.setting.rehearse:
            small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
            small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
            command += [word for key, value in small.items() for word in (f"--model.architecture.{key}", str(value))]
            command += ["--training.sequence_length", "32", "--device", "cpu"]
        return Stage(name, "profile", command, limit, "names the next cost")

    def kernels(self, kernel: str, cases: list[str], providers: list[str], limit: float, goal: str = "") -> Stage:
        command = [self.python, "tools/benchmark_kernels.py", *self._device(), "--kernels", kernel, "--no-compile"]
        if self.setting.rehearse:
            command += ["--sizes", "tiny", "--seconds", "0", "--cases", *TINY_CASES[kernel]]
        else:
            command += ["--sizes", "qwen2.5", "--seconds", "0.5", "--cases", *cases]
        command += ["--providers", *providers, *self._json(kernel)]
        command += ["--time-limit", "{seconds}"]  # starts no further case then
        return Stage(kernel, "kernels", command, limit, goal, checks=True)

    def mixture(self, limit: float) -> Stage:
        """Return the comparison of a layer of Qwen3-30B-A3B with the module of transformers."""
        sizes = (16, 32, 4, 2, 16) if self.setting.rehearse else (16_384, 2048, 128, 8, 768)
        names = ("--tokens", "--hidden", "--experts", "--per-token", "--width")
        command = [self.python, "benchmarks/mixture.py", "--dtype", "bf16", *self._json("mixture")]
        command += [word for name, size in zip(names, sizes, strict=True) for word in (name, str(size))]
        return Stage("mixture", "mixture", command, limit, "ours at least 1 x transformers' default")

    def _variant(self, name: str, model: str, setting: str, goal: str, limit: float) -> Stage:
        """Return our step with another setting, compared with the default one of the same part."""
        command = self._peers(name, model, "--engines", "retemper", "--ours", setting)
        baseline = self._report(self.part, model)
        return Stage(name, "step", command, limit, f"{goal} 1 x {model}", checks=True, baseline=baseline)

    def _peers(self, name: str, model: str, *options: str) -> list[str]:
        command = [self.python, "benchmarks/peers.py", *self._device(), *self._json(name)]
        # Ended by the command itself, an engine's last words are in the report. The runner knows the seconds.
        command += ["--total-time", "{seconds}", *(TINY_MODEL if self.setting.rehearse else MODEL[model])]
        return [*command, *options]

    def _device(self) -> list[str]:
        return ["--device", "cpu" if self.setting.rehearse else "cuda"]

    def _json(self, name: str) -> list[str]:
        return ["--json", str(self._report(self.part, name))]

    def _report(self, part: int, name: str) -> Path:
        return part_folder(self.setting.work, part) / f"{name}.json"


def _first_part(setting: Setting) -> list[Stage]:
    make = _Stages(1, setting)
    goal = " and ".join(f"{milliseconds:g}" for milliseconds in CROSS_ENTROPY_MS.values()) + " ms"
    return [
        make.ceilings(16),
        make.correctness(75),
        make.ours("0.5b", 60),
        make.varlen("0.5b", 38),
        make.profile("0.5b-profile", 35),
        make.peer("trainer+liger", "0.5b", 40),
        make.kernels("linear_cross_entropy", list(CROSS_ENTROPY_MS), CROSS_ENTROPY_PROVIDERS, 55, goal),
        make.peer("trainer+regional", "0.5b", 40),
        make.fused("0.5b", 26),
    ]


def _second_part(setting: Setting) -> list[Stage]:
    make = _Stages(2, setting)
    return [
        make.ours("7b", 75),
        make.peer("trainer+liger", "7b", 62),
        make.varlen("7b", 42),
        make.peer("retemper+fsdp", "7b", 44),
        make.kernels("attention", ATTENTION_CASES, ATTENTION_PROVIDERS, 45, "the default is the fastest"),
        make.mixture(19),
        make.again("0.5b", 38),
        make.peer("trainer+regional", "7b", 20),
    ]
