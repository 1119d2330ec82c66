"""A description of the machine for benchmark results."""

import os
import platform
import re
from pathlib import Path

import torch


def machine() -> str:
    """The number of cores that this process may use, the processor and the GPU."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    return f"{cores} cores, {model[1] if model else platform.machine()}, {gpu}"
