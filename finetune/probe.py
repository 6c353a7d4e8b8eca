"""A plan checked by doing a little of it: two optimizer steps on the heaviest micro-batch of the course.

Nothing is written, and the adapter is thrown away. What was measured corrects the plan's totals.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from finetune import hardware, loop, model, plan, speed, starts, teacher, teaching
from finetune import optimizer as optimizers
from finetune.errors import EnvironmentFault, ModelError, RecipeError
from finetune.fallback import Setting
from finetune.loading import BaseForm
from finetune.loop import Course
from finetune.model import Policy
from finetune.prepare import Prepared
from finetune.terminal import Terminal, duration, size


@dataclass(frozen=True, kw_only=True)
class Probed:
    """Bytes and seconds of the heaviest micro-batch, predicted and measured, and the plan's totals put right by them.

    On a card memory is what was allocated there; elsewhere it is the process's.
    """

    tokens: int
    predicted_memory: int
    measured_memory: int
    corrected_memory: int
    predicted_seconds: float | None
    measured_seconds: float
    corrected_seconds: float | None

    def lines(self) -> list[str]:
        said = f"{size(self.predicted_memory)} predicted, {size(self.measured_memory)} measured"
        step = "unknown" if self.predicted_seconds is None else f"{self.predicted_seconds:.2f} s"
        total = f", so about {duration(self.corrected_seconds)} in all" if self.corrected_seconds else ""
        return [
            f"probe      two steps of {self.tokens} tokens, the course's heaviest micro-batch",
            f"memory     {said}, so {size(self.corrected_memory)} in all",
            f"time       {step} predicted, {self.measured_seconds:.2f} s measured{total}",
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def probe(prepared: Prepared, terminal: Terminal) -> Probed:
    """Load the model and take two steps.

    Raises:
        ModelError: the base is not on this disk, or does not load.
        EnvironmentFault: the steps run out of memory.
    """
    chosen, base, load, samples = prepared.plan, prepared.base, prepared.load, prepared.samples
    if base is None or load is None or samples is None:
        fix = "bring it here first (finetune train does), or plan without --probe"
        raise ModelError("the weights are not on this disk", chosen.model, fix)
    if prepared.recipe.objective.rows == "prompts":
        what = "what grpo puts through the model it must first sample"
        raise RecipeError(what, prepared.located.where("objective.method"), "plan without --probe")
    setting = Setting(
        recompute=chosen.recompute, recomputed_layers=chosen.recomputed_layers,
        micro_batch_tokens=chosen.micro_batch_tokens,
    )  # fmt: skip
    steps = plan.course_steps(prepared.recipe, load.lengths, load.parts)
    heaviest = speed.work(steps, load, setting.micro_batch_tokens).samples
    done = speed.work([heaviest], load, setting.micro_batch_tokens)
    rows = chosen.adapter_fields.get("trainable_token_indices")
    need = plan.need_of(
        prepared.located, base.shape, prepared.hardware, load, rows, teaching.beside(prepared.teacher, base.shape)
    )
    predicted = plan.predicted(need, setting.recomputed_layers, setting.recompute == "offload", done, 0)
    terminal.say(f"loading {chosen.model} as {chosen.weights} on {chosen.device_name}")
    form = BaseForm(weights=chosen.weights, double=chosen.double, compute=chosen.compute, device=chosen.device)
    measured, seconds = _measure(prepared, model.load_base(base, form), form, setting, heaviest)
    expected = speed.training_seconds(need, setting.recomputed_layers, done)
    return Probed(
        tokens=done.heaviest.tokens, predicted_memory=predicted.training, measured_memory=measured,
        corrected_memory=chosen.budget.total + measured - predicted.training,
        predicted_seconds=expected, measured_seconds=seconds,
        corrected_seconds=chosen.seconds * seconds / expected if chosen.seconds and expected else None,
    )  # fmt: skip


def _measure(
    prepared: Prepared, policy: Policy, form: BaseForm, setting: Setting, samples: tuple[int, ...]
) -> tuple[int, float]:
    """(peak bytes over both steps, seconds of the second)."""
    wanted, chosen = prepared.recipe.train, prepared.plan
    assert prepared.samples is not None
    said = None if prepared.teacher is None else teacher.load(prepared.teacher, policy, form, Terminal(silent=True))
    method = prepared.recipe.adapter.method
    fields = starts.plain(chosen.adapter_fields) if method == "lora" else chosen.adapter_fields
    policy = model.attach(
        policy,
        fields,
        wanted.seed,
        method=method,
        kernels=wanted.kernels != "off",
        compiled=wanted.compile is True,
    )
    policy = replace(policy, teacher=said)
    setting.apply(policy)
    optimizer = optimizers.make(
        policy.model, wanted.optimizer, weight_decay=wanted.weight_decay, lora_plus_ratio=wanted.lora_plus_ratio
    )
    course = Course(
        steps=(samples, samples), peak_rate=wanted.learning_rate, warmup=0, kind="constant", seed=wanted.seed,
        max_grad_norm=wanted.max_grad_norm, micro_batch_tokens=setting.micro_batch_tokens,
    )  # fmt: skip
    scaler = torch.amp.GradScaler(chosen.device) if chosen.loss_scaling else None
    hardware.forget_peak()
    try:
        *_, last = loop.run(policy, prepared.objective, prepared.samples, course, optimizer, 0, scaler)
    except torch.OutOfMemoryError as error:
        what = f"out of memory: {str(error).splitlines()[0]}"
        fix = "lower train.micro_batch_tokens, or leave it at auto"
        raise EnvironmentFault(what, "the heaviest micro-batch", fix) from None
    return hardware.peak_memory(), last.seconds
