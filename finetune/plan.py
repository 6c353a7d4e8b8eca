"""Recipe + base + machine + lengths of the samples → Plan: every ``auto`` a number, memory and time predicted.

Arithmetic only: nothing is loaded, so that the answer comes before anything is paid for. What was resolved here is
what the run uses, and what a resumed run uses again.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetune import budget, fitting, forms, optimizer, schedule, speed, targets
from finetune.budget import Beside, Budget, Load, Need, Pass
from finetune.decoder import DecoderShape
from finetune.errors import EnvironmentFault, RecipeError
from finetune.hardware import Hardware
from finetune.optimizer import Tensors
from finetune.recipe import Located, Recipe, adapter_methods, adapter_source
from finetune.recipe.objective_keys import extra_passes
from finetune.schedule import Part
from finetune.speed import Work
from finetune.targets import Target
from finetune.terminal import clean, size


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be done, in numbers."""

    model: str
    family: str
    parameters: int
    device: str
    device_name: str
    weights: str
    double: bool
    compute: str
    loss_scaling: bool
    recompute: str
    recomputed_layers: int
    micro_batch_tokens: int
    steps: int | None
    samples: int | None
    counted: str
    """What its samples are: samples, pairs or prompts, whose tokens are those of all answers to them, at most."""
    tokens: int | None
    supervised_tokens: int | None
    targets: tuple[Target, ...]
    whole_parameters: int
    frozen_parameters: int
    """Of the adapter's, those that the optimizer leaves as they begin: LoRA-FA's A."""
    adapter_fields: dict[str, Any]
    budget: Budget
    free_memory: int
    seconds: float | None
    output: str
    output_bytes: int
    notes: tuple[str, ...]
    unchecked: tuple[str, ...]

    @property
    def trainable(self) -> int:
        adapter = sum(target.adapter_parameters for target in self.targets)
        return adapter + self.whole_parameters - self.frozen_parameters

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"memory": self.budget.total, "trainable_parameters": self.trainable}


def course_steps(recipe: Recipe, lengths: Sequence[int], parts: Sequence[Part] = ()) -> list[tuple[int, ...]]:
    """The samples of every step. ``parts``: whose samples they are."""
    train = recipe.train
    return schedule.steps(
        lengths, train.seed, count=train.steps, epochs=train.epochs,
        examples=train.examples_per_step, tokens=train.tokens_per_step, parts=parts,
    )  # fmt: skip


def shares(load: Load, chosen: Sequence[int]) -> list[str]:
    """What each of several sources gives to the course, in words."""
    if len(load.parts) < 2:
        return []
    bounds = list(itertools.accumulate(part.samples for part in load.parts))
    drawn, tokens = [0] * len(bounds), [0] * len(bounds)
    for index in chosen:
        source = bisect.bisect_right(bounds, index)
        drawn[source] += 1
        tokens[source] += load.lengths[index]
    said = []
    for part, rows, count in zip(load.parts, drawn, tokens, strict=True):
        asked = "" if part.share is None else f" ({part.share:.1%} asked)"
        share = count / max(1, sum(tokens))
        said.append(f"{part.name} gives {share:.1%} of the tokens{asked}: {rows / part.samples:.2f} passes over it")
    return said


def compute_dtype(recipe: Recipe, hardware: Hardware) -> str:
    """``auto``: bf16 where the device has it, fp16 (with loss scaling) on older cards, fp32 on other processors."""
    if recipe.quantize.compute != "auto":
        return recipe.quantize.compute
    if recipe.quantize.weights in budget.BYTES:
        return recipe.quantize.weights
    if hardware.bf16:
        return "bf16"
    return "fp16" if hardware.device == "cuda" else "fp32"


def make(
    located: Located, shape: DecoderShape, hardware: Hardware, load: Load | None, *, must_fit: bool,
    notes: Sequence[str] = (), unchecked: Sequence[str] = (), rows: dict[str, list[int]] | None = None,
    beside: Beside | None = None, processes: int = 1,
) -> Plan:  # fmt: skip
    """Resolve a recipe for one machine, or each of ``processes``. ``rows``: ids of trained rows, by their module;
    ``beside``: who teaches.

    Raises:
        RecipeError: targets that match nothing, or a window beyond the model's positions.
        EnvironmentFault: a base that is on the disk does not fit this machine's memory.
    """
    recipe = located.recipe
    selection = targets.select(located, shape)
    if recipe.train.max_length > shape.max_positions:
        what = f"{recipe.train.max_length} is more than the model's {shape.max_positions} positions"
        raise RecipeError(what, located.where("train.max_length"), _longer(shape, recipe.rope))
    need = need_of(located, shape, hardware, load, rows, beside, processes)
    compute, tensors = need.compute, need.tensors
    steps = course_steps(recipe, load.lengths, load.parts) if load else None
    taken, seen = speed.as_sampled(recipe, steps, load) if load and steps else (steps, load)
    fitted = fitting.fit(need, _step_tokens(recipe, taken, seen))
    done = speed.work(taken, seen, fitted.micro_batch_tokens) if seen and taken else None
    offload, full = fitted.recompute == "offload", fitted.micro_batch_tokens
    memory = predicted(need, fitted.layers, offload, done, full)
    kind = recipe.train.optimizer
    whole = selection.whole + shape.hidden * sum(map(len, (rows or {}).values()))
    said = [f"PEFT says: {clean(one)}" for one in selection.said]
    said += [f"modules_to_save: {selection.whole:,} parameters are trained whole, in fp32"] if selection.whole else []
    remarks = [*notes, *said, *_remarks(recipe, hardware, compute), *optimizer.notes(kind, tensors, hardware.device),
               *_may_end_early(recipe), *_aim(recipe), *_shards(need, processes)]  # fmt: skip
    if memory.total > hardware.free_memory * budget.USABLE + memory.overhead:
        usable = (hardware.free_memory * budget.USABLE + memory.overhead) / 1e9
        what = f"needs about {memory.total / 1e9:.1f} GB, at most {usable:.1f} GB can be used here"
        if must_fit:
            raise EnvironmentFault(what, f"memory of {hardware.name}", _smaller(recipe, processes))
        remarks.append(f"does not fit here: {what}")
    chosen = [index for step in steps for index in step] if steps and load else []
    remarks += shares(load, chosen) if load else []
    fields = targets.fields_of(recipe.adapter.method, dict(recipe.adapter.fields))
    fields |= {"trainable_token_indices": rows} if rows else {}
    return Plan(
        model=recipe.model, family=shape.family, parameters=shape.parameters(),
        device=hardware.device, device_name=hardware.name,
        weights=recipe.quantize.weights, double=recipe.quantize.double, compute=compute,
        loss_scaling=compute == "fp16", recompute=fitted.recompute,
        recomputed_layers=fitted.layers, micro_batch_tokens=fitted.micro_batch_tokens,
        steps=len(steps) if steps is not None else recipe.train.steps,
        samples=len(chosen) if load else None, tokens=_through(taken, seen.lengths) if seen else None,
        counted=recipe.objective.rows if recipe.objective.rows in ("pairs", "prompts") else "samples",
        supervised_tokens=_through(taken, seen.supervised) if seen else None,
        targets=selection.targets, whole_parameters=whole,
        frozen_parameters=sum(one.parameters for one in tensors if one.role == "A") if kind == "lora_fa" else 0,
        adapter_fields=fields,
        budget=memory, free_memory=hardware.free_memory,
        seconds=speed.seconds(need, fitted.layers, done) if done else None,
        output=recipe.output, output_bytes=output_bytes(recipe, tensors),
        notes=tuple(remarks), unchecked=(*unchecked, *_uncounted(selection, recipe)),
    )  # fmt: skip


def _through(steps: Sequence[Sequence[int]] | None, counts: Sequence[int]) -> int:
    """So many tokens go through the model in a course, by each sample's."""
    return sum(counts[index] for step in steps or () for index in step)


def _step_tokens(recipe: Recipe, steps: Sequence[Sequence[int]] | None, load: Load | None) -> int | None:
    """The most tokens that one step holds, where that is known."""
    if load and steps:
        return max(sum(load.lengths[index] for index in step) for step in steps)
    return fitting.step_tokens(recipe, load)


def predicted(need: Need, layers: int, offload: bool, done: Work | None, full: int) -> Budget:
    """Peak memory of a course's own micro-batches, or where they are not known of ``full`` tokens at once."""
    longest = min(full, need.recipe.train.max_length)
    heaviest = done.heaviest if done else Pass(tokens=full, supervised=full, longest=longest)
    return need.budget(heaviest, layers, offload=offload, passes=done.passes if done else None)


def need_of(
    located: Located, shape: DecoderShape, hardware: Hardware, load: Load | None, rows: dict[str, list[int]] | None,
    beside: Beside | None = None, processes: int = 1,
) -> Need:  # fmt: skip
    """What memory and time depend on. Raises RecipeError: targets that match nothing."""
    row_tensors = [Tensors("whole", shape.hidden * len(ids), 1) for ids in (rows or {}).values()]
    return Need(
        recipe=located.recipe, shape=shape, hardware=hardware, compute=compute_dtype(located.recipe, hardware),
        tensors=[*targets.select(located, shape).tensors, *row_tensors], load=load, beside=beside,
        shards=processes if located.recipe.train.shard == "fsdp" else 1,
    )  # fmt: skip


def _longer(shape: DecoderShape, rope: str | None) -> str:
    choice = ", or choose what lies beyond with `rope:`" if shape.family == "qwen1" and rope is None else ""
    return f"at most {shape.max_positions}{choice}"


def _smaller(recipe: Recipe, processes: int) -> str:
    """What takes less memory."""
    if processes > 1 and recipe.train.shard == "none":
        return "part the base among the processes: train.shard: fsdp"
    if recipe.train.micro_batch_tokens != "auto":
        return "lower train.micro_batch_tokens, or leave it at auto"
    packed = recipe.quantize.weights in forms.HELD
    return f"lower train.max_length, or {'take a smaller model' if packed else 'use quantize nf4'}"


def _shards(need: Need, processes: int) -> list[str]:
    """What several processes hold each, and what they send one another."""
    if processes == 1:
        return []
    if need.shards == 1:
        return [f"memory is that of each of {processes} processes, which holds the whole base; time is that of one"]
    quantize, shape = need.recipe.quantize, need.shape
    scales = budget.weight_bytes(quantize.weights, quantize.double, need.compute, shape, need.hardware.device)
    linear = shape.linear_parameters() * (0.5 if quantize.weights in ("nf4", "fp4") else budget.BYTES[need.compute])
    return [
        f"memory is that of each of {processes} processes, which holds 1/{processes} of the layers, "
        f"{size(linear / processes)} of {size(linear)}; embedding, head and scales, {size(scales - linear)}, and the "
        "adapter are whole on each",
        f"every pass of a micro-batch, forward or backward, brings each process {size(linear * (1 - 1 / processes))}, "
        "which the time above does not know",
    ]


def _aim(recipe: Recipe) -> list[str]:
    """What is learned from, where that is judged answers, and what they are compared with."""
    chosen = recipe.objective
    if chosen.method == "sft":
        return []
    said = {key: value for key, value in chosen.settings().items() if value is not None and key != "rewards"}
    settings = ", ".join(f"{key} {value}" for key, value in said.items())
    if chosen.method == "distill":
        return [f"objective {chosen.method} ({settings})"]
    referred = bool(chosen.beta) if chosen.method == "grpo" else extra_passes(chosen) > 0
    origin = recipe.adapter.start_from
    against = f"the adapter of {origin}" if origin else "the base without adapter"
    seen = f"the reference is {against}, looked at in each step: no second model" if referred else "no reference policy"
    parts = "a pair is a chosen and a rejected text, never parted; " if chosen.rows == "pairs" else ""
    if chosen.scored:
        seen = "a score head is trained beside the adapter, from zeros, and read at each text's last token"
    return [f"objective {chosen.method} ({settings}): {parts}{seen}"]


def _may_end_early(recipe: Recipe) -> list[str]:
    patience, every = recipe.evaluate.early_stopping_patience, recipe.evaluate.every
    said = f"after {patience} evaluations, one every {every} steps, without a better {recipe.evaluate.best_by}"
    return [] if patience is None else [f"the run may end early: steps and time are at most these; it ends {said}"]


def _uncounted(selection: targets.Selection, recipe: Recipe) -> list[str]:
    method = recipe.adapter.method
    return [] if selection.known else [f"how much {method} trains: PEFT must see the weights to know"]


def _remarks(recipe: Recipe, hardware: Hardware, compute: str) -> list[str]:
    found = []
    if hardware.device == "cpu":
        found.append("no CUDA card here: training runs on the CPU")
    if compute == "fp16":
        chosen = recipe.quantize.compute == "auto" and recipe.quantize.weights != "fp16"
        found.append(f"fp16 with loss scaling, {'since this device has no bf16' if chosen else 'as the recipe says'}")
    method, fields = recipe.adapter.method, recipe.adapter.fields
    found += adapter_methods.remarks(method, fields, recipe.quantize.weights, adapter_source.version())
    if method != "lora":
        found.append(f"{method} goes through PEFT's own forward; what that keeps in memory, plan --probe measures")
        return found
    start = adapter_methods.start_of(fields)
    if start in adapter_methods.OFF_BASE:
        found.append(f"{start}: the start is taken off beside the base; the finished adapter has twice the rank")
    reason = "DoRA" if fields.get("use_dora") else start if start in (*adapter_methods.OFF_BASE, "mica") else ""
    if reason:
        found.append(f"the fused LoRA step is off: {reason}; PEFT's own forward is used")
    return found


def output_bytes(recipe: Recipe, tensors: Sequence[Tensors]) -> int:
    """Checkpoints hold the adapter and the optimizer's state; one more is being written while the last are kept."""
    adapter = 4 * sum(one.parameters for one in tensors)
    saved = optimizer.saved_bytes(recipe.train.optimizer, tensors)
    best = adapter if recipe.evaluate.keep == "best" else 0
    return (recipe.train.keep_last + 1) * (adapter + saved) + adapter + best + 10_000_000
