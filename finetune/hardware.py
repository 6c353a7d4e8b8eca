"""What this machine has. Nothing else in the package asks ``torch.cuda`` or reads the processor's flags."""

from __future__ import annotations

import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_MATRIX_FLAGS = ("avx512_bf16", "amx_bf16", "avx512f", "avx2")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One machine: the device that trains, its memory in bytes, and what its bits depend on."""

    device: str
    name: str
    memory: int
    free_memory: int
    bf16: bool
    threads: int
    instruction_set: str
    flops: float | None
    """Dense FLOP/s that matrix products reach in practice; None for a card that is not in the table."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Sustained dense bf16/fp16 TFLOP/s, a cautious share (about 80 %) of the makers' data sheets.
_CARD_TFLOPS = {
    "H200": 790,
    "H100": 750,
    "A100": 250,
    "L40S": 280,
    "L4": 90,
    "A10": 95,
    "RTX 4090": 140,
    "RTX 3090": 60,
    "V100": 95,
    "T4": 40,
}


def detect() -> Hardware:
    """Look at the machine once. A CUDA card is used where there is one, otherwise the CPU."""
    import psutil
    import torch

    flags = cpu_flags()
    instruction_set = "+".join([torch.backends.cpu.get_cpu_capability(), *[f for f in _MATRIX_FLAGS[:2] if f in flags]])
    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        tflops = next((value for key, value in _CARD_TFLOPS.items() if key in name), None)
        return Hardware(
            device="cuda",
            name=name,
            memory=total,
            free_memory=free,
            bf16=torch.cuda.get_device_capability() >= (8, 0),
            threads=threads,
            instruction_set=instruction_set,
            flops=tflops * 1e12 if tflops else None,
        )
    memory = psutil.virtual_memory()
    return Hardware(
        device="cpu",
        name=cpu_name(),
        memory=memory.total,
        free_memory=memory.available,
        bf16=any(flag in flags for flag in _MATRIX_FLAGS[:2]),
        threads=threads,
        instruction_set=instruction_set,
        flops=_probe_flops("bfloat16" if any(flag in flags for flag in _MATRIX_FLAGS[:2]) else "float32"),
    )


def imagined(gigabytes: float) -> Hardware:
    """A recent CUDA card with that much memory, for plans made on another machine. Its speed is not known."""
    size = int(gigabytes * 1e9)
    return Hardware(
        device="cuda",
        name=f"a card with {gigabytes:g} GB",
        memory=size,
        free_memory=size,
        bf16=True,
        threads=1,
        instruction_set="",
        flops=None,
    )


def cpu_flags() -> frozenset[str]:
    return frozenset(_cpuinfo("flags").split())


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _probe_flops(dtype_name: str) -> float:
    """FLOP/s of a 1024³ matrix product on this CPU, best of three; takes well under a second."""
    import time

    import torch

    a = torch.randn(1024, 1024).to(getattr(torch, dtype_name))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def free_disk(path: Path) -> int:
    """Free bytes where ``path`` is or would be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def memory_in_use() -> int:
    """Peak bytes so far: allocated on the card, or resident on a machine without one."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


CODEC = 1
"""The version of the arithmetic in ``kernels/four_bit``; a base packed before it had one was bitsandbytes'."""


def environment(hardware: Hardware) -> dict[str, str | int]:
    """What a run's bits depend on besides recipe, data and base (each was measured to change them)."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors")
    return {
        "device": hardware.device,
        "device_name": hardware.name,
        "instruction_set": hardware.instruction_set,
        "threads": hardware.threads,
        "python": platform.python_version(),
        "four_bit_codec": CODEC,
        **{name: version(name) for name in packages},
    }
