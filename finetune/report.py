"""A plan as text: what will be trained, at what cost, what was chosen and what was not checked."""

from __future__ import annotations

from finetune.plan import Plan
from finetune.terminal import amount, duration, size


def plan_lines(plan: Plan) -> list[str]:
    """The plan, ready to print."""
    lines = [
        f"model      {plan.model} ({plan.family}, {amount(plan.parameters)} parameters)",
        f"device     {plan.device_name} ({plan.device}), {size(plan.free_memory)} free",
        f"base       {plan.weights}{' double' if plan.double and plan.weights in ('nf4', 'fp4') else ''}, "
        f"products in {plan.compute}{' with loss scaling' if plan.loss_scaling else ''}",
        "",
        f"{'target':<12}{'modules':>8}{'shape':>16}{'base':>12}{'adapter':>12}{'in fp32':>10}",
    ]
    for target in plan.targets:
        shape = f"{target.shape[0]}×{target.shape[1]}"
        lines.append(
            f"{target.module:<12}{target.count:>8}{shape:>16}{amount(target.base_parameters):>12}"
            f"{amount(target.adapter_parameters):>12}{size(target.adapter_parameters * 4):>10}"
        )
    lines += ["", *_memory(plan), "", *_course(plan)]
    lines += [f"note       {note}" for note in plan.notes]
    lines += [f"unchecked  {what}" for what in plan.unchecked]
    return lines


def _memory(plan: Plan) -> list[str]:
    budget = plan.budget
    parts = [
        f"{name} {size(value)}"
        for name in ("weights", "adapter", "gradients", "optimizer", "activations", "head", "generation", "overhead")
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
    tokens = "" if plan.tokens is None else f", {plan.samples} samples, {plan.tokens:,} tokens"
    supervised = "" if plan.supervised_tokens is None else f" ({plan.supervised_tokens:,} supervised)"
    time = "unknown" if plan.seconds is None else f"about {duration(plan.seconds)} (predicted)"
    return [
        f"course     {steps}{tokens}{supervised}",
        f"batches    at most {plan.micro_batch_tokens} tokens at once, {recomputed(plan)}",
        f"time       {time}",
        f"writes     {plan.output}: checkpoints and adapter, up to {size(plan.output_bytes)}",
    ]
