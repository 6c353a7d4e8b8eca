"""What trials run: each function is called in a forked child, and its result is the child's exit code."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


def train(recipe: str, plant: str = "") -> NoReturn:
    """The command ``finetune train RECIPE`` in this process; ``plant`` names a defect of ``plants.py``."""
    from finetune import cli  # heavy and not every job's concern
    from tests.faults import plants

    if plant:
        getattr(plants, plant)()
    sys.argv = ["finetune", "train", recipe]
    cli.main()
    raise AssertionError("the command line ends by an exit code")


def command(arguments: Sequence[str]) -> NoReturn:
    """Any command of the line."""
    from finetune import cli

    sys.argv = ["finetune", *arguments]
    cli.main()
    raise AssertionError("the command line ends by an exit code")


def train_signalled(
    recipe: str, signals: Sequence[tuple[float, int]], group: bool = False, plant: str = ""
) -> NoReturn:
    """The same, while another thread sends this process (or its whole group) signals, each after some seconds."""
    for seconds, number in signals:
        timer = threading.Timer(seconds, os.killpg if group else os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()
    train(recipe, plant)


def train_signalled_in(recipe: str, place: str, call: int, numbers: Sequence[int], plant: str = "") -> NoReturn:
    """The same, with the signals sent at the start of call ``call`` of ``place`` (``module:name``, also a method)."""
    module, _, dotted = place.partition(":")
    owner = importlib.import_module(module)
    *path, name = dotted.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), itertools.count(1)

    def signalling(*args: Any, **more: Any) -> Any:
        if next(calls) == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return real(*args, **more)

    setattr(owner, name, signalling)
    train(recipe, plant)


def train_orphaning(recipe: str, seconds: float, plant: str = "") -> int:
    """Train in a child of one's own and kill only it: the processes that it started are left alive."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        try:
            train(recipe, plant)
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 0


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
