"""Forms of one base side by side: does the loss fall, what does it take, how far is a merged model from the live one?

    make bench-forms        # about five minutes at rest; results/forms-<device>.json

The quickstart's recipe, cut short, over the 135M base in 16 bits, in bitsandbytes' and torchao's forms, and packed in
the layouts of GPTQ and AWQ. Those two are packed here by plain rounding to the nearest, which no calibration helps:
their losses say that the layouts are read and trained over, and nothing of what the methods are worth.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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

BASE = ROOT / "data" / "bases" / "smollm2-135m-instruct"
STEPS, ROWS = 12, 32
PLACE = ROOT / "runs" / "forms"
"""Where packed bases are kept between calls."""
PACKED: dict[str, dict[str, Any]] = {
    "gptq": {"kind": "gptq", "group": 128},  # 576 inputs are four groups and a half: the last one is shorter
    "gptq desc_act": {"kind": "gptq", "group": 128, "desc_act": True},
    "awq": {"kind": "awq", "group": 64},  # AWQ has whole groups only, and 128 does not go into 576
}
FORMS = ("bf16", "nf4", "int8", "torchao_int8", *PACKED)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, merge and prove over each form of the base.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--form", action="append", choices=FORMS, help="these alone; the others stay as they were")
    given = parser.parse_args()
    from finetune import hardware

    machine = hardware.detect()
    path = given.out / f"forms-{machine.device}.json"
    known = json.loads(path.read_text())["forms"] if given.form and path.is_file() else {}
    for form in given.form or FORMS:
        known[form] = measure(form)
        print(form, json.dumps(known[form]), flush=True)
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "hardware": machine.to_dict(),
            "versions": hardware.environment(machine, "torchao"), "steps": STEPS, "rows": ROWS,
            "forms": {one: known[one] for one in FORMS if one in known},
        }  # fmt: skip
        given.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def measure(form: str) -> dict[str, Any]:
    """One form: trained, merged into the base as it acts, compared."""
    from tests import packing

    with tempfile.TemporaryDirectory(prefix="finetune-forms-") as scratch:
        place, base = Path(scratch), PLACE / form.replace(" ", "-") if form in PACKED else BASE
        if form in PACKED and not base.is_dir():
            shutil.rmtree(base.with_suffix(".part"), ignore_errors=True)
            packing.pack_base(BASE, base.with_suffix(".part"), **PACKED[form])
            base.with_suffix(".part").rename(base)
        run, merged = place / "run", place / "merged"
        sets = {
            "model": base, "quantize.weights": form.split()[0], "train.steps": STEPS, "train.save_every": STEPS,
            "train.warmup": 2, "evaluate.rows": ROWS, "evaluate.metrics": "[loss]", "tracker": "none", "output": run,
        }  # fmt: skip
        began = time.monotonic()
        peak = _finetune("train", "recipes/quickstart.yaml", *(f"--set={key}={value}" for key, value in sets.items()))
        trained = time.monotonic() - began
        _finetune("merge", str(run), "--out", str(merged), "--base", "replayed")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        scores, note = json.loads((run / "scores.json").read_text()), json.loads((merged / "finetune.json").read_text())
        plan = json.loads((run / "plan.json").read_text())
        shutil.rmtree(merged)
        names = ("before", "after", "merged")
        return {
            "folder_bytes": sum(path.stat().st_size for path in base.glob("*.safetensors")),
            "planned_weight_bytes": plan["budget"]["weights"], "planned_peak": plan["memory"], "peak": peak,
            "first_loss": lines[0]["loss"], "last_loss": lines[-1]["loss"],
            "held_out": {name: scores[name]["loss"] for name in names if name in scores},
            "train_seconds": round(trained, 1), "quantised_as": note["quantised_as"],
            **{key: note["proof"][key] for key in ("mean_kl", "max_kl", "agreement", "positions")},
        }  # fmt: skip


def _finetune(*arguments: str) -> int:
    """Run the command in a process of its own; → its peak memory in bytes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen([sys.executable, "-m", "finetune", *arguments], cwd=ROOT, env=environment)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"finetune {arguments[0]} ended with {child.returncode}")
    return used.ru_maxrss * 1024


if __name__ == "__main__":
    raise SystemExit(main())
