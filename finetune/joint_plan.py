"""Several adapters over one base, planned as one run: how the tokens of a pass are shared out, and what all take.

Each member keeps the plan of a run of its own, save for what the passes fix: tokens at once, recomputation, memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from finetune import budget, fitting
from finetune.budget import Budget, Load, Need, Pass
from finetune.decoder import DecoderShape
from finetune.errors import EnvironmentFault, Fault, RecipeError
from finetune.hardware import Hardware
from finetune.plan import Plan
from finetune.recipe import Located

_ALONE = "or train them one after the other: --set adapters=NAME"
_UNROUTABLE = {
    "use_dora": ("DoRA's norms need a pass of its own over the base's weights for each adapter", "set it to false"),
    "modules_to_save": (
        "a module that is trained whole cannot be shared, each adapter would need its own",
        "remove it",
    ),
}
"""Adapter fields that have no place in a pass of several: why, and what helps."""


class Member(NamedTuple):
    """One of the runs, with the plan that it would have alone."""

    located: Located
    plan: Plan
    shape: DecoderShape
    load: Load | None


@dataclass(frozen=True, kw_only=True)
class JointPlan:
    """The plans of all members by name; each has the budget of all."""

    plans: dict[str, Plan]

    @property
    def budget(self) -> Budget:
        return next(iter(self.plans.values())).budget

    def to_dict(self) -> dict[str, Any]:
        return {"adapters": {name: plan.to_dict() for name, plan in self.plans.items()}, "memory": self.budget.total}


def refuse_unroutable(runs: Sequence[Located], processes: int) -> None:
    """Raise RecipeError where an adapter has what only a pass of its own can give it, and for several processes."""
    if processes > 1:
        what = "several adapters are trained by one process"
        raise RecipeError(what, "--processes", "train one of them: --set adapters=NAME")
    if runs[0].recipe.train.kernels == "off":
        what = "without kernels each adapter goes through the base by itself, and nothing is shared"
        raise RecipeError(what, runs[0].where("train.kernels"), f"remove it, {_ALONE}")
    faults = [
        Fault(f"only LoRA's adapters can share a pass (adapter {run.name})", run.where("adapter.method"), _ALONE[3:])
        for run in runs
        if run.recipe.adapter.method != "lora"
    ]
    faults += [
        Fault(f"{why} (adapter {run.name})", run.where(f"adapter.{key}"), f"{fix}, {_ALONE}")
        for run in runs
        for key, (why, fix) in _UNROUTABLE.items()
        if run.recipe.adapter.fields.get(key)
    ]
    for run in runs:
        wanted = run.recipe.evaluate
        for key, used in (("keep", wanted.keep == "best"),
                          ("early_stopping_patience", wanted.early_stopping_patience is not None)):  # fmt: skip
            if used:
                what = f"several adapters are trained to their ends, and their last steps kept (adapter {run.name})"
                faults.append(Fault(what, run.where(f"evaluate.{key}"), f"remove it, {_ALONE}"))
    if (method := runs[0].recipe.objective.method) != "sft":
        what = f"several adapters in one pass are trained by sft alone, not by {method}"
        faults.append(Fault(what, runs[0].where("objective.method"), f"remove it, {_ALONE}"))
    if faults:
        raise RecipeError.of(faults)


def fit(members: Sequence[Member], hardware: Hardware, *, must_fit: bool) -> list[Plan]:
    """The members' plans for passes that hold rows of all of them.

    A pass has room for the longest example of each, and what is left is shared out once: no member's own split of its
    step depends on how many are still training.

    Raises:
        RecipeError: ``micro_batch_tokens`` is too small for that.
        EnvironmentFault: all together do not fit this machine's memory.
    """
    first = members[0]
    longest = sum(member.located.recipe.train.max_length for member in members)
    wanted = first.located.recipe.train.micro_batch_tokens
    if wanted != "auto" and wanted < longest:
        what = f"must hold one example of each of {len(members)} adapters ({longest}); found {wanted}"
        raise RecipeError(what, first.located.where("train.micro_batch_tokens"), f"raise it, {_ALONE}")
    steps = [fitting.step_tokens(member.located.recipe, member.load) for member in members]
    at_once = {
        "max_length": longest, "examples_per_step": None,
        "tokens_per_step": sum(found for found in steps if found) if all(steps) else None,
    }  # fmt: skip
    train = first.located.recipe.train.model_copy(update=at_once)
    recipe = first.located.recipe.model_copy(update={"train": train})
    budgets = [member.plan.budget for member in members]
    every = {name: sum(getattr(one, name) for one in budgets) for name in ("adapter", "gradients", "optimizer")}
    left = replace(hardware, free_memory=hardware.free_memory - int(sum(every.values()) / budget.USABLE))
    need = Need(
        recipe=recipe, shape=first.shape, hardware=left, compute=first.plan.compute, tensors=(), load=first.load
    )  # fmt: skip
    fitted = fitting.fit(need, train.tokens_per_step)
    full = min(fitted.micro_batch_tokens, train.tokens_per_step or fitted.micro_batch_tokens)
    all_rows = Pass(tokens=full, supervised=full, longest=longest)
    found = need.budget(all_rows, fitted.layers, offload=fitted.recompute == "offload")
    found = replace(found, generation=max(one.generation for one in budgets), **every)
    usable = hardware.free_memory * budget.USABLE + found.overhead
    if must_fit and found.total > usable:
        what = f"all adapters need about {found.total / 1e9:.1f} GB, at most {usable / 1e9:.1f} GB can be used here"
        raise EnvironmentFault(what, f"memory of {hardware.name}", f"lower train.max_length, {_ALONE}")
    shares = _shares(fitted.micro_batch_tokens - longest, members, steps)
    return [
        replace(
            member.plan, recompute=fitted.recompute, recomputed_layers=fitted.layers, budget=found,
            micro_batch_tokens=member.located.recipe.train.max_length + share,
        )
        for member, share in zip(members, shares, strict=True)
    ]  # fmt: skip


def _shares(spare: int, members: Sequence[Member], steps: Sequence[int | None]) -> list[int]:
    """The tokens of a pass beyond the longest examples, as each step needs them; evenly where that is unknown."""
    lacks = [
        max(0, step - member.located.recipe.train.max_length) if step else 1
        for member, step in zip(members, steps, strict=True)
    ]
    if not all(steps) or not sum(lacks):
        return [spare // len(members)] * len(members)
    return [spare * lack // sum(lacks) for lack in lacks]
