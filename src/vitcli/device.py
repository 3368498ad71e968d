"""What the machine is and what is fast on it: device, precision, memory allocator."""

import contextlib
import ctypes
import math
import platform
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vitcli.errors import ConfigError

__all__ = [
    "AUTOCAST",
    "bf16_speedup",
    "choose_device",
    "choose_precision",
    "flops_per_second",
    "hardware",
    "keep_freed_memory",
    "memory_bytes",
]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # what a forward pass computes in, by train.precision

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Ask glibc to keep freed blocks in the process.

    By default every tensor above 128 KiB is mapped and unmapped anew, and a training step on the CPU spends much of its time
    in page faults. Does nothing where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and platform.libc_ver()[0] == "glibc":
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest value glibc takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 64 << 20)


def choose_device(wanted: str) -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda`; on a GPU, see to it that float32 is float32.

    Raises:
        ConfigError: `cuda` is asked for and torch sees no GPU.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but torch sees no GPU here; use auto or cpu")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        # By default torch rounds what convolutions read to TF32, and what matrix products read not: a ResNet and a Transformer
        # in "float32" would be compared in two precisions. Who wants speed takes bf16.
        cudnn: Any = torch.backends.cudnn  # which the stubs know less of
        cudnn.conv.fp32_precision = "ieee"
    return torch.device(wanted)


def choose_precision(wanted: str, device: torch.device, *, width: int) -> str:
    """Return `float32` or `bf16` for `auto`: bf16 on a GPU that has it, and on a CPU where a short measurement finds it faster.

    The run keeps the outcome.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"

    # bf16 also costs casts and slower element-wise kernels, so a product must win clearly before a step does
    return "bf16" if bf16_speedup(width) > 1 / 0.6 else "float32"


@cache  # one answer for all runs that a process plans: they are compared with each other
def bf16_speedup(width: int) -> float:
    """Return how many times faster than in float32 this CPU makes the product of an MLP of `width`; takes 0.1 s or less."""
    pairs = {
        dtype: (torch.ones(2048, width, dtype=dtype), torch.ones(width, 4 * width, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(pairs, math.inf)
    for _ in range(5):  # in turn, and the best of each: what else the machine does slows single ones
        for dtype, (a, b) in pairs.items():
            start = time.perf_counter()
            a @ b
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]


def flops_per_second(device: torch.device) -> float:
    """Return a cautious guess of sustained training speed, FLOP/s of a small model; for planning only."""
    return 50e12 if device.type == "cuda" else 20e9 * (torch.get_num_threads() or 1)


def memory_bytes(device: torch.device) -> int | None:
    """Return the memory that training may use: free GPU memory, or what the operating system calls available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = []
    with contextlib.suppress(OSError, StopIteration):  # what can be had without swapping: the page cache counts as free
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" where there is none
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=None)


def hardware(device: torch.device) -> str:
    """Describe the device in a few words, for manifests and tables."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), name
        )
    return f"{name}, {torch.get_num_threads()} threads"
