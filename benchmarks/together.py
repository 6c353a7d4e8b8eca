"""Several adapters in one run against the same adapters one after the other, in turns. See README.md here.

    .venv/bin/python benchmarks/together.py                              # after make base: the 135M base, NF4
    .venv/bin/python benchmarks/together.py --tokens 128 512 --adapters 2 4 --rounds 3 --steps 4
    .venv/bin/python benchmarks/together.py --wide                       # a random base of width 2048

Run it from the repository's root, on a machine that does nothing else. Every contestant is a process of its own that
loads the base and trains; the k single runs of a round are k processes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the package lies above it

ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
TARGET = 0.7
NAMES = ("a", "b", "c", "d", "e", "f", "g", "h")
_RECIPE = """\
model: {base}
quantize: {{weights: {weights}, compute: {compute}}}
adapter: {{method: lora, r: 16, lora_alpha: 32}}
data: {{train_path: data/dates/train.jsonl}}
train:
  steps: {steps}
  tokens_per_step: {tokens}
  learning_rate: 0.0005
  max_length: {length}
tracker: none
output: {folder}/runs
adapters:
"""
_WIDE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    rounds: int
    steps: int
    skip: int
    adapters: tuple[int, ...]
    tokens: tuple[int, ...]
    weights: str
    compute: str
    wide: bool
    out: Path


def options() -> Options:
    parser = argparse.ArgumentParser(description="Measure several adapters in one run against one after the other.")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contestant runs, in turns (default 3)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each run (default 6)")
    parser.add_argument("--skip", type=int, default=2, help="steps before them that are not timed (default 2)")
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 4], help="adapters at once (default 2 4)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512], help="at most, an adapter and step")
    parser.add_argument("--weights", default="nf4", choices=["nf4", "fp4", "int8", "bf16", "fp32"])
    parser.add_argument("--compute", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--wide", action="store_true", help="a random base of width 2048 and 4 layers")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the result file")
    given = parser.parse_args()
    if min(given.rounds, given.steps, given.skip) < 1 or not 2 <= min(given.adapters) <= max(given.adapters) <= len(
        NAMES
    ):
        parser.error(f"--rounds, --steps and --skip at least 1, --adapters from 2 to {len(NAMES)}")
    return Options(
        rounds=given.rounds, steps=given.steps, skip=given.skip, adapters=tuple(given.adapters),
        tokens=tuple(given.tokens), weights=given.weights, compute=given.compute, wide=given.wide, out=given.out,
    )  # fmt: skip


def base_folder(chosen: Options, folder: Path) -> Path:
    """The fetched base, or a random wide one."""
    if not chosen.wide:
        found = ROOT / "data" / "bases" / "smollm2-135m-instruct"
        if not found.is_dir():
            raise SystemExit("the base is not on this disk: make base")
        return found.relative_to(ROOT)
    spec = importlib.util.spec_from_file_location("make_tiny_base", ROOT / "data" / "make_tiny_base.py")
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    made: Path = maker.build(folder / "wide", **_WIDE)
    return made


def write_recipe(chosen: Options, base: Path, folder: Path, count: int, tokens: int) -> Path:
    """``count`` adapters that differ in seed, and so in start and order of the rows, and in learning rate."""
    text = _RECIPE.format(
        base=base, weights=chosen.weights, compute=chosen.compute, steps=chosen.skip + chosen.steps, tokens=tokens,
        length=tokens if chosen.wide else min(tokens, 256), folder=folder,
    )  # fmt: skip
    for number in range(count):
        rate = 0.0002 * (number + 1)
        text += f"  - {{name: {NAMES[number]}, train: {{seed: {number}, learning_rate: {rate:.4f}}}}}\n"
    path = folder / f"{count}-{tokens}.yaml"
    path.write_text(text)
    return path


def contestant(recipe: Path, overrides: list[str], folder: Path) -> dict[str, Any]:
    """One process: what it says of its steps, and what it took as a whole."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--child", str(recipe), str(result), *overrides],
        cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode or not result.exists():
        raise SystemExit(f"{recipe.name} {overrides} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found: dict[str, Any] = json.loads(result.read_text())
    return found | {"process_seconds": wall, "process_cpu_seconds": cpu}


def child(recipe: Path, result: Path, overrides: list[str]) -> None:
    """Train as ``finetune train`` does, without its files, and write down every step."""
    from finetune import prepare
    from finetune.hardware import memory_in_use

    prepared = prepare.prepare_all(recipe, overrides)
    seconds, cpu, losses = [], [], []
    last = (time.perf_counter(), time.process_time())
    for step in _joint(prepared) if len(prepared) > 1 else _single(prepared[0]):
        now = (time.perf_counter(), time.process_time())
        seconds.append(now[0] - last[0])
        cpu.append(now[1] - last[1])
        losses.append(step)
        last = (time.perf_counter(), time.process_time())
    first = prepared[0].plan
    found = {
        "seconds": seconds, "cpu_seconds": cpu, "losses": losses, "memory": memory_in_use(),
        "tokens": {one.located.name: (one.plan.tokens or 0) / len(seconds) for one in prepared},
        "compute": first.compute, "recompute": first.recompute, "micro_batch_tokens": first.micro_batch_tokens,
    }  # fmt: skip
    result.write_text(json.dumps(found))


def _single(prepared: Any) -> Iterator[dict[str, float]]:
    from finetune import loop, model
    from finetune import train as training
    from finetune.objectives import sft
    from finetune.run import Run
    from finetune.terminal import Terminal

    run = Run(prepared, Terminal(quiet=True), digests={})
    course = run.course()
    policy = training.attach(run, model.load_base(run.base, run.form()))
    training.recompute(run, policy)
    optimizer, _ = training.optimizer_of(run, policy)
    for event in loop.run(policy, sft, run.samples, course, optimizer):
        yield {prepared.located.name: event.loss}


def _joint(prepared: Any) -> Iterator[dict[str, float]]:
    from finetune import lockstep, model, shared_base
    from finetune import train as training
    from finetune.objectives import sft
    from finetune.run import Run
    from finetune.terminal import Terminal

    runs = [Run(one, Terminal(quiet=True), digests={}) for one in prepared]
    base = model.load_base(runs[0].base, runs[0].form())
    members = []
    for run in runs:
        policy = training.attach(run, shared_base.view(base))
        members.append(
            lockstep.Member(
                name=run.prepared.located.name, policy=policy, examples=run.samples, course=run.course(),
                optimizer=training.optimizer_of(run, policy)[0],
            )
        )  # fmt: skip
    joint = shared_base.join(base, [member.policy for member in members])
    training.recompute(runs[0], joint.policy)
    for done in lockstep.run(joint, sft, members):
        yield {name: event.loss for name, event in done.items()}


def measure(chosen: Options, base: Path, folder: Path, count: int, tokens: int) -> dict[str, Any]:
    """All rounds of one size: the joint run, then each adapter alone; every other round the other way round."""
    recipe = write_recipe(chosen, base, folder, count, tokens)
    rounds = []
    for number in range(chosen.rounds):
        turns = ["", *NAMES[:count]]
        found = {}
        for name in turns if number % 2 == 0 else reversed(turns):
            found[name or "together"] = contestant(recipe, [f"adapters={name}"] if name else [], folder)
        rounds.append(found)
        one = ratios(chosen.skip, found)
        print(
            f"{count} adapters, {tokens} tokens, round {number + 1}/{chosen.rounds}: "
            + "  ".join(f"{key} {value:.2f}" for key, value in one.items()),
            flush=True,
        )
    every = [ratios(chosen.skip, found) for found in rounds]
    summary = {key: _spread([one[key] for one in every]) for key in every[0]}
    return {"adapters": count, "tokens": tokens, "ratios": summary, "rounds": rounds, "apart": _apart(rounds[0])}


def ratios(skip: int, found: dict[str, Any]) -> dict[str, float]:
    """Joint time ÷ the sum of the single runs' times: of the steps that count, and of whole processes."""
    joint, alone = found["together"], [one for name, one in found.items() if name != "together"]

    def steps(one: dict[str, Any], key: str) -> float:
        return float(sum(one[key][skip:]))

    return {
        "steps": steps(joint, "seconds") / sum(steps(one, "seconds") for one in alone),
        "steps_cpu": steps(joint, "cpu_seconds") / sum(steps(one, "cpu_seconds") for one in alone),
        "whole": joint["process_seconds"] / sum(one["process_seconds"] for one in alone),
        "whole_cpu": joint["process_cpu_seconds"] / sum(one["process_cpu_seconds"] for one in alone),
        "memory": joint["memory"] / max(one["memory"] for one in alone),
    }


def _apart(found: dict[str, Any]) -> float:
    """The largest relative difference of a step's loss from the single run's: rounding, and what it grows to."""
    return max(
        abs(step[name] - own[name]) / own[name]
        for name in found
        if name != "together"
        for step, own in zip(found["together"]["losses"], found[name]["losses"], strict=True)
    )


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| adapters | tokens each | steps | steps, processor time | whole runs | memory |",
        "|---|---|---|---|---|---|",
    ]
    spread = "**{median:.2f}** ({min:.2f}–{max:.2f})"
    for one in results:
        cells = [spread.format(**one["ratios"][key]) for key in ("steps", "steps_cpu", "whole", "memory")]
        lines.append(f"| {one['adapters']} | {one['tokens']} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    from finetune import hardware

    chosen = options()
    machine, load, began = hardware.detect(), os.getloadavg(), datetime.now(UTC)
    if load[0] > 0.25 * (os.cpu_count() or 1):
        print(f"this machine is busy (load {load[0]:.1f}): the timings will be worth little", file=sys.stderr)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = base_folder(chosen, folder)
        results = [
            measure(chosen, base, folder, count, tokens) for tokens in chosen.tokens for count in chosen.adapters
        ]
    record = {
        "began": began.isoformat(timespec="seconds"), "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]), "hardware": machine.to_dict(),
        "python": sys.version.split()[0], "load_before": load, "load_after": os.getloadavg(),
        "environment": ENVIRONMENT, "versions": {name: version(name) for name in PACKAGES},
        "base": "random, width 2048, 4 layers" if chosen.wide else str(base), "weights": chosen.weights,
        "results": results,
    }  # fmt: skip
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / f"together{'-wide' if chosen.wide else ''}-{began:%Y-%m-%d}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(["", f"{machine.name}, {machine.threads} threads, {machine.instruction_set}", "", *table(results)]))
    print(f"\nloss of a step, joint against single, at most {max(one['apart'] for one in results):.0e} apart")
    print(f"written to {path}")
    return 0 if all(one["ratios"]["steps"]["median"] <= TARGET for one in results) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
        raise SystemExit(0)
    raise SystemExit(main())
