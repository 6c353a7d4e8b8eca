"""What each objective of judged answers does to a real base and to a trained adapter, on held-out rows.

    .venv/bin/python benchmarks/preferences.py                   # after make quickstart: all of them, half an hour
    .venv/bin/python benchmarks/preferences.py orpo kto          # some; finished runs are taken as they are

Run it from the repository's root. Every run is its recipe, trained, merged and judged by the command line; what another
call measured stays in results/preferences-cpu.json. Labelled rows hold wrong answers too: those of the task are asked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "preferences-cpu.json"
SUPERVISED = "runs/quickstart"
ANSWERS = "data/dates/eval.jsonl"
METHODS = ("dpo", "orpo", "simpo", "kto")
FIGURES = (
    "loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected", "logps/chosen",
    "logps/rejected", "kl",
)  # fmt: skip
WHAT = (
    "recipes/dates-*.yaml on SmolLM2-135M-Instruct in NF4, 200 held-out rows, before, after and merged; two CPU cores "
    "beside other work, so that no time is told"
)


def runs() -> dict[str, list[str]]:
    """Name → the words of ``finetune train``: each method from the base, and gone on from the quickstart."""
    found: dict[str, list[str]] = {}
    for method in METHODS:
        recipe = f"recipes/dates-{method}.yaml"
        found[method] = [recipe]
        if method != "orpo":  # it learns the answer itself
            more = [f"adapter.start_from={SUPERVISED}", f"output=runs/dates-{method}-after"]
            found[f"{method}_after"] = [recipe, *(part for one in more for part in ("--set", one))]
    return found


def call(*words: str) -> str:
    """One command line; its standard output. Stops the script where it fails."""
    done = subprocess.run([sys.executable, "-m", "finetune", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"finetune {' '.join(words)} ended with {done.returncode}")
    return done.stdout


def measure(words: list[str]) -> dict[str, Any]:
    """Train, merge and judge one run; what came of it."""
    run = Path(json.loads(call("train", *words, "--json"))["runs"][0]["folder"])
    if not (ROOT / run / "merged").is_dir():
        call("merge", str(run), "--out", str(run / "merged"), "--json", "--quiet")
    scores, answers = json.loads((ROOT / run / "scores.json").read_text(encoding="utf-8")), {}
    if "exact_match" not in scores["after"]:  # labelled rows have no right answer: those of the task itself do
        more = ["--data", ANSWERS, "--set", "evaluate.metrics=[exact_match]"]
        asked = json.loads(call("eval", str(run / "merged"), *more, "--json", "--quiet"))
        answers = {"answers": {"rows": ANSWERS, **asked["scores"]}}
    steps = [json.loads(line) for line in (ROOT / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "command": f"finetune train {' '.join(words)}",
        "scores": scores,
        **answers,
        "first_step": {key: steps[0][key] for key in FIGURES if key in steps[0]},
        "last_step": {key: steps[-1][key] for key in FIGURES if key in steps[-1]},
        "environment": json.loads((ROOT / run / "identity.json").read_text(encoding="utf-8"))["environment"],
    }


def main() -> None:
    known = runs()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all where none is named")
    names = parser.parse_args().names or list(known)
    if unknown := set(names) - set(known):
        parser.error(f"no run is called {', '.join(sorted(unknown))}")
    for name in names:
        made = measure(known[name])
        stored = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
        stored = {"what": WHAT, "runs": {**stored.get("runs", {}), name: made}}
        OUT.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {json.dumps({key: value.get('preference_accuracy') for key, value in made['scores'].items()})}")


if __name__ == "__main__":
    main()
