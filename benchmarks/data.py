"""The data steps, side by side: `finetune`, `datasets` and TRL on the same made rows. See README.md here.

    .venv/bin/python benchmarks/data.py            # 6,000 rows, 5 rounds: some ten minutes
    .venv/bin/python benchmarks/data.py --quick    # does it run?

Run it from the repository's root, after `make base`, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

_ABOVE = str(Path(__file__).resolve().parents[1])
if _ABOVE not in sys.path:
    sys.path.insert(0, _ABOVE)  # a script's own folder is on the path, the package of contestants lies above it

from benchmarks.contestants import made_rows  # noqa: E402 — found only now
from benchmarks.contestants.rows import ENVIRONMENT, ROOT, Worker  # noqa: E402
from benchmarks.rounds import BASE, OURS, OWN, PEERS, SEED, WINDOW, Bench, Contestant, summed  # noqa: E402
from finetune import hardware  # noqa: E402
from finetune.terminal import size  # noqa: E402

PACKAGES = ("torch", "transformers", "tokenizers", "trl", "datasets", "pyarrow", "numpy", "rensa", "datasketch")
STEPS = (8, 64, 0)
"""Windows of tokens in one optimizer step; 0: the whole epoch at once."""


@dataclass(frozen=True, kw_only=True)
class Options:
    rows: int
    rounds: int
    many: int
    sections: tuple[str, ...]
    out: Path


def contest(task: str, *peers: tuple[str, str, dict[str, Any]], ours: dict[str, Any] | None = None) -> list[Contestant]:
    """`finetune` first, then (name, task, call) of each peer."""
    first = Contestant(name=OURS, module=OWN, task=task, call=ours or {})
    return [first, *(Contestant(name=name, module=PEERS, task=what, call=call) for name, what, call in peers)]


TOKENISE = contest(
    "tokenise",
    ("datasets.map, a row at a time", "mapped", {}),
    ("datasets.map, a row at a time, num_proc=2", "mapped", {"processes": 2}),
    ("datasets.map in batches, marked template", "mapped_in_batches", {}),
    ("TRL, assistant_only_loss", "trl", {"options": {"packing": False}}),
    ("TRL, dataset_num_proc=2", "trl", {"processes": 2, "options": {"packing": False}}),
    ("TRL, packing=True, dataset_num_proc=2", "trl", {"processes": 2, "options": {"packing": True}}),
)
CHECK = contest(
    "check",
    ("datasets.map of a hand-written check", "check", {}),
    ("datasets.map of a hand-written check, num_proc=2", "check", {"processes": 2}),
)
CHECK.append(
    Contestant(
        name="finetune, near copies and languages too", module=OWN, task="check", call={"options": {"all": True}}
    )
)


def same_work(bench: Bench) -> dict[str, Any]:
    """Whether everyone makes the same samples of the first rows: ids and marks, by digest; those that fit."""
    few = bench.folder / "few.jsonl"
    with bench.file.open(encoding="utf-8") as file:
        few.write_text("".join(line for line, _ in zip(file, range(500), strict=False)), encoding="utf-8")
    alone = [one for one in TOKENISE if not one.call.get("options", {}).get("packing")]
    made = {one.name: bench.ask(one, few, bench.cache(), digests=True)["found"]["digests"] for one in alone}
    ours = made[OURS]
    return {
        name: {"samples": len(found), "same": len(set(ours) & set(found)), "of": len(ours)}
        for name, found in made.items()
    }  # fmt: skip


def tokenise(bench: Bench) -> dict[str, Any]:
    return summed(bench.rounds("tokenise", TOKENISE, again=True), again=True) | {"same_work": same_work(bench)}


def check(bench: Bench) -> dict[str, Any]:
    return summed(bench.rounds("check", CHECK))


def many(bench: Bench) -> dict[str, Any]:
    """Once, in a process of its own: does memory stay bounded over very many rows?"""
    file = bench.folder / "many.jsonl"
    written = made_rows.multiply(bench.file, file, bench.many)
    with Worker(OWN, bench.folder / "many.log") as worker:
        few = worker.ask("check", {"file": str(bench.file)})
        found = worker.ask("check", {"file": str(file)})
    speed = bench.many / found["seconds"]
    print(f"check of {bench.many:,} rows: {speed:.0f} rows/s, peak {size(found['peak_memory'])}", flush=True)
    file.unlink()
    return found | {
        "rows": bench.many, "bytes": written, "rows_per_second": speed,
        "rows_per_cpu_second": bench.many / found["cpu_seconds"], "peak_memory_before": few["peak_memory"],
    }  # fmt: skip


def pack(bench: Bench) -> dict[str, Any]:
    """Steps and packs of one epoch against `pack_dataset`, over the same lengths."""
    lengths, laid = bench.folder / "lengths.json", bench.cache()
    bench.ask(Contestant(name=OURS, module=OWN, task="tokenise", call={"lengths": str(lengths)}), bench.file, laid)
    found = {"lengths": json.loads(lengths.read_text())}
    bench.workers[PEERS].ask("lay_out", {"folder": str(laid), "options": found})
    ours: list[tuple[str, dict[str, Any]]] = [(_step_name(step), {"step": step}) for step in STEPS]
    ours.append(("finetune, the epoch in one step, every sample read", {"step": 0, "read": True}))
    peers: list[tuple[str, dict[str, Any]]] = [
        ("TRL pack_dataset, bfd", {}),
        ("TRL pack_dataset, bfd, num_proc=2", {"processes": 2}),
        ("TRL pack_dataset, bfd, all rows in one batch", {"options": {"batch": len(found["lengths"])}}),
    ]
    contestants = [
        *(Contestant(name=name, module=OWN, task="pack", call={"options": found | how}) for name, how in ours),
        *(Contestant(name=name, module=PEERS, task="pack", call=call) for name, call in peers),
    ]
    results = [
        {one.name: bench.ask(one, bench.file, laid) for one in contestants} for _ in range(bench.turns)
    ]  # fmt: skip
    return summed(results, first=_step_name(STEPS[-1])) | {"samples": len(found["lengths"])}


def _step_name(step: int) -> str:
    return f"finetune, {step} windows a step" if step else "finetune, the epoch in one step"


def near(bench: Bench) -> dict[str, Any]:
    """The search for near copies, and how many of those that were planted it finds."""
    file = bench.folder / "planted.jsonl"
    planted = made_rows.plant(bench.file, file, share=0.05, seed=SEED)
    against = [("datasketch MinHashLSH", "rows_datasketch", "near")] if find_spec("datasketch") else []
    contestants = [
        Contestant(name=name, module=module, task=task, call={})
        for name, module, task in [(OURS, OWN, "near"), *against]
    ]
    if not against:
        print("datasketch is not installed: near copies are searched for without a peer", file=sys.stderr)
    found = summed([
        {one.name: bench.ask(one, file, bench.folder) for one in contestants} for _ in range(bench.turns)
    ])  # fmt: skip
    found["samples"] = bench.count + len(planted)
    for results in found["rounds"]:
        for result in results.values():
            result["found"] = made_rows.judge(file, planted, result["found"]["pairs"])
    return found


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "tokenise": tokenise, "check": check, "many": many, "pack": pack, "near": near,
}  # fmt: skip


def table(name: str, found: dict[str, Any], count: int) -> list[str]:
    """One section as a Markdown table: ratios first, absolute values as context."""
    if "ratios" not in found:
        return []
    lines = [
        "",
        f"| {name} | speed, times | processor time, times | second opening, times | rows/s | fill |",
        "|---|---|---|---|---|---|",
    ]
    for one, ratio in found["ratios"].items():
        cells = [
            "**{median:.2f}** ({min:.2f}–{max:.2f})".format(**ratio[key])
            if key in ratio and one != found["first"]
            else ""
            for key in ("seconds", "cpu_seconds", "again")
        ]
        speed = found.get("samples", count) / median(each[one]["seconds"] for each in found["rounds"])
        fill = found["rounds"][0][one]["found"].get("fill")
        lines.append(f"| {one} | {' | '.join(cells)} | {speed:,.0f} | {f'{fill:.1%}' if fill else ''} |")
    return lines


def options() -> Options:
    parser = argparse.ArgumentParser(description="Measure the data steps of finetune, datasets and TRL side by side.")
    parser.add_argument("--rows", type=int, default=6000, help="made rows (default 6,000)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contestant runs, in turns (default 5)")
    parser.add_argument("--many", type=int, default=1_000_000, help="rows of the one large check (default 1,000,000)")
    parser.add_argument("--quick", action="store_true", help="few rows, two rounds")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS], default=[*SECTIONS], help="some sections alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the result file")
    given = parser.parse_args()
    if given.quick:
        given.rows, given.rounds, given.many = min(given.rows, 1000), min(given.rounds, 2), min(given.many, 20_000)
    if min(given.rows, given.rounds, given.many) < 1:
        parser.error("--rows, --rounds and --many must be at least 1")
    return Options(
        rows=given.rows, rounds=given.rounds, many=given.many, sections=tuple(given.only), out=given.out
    )  # fmt: skip


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> int:
    chosen = options()
    if find_spec("trl") is None:
        raise SystemExit('TRL is not installed: pip install "finetune-qwen[bench]" (or: make bench)')
    if not (ROOT / BASE / "tokenizer.json").is_file():
        raise SystemExit(f"{BASE} is not on this disk: make base")
    machine, load, began = hardware.detect(), os.getloadavg(), datetime.now(UTC)
    if load[0] > 0.25 * (os.cpu_count() or 1):
        print(f"this machine is busy (load {load[0]:.1f}): only the ratios say something", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(chosen.rows, chosen.rounds, chosen.many, Path(folder))
        results = {name: SECTIONS[name](bench) for name in chosen.sections}
        bench.close()
    record = {
        "began": began.isoformat(timespec="seconds"), "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]), "options": asdict(chosen) | {"out": ""},
        "hardware": machine.to_dict(), "cores": os.cpu_count(), "python": sys.version.split()[0], "load_before": load,
        "load_after": os.getloadavg(), "environment": ENVIRONMENT, "versions": _versions(), "window": WINDOW,
        "base": BASE, "rows": bench.made, "results": results,
    }  # fmt: skip
    chosen.out.mkdir(parents=True, exist_ok=True)
    name = "".join(sign if sign.isalnum() else "-" for sign in machine.name.lower()).strip("-")
    path = chosen.out / f"data-{began:%Y-%m-%d}-{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{machine.name}, {os.cpu_count()} cores, {machine.instruction_set}")
    for one, found in results.items():
        print("\n".join(table(one, found, chosen.rows)))
    print(f"\nwritten to {path}")
    same = results.get("tokenise", {}).get("same_work", {})
    unlike = [one for one, made in same.items() if made["same"] < made["of"]]
    for one in unlike:
        print(f"{one} makes other samples of the same rows: its timing compares nothing", file=sys.stderr)
    return 1 if unlike else 0


if __name__ == "__main__":
    raise SystemExit(main())
