"""Predicted against measured: what `finetune plan` says of a grid of runs, and what then comes.

    python benchmarks/plan.py             # the grid; writes benchmarks/results/plan-cpu.json
    python benchmarks/plan.py --only large  # points whose name holds that; writes nothing
    python benchmarks/plan.py --table       # the record as a table, by today's formulas

Each point is a process of its own that goes the real road: prepare, load, attach, steps of the real loop, judging.
Peaks are the kernel's (VmHWM, forgotten after loading). What was measured and what the plan was made from are both
written, so that `tests/test_calibration.py` can plan again with the formulas of its day.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import cases  # noqa: E402
from benchmarks.calibration import judge, resting, table  # noqa: E402
from finetune import hardware  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "plan-cpu.json"
STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run. ``case``: of ``cases``, or tiny; ``memory``: GB that the plan may use, if not the machine's."""

    name: str
    case: str
    overrides: tuple[str, ...] = ()
    memory: float | None = None
    judged: bool = False
    steps: int = STEPS


def _at(tokens: int, *more: str) -> tuple[str, ...]:
    return (f"train.micro_batch_tokens={tokens}", *more)


_SHORT = ("train.max_length=512",)
GRID = (
    Point(name="tiny nf4, judged", case="tiny", judged=True, steps=40),  # of some 30 ms each
    Point(name="tiny fp32", case="tiny", overrides=("quantize.weights=fp32", *_at(512)), steps=40),
    Point(name="small bf16 512", case="small", overrides=(*_SHORT, *_at(512))),
    Point(name="small bf16 1024", case="small", overrides=_at(1024)),
    Point(name="small bf16 2048", case="small", overrides=_at(2048)),
    Point(name="small bf16 4096", case="small", overrides=_at(4096, "train.examples_per_step=16")),
    Point(name="small bf16 4096 in 0.85 GB", case="small", overrides=("train.examples_per_step=16",), memory=0.85),
    Point(name="small bf16 4096 recomputed", case="small",
          overrides=_at(4096, "train.examples_per_step=16", "train.recompute=layers")),
    Point(name="small bf16 1024 without kernels", case="small", overrides=_at(1024, "train.kernels=off")),
    Point(name="small nf4 2048", case="small", overrides=("quantize.weights=nf4", *_at(2048))),
    Point(name="small fp32 1024", case="small", overrides=("quantize.weights=fp32", *_at(1024))),
    Point(name="large bf16 512", case="large", overrides=(*_SHORT, *_at(512))),
    Point(name="large bf16 2048", case="large", overrides=_at(2048, "train.examples_per_step=8")),
    Point(name="large fp32 1024", case="large", overrides=("quantize.weights=fp32", *_at(1024))),
    Point(name="large bf16 4096 recomputed", case="large",
          overrides=_at(4096, "train.examples_per_step=16", "train.recompute=layers")),
    Point(name="135M nf4 dates, judged", case="real", overrides=("evaluate.rows=50",), judged=True),
    Point(name="135M bf16 dates, judged", case="real",
          overrides=("quantize.weights=bf16", "evaluate.rows=50"), judged=True),
    Point(name="135M nf4 2048", case="text", overrides=_at(2048), steps=3),
    Point(name="135M bf16 4096", case="text",
          overrides=("quantize.weights=bf16", *_at(4096, "train.examples_per_step=12")), steps=2),
    Point(name="135M nf4 4096 recomputed", case="text",
          overrides=_at(4096, "train.examples_per_step=12", "train.recompute=layers"), steps=2),
    Point(name="135M nf4 in 1.1 GB", case="text", memory=1.1, steps=2),
    Point(name="135M fp32 1024", case="text", overrides=("quantize.weights=fp32", *_at(1024)), steps=2),
    Point(name="135M nf4 1024 without kernels", case="text", overrides=_at(1024, "train.kernels=off"), steps=2),
)  # fmt: skip


def measure(point: Point, scratch: Path) -> dict[str, Any]:
    """One point in a fresh process: its inputs and what was measured."""
    recipe = ROOT / "recipes" / "tiny.yaml" if point.case == "tiny" else cases.make(point.case).recipe
    handed, result = scratch / "point.json", scratch / "result.json"
    result.unlink(missing_ok=True)
    handed.write_text(json.dumps({
        "recipe": str(recipe), "steps": point.steps, "judged": point.judged, "result": str(result),
        "memory": int(point.memory * 1e9) if point.memory else None,
        "overrides": [
            "tracker=none", f"output={scratch}/run", "train.warmup=0", f"train.steps={point.steps}", *point.overrides,
        ],
    }))  # fmt: skip
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.contestants.planned", str(handed)],
        cwd=ROOT, env=os.environ | quiet, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode or not result.exists():
        raise SystemExit(f"{point.name} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    found["inputs"]["recipe"]["output"] = "runs/plan"
    return {"name": point.name, "memory_given": point.memory, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="points whose name holds this")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", action="store_true", help="print the committed record as a table, measure nothing")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table(json.loads(RESULT.read_text()))))
        return
    began, load, started = datetime.now(UTC), os.getloadavg(), time.perf_counter()
    points = []
    with tempfile.TemporaryDirectory() as scratch:
        for point in GRID:
            if options.only in point.name:
                points.append(measure(point, Path(scratch)))
                peak = points[-1]["measured"]["training_peak"] / 1e9
                print(f"{len(points):2}  {point.name:34} {peak:6.2f} GB", flush=True)
    record: dict[str, Any] = {
        "began": began.isoformat(timespec="seconds"), "seconds": round(time.perf_counter() - started),
        "command": "python benchmarks/plan.py", "load_before": load, "load_after": os.getloadavg(),
        "hardware": hardware.detect().to_dict(), "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(), "environment": hardware.LIBRARIES,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "points": points,
    }  # fmt: skip
    _tell(record)
    out = options.out or (None if options.only else RESULT)
    if out:
        out.write_text(json.dumps(record) + "\n")
        print(f"written: {out.name}")


def _tell(record: dict[str, Any]) -> None:
    """Predicted, measured, and how far off: memory, then the seconds of the steps behind the first."""
    judged = judge(record)
    for one in judged:
        print(one.line())
    times = "wall time" if resting(record) else "processor time over the threads: the machine did other work as well"
    print(f"time is {times}")
    for part in ("memory", "time"):
        print(f"furthest off in {part}: {max(judged, key=lambda one: abs(getattr(one, part) - 1)).line()}")
    for words in ("tiny", ""):
        points = [point["measured"]["steps"][1:] for point in record["points"] if words in point["name"]]
        shares = sorted(sum(one["waited"] for one in steps) / sum(one["seconds"] for one in steps) for steps in points)
        if shares:
            span = f"{shares[0]:.2%} to {shares[-1]:.2%}"
            print(f"share of the time in which {words or 'all'} runs waited for samples: {span}")


if __name__ == "__main__":
    main()
