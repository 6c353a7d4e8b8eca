"""One training step, side by side: `finetune`, TRL and transformers' Trainer on the same samples. See README.md here.

    make bench                                    # NF4 base, 3 rounds of 4 timed steps, and the check of the loss
    .venv/bin/python benchmarks/train.py --weights nf4 bf16 --rounds 5

Run it from the repository's root, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the package of contestants lies above it

from benchmarks.contestants.job import IGNORED, Job  # noqa: E402 — found only now
from finetune import hardware, prepare  # noqa: E402
from finetune.plan import course_steps  # noqa: E402
from finetune.prepare import Prepared  # noqa: E402
from finetune.run import Run  # noqa: E402
from finetune.terminal import Terminal, size  # noqa: E402

OURS = "finetune"
CONTESTANTS: dict[str, tuple[str, str, list[str]]] = {
    OURS: ("finetune", "benchmarks.contestants.ours", []),
    "trl": ("TRL SFTTrainer, defaults", "benchmarks.contestants.peers", ["trl"]),
    "trl-best": ("TRL, padding_free, nothing recomputed", "benchmarks.contestants.peers", ["trl-best"]),
    "hf": ("Trainer + PEFT, padded, nothing recomputed", "benchmarks.contestants.peers", ["hf"]),
}
"""Name → what it is, its module, its arguments; measured in this order in every round."""
BOUNDS = {"bf16": 1e-3, "fp16": 1e-3, "fp32": 1e-5}
"""Largest difference of a step's loss from the reference, at the same weights."""
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads ruin every timing on a shared machine; `finetune` sets it itself
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "datasets", "tokenizers")


@dataclass(frozen=True)
class Options:
    recipe: str
    rounds: int
    steps: int
    skip: int
    weights: tuple[str, ...]
    loss_check: bool
    huge_pages: bool
    out: Path


def options() -> Options:
    parser = argparse.ArgumentParser(description="Measure one training step of finetune, TRL and Trainer side by side.")
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contestant runs, in turns (default 3)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each run (default 4)")
    parser.add_argument("--skip", type=int, default=1, help="steps before them that are not timed (default 1)")
    parser.add_argument("--weights", nargs="+", choices=["nf4", "bf16"], default=["nf4"], help="forms of the base")
    parser.add_argument("--no-loss-check", action="store_true", help="leave out the comparison with the reference")
    parser.add_argument("--huge-pages", action="store_true", help="THP_MEM_ALLOC_ENABLE=1 for all contestants")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the result file")
    given = parser.parse_args()
    if min(given.steps, given.skip) < 1 or given.rounds < 0:
        parser.error("--steps and --skip must be at least 1, --rounds at least 0")
    return Options(
        recipe=given.recipe, rounds=given.rounds, steps=given.steps, skip=given.skip, weights=tuple(given.weights),
        loss_check=not given.no_loss_check, huge_pages=given.huge_pages, out=given.out,
    )  # fmt: skip


def make_job(prepared: Prepared, chosen: Options, compute: str) -> Job:
    """The recipe's first steps as data, for every contestant the same."""
    recipe, examples = prepared.recipe, prepared.examples
    assert prepared.base is not None
    count = chosen.skip + chosen.steps
    # Run.course() is what `finetune train` follows.
    course = Run(prepared, Terminal(quiet=True)).course()
    steps = course_steps(recipe, [len(example.ids) for example in examples])[:count]
    return Job(
        recipe=chosen.recipe, base=str(prepared.base.folder), weights=recipe.quantize.weights,
        double=recipe.quantize.double, compute=compute, lora=prepared.plan.adapter_fields, seed=recipe.train.seed,
        max_grad_norm=recipe.train.max_grad_norm, skip=chosen.skip,
        rates=[course.rate(step) for step in range(count)], result="",
        steps=[[_sample(examples[index]) for index in step] for step in steps],
    )  # fmt: skip


def _sample(example: Any) -> dict[str, list[int]]:
    labels = [token if keep else IGNORED for token, keep in zip(example.ids, example.supervised, strict=True)]
    return {"ids": list(example.ids), "labels": labels}


def compete(module: str, arguments: list[str], job: Job, folder: Path, huge_pages: bool) -> dict[str, Any]:
    """One contestant in a process of its own.

    Raises:
        SystemExit: it failed, with the end of what it said.
    """
    result, handed = folder / "result.json", folder / "job.json"
    result.unlink(missing_ok=True)
    replace(job, result=str(result)).write(handed)
    pages = {"THP_MEM_ALLOC_ENABLE": "1"} if huge_pages else {}
    done = subprocess.run(
        [sys.executable, "-m", module, str(handed), *arguments],
        cwd=ROOT, env=os.environ | ENVIRONMENT | pages, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode or not result.exists():
        raise SystemExit(f"{module} {' '.join(arguments)} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    timed = sum(found["seconds"][job.skip :])
    tokens = sum(len(sample["ids"]) for step in job.steps[job.skip :] for sample in step)
    return found | {"tokens_per_second": tokens / timed}


def check_loss(job: Job, folder: Path, huge_pages: bool) -> dict[str, Any]:
    """`finetune` against the reference, step by step."""
    with tempfile.TemporaryDirectory(dir=folder) as snapshots:
        watched = replace(job, snapshots=snapshots)
        ours = compete(CONTESTANTS[OURS][1], [], watched, folder, huge_pages)
        reference = compete("benchmarks.contestants.reference", [], watched, folder, huge_pages)
    same = _largest_difference(ours["losses"], reference["same_weights"])
    layout, bound = _largest_difference(ours["losses"], ours["padded"]), BOUNDS[job.compute]
    return {
        "same_weights": same, "own_course": _largest_difference(ours["losses"], reference["losses"]),
        "same_layers": layout,
        "reference_wider": _largest_difference(reference["same_weights"], reference["same_weights_wider"]),
        "reference_spread": _largest_difference(reference["same_weights"], reference["same_weights_autocast"]),
        "bound": bound, "holds": layout <= bound and (job.compute != "fp32" or same <= bound), "steps": len(job.steps),
        "finetune": ours["losses"], "reference_at_same_weights": reference["same_weights"],
        "reference_under_autocast": reference["same_weights_autocast"], "reference_own_course": reference["losses"],
    }  # fmt: skip


def _largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def measure(weights: str, chosen: Options, folder: Path) -> dict[str, Any]:
    """All rounds and the loss check of one form of the base."""
    prepared = prepare.prepare(Path(chosen.recipe), [f"quantize.weights={weights}"])
    if prepared.base is None:
        raise SystemExit(f"{prepared.recipe.model} is not on this disk: make base")
    compute = prepared.plan.compute
    job = make_job(prepared, chosen, compute)
    rounds: list[dict[str, Any]] = []
    for number in range(chosen.rounds):
        rounds.append({})
        for name, (_, module, arguments) in CONTESTANTS.items():
            found = compete(module, arguments, job, folder, chosen.huge_pages)
            rounds[-1][name] = found
            speed = f"{found['tokens_per_second']:7.0f} tokens/s   {size(found['peak_memory'])}"
            print(f"{weights}  round {number + 1}/{chosen.rounds}  {name:9} {speed}", flush=True)
    losses = {}
    for dtype in dict.fromkeys([compute, "fp32"]) if chosen.loss_check else ():
        print(f"{weights}  loss against the reference, computing in {dtype}", flush=True)
        losses[dtype] = check_loss(replace(job, compute=dtype), folder, chosen.huge_pages)
    return {
        "compute": compute, "work": _work(job), "rounds": rounds, "ratios": ratios(rounds), "loss_check": losses,
    }  # fmt: skip


def _work(job: Job) -> dict[str, Any]:
    """What the timed steps hold, per step on average."""
    timed = job.steps[job.skip :]
    real = sum(len(sample["ids"]) for step in timed for sample in step)
    padded = sum(len(step) * max(len(sample["ids"]) for sample in step) for step in timed)
    supervised = sum(label != IGNORED for step in timed for sample in step for label in sample["labels"])
    return {
        "rows": len(timed[0]), "tokens": real / len(timed), "padding_share": 1 - real / padded,
        "supervised_share": supervised / real, "lora": job.lora, "rates": job.rates,
    }  # fmt: skip


def ratios(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """finetune / contestant, within each round: speed (more is better) and peak memory (less is better)."""
    found = {}
    for name in CONTESTANTS if rounds else ():
        pairs = [(one[OURS], one[name]) for one in rounds]
        found[name] = {
            "speed": _spread([ours["tokens_per_second"] / peer["tokens_per_second"] for ours, peer in pairs]),
            "memory": _spread([ours["peak_memory"] / peer["peak_memory"] for ours, peer in pairs]),
            "processor_time": _spread([_busy(ours) / _busy(peer) for ours, peer in pairs]),
            "loss_difference": max(_largest_difference(ours["losses"], peer["losses"]) for ours, peer in pairs),
        }
    return found


def _busy(result: dict[str, Any]) -> float:
    """Processor seconds of a whole run's steps but the first: less shaken by neighbours than the wall clock."""
    return float(sum(result["cpu_seconds"][1:]))


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}


def heading(weights: str, found: dict[str, Any]) -> str:
    work = found["work"]
    return (
        f"{weights} base, {found['compute']} compute; a step: {work['rows']} rows, {work['tokens']:.0f} tokens, "
        f"{work['padding_share']:.0%} padding when padded, {work['supervised_share']:.0%} supervised"
    )


def table(found: dict[str, Any]) -> list[str]:
    """One form of the base as a Markdown table: ratios first, absolute values as context."""
    rounds = found["rounds"]
    if not rounds:
        return []
    lines = ["| against | speed, times | peak memory, times | loss differs by | tokens/s | peak memory |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, ratio in found["ratios"].items():
        tokens = median(one[name]["tokens_per_second"] for one in rounds)
        memory = size(median(one[name]["peak_memory"] for one in rounds))
        if name == OURS:
            lines.append(f"| *finetune itself* | 1 | 1 | | {tokens:.0f} | {memory} |")
            continue
        spread = "**{median:.2f}** ({min:.2f}–{max:.2f})"
        speed, held = spread.format(**ratio["speed"]), spread.format(**ratio["memory"])
        label = CONTESTANTS[name][0]
        lines.append(f"| {label} | {speed} | {held} | {ratio['loss_difference']:.0e} | {tokens:.0f} | {memory} |")
    return lines


def loss_lines(checks: dict[str, Any]) -> list[str]:
    """The verdict, and for 16 bits beside it how far the reference's own two ways of rounding lie apart."""
    lines = []
    for dtype, check in checks.items():
        verdict = "holds" if check["holds"] else "BROKEN"
        lines.append(
            f"loss against the padded reference, {dtype}, largest of {check['steps']} steps: "
            f"{check['same_layers']:.1e} through the same layers, {check['same_weights']:.1e} through PEFT's own "
            f"(bound {check['bound']:.0e}: {verdict}), {check['own_course']:.1e} on its own course"
        )
        if dtype != "fp32":
            lines[-1] += (
                f"; the reference against itself: {check['reference_wider']:.1e} with wider padding, "
                f"{check['reference_spread']:.1e} with autocast"
            )
    return lines


def main() -> int:
    chosen = options()
    if find_spec("trl") is None:
        raise SystemExit('TRL is not installed: pip install "finetune-qwen[bench]" (or: make bench)')
    machine, load = hardware.detect(), os.getloadavg()
    if load[0] > 0.25 * (os.cpu_count() or 1):
        print(f"this machine is busy (load {load[0]:.1f}): the timings will be worth little", file=sys.stderr)
    began = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as folder:
        results = {weights: measure(weights, chosen, Path(folder)) for weights in chosen.weights}
    record = {
        "began": began.isoformat(timespec="seconds"), "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]), "options": asdict(chosen) | {"out": ""},
        "hardware": machine.to_dict(), "python": sys.version.split()[0], "load_before": load,
        "load_after": os.getloadavg(), "environment": ENVIRONMENT,
        "versions": {name: version(name) for name in PACKAGES}, "results": results,
    }  # fmt: skip
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / f"train-{began:%Y-%m-%d}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{machine.name}, {machine.threads} threads, {machine.instruction_set}")
    for weights, found in results.items():
        print("\n".join(["", heading(weights, found), "", *table(found), "", *loss_lines(found["loss_check"])]))
    print(f"\nwritten to {path}")
    return 0 if all(check["holds"] for found in results.values() for check in found["loss_check"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
