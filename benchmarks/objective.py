"""What an objective did to a real base, from a finished run's own files, as ``benchmarks/results/NAME-cpu.json``.

finetune train recipes/dates-reward.yaml && finetune merge runs/dates-reward --out runs/dates-reward/merged
python -m benchmarks.objective runs/dates-reward recipes/dates-reward.yaml > benchmarks/results/reward-cpu.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_FIGURES = ("loss", "reward", "logps/", "kl", "completions/", "frac_")


def record(run: Path, recipe: str) -> dict[str, Any]:
    """The scores, the first and the last step's figures, a merge's proof, and where it ran."""
    identity = json.loads((run / "identity.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    merged = run / "merged" / "finetune.json"
    return {
        "what": f"{recipe} over {identity['recipe']['model']}, {len(lines)} steps; beside other work: no time is told",
        "command": f"finetune train {recipe}",
        "scores": json.loads((run / "scores.json").read_text()),
        "first_step": _of(lines[0]),
        "last_step": _of(lines[-1]),
        **({"reward_by_step": [line["reward"] for line in lines]} if "reward" in lines[0] else {}),
        "merge_proof": json.loads(merged.read_text())["proof"] if merged.is_file() else None,
        "environment": identity["environment"],
    }


def _of(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key.startswith(_FIGURES)}


if __name__ == "__main__":
    print(json.dumps(record(Path(sys.argv[1]), sys.argv[2]), indent=1))
