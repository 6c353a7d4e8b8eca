"""What must hold of ``evaluate.keep`` and early stopping: they choose among evaluations, so there must be some."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune.recipe import objective_keys
from finetune.recipe.words import Finding, shown


def check(tree: dict[str, Any]) -> Iterator[Finding]:
    """Every fault of the section's choice; values of a wrong type are somebody else's to report."""
    section, train = tree.get("evaluate"), tree.get("train")
    if not isinstance(section, dict):
        return
    wanted = [
        key for key, used in (
            ("keep", section.get("keep") == "best"),
            ("early_stopping_patience", section.get("early_stopping_patience") is not None),
        ) if used
    ]  # fmt: skip
    if not wanted:
        return
    at = ("evaluate", wanted[0])
    every, steps = section.get("every", 0), train.get("steps") if isinstance(train, dict) else None
    if every in (0, None):
        yield Finding(
            at, "nothing is judged on the way: evaluate.every is 0", "set it to the steps between evaluations"
        )
    elif isinstance(every, int) and isinstance(steps, int) and every >= steps:
        what = f"nothing is judged on the way: evaluate.every is {every}, train.steps is {steps}"
        yield Finding(at, what, "lower evaluate.every")
    by, metrics = section.get("best_by", "loss"), section.get("metrics", ["loss"])
    measured = [*metrics, *objective_keys.scores(tree)] if isinstance(metrics, list) else []
    if isinstance(by, str) and isinstance(metrics, list) and by not in measured:
        named = ", ".join(str(one) for one in measured)
        fix = f"name one that is ({named}), or add it to evaluate.metrics"
        yield Finding(("evaluate", "best_by"), f"{shown(by)} is not measured", fix)
