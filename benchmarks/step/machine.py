"""Describe the machine of a measurement: processor, GPU, versions, commit. No names of machines or folders."""

from __future__ import annotations

import torch

from ..preprocess.machine import machine_facts

_KEPT = ("processor", "cores", "memory_gb", "load_before", "system", "python", "retemper", "commit", "numpy")


def step_machine_facts() -> dict[str, object]:
    """Return the facts for the results file. Call it in the measuring process: querying a GPU's properties uses its
    memory.
    """
    facts: dict[str, object] = {name: value for name, value in machine_facts().items() if name in _KEPT}
    facts["torch"] = torch.__version__
    facts["threads"] = torch.get_num_threads()
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        pass
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts["gpu"] = properties.name
        facts["gpu_memory_gb"] = round(properties.total_memory / 1e9, 1)
        facts["gpus_seen"] = torch.cuda.device_count()
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
    facts["fp32_matmul_precision"] = torch.get_float32_matmul_precision()
    return facts
