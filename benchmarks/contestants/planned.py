"""One point of the plan's grid in a process of its own: planned, loaded, trained for a few steps, judged where asked.

Written down: what the plan was made from, and what then came: resident and peak memory part by part, and seconds.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finetune import hardware

hardware.set_libraries()  # as the command does, before torch loads

from finetune import evaluate, loop, model, prepare  # noqa: E402
from finetune import optimizer as optimizers  # noqa: E402
from finetune.objectives import sft  # noqa: E402
from finetune.run import Run  # noqa: E402
from finetune.terminal import Terminal  # noqa: E402


def main(point: dict[str, Any]) -> None:
    """``point``: recipe, overrides, steps, and free memory in bytes where the plan is to be made for less."""
    if point["memory"]:
        found = hardware.detect()
        hardware.detect = lambda: replace(found, free_memory=point["memory"])
    measured: dict[str, Any] = {"imported": hardware.resident()}
    prepared = prepare.prepare(Path(point["recipe"]), point["overrides"])
    run = Run(prepared, Terminal(quiet=True))
    course = run.course()
    measured["prepared"] = hardware.resident()
    hardware.forget_peak()
    began = time.perf_counter()
    policy = model.load_base(run.base, run.form())
    policy = model.attach(
        policy, prepared.plan.adapter_fields, course.seed, kernels=prepared.recipe.train.kernels != "off"
    )
    if prepared.plan.recompute != "none":
        policy.recompute_layers(prepared.plan.recomputed_layers, offload=prepared.plan.recompute == "offload")
    optimizer = optimizers.make(policy.model, prepared.recipe.train.optimizer)
    measured |= {"loading_peak": hardware.peak_memory(), "loaded": hardware.resident()}
    measured["loading_seconds"] = time.perf_counter() - began
    hardware.forget_peak()
    measured["steps"] = _steps(loop.run(policy, sft, prepared.samples, course, optimizer), point["steps"])
    measured |= {"training_peak": hardware.peak_memory(), "trained": hardware.resident()}
    if point["judged"]:
        hardware.forget_peak()
        began, cpu = time.perf_counter(), time.process_time()
        assert prepared.held_out is not None
        evaluate.judge(policy, prepared.held_out, run.how(), progress=lambda *_: None)
        measured |= {
            "judging_seconds": time.perf_counter() - began, "judging_cpu": time.process_time() - cpu,
            "judging_peak": hardware.peak_memory(),
        }  # fmt: skip
    Path(point["result"]).write_text(json.dumps({"inputs": _inputs(prepared), "measured": measured}))


def _steps(events: Any, count: int) -> list[dict[str, float]]:
    found = []
    for _ in range(count):
        cpu = time.process_time()
        event = next(events)
        found.append({
            "seconds": event.seconds, "waited": event.waited, "cpu": time.process_time() - cpu, "tokens": event.tokens,
            "resident": hardware.resident(), "peak": hardware.peak_memory(),
        })  # fmt: skip
    return found


def _inputs(prepared: prepare.Prepared) -> dict[str, Any]:
    """What ``plan.make`` takes, so that a test can plan again."""
    base = prepared.base
    assert base is not None
    assert prepared.load is not None
    return {
        "recipe": prepared.recipe.to_yaml_dict(),
        "shape": asdict(base.shape),
        "hardware": prepared.hardware.to_dict(),
        "load": asdict(prepared.load),
    }


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
