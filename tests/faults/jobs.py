"""What trials run: each function is called in a forked child, and its result is the child's exit code."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path


def train(recipe: str, overrides: Sequence[str] = ()) -> int:
    """``finetune train RECIPE --set …`` without starting a process for it."""
    from finetune.cli import main_in_process  # heavy and not every job's concern

    settings = [part for override in overrides for part in ("--set", override)]
    return int(main_in_process(["train", recipe, *settings]))


def save_demo(folder: str) -> int:
    """A small save of the kind a run makes, with writers in Python and in Rust; 13 operations below ``folder``."""
    import torch
    from safetensors.torch import save_file

    root = Path(folder)
    draft = root / "step-1.tmp"
    draft.mkdir(parents=True)
    with (draft / "state.json").open("w", encoding="utf-8") as file:
        file.write("{}\n")
        file.flush()
        os.fsync(file.fileno())
    save_file({"a": torch.arange(1000.0)}, draft / "adapter.safetensors")
    (draft / "scratch").write_bytes(b"x" * 100)
    (draft / "scratch").unlink()
    draft.rename(root / "step-1")
    return 0


def write_twice(folder: str) -> int:
    """Two names, 100 bytes each, errors told by the exit code: the error number of the first one met."""
    try:
        for name in ("first", "second"):
            fd = os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT, 0o600)
            written = os.write(fd, b"y" * 100)
            os.close(fd)
            print(name, written)
    except OSError as error:
        return int(error.errno or 1)
    return 0


def compute(threads: int) -> int:
    """Multiply matrices on several threads, which a fork after a used thread pool would never finish."""
    import torch

    left = torch.ones(600, 600)
    total = sum(float((left @ left).sum()) for _ in range(5))
    return 0 if torch.get_num_threads() == threads and total == 5 * 600.0**3 else 1


def spawn_sleeper() -> int:
    """Leave a child of one's own behind, sleeping, and sleep too."""
    pid = os.fork()
    if pid:
        print(pid, flush=True)
    time.sleep(60)
    return 0
