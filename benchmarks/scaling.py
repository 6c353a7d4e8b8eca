"""Does cost grow with the work and no faster? Tokens per second and peak memory over 2 to 32 times as much of it.

    make bench-scaling      # about three minutes; results/scaling-<device>.json and docs/scaling.svg

Three things grow, one at a time: the rows of the data, the tokens that go through at once, and the length of a sample.
Each point is a process of its own, over the benchmark's small base (see cases.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import cases  # noqa: E402 — found only now
from benchmarks.turns import ENVIRONMENT  # noqa: E402

TOKENS = 4096
"""Tokens of one optimizer step in the last two sweeps."""
SWEEPS = {
    "rows": [512 * factor for factor in (1, 2, 4, 8, 16, 32)],
    "micro_batch_tokens": [256, 512, 1024, 2048, 4096, 8192],
    "length": [32, 64, 128, 256, 512, 1024],
}
LABELS = {"rows": "rows of the data", "micro_batch_tokens": "tokens at once", "length": "tokens of a sample"}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure how cost grows with the work.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "scaling.svg")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print("RESULT " + json.dumps(_rows(int(given.one[1])) if given.one[0] == "rows" else _steps(*given.one)))
        return 0
    from finetune import hardware

    cases.make("small")
    found: dict[str, list[dict[str, Any]]] = {}
    for sweep, sizes in SWEEPS.items():
        found[sweep] = [{"size": size} | _in_a_process(sweep, size) for size in sizes]
    machine = hardware.detect()
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "hardware": machine.to_dict(),
        "versions": hardware.environment(machine), "step_tokens": TOKENS, "sweeps": found,
    }  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"scaling-{machine.device}.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(record, given.plot)
    return 0


def _in_a_process(sweep: str, size: int) -> dict[str, Any]:
    import os

    done = subprocess.run(
        [sys.executable, __file__, "--one", sweep, str(size)], cwd=ROOT, env=os.environ | ENVIRONMENT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"{sweep} {size} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    print(f"{sweep:20}{size:8}  {found['per_second']:9.0f}/s  {found['peak_memory'] / 1e9:.2f} GB", flush=True)
    return found


def _rows(count: int) -> dict[str, Any]:
    """Rows read, checked, tokenised and kept, from a cold cache, and then one step's samples read: rows per second."""
    import os

    from finetune import hardware, prepare

    case = cases.make("small")
    lines = (case.recipe.parent / "rows.jsonl").read_text().splitlines()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        path = Path(folder) / "rows.jsonl"
        # A repeat's first character differs, so that every row is its own.
        marked = (lines[n % len(lines)].replace('"content": "', f'"content": "{n} ', 1) for n in range(count))
        path.write_text("\n".join(marked) + "\n")
        began = time.perf_counter()
        prepared = prepare.prepare(case.recipe, [f"data.train_path={path}"])
        assert prepared.samples is not None
        tokens = int(prepared.samples.lengths.sum())
        return {
            "per_second": count / (time.perf_counter() - began),
            "tokens": tokens,
            "peak_memory": hardware.peak_memory(),
        }


def _steps(sweep: str, size: str) -> dict[str, Any]:
    """Two timed optimizer steps: tokens per second."""
    import torch

    from finetune import base, hardware, loop, model, optimizer
    from finetune.dataset import Example
    from finetune.loading import BaseForm
    from finetune.loop import Course
    from finetune.objectives import sft

    at_once, length = (int(size), 128) if sweep == "micro_batch_tokens" else (TOKENS, int(size))
    tokens = max(TOKENS, at_once)
    form = BaseForm(weights="bf16", double=True, compute="bf16", device="cpu")
    policy = model.load_base(base.inspect(cases.FOLDER / "bench-small" / "base"), form)
    policy = model.attach(policy, {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}, 0)
    drawn, count = torch.Generator().manual_seed(0), tokens // length
    ids = torch.randint(250, (3 * count, length), generator=drawn).tolist()
    weights = tuple(float(place >= length // 2) for place in range(length))
    examples = [Example(ids=tuple(one), weights=weights, where=str(number)) for number, one in enumerate(ids)]
    steps = tuple(tuple(range(step * count, (step + 1) * count)) for step in range(3))
    course = Course(steps=steps, peak_rate=1e-4, warmup=0, kind="constant", max_grad_norm=1.0,
                    micro_batch_tokens=at_once, seed=0)  # fmt: skip
    events = loop.run(policy, sft, examples, course, optimizer.make(policy.model))
    next(events)
    hardware.forget_peak()
    began = time.perf_counter()
    for _ in range(2):
        next(events)
    return {"per_second": 2 * tokens / (time.perf_counter() - began), "peak_memory": hardware.peak_memory()}


def plot(record: dict[str, Any], path: Path) -> None:
    """Three panels: speed against size, memory beside it."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6))
    for axis, (sweep, points) in zip(axes, record["sweeps"].items(), strict=True):
        sizes = [point["size"] for point in points]
        axis.plot(sizes, [point["per_second"] for point in points], "o-", color="#2a6f97")
        axis.set(xscale="log", xlabel=LABELS[sweep], ylabel="rows/s" if sweep == "rows" else "tokens/s")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        beside = axis.twinx()
        beside.plot(sizes, [point["peak_memory"] / 1e9 for point in points], "s--", color="#bc6c25")
        beside.set_ylabel("peak memory, GB (dashed)")
        beside.set_ylim(bottom=0)
    figure.suptitle(f"{record['hardware']['name']}, {record['hardware']['threads']} threads, {record['date'][:10]}")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    raise SystemExit(main())
