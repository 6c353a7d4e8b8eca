"""What this machine has. Nothing else in the package asks ``torch.cuda`` or reads the processor's flags."""

from __future__ import annotations

import functools
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LIBRARIES = {
    # Threads that sleep while they wait: on a machine shared with other work, spinning ones made generation several
    # times slower (55 s against 6 s, seen once). On an idle machine it was not measured.
    "OMP_WAIT_POLICY": "PASSIVE",
    # oneDNN compiles a product for each shape that it meets and keeps 1,024 of them, in two caches. Micro-batches
    # differ in length, and one linear of one length keeps 1 to 1.5 MB (measured): a gigabyte in a long run. A step
    # needs 40 to 80 of them; to compile one takes 0.2 ms.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}
"""Environment variables that torch's libraries read when they load; ``set_libraries`` sets those that are not set."""
CONTEXT = 0.9e9
"""Bytes of a card that a process takes before it holds anything: context and allocator's slack (not measured)."""
_MATRIX_FLAGS = ("avx512_bf16", "amx_bf16", "avx512f", "avx2")


def set_libraries() -> None:
    """Set what of ``LIBRARIES`` nobody has set; of use before torch computes for the first time."""
    for name, value in LIBRARIES.items():
        os.environ.setdefault(name, value)


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
    flops_fp32: float | None = None
    """The same in fp32, where it was measured; else it is taken to be ``flops``."""
    bandwidth: float | None = None
    """Bytes/s of a pointwise operation that reads and writes main memory, where it was measured."""

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
    """Look at the machine. A CUDA card is used where there is one, otherwise the CPU, whose speed is measured once."""
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
    fp32 = _probe_flops("float32", threads)
    bf16 = any(flag in flags for flag in _MATRIX_FLAGS[:2])
    return Hardware(
        device="cpu",
        name=cpu_name(),
        memory=memory.total,
        free_memory=memory.available,
        bf16=bf16,
        threads=threads,
        instruction_set=instruction_set,
        flops=_probe_flops("bfloat16", threads) if bf16 else fp32,
        flops_fp32=fp32,
        bandwidth=_probe_bandwidth(threads),
    )


def imagined(gigabytes: float) -> Hardware:
    """A recent CUDA card with that much memory, for plans made on another machine. Its speed is not known."""
    size = int(gigabytes * 1e9)
    free = max(0, size - int(CONTEXT))  # what a real card's driver would say once a process has begun on it
    return Hardware(
        device="cuda",
        name=f"a card with {gigabytes:g} GB",
        memory=size,
        free_memory=free,
        bf16=True,
        threads=1,
        instruction_set="",
        flops=None,
    )


def cards() -> list[dict[str, Any]]:
    """Every CUDA card as torch sees it: name, memory in bytes, compute capability."""
    import torch

    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count() if torch.cuda.is_available() else 0))
    return [{"name": one.name, "memory": one.total_memory, "capability": [one.major, one.minor]} for one in found]


def nvidia_driver() -> str:
    """The version of this system's NVIDIA driver; empty where none is loaded."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    return next((word for word in text.split() if word[0].isdigit() and "." in word), "present")


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


@functools.cache
def _probe_flops(dtype_name: str, threads: int) -> float:
    """FLOP/s of a 1024³ matrix product on this CPU, the best of several; takes well under a second."""
    import torch

    a = torch.randn(1024, 1024).to(getattr(torch, dtype_name))
    out = torch.empty_like(a)
    return 2 * 1024**3 / _best(lambda: torch.mm(a, a, out=out))


@functools.cache
def _probe_bandwidth(threads: int) -> float:
    """Bytes/s of a product of two numbers each from main memory, into main memory."""
    import torch

    a = torch.ones(1 << 23)
    out = torch.empty_like(a)
    return 3 * 4 * len(a) / _best(lambda: torch.mul(a, a, out=out))


def _best(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of some repetitions: neighbours on the machine only ever slow one down."""
    import time

    found = list[float]()
    while len(found) < 3 or (len(found) < 12 and sum(found) < 0.15):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


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


def forget_peak() -> bool:
    """Let the peak of memory begin again from what is held now; False where the system cannot."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Peak bytes since ``forget_peak``: allocated on the card, or resident on a machine without one."""
    return memory_in_use() if _on_card() else resident("VmHWM") or memory_in_use()


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process from the kernel's account of it; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def _on_card() -> bool:
    import torch

    return torch.cuda.is_available()


def trim(beyond: int = 0) -> None:
    """Give free memory of the C library's heap back to the system, where the process holds more than ``beyond`` bytes.

    glibc before 2.38 seldom finds an aligned block again that it has freed, and torch asks for nothing else: without
    this a process grows from step to step. Pages that come back anew cost a tenth of a step, so a step does without
    while memory is as planned. Does nothing where the C library is another.
    """
    function = _malloc_trim()
    if function is not None and (not beyond or memory_in_use() > beyond):
        function(0)


@functools.cache
def _malloc_trim() -> Any:
    import ctypes

    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def empty_cache() -> None:
    """Give everything back that nothing refers to, on the card too: after a step that ran out of memory."""
    import gc

    import torch

    gc.collect()
    trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


CODEC = 1
"""The version of the arithmetic in ``kernels/four_bit``; a base packed before it had one was bitsandbytes'."""


def environment(hardware: Hardware, *more: str) -> dict[str, str | int]:
    """What a run's bits depend on besides recipe, data and base (each was measured to change them).

    ``more``: packages that only its form of the base hangs on.
    """
    from importlib.metadata import version

    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", *more)
    return {
        "device": hardware.device,
        "device_name": hardware.name,
        "instruction_set": hardware.instruction_set,
        "threads": hardware.threads,
        "python": platform.python_version(),
        "four_bit_codec": CODEC,
        **{name: version(name) for name in packages},
    }
