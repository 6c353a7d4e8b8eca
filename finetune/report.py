"""A plan as text: what will be trained, at what cost, what was chosen and what was not checked; and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from finetune import scores
from finetune.joint_plan import JointPlan
from finetune.plan import Plan
from finetune.runfolder import RunFolder, read_json
from finetune.terminal import amount, duration, size


def plan_lines(plan: Plan) -> list[str]:
    """The plan, ready to print."""
    lines = [
        *_base(plan),
        "",
        f"{'target':<12}{'modules':>8}{'shape':>16}{'base':>12}{'adapter':>12}{'in fp32':>10}",
    ]
    for target in plan.targets:
        shape = f"{target.shape[0]}×{target.shape[1]}" if target.base_parameters else ""
        lines.append(
            f"{target.module:<12}{target.count:>8}{shape:>16}{amount(target.base_parameters):>12}"
            f"{amount(target.adapter_parameters):>12}{size(target.adapter_parameters * 4):>10}"
        )
    lines += ["", *_memory(plan), "", *_course(plan)]
    lines += [f"note       {note}" for note in plan.notes]
    lines += [f"unchecked  {what}" for what in plan.unchecked]
    return lines


def _base(plan: Plan) -> list[str]:
    return [
        f"model      {plan.model} ({plan.family}, {amount(plan.parameters)} parameters)",
        f"device     {plan.device_name} ({plan.device}), {size(plan.free_memory)} free",
        f"base       {plan.weights}{' double' if plan.double and plan.weights in ('nf4', 'fp4') else ''}, "
        f"products in {plan.compute}{' with loss scaling' if plan.loss_scaling else ''}",
    ]


def joint_lines(joint: JointPlan) -> list[str]:
    """The plan of several adapters over one base: what they share, then each, then what all take."""
    plans = joint.plans
    first = next(iter(plans.values()))
    lines = [*_base(first), "", f"{len(plans)} adapters over this base, in one run"]
    for name, plan in plans.items():
        kinds = ", ".join(target.module for target in plan.targets)
        lines += [
            "",
            f"adapter    {name}: {amount(plan.trainable)} parameters, {size(plan.trainable * 4)} in fp32, on {kinds}",
            *_course(plan),
        ]
    lines += ["", *_memory(first), "           of all adapters together, the base once"]
    lines.append(f"batches    at most {sum(plan.micro_batch_tokens for plan in plans.values())} tokens of all at once")
    if all(plan.seconds is not None for plan in plans.values()):
        seconds = sum(plan.seconds or 0.0 for plan in plans.values())
        lines.append(f"time       at most {duration(seconds)} (predicted: that of the runs one after the other)")
    for label, every in (("note", [plan.notes for plan in plans.values()]),
                         ("unchecked", [plan.unchecked for plan in plans.values()])):  # fmt: skip
        lines += [f"{label:<11}{said}" for said in _told(list(plans), every)]
    return lines


def _told(names: list[str], every: list[tuple[str, ...]]) -> list[str]:
    """What is said of all of them once, of some with their names."""
    found = dict.fromkeys(one for said in every for one in said)
    whose = {one: [name for name, said in zip(names, every, strict=True) if one in said] for one in found}
    return [one if len(whose[one]) == len(names) else f"{', '.join(whose[one])}: {one}" for one in found]


def _memory(plan: Plan) -> list[str]:
    budget = plan.budget
    parts = [
        f"{name} {size(value)}"
        for name in (
            "weights",
            "teacher",
            "adapter",
            "gradients",
            "optimizer",
            "activations",
            "head",
            "generation",
            "overhead",
        )
        if (value := getattr(budget, name))
    ]
    return [f"memory     {size(budget.total)} predicted peak", f"           {', '.join(parts)}"]


def recomputed(plan: Plan) -> str:
    """What the backward pass computes again, in words."""
    if plan.recompute == "none":
        return "nothing recomputed"
    where = ", their inputs in the machine's memory" if plan.recompute == "offload" else ""
    return f"{plan.recomputed_layers} layers recomputed{where}"


def _course(plan: Plan) -> list[str]:
    steps = "steps unknown" if plan.steps is None else f"{plan.steps} steps"
    tokens = "" if plan.tokens is None else f", {plan.samples} {plan.counted}, {plan.tokens:,} tokens"
    supervised = "" if plan.supervised_tokens is None else f" ({plan.supervised_tokens:,} supervised)"
    time = "unknown" if plan.seconds is None else f"about {duration(plan.seconds)} (predicted)"
    return [
        f"course     {steps}{tokens}{supervised}",
        f"batches    at most {plan.micro_batch_tokens} tokens at once, {recomputed(plan)}",
        f"time       {time}",
        f"writes     {plan.output}: checkpoints and adapter, up to {size(plan.output_bytes)}",
    ]


def summary_lines(folder: Path, seconds: float) -> list[str]:
    """What happened, where things lie, and what to type next."""
    files, note = RunFolder(folder), read_json(folder / "merged" / "finetune.json") or {}
    lines = ["", f"done in {duration(seconds)}: trained, judged, merged and proven", *scores.table(scores.read(files))]
    if "proof" in note:
        mean, bound = note["proof"]["mean_kl"], note["proof"]["bound"]
        lines.append(f"merged against live: mean KL {mean:.1e} nats (at most {bound:.0e})")
    places = {"adapter": files.adapter, "merged": folder / "merged", "curves": files.metrics, "answers": files.samples}
    lines += [f"{name:<12}{path}" for name, path in places.items()]
    following = (f"chat {folder}", f"dashboard {folder.parent}", "plan recipes/qwen2.5-14b-qlora-24gb.yaml")
    return [*lines, "next:", *(f"  .venv/bin/finetune {command}" for command in following)]


def say_plan(plans: Mapping[str, Plan], say: Callable[[str], None]) -> Plan | JointPlan:
    """Tell the plan of a run, or of several adapters' by name as one; which that is."""
    made = next(iter(plans.values())) if len(plans) == 1 else JointPlan(plans=dict(plans))
    for line in plan_lines(made) if isinstance(made, Plan) else joint_lines(made):
        say(line)
    return made
