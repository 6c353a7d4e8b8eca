"""What every contestant is handed, and what it hands back.

A job holds the samples already tokenised, in the order of the steps, and the learning rate of every step: no contestant
can differ from another in data, order, loss mask or schedule. This file imports nothing of `finetune`, so that the
peers run without a line of it.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
IGNORED = -100
"""The label of a token that is not trained, as transformers' losses know it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process's work. ``steps`` holds, per optimizer step, that step's samples; ``rates`` its learning rate."""

    recipe: str
    base: str
    weights: str
    double: bool
    compute: str
    lora: dict[str, Any]
    seed: int
    max_grad_norm: float
    skip: int
    rates: list[float]
    steps: list[list[dict[str, list[int]]]]
    """Samples as ``{"ids": […], "labels": […]}``; a label is its own token's id, or ``IGNORED``."""
    result: str
    snapshots: str | None = None
    """A folder for the adapter as it was before each step: written by `finetune`, read by the reference."""
    same_start: bool = True
    """Whether the reference's own adapter must begin with the very numbers of the first snapshot."""
    turns: bool = False
    """Wait for a line of the standard input before each step, so that contestants can take turns."""
    levers: list[str] = field(default_factory=list)
    """Parts of `finetune` that are switched off, to see what each is worth."""

    @staticmethod
    def read(path: str) -> Job:
        return Job(**json.loads(Path(path).read_text()))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    def snapshot(self, step: int) -> Path:
        assert self.snapshots is not None
        return Path(self.snapshots) / f"{step}.safetensors"


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Watch:
    """Times steps end to end (fetching, collating, the step and its logging) and takes the peak of memory over the
    steps that count, so that neither a loader's passing copy of the weights nor the first step's warm-up is in it.
    """

    skip: int
    turns: bool = False
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Real tokens of each step, where a contestant deals the rows in its own way."""
    resident_before: int = 0
    _last: tuple[float, float] = (0.0, 0.0)
    _answers: Any = None

    def __post_init__(self) -> None:
        if self.turns:  # the standard output is the line to the one who asks; what libraries print goes elsewhere
            self._answers = os.fdopen(os.dup(1), "w")
            os.dup2(2, 1)

    def start(self) -> None:
        gc.collect()
        self.resident_before = _status("VmRSS")
        self._wait({"ready": True})

    def lap(self) -> None:
        """One optimizer step is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        self.seconds.append(wall - self._last[0])
        self.cpu_seconds.append(cpu - self._last[1])
        if len(self.seconds) == self.skip:
            _forget_peak()
        self._wait({"seconds": self.seconds[-1]})

    def _wait(self, said: dict[str, Any]) -> None:
        if self.turns:
            self._answers.write(json.dumps(said) + "\n")
            self._answers.flush()
            if not sys.stdin.readline():
                raise SystemExit("told to stop")
        self._last = (time.perf_counter(), time.process_time())

    def finish(self, job: Job, **details: Any) -> None:
        """Write the result file."""
        result = {
            "losses": self.losses,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "tokens": self.tokens,
            "peak_memory": _peak(),
            "resident_before_training": self.resident_before,
            "threads": torch.get_num_threads(),
            **details,
        }
        Path(job.result).write_text(json.dumps(result, allow_nan=False))


def _status(key: str) -> int:
    """Bytes from the kernel's account of this process; 0 where there is none."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _forget_peak() -> None:
    """Let the peak of memory begin again from what is held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def refuse_repacked(model: torch.nn.Module) -> None:
    """bitsandbytes repacks a 4-bit weight at an evaluation-mode forward on some processors; gradients are wrong from
    then on and every timing is of another computation. No contestant may get there.
    """
    states = (getattr(getattr(module, "weight", None), "quant_state", None) for module in model.modules())
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        raise RuntimeError("a 4-bit weight was repacked for inference during training; this measurement is void")


def load_plain(job: Job) -> Any:
    """The frozen base as transformers and bitsandbytes give it, without any of this project's code."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=job.double,
        bnb_4bit_compute_dtype=DTYPES[job.compute],
    )
    model = AutoModelForCausalLM.from_pretrained(
        job.base,
        dtype=DTYPES[job.compute if job.weights == "nf4" else job.weights],
        quantization_config=quantised if job.weights == "nf4" else None,
        device_map={"": device()},
        attn_implementation="sdpa",
        local_files_only=True,
    )
    if job.weights != "nf4" and job.weights != job.compute:
        model = model.to(DTYPES[job.compute])
    return model.train()
