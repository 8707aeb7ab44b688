"""Packaging of Retemper.

The repository root *is* the package ``retemper`` (docs/architecture.md, "Import names"): ``engine/`` is imported as
``retemper.engine``, ``kernels/`` as ``retemper.kernels``, and no bare top-level name such as ``kernels`` or ``tools``
is taken from anybody.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
ADDRESS = "https://github.com/retemper/retemper"
"""Provisional: the project is not published yet (CONTRIBUTING.md)."""
PACKAGES = ("benchmarks", "checkpoint_convert", "engine", "kernels", "tools")
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "__init__.py").read_text(encoding="utf-8")).group(1)
EXTRAS = {
    "gpu": ["flash-attn>=2.7", "triton>=3.2"],
    "fp8": ["torchao>=0.15"],
    "qlora": ["bitsandbytes>=0.50"],
    "fast": ["fastokens==0.3.5"],  # young: its exactness was checked in this version
    "formats": ["pyarrow>=16", "openpyxl>=3.1", "pypdf[crypto]>=5.0", "lxml>=6.0"],
    "chat": ["jinja2>=3.1.6"],
    "dedup": ["rensa>=0.5,<0.6"],
    "clean": ["ftfy>=6.2,<7", "py3langid>=0.4,<0.5"],
    "tiktoken": ["tiktoken>=0.7"],
    "wandb": ["wandb>=0.27"],
    "mlflow": ["mlflow-skinny>=3.0"],
    "trackio": ["trackio>=0.40"],
    "swanlab": ["swanlab>=0.10"],
    "comet": ["comet-ml>=3.47"],
    "trackers": ["tensorboard>=2.16", "wandb>=0.27", "mlflow-skinny>=3.0", "trackio>=0.40"],
    "prometheus": ["prometheus_client>=0.19"],
    "eval": ["lm-eval[hf]>=0.4.13"],
    "hub": ["hf-xet>=1.1", "datasets>=4"],
    "cloud": ["s3fs>=2024.6", "gcsfs>=2024.6", "aiohttp>=3.9"],
    "datatrove": ["datatrove>=0.10,<1"],
    "demo": ["psutil>=5.9"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6"],
    "benchmarks": ["matplotlib>=3.8", "psutil>=5.9"],
    "dev": [
        "pytest>=8.0",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "datasketch>=1.6",
        "pyte>=0.8.2",  # a terminal, for tests of the console
        "peft>=0.18",  # adapters of tests are compared with it
        "accelerate>=1.0",  # for peft
        "torchao>=0.15",  # 8-bit optimizers and weights are compared with it
        "bitsandbytes>=0.50",  # for adapter.quantize_base
        "kernels",
        "triton>=3.6; sys_platform == 'linux'",
        "ruff>=0.9",
        "mypy>=1.15",
        "types-PyYAML",
    ],
}
# What users of any machine can install: no compiler, no GPU. swanlab and comet limit the versions of other packages.
NOT_IN_ALL = ("gpu", "fp8", "qlora", "docs", "dev", "swanlab", "comet")
EXTRAS["all"] = sorted({each for name in EXTRAS if name not in NOT_IN_ALL for each in EXTRAS[name]})


class BuildPackage(build_py):
    """Leave out this file, which lies in the folder of the package."""

    def find_package_modules(self, package, package_dir):
        """Return the modules of a package as (package, module, path)."""
        return [module for module in super().find_package_modules(package, package_dir) if module[1] != "setup"]


setup(
    name="retemper",
    version=VERSION,
    description="Megatron-style continued pretraining of open language models: fast, exact, honest and simple",
    url=ADDRESS,
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    package_dir={"retemper": "."},
    package_data={"retemper": ["py.typed", "megatron_configs/*.yaml", "launch/*"]},
    cmdclass={"build_py": BuildPackage},
    entry_points={"console_scripts": ["retemper = retemper.tools.cli.main:main"]},
    packages=["retemper"]
    + [f"retemper.{name}" for name in find_packages(str(ROOT), include=[p for r in PACKAGES for p in (r, f"{r}.*")])],
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "transformers>=5.0",
        "tokenizers>=0.21",
        "sentencepiece>=0.2",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "jsonargparse[signatures]>=4.49",
        "PyYAML>=6.0",
        "orjson>=3.10",
        "xxhash>=3.4",
        "zstandard>=0.22",
        "isal>=1.6",
        "tensorboard>=2.16",
        "tqdm>=4.66",
        "shtab>=1.13",
    ],
    extras_require=EXTRAS,
)
