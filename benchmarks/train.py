"""Training steps side by side: `finetune`, TRL and transformers' Trainer on the same samples. See README.md here.

    make bench                                         # four cases, and what each part of finetune is worth
    .venv/bin/python benchmarks/train.py --cases real --steps 8
    .venv/bin/python benchmarks/train.py --loss        # only the loss, against the padded reference

Run it from the repository's root, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the package of contestants lies above it

from benchmarks import cases, turns  # noqa: E402 — found only now
from benchmarks.cases import Case  # noqa: E402
from benchmarks.contestants.job import IGNORED, Job  # noqa: E402
from benchmarks.turns import ENVIRONMENT, PEERS, Entry  # noqa: E402
from finetune import hardware, prepare  # noqa: E402
from finetune.run import Run  # noqa: E402
from finetune.terminal import Terminal, size  # noqa: E402

OURS = "finetune"
CONTESTANTS = {
    OURS: Entry(title="finetune", module="ours"),
    "trl": Entry(title="TRL SFTTrainer, defaults", module="peers", arguments=("trl",)),
    "trl-best": Entry(title="TRL, padding_free, nothing recomputed", module="peers", arguments=("trl-best",)),
    "trl-packed": Entry(title="TRL, packing, nothing recomputed", module="peers", arguments=("trl-packed",)),
    "hf": Entry(title="Trainer + PEFT, padded, nothing recomputed", module="peers", arguments=("hf",)),
}
LEVERS = {
    "attention": "torch's own backward of attention",
    "layer": "transformers' decoder layers",
    "lora": "transformers' layers and PEFT's linears",
    "head": "all logits at once, in fp32",
    "recompute": "every layer recomputed",
    "packing": "one sample at a time",
}
"""A part of `finetune` that is switched off alone → what stands in its place."""
BOUNDS = {"bf16": 1e-3, "fp16": 1e-3, "fp32": 1e-5}
"""Largest difference of a step's loss from the reference, at the same weights."""
RATIOS = {
    "small_vs_trl_default": ("small", "trl", "speed"), "small_vs_trl_best": ("small", "best", "speed"),
    "large_vs_trl_default": ("large", "trl", "speed"), "large_vs_trl_best": ("large", "best", "speed"),
    "large_vs_hf_trainer": ("large", "hf", "speed"), "large_rss_vs_trl": ("large", "trl", "memory"),
    "real_vs_trl_default": ("real", "trl", "speed"), "text_vs_trl_default": ("text", "trl", "speed"),
}  # fmt: skip
"""The figures by name → case, peer, what. ``best``: the fastest of TRL's settings."""
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")


@dataclass(frozen=True)
class Options:
    names: tuple[str, ...]
    steps: int
    levers: tuple[str, ...]
    loss: bool
    huge_pages: bool
    out: Path


def options() -> Options:
    parser = argparse.ArgumentParser(description="Measure training steps of finetune, TRL and Trainer side by side.")
    parser.add_argument("--cases", nargs="+", choices=cases.NAMES, default=list(cases.NAMES))
    steps = int(os.environ.get("BENCH_STEPS", "3"))
    parser.add_argument("--steps", type=int, default=steps, help="timed steps after one that is not (BENCH_STEPS or 3)")
    levers = "cases in which each part of finetune is switched off alone"
    parser.add_argument("--levers", nargs="*", choices=["small", "large"], default=["small", "large"], help=levers)
    parser.add_argument("--loss", action="store_true", help="compare the loss with the reference, and nothing else")
    parser.add_argument("--huge-pages", action="store_true", help="THP_MEM_ALLOC_ENABLE=1 for all contestants")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the result file")
    given = parser.parse_args()
    if given.steps < 1:
        parser.error("--steps must be at least 1")
    return Options(tuple(given.cases), given.steps, tuple(given.levers), given.loss, given.huge_pages, given.out)


def make_job(case: Case, steps: int, compute: str = "auto") -> Job:
    """The recipe's first steps as data, for every contestant the same."""
    overrides = [f"quantize.weights={case.weights}", f"quantize.compute={compute}"]
    prepared = prepare.prepare(case.recipe, overrides)
    if prepared.base is None:
        raise SystemExit(f"{prepared.recipe.model} is not on this disk: make base")
    # Run.course() is what `finetune train` follows.
    course, samples = Run(prepared, Terminal(quiet=True)).course(), prepared.samples
    assert samples is not None
    chosen = [[_sample(samples[index]) for index in step] for step in course.steps[: steps + 1]]
    return Job(
        recipe=str(case.recipe), base=str(prepared.base.folder), weights=prepared.recipe.quantize.weights,
        double=prepared.recipe.quantize.double, compute=prepared.plan.compute, lora=prepared.plan.adapter_fields,
        seed=course.seed, max_grad_norm=course.max_grad_norm, skip=1, result="",
        rates=[course.rate(step) for step in range(steps + 1)], steps=chosen,
    )  # fmt: skip


def _sample(example: Any) -> dict[str, list[int]]:
    labels = [token if keep else IGNORED for token, keep in zip(example.ids, example.supervised, strict=True)]
    return {"ids": list(example.ids), "labels": labels}


def measure(case: Case, chosen: Options) -> dict[str, Any]:
    """All contestants of one case, step by step in turn; then finetune with each lever off, in turn with itself."""
    job = make_job(case, chosen.steps)
    found = turns.compete(CONTESTANTS, job, chosen.huge_pages, case.name)
    measured = {
        "title": case.title, "compute": job.compute, "work": _work(job), "contestants": found,
        "ratios": turns.ratios(found, job, OURS),
    }  # fmt: skip
    if case.name in chosen.levers:
        off = {name: replace(CONTESTANTS[OURS], levers=(name,)) for name in LEVERS}
        levers = turns.compete({OURS: CONTESTANTS[OURS], **off}, job, chosen.huge_pages, f"{case.name} levers")
        measured |= {"levers": levers, "lever_ratios": turns.ratios(levers, job, OURS)}
    return measured


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


def check_loss(case: Case, steps: int, compute: str, huge_pages: bool) -> dict[str, Any]:
    """`finetune` against the reference, step by step, at the weights that it had before each step.

    In 16 bits the reference does not agree with itself to the bound, so both are set against the reference in fp32.
    """
    job = make_job(case, steps, compute)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as snapshots:
        watched = replace(job, snapshots=snapshots)
        ours = turns.alone(OURS, CONTESTANTS[OURS], watched, Path(folder), huge_pages)
        entry, truth = Entry(title="reference", module="reference"), None
        reference = turns.alone("reference", entry, watched, Path(folder), huge_pages)
        if compute != "fp32":
            truth = turns.alone(
                "truth", entry, replace(watched, compute="fp32", same_start=False), Path(folder), huge_pages
            )
    same, bound = _largest_difference(ours["losses"], reference["same_weights"]), BOUNDS[job.compute]
    found = {
        "from_reference": same, "reference_wider": _largest_difference(*(reference[key] for key in _SAME)),
        "bound": bound, "holds": same <= bound, "steps": len(job.steps), "finetune": ours["losses"],
        "reference": reference["same_weights"],
    }  # fmt: skip
    if truth:
        exact = truth["same_weights"]
        own, theirs = (_mean_difference(one, exact) for one in (ours["losses"], reference["same_weights"]))
        # A random base's loss is ten to twenty times a real one's, and so is what 16 bits leave of it.
        pairs = zip(ours["losses"], reference["same_weights"], strict=True)
        near = all(abs(one - other) <= bound * max(1.0, other) for one, other in pairs)
        found |= {"from_fp32": own, "reference_from_fp32": theirs, "fp32": exact}
        found["holds"] = near or own <= theirs + bound
    return found


_SAME = ("same_weights", "same_weights_wider")


def _mean_difference(one: list[float], other: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def _largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def summary(results: Mapping[str, Any]) -> dict[str, float]:
    """The figures that the documentation quotes, of the cases that were run."""
    found = {}
    for name, (case, peer, what) in RATIOS.items():
        if case not in results:
            continue
        ratios = results[case]["ratios"]
        if what == "memory":
            found[name] = ratios[peer]["memory"]
        elif peer == "best":
            found[name] = min(one["speed"]["median"] for key, one in ratios.items() if key.startswith("trl"))
        else:
            found[name] = ratios[peer]["speed"]["median"]
    return {name: round(value, 3) for name, value in found.items()}


def table(found: Mapping[str, Any], ratios: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    """Markdown: ratios first, absolute values as context."""
    lines = ["| against | speed, times | peak memory, times | loss differs by | tokens/s | peak memory |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, ratio in ratios.items():
        speed = "**{median:.2f}** ({min:.2f}–{max:.2f})".format(**ratio["speed"])
        gap = f"{ratio['loss_difference']:.0e}" if "loss_difference" in ratio else "other rows"
        tokens = median(found[name]["tokens_per_second"])
        lines.append(
            f"| {titles[name]} | {speed} | {ratio['memory']:.2f} | {gap} | {tokens:.0f} "
            f"| {size(found[name]['peak_memory'])} |"
        )
    return lines


def main() -> int:
    chosen, machine, load = options(), hardware.detect(), os.getloadavg()
    if not PEERS.exists():
        raise SystemExit("the peers' environment is missing: make bench")
    if load[0] > 0.25 * (os.cpu_count() or 1):
        print(f"this machine is busy (load {load[0]:.1f}): the timings will be worth little", file=sys.stderr)
    began = datetime.now(UTC)
    made = {name: cases.make(name) for name in chosen.names}
    if chosen.loss:
        results: dict[str, Any] = {
            name: {compute: check_loss(case, chosen.steps, compute, chosen.huge_pages) for compute in ("fp32", "bf16")}
            for name, case in made.items()
        }
    else:
        results = {name: measure(case, chosen) for name, case in made.items()}
    record = {
        "began": began.isoformat(timespec="seconds"), "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]), "hardware": machine.to_dict(),
        "python": sys.version.split()[0], "load_before": load, "load_after": os.getloadavg(),
        "environment": ENVIRONMENT, "versions": {name: version(name) for name in PACKAGES} | turns.peer_versions(),
        **({} if chosen.loss else {"ratios": summary(results)}), "results": results,
    }  # fmt: skip
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / f"{'loss' if chosen.loss else 'train'}-{machine.device}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{machine.name}, {machine.threads} threads, {machine.instruction_set}")
    holds = _print_losses(results) if chosen.loss else _print_tables(results, record["ratios"])
    print(f"\nwritten to {path}")
    return 0 if holds else 1


def _print_losses(results: Mapping[str, Any]) -> bool:
    checks = [(name, compute, check) for name, found in results.items() for compute, check in found.items()]
    for name, compute, check in checks:
        verdict = "holds" if check["holds"] else "BROKEN"
        line = f"{name} {compute}: {check['from_reference']:.1e} from the reference (bound {check['bound']:.0e}"
        if "from_fp32" in check:
            line += (
                f", where it differs from itself by {check['reference_wider']:.1e} with wider padding); from fp32 "
                f"{check['from_fp32']:.1e}, the reference {check['reference_from_fp32']:.1e}"
            )
        print(f"{line}): {verdict}")
    return all(check["holds"] for _, _, check in checks)


def _print_tables(results: Mapping[str, Any], figures: Mapping[str, float]) -> bool:
    for name, found in results.items():
        work = found["work"]
        print(
            f"\n{name}: {found['title']}, {found['compute']} products; a step: {work['rows']} rows, "
            f"{work['tokens']:.0f} tokens, {work['padding_share']:.0%} padding when padded, "
            f"{work['supervised_share']:.0%} supervised\n"
        )
        titles = {key: entry.title for key, entry in CONTESTANTS.items()}
        print("\n".join(table(found["contestants"], found["ratios"], titles)))
        if "levers" in found:
            print("\n" + "\n".join(table(found["levers"], found["lever_ratios"], {OURS: OURS, **LEVERS})))
    print("\n" + "\n".join(f"{name:24}{value:8.3f}" for name, value in figures.items()))
    return True


if __name__ == "__main__":
    raise SystemExit(main())
