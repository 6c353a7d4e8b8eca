"""Which PEFT method works on which base: every cell tried, and written down for readers and for `finetune plan`.

    python benchmarks/capabilities.py                       # all, or what is left of an interrupted one
    python benchmarks/capabilities.py --only loha --base nf4  # some cells again; the others stay as they were written

Writes docs/capabilities.json, the page docs/capabilities.md and finetune/recipe/capabilities.json (what a plan refuses
or says because of it). What has been tried is kept in runs/capabilities until all of it is.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on a hub
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.cells import CHECKS, WORKS, Row, attempt, rows  # noqa: E402
from finetune import hardware  # noqa: E402
from finetune.recipe import adapter_methods  # noqa: E402
from finetune.runfolder import write_json  # noqa: E402
from tests import packing  # noqa: E402

MATRIX = ROOT / "docs" / "capabilities.json"
PAGE = ROOT / "docs" / "capabilities.md"
TABLE = ROOT / "finetune" / "recipe" / "capabilities.json"
KEPT = ROOT / "runs" / "capabilities" / "cells.json"
_NEEDED = ("train", "resume", "export")
"""Without one of these a method is refused; one that only cannot be merged is trained with a remark."""
_SIGNS = {WORKS: "✓", "refused": "–", "fails": "✗"}

_BASES = {"bf16": "bfloat16", "gptq": "gptq", "awq": "awq"}
"""The tiny base that a form is tried on, where it is not the one in fp32."""

Matrix = dict[str, dict[str, dict[str, str]]]
"""name → base → check → verdict"""


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("peft", "torch", "transformers", "bitsandbytes")}


def table(matrix: Matrix, peft: str) -> dict[str, Any]:
    """What a plan must know of the matrix. What it refuses by itself need not be told to it."""
    refused: Matrix | dict[str, dict[str, str]] = {}
    unmerged: dict[str, dict[str, str]] = {}
    for name, bases in matrix.items():
        for base, cell in bases.items():
            if cell["train"].startswith("refused"):
                continue
            bad = next((cell[check] for check in _NEEDED if cell[check] != WORKS), "")
            if bad:
                refused.setdefault(name, {})[base] = bad.partition(": ")[2]
            elif cell["merge"] != WORKS:
                unmerged.setdefault(name, {})[base] = cell["merge"].partition(": ")[2]
    return {"peft": peft, "refused": refused, "unmerged": unmerged}


def page(matrix: Matrix, stamp: dict[str, Any]) -> str:
    """The matrix for readers: a sign for each check, then every reason."""
    made = ", ".join(f"{name} {number}" for name, number in stamp["versions"].items())
    bases = adapter_methods.TRIED
    lines = [_HEAD.format(made=made, date=stamp["date"], machine=stamp["machine"]).strip(), ""]
    lines += [f"| `adapter.method` | {' | '.join(bases)} |", f"|---|{'---|' * len(bases)}"]
    for name, cells in matrix.items():
        signs = (" ".join(_SIGNS[cells[base][check].partition(":")[0]] for check in CHECKS) for base in bases)
        lines.append(f"| {name} | {' | '.join(signs)} |")
    lines += ["", "## Reasons", ""]
    for name, cells in matrix.items():
        whose: dict[str, list[str]] = {}
        for base in bases:
            for check in CHECKS:
                if cells[base][check] != WORKS and cells[base][check] != "refused: it does not train":
                    whose.setdefault(f"{cells[base][check]}", []).append(f"{base} {check}")
        for reason, places in whose.items():
            lines.append(f"- **{name}**, {_shorter(places)}: {_plain(reason)}")
    return "\n".join(lines) + "\n"


_HEAD = """
# What works with what

Every PEFT method by its name in the recipe (`adapter.method`, or `lora` with one of its own fields), on a base held
in each number format. A cell is five checks, tried in this order by `make capabilities` over a tiny random Qwen2 with
the project's own verbs:

1. **train**: the loss falls in a few steps;
2. **resume**: a run interrupted half-way ends with the same bytes as an unbroken one;
3. **merge**: the merged model, loaded from the disk, is the live one (mean KL ≤ 1e-3);
4. **export**: transformers and PEFT alone load the exported adapter, over the base as it acts in training, and answer
   as the live model does (within a thousandth of the adapter's effect, in fp32);
5. **convert**: `finetune convert RUN OUT --to lora --rank R` at full rank does the same.

✓ works · ✗ tried, and fails · – refused. The reasons stand below. `finetune plan` refuses what fails to train, resume
or load elsewhere, with its reason; a method that only cannot be merged is trained, and the plan says so. `fp16` is
judged as `bf16`. Tried with {made} on {date}, on {machine}: [capabilities.json](capabilities.json) has every verdict.

All of it was tried on a CPU: int8 and the 4-bit forms are bitsandbytes' storage with this project's arithmetic
([decision 0002](decisions/0002-own-arithmetic-on-frozen-layers.md)). **Not yet run on a card.** Methods other than
LoRA see a quantised base through its dequantised weights; PEFT by itself knows few of them on 4 or 8 bits, so load
such an adapter on the 16-bit base, or merge it.
"""


def _shorter(places: list[str]) -> str:
    """``nf4 train`` … as few words as say it."""
    by_base: dict[str, list[str]] = {}
    for place in places:
        base, check = place.split()
        by_base.setdefault(base, []).append(check)
    same: dict[str, list[str]] = {}
    for base, checks in by_base.items():
        same.setdefault("all" if len(checks) == len(CHECKS) else ", ".join(checks), []).append(base)
    every = len(adapter_methods.TRIED)
    return "; ".join(
        f"{'every base' if len(bases) == every else ', '.join(bases)}{'' if checks == 'all' else f' ({checks})'}"
        for checks, bases in same.items()
    )


def _plain(reason: str) -> str:
    """Safe in a page: what a library says may hold characters that Markdown reads."""
    return (
        reason.replace("<", "‹")
        .replace(">", "›")
        .replace("`", "'")
        .replace("|", "/")
        .replace("[", "(")
        .replace("]", ")")
    )


def _try(name: str, base: str, scratch: Path) -> tuple[str, str, dict[str, str]]:
    """One cell, in a process of its own kind: one thread each, as many at once as there are processors."""
    # A former verdict must not decide this one.
    adapter_methods.tried = lambda: {"peft": version("peft"), "refused": {}, "unmerged": {}}  # type: ignore[assignment]
    import torch

    torch.set_num_threads(1)
    row = next(row for row in rows() if row.name == name)
    folder = scratch / f"{os.getpid()}"
    if not hasattr(hardware.detect, "cache_info"):  # measuring this machine's speed anew takes half of a cell's time
        hardware.detect = functools.cache(hardware.detect)  # type: ignore[assignment]
    return name, base, attempt(row, base, scratch / _BASES.get(base, "float32"), folder)


def try_all(asked: list[tuple[Row, str]], known: Matrix) -> Matrix:
    """Try the cells that are not known yet; each is kept as soon as it is tried."""
    from finetune import tiny_base

    began, left = time.monotonic(), [(row, base) for row, base in asked if base not in known.get(row.name, {})]
    with tempfile.TemporaryDirectory(prefix="finetune-capabilities-") as folder:
        scratch = Path(folder)
        for dtype in ("float32", "bfloat16") if left else ():
            tiny_base.build(scratch / dtype, dtype=dtype)
        for kind in ("gptq", "awq") if left else ():
            packing.pack_base(scratch / "float32", scratch / kind, kind)
        with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
            waiting = [pool.submit(_try, row.name, base, scratch) for row, base in left]
            for at, done in enumerate(as_completed(waiting), 1):
                name, base, cell = done.result()
                known.setdefault(name, {})[base] = cell
                KEPT.parent.mkdir(parents=True, exist_ok=True)
                write_json(KEPT, {"versions": versions(), "methods": known})
                eta = (time.monotonic() - began) / at * (len(left) - at)
                said = " ".join(_SIGNS[cell[check].partition(":")[0]] for check in CHECKS)
                print(f"{at}/{len(left)} {name} {base}: {said}   ETA {eta:.0f}s", flush=True)
    return known


def _kept() -> Matrix:
    """What an interrupted command has tried with these versions."""
    if not KEPT.is_file():
        return {}
    kept = json.loads(KEPT.read_text())
    return kept["methods"] if kept["versions"] == versions() else {}


def write(matrix: Matrix) -> None:
    """The three files."""
    from finetune import hardware

    machine = hardware.detect()
    stamp = {"versions": versions(), "date": datetime.now(UTC).date().isoformat(), "machine": machine.name}
    order = [row.name for row in rows()]
    ordered = {name: {base: matrix[name][base] for base in adapter_methods.TRIED} for name in order}
    _text(MATRIX, json.dumps(stamp | {"methods": ordered}, indent=1, ensure_ascii=False) + "\n")
    _text(PAGE, page(ordered, stamp))
    _text(TABLE, json.dumps(table(ordered, stamp["versions"]["peft"]), indent=1, ensure_ascii=False) + "\n")
    KEPT.unlink(missing_ok=True)
    print(f"written: {MATRIX.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}, {TABLE.relative_to(ROOT)}")


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--only", action="append", default=[], help="names that hold this text; may be repeated")
    words.add_argument("--base", choices=adapter_methods.TRIED)
    asked = words.parse_args()
    known = _kept()
    if asked.only or asked.base:
        known = json.loads(MATRIX.read_text())["methods"] | known
    wanted = [(row, base) for row in rows() for base in adapter_methods.TRIED]
    for row, base in wanted:
        named = any(text in row.name for text in asked.only or [""])
        if (asked.only or asked.base) and named and base == (asked.base or base):
            known.get(row.name, {}).pop(base, None)
    write(try_all(wanted, known))


if __name__ == "__main__":
    main()
