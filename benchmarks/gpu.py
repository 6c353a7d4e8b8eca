"""QLoRA steps of the true 14B shapes on a CUDA card: `finetune` beside TRL, its padding-free way and Liger.

    make bench-gpu
    .venv/bin/python benchmarks/gpu.py --shapes tiny --lengths 32 --rows 1 2      # a trial without a card

The base is random and made on the device, layer by layer in NF4: nothing is fetched and nothing is written. Rows are
dense, of one length, half supervised, so that nobody pads; each contestant has a process of its own. Written to
results/gpu-<card>.json. MFU counts useful work alone (no recomputation, the head on supervised tokens).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.contestants import gpu_peers  # noqa: E402 — found only now
from benchmarks.contestants.gpu_peers import forget_peak, synchronised  # noqa: E402

SHAPES = {"qwen2.5-14b": "Qwen/Qwen2.5-14B", "qwen-14b": "Qwen/Qwen-14B", "tiny": "data/bases/tiny"}
OURS = ("finetune", "finetune-recompute")
CONTESTANTS = (*OURS, *gpu_peers.SETTINGS)
LENGTHS, ROWS = (256, 512, 1024, 2048, 4096, 8192), (1, 8)
SKIP, STEPS, RANK = 1, 4, 16
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by the makers' data sheets."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement: ``rows`` rows of ``length`` tokens go through at once and are one optimizer step."""

    contestant: str
    shape: str
    length: int
    rows: int


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure QLoRA steps of 14B shapes on a card.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen2.5-14b", "qwen-14b"])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        return _measure_all(json.loads(given.one))
    import torch

    if not torch.cuda.is_available() and given.shapes != ["tiny"]:
        print("no CUDA card on this machine: not run")
        return 0
    found: list[dict[str, Any]] = []
    for shape in given.shapes:
        for name in given.contestants:
            points = [Point(contestant=name, shape=shape, length=length, rows=rows)
                      for length in given.lengths for rows in given.rows]  # fmt: skip
            found += _in_a_process(points)
    _write(given.out, found)
    return 0


def _in_a_process(points: list[Point]) -> list[dict[str, Any]]:
    """All points of one contestant and shape, which share a loaded base. What it printed is kept where it fails."""
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        asked = json.dumps({"points": [asdict(point) for point in points], "result": result.name})
        done = subprocess.run(
            [sys.executable, __file__, "--one", asked], cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        text = Path(result.name).read_text()
    found: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    if done.returncode:
        ending = (done.stdout + done.stderr).strip().splitlines()[-1:]
        found.append(asdict(points[0]) | {"failed": " ".join(ending)})
    for one in found:
        said = one.get("failed") or f"{one['tokens_per_second']:9.0f} tokens/s  {one['peak_memory'] / 2**30:6.1f} GiB"
        print(f"{one['shape']:12} {one['contestant']:19} {one['rows']:2} x {one['length']:5}  {said}", flush=True)
    return found


def _measure_all(asked: dict[str, Any]) -> int:
    """In the child: load once, then point after point; a point that does not fit is said so and passed over."""
    import torch

    points = [Point(**point) for point in asked["points"]]
    base, model = _base(points[0].shape)
    with Path(asked["result"]).open("a") as result:
        for point in points:
            try:
                timed = _ours(base, model, point) if point.contestant in OURS else _theirs(base, model, point)
                found = _figures(base, point, timed)
            except torch.OutOfMemoryError as error:
                found = {"failed": f"out of memory: {str(error).splitlines()[0][:120]}"}
            result.write(json.dumps(asdict(point) | found) + "\n")
            result.flush()
            _clear()
    return 0


def _base(shape: str) -> tuple[Any, Any]:
    """(the base by its numbers, its model with random weights in NF4 on the device, as the loader makes it)."""
    import torch

    from finetune import known_models, loading
    from finetune.base import Base
    from finetune.decoder import DecoderShape
    from finetune.headers import Tensor
    from finetune.loading import BaseForm

    known = known_models.find(SHAPES[shape])
    assert known is not None
    numbers = DecoderShape.from_known(known)
    family = "qwen2" if numbers.family == "qwen1" else numbers.family
    config = known._asdict() | {"model_type": family, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    tensors = {name: Tensor(shard="", dtype="BF16", shape=size) for name, size in numbers.tensors().items()}
    base = Base(folder=ROOT, layout="native", config=config, shape=numbers, tensors=tensors, stop_token="", notes=())
    device = "cuda" if torch.cuda.is_available() else "cpu"

    class Random:
        """Stands where the loader's reader of shards stands."""

        def __init__(self, base: Base) -> None:
            self._drawn = torch.Generator(device).manual_seed(0)

        def __enter__(self) -> Random:
            return self

        def __exit__(self, *_: object) -> None: ...

        def tensor(self, name: str) -> torch.Tensor:
            size = tensors[name].shape
            made = torch.randn(size, generator=self._drawn, device=device, dtype=torch.bfloat16)
            return made.mul_(0.1).add_(1) if "norm" in name else made.mul_(0.02)

    loading.Reader = Random  # type: ignore[assignment,misc]
    loading.layouts.generation = lambda _: {}  # type: ignore[assignment]  # there is no folder to ask
    return base, loading.load(base, BaseForm(weights="nf4", double=True, compute="bf16", device=device))


def _rows(base: Any, point: Point) -> list[dict[str, list[int]]]:
    import torch

    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(base.shape.vocab, (point.rows * (SKIP + STEPS), point.length), generator=drawn).tolist()
    half = point.length // 2
    return [{"input_ids": one, "labels": [-100] * half + one[half:]} for one in ids]


def _lora() -> dict[str, Any]:
    from finetune.decoder import LINEARS

    return {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(LINEARS)}


def _ours(base: Any, model: Any, point: Point) -> list[float]:
    """Through the loop of `finetune train`."""
    from finetune import loop, optimizer
    from finetune.dataset import Example
    from finetune.loop import Course
    from finetune.model import Policy, attach
    from finetune.objectives import sft

    policy = Policy(model=model, tokenizer=None, renderer=None, stop_token="", adapted=False)  # type: ignore[arg-type]
    policy = attach(policy, _lora(), 0)
    if point.contestant == "finetune-recompute":
        policy.recompute_layers()
    rows = _rows(base, point)
    examples = [
        Example(ids=tuple(row["input_ids"]), weights=tuple(float(one != -100) for one in row["labels"]), where="")
        for row in rows
    ]
    steps = tuple(tuple(range(low, low + point.rows)) for low in range(0, len(rows), point.rows))
    course = Course(steps=steps, peak_rate=1e-4, warmup=0, kind="constant", max_grad_norm=1.0,
                    micro_batch_tokens=point.rows * point.length, seed=0)  # fmt: skip
    events, timed = loop.run(policy, sft, examples, course, optimizer.make(policy.model)), []
    try:
        for number in range(SKIP + STEPS):
            if number == SKIP:
                forget_peak()
            began = time.perf_counter()
            next(events)
            timed.append(synchronised() - began)
    finally:
        events.close()
        policy.model.unload()
    return timed[SKIP:]


def _theirs(base: Any, model: Any, point: Point) -> list[float]:
    work = gpu_peers.Work(rows=_rows(base, point), at_once=point.rows, skip=SKIP, lora=_lora())
    return gpu_peers.steps(point.contestant, model, work)


def _figures(base: Any, point: Point, seconds: list[float]) -> dict[str, Any]:
    """Real tokens per second, peak memory, and the share of the card's arithmetic that was useful."""
    import torch

    shape, tokens = base.shape, point.rows * point.length
    speed = tokens * len(seconds) / sum(seconds)
    lora = RANK * shape.layers * sum(sum(shape.linear(kind)) for kind in _lora()["target_modules"])
    attention = 3.5 * 2 * shape.heads * shape.head_dim * point.length * shape.layers
    useful = 4 * shape.linear_parameters() + 6 * lora + attention + 0.5 * 4 * shape.hidden * shape.vocab
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((value for key, value in PEAKS.items() if key in name), None)
    memory = torch.cuda.max_memory_allocated() if name else 0
    return {
        "seconds": seconds, "tokens_per_second": speed, "peak_memory": memory, "useful_flops_per_token": useful,
        "mfu": speed * useful / peak if peak else None,
    }  # fmt: skip


def _clear() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _write(folder: Path, found: list[dict[str, Any]]) -> None:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"
    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "liger_kernel")
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "card": name, "python": sys.version.split()[0],
        "versions": {one: version(one) for one in packages if find_spec(one)}, "points": found,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-{name.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    raise SystemExit(main())
