"""What transformers' Trainer reads, which every trainer that can be imported is built on: course, rates, saves, seed.

Facts of transformers 5.23 (`training_args.py`, `trainer.py`, `optimization.py`); where a trainer pins an older one, its
own file says what was otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.foreign import Course, Draft, short

OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "paged_adamw", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
STOPS = ("early_stopping_patience", "early_stopping_steps", "early_stop_interval")
"""What axolotl, LLaMA-Factory and ms-swift call the evaluations without improvement after which a run ends."""
TRACKERS = ("wandb", "trackio", "tensorboard", "mlflow")
_RATE = "the recipe's optimizers have betas 0.9 and 0.999 and eps 1e-8"


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a trainer calls the Trainer's arguments, and its defaults where they are others."""

    batch: str = "per_device_train_batch_size"
    epochs: str = "num_train_epochs"
    schedule: str = "lr_scheduler_type"
    optimizer: str = "optim"
    batch_default: int = 8
    accumulation_default: int = 1
    epochs_default: float = 3.0
    rate_default: float = 5e-5
    schedule_default: str = "linear"
    decay_default: float = 0.0
    beta2_default: float = 0.999
    optimizer_default: str = "adamw_torch_fused"
    report_default: str = "none"
    ratio: bool = True
    """Whether ``warmup_ratio`` is read; transformers 5 has it no more."""


def course(draft: Draft, names: Names, *, packed: int | None = None) -> None:
    """Steps, rows in a step, rates, saves and seed; ``packed``: the length to which rows are packed, if they are."""
    settings = draft.settings
    micro = settings.count(names.batch, names.batch_default)
    accumulation = settings.count("gradient_accumulation_steps", names.accumulation_default)
    steps = settings.count("max_steps", -1, least=-1)
    draft.course = Course(
        micro=micro, accumulation=accumulation, devices=settings.devices or 1, steps=steps if steps > 0 else None,
        epochs=settings.number(names.epochs, names.epochs_default), warmup=0.0, warmup_keys=("warmup_steps",),
        save=_every(draft, "save", "steps"), evaluate=_every(draft, "eval", "no"), packed=packed is not None,
        rounding=math.ceil,
    )  # fmt: skip
    if draft.course.epochs <= 0:
        settings.fault(names.epochs, f"must be above 0; found {short(draft.course.epochs)}")
        draft.course.epochs = names.epochs_default
    _length(draft, draft.course, names)
    _size(draft, draft.course, names.batch, packed)
    rates(draft, names)
    warmup(draft, draft.course, ratio=names.ratio)
    if settings.has("save_total_limit"):
        draft.put("train.keep_last", settings.count("save_total_limit", 2), "save_total_limit")
    draft.put("train.seed", settings.count("seed", 42, least=0), "seed")
    tracker(draft, settings.items("report_to"), names.report_default)


def _length(draft: Draft, made: Course, names: Names) -> None:
    if made.steps is not None:
        draft.put("train.steps", made.steps, "max_steps")
        if draft.settings.has(names.epochs):
            draft.lost(names.epochs, f"max_steps {made.steps} decides, there as here")
    else:
        draft.put("train.epochs", made.epochs, names.epochs)


def _size(draft: Draft, made: Course, batch: str, packed: int | None) -> None:
    keys = (batch, "gradient_accumulation_steps", *(("devices",) if made.devices > 1 else ()))
    product = " × ".join(str(one) for one in (made.micro, made.accumulation, made.devices)[: len(keys)])
    if draft.settings.devices is None:
        draft.differs(keys[0], "rows of a step count for each device, and the file does not say on how many it ran: "
                      "one is taken; give --devices N for more")  # fmt: skip
    if packed is None:
        draft.put("train.examples_per_step", made.per_step, *keys, value=product, note="one step's rows")
    else:
        tokens = made.per_step * packed
        note = f"packed: each row of the batch holds up to {packed:,} tokens"
        draft.put("train.tokens_per_step", tokens, *keys, value=product, note=note)
        draft.differs(keys[0], f"with packing it counts packs of {packed:,} tokens, not rows: a step is filled by "
                               "tokens "
                      "here, and the rows of a step differ")  # fmt: skip


def rates(draft: Draft, names: Names) -> None:
    """Learning rate, schedule, optimizer, decay, clipping."""
    settings = draft.settings
    draft.put("train.learning_rate", settings.number("learning_rate", names.rate_default), "learning_rate")
    kind = settings.text(names.schedule, names.schedule_default)
    ours = SCHEDULES.get(kind, "cosine" if "cosine" in kind else "linear")
    draft.put("train.schedule", ours, names.schedule, value=kind)
    if kind not in SCHEDULES:
        draft.lost(names.schedule, f"{short(kind)} is no schedule of a recipe (linear, cosine, constant, wsd): {ours} "
                   "is written in its place")  # fmt: skip
    optimizer = settings.text(names.optimizer, names.optimizer_default)
    draft.put("train.optimizer", OPTIMIZERS.get(optimizer, "adamw"), names.optimizer, value=optimizer)
    if optimizer not in OPTIMIZERS:
        draft.lost(names.optimizer, f"{short(optimizer)} is no optimizer of a recipe: adamw is written in its place")
    draft.put("train.weight_decay", settings.number("weight_decay", names.decay_default), "weight_decay")
    clip = settings.number("max_grad_norm", 1.0)
    if clip > 0:
        draft.put("train.max_grad_norm", clip, "max_grad_norm")
    else:
        draft.put("train.max_grad_norm", 1e6, "max_grad_norm", value=clip, note="nothing was clipped: nor is it now")
    for key, default, ours_is in (
        ("adam_beta1", 0.9, 0.9), ("adam_beta2", names.beta2_default, 0.999), ("adam_epsilon", 1e-8, 1e-8),
    ):  # fmt: skip
        value = settings.number(key, default)
        if value != ours_is:
            source = "" if settings.has(key) else ", a default of that program that differs from transformers'"
            draft.lost(key, f"it was {value:g}{source}; {_RATE}")


def warmup(draft: Draft, made: Course, *, ratio: bool) -> None:
    """``warmup_steps`` is a share of the steps where it is below 1; the old ``warmup_ratio`` counts where it exists."""
    settings = draft.settings
    steps, share = settings.number("warmup_steps", 0), settings.given("warmup_ratio") if ratio else None
    if steps < 0 or not 0 <= (share or 0) < 1:
        settings.fault("warmup_ratio" if share else "warmup_steps", "must be a number of steps, or a share below 1")
    elif share and not steps:
        made.warmup, made.warmup_keys = share, ("warmup_ratio",)
    else:
        made.warmup = steps if steps < 1 else int(steps)
        if share:
            draft.lost("warmup_ratio", "warmup_steps decides where both are given, there as here")
    if made.warmup and _is_constant(draft):
        draft.differs(made.warmup_keys[0], "the schedule `constant` has no warm-up there: it was ignored without a "
                      "word (constant_with_warmup has one)")  # fmt: skip
        made.warmup = 0


def _first_step(draft: Draft, made: Course, steps: int) -> None:
    if steps:
        draft.differs(made.warmup_keys[0], "the first step of a warm-up had rate 0 there and moved nothing; here it "
                      "has the first part of the rise")  # fmt: skip


def _is_constant(draft: Draft) -> bool:
    return any(one.recipe == "train.schedule" and one.value == "constant" for one in draft.taken)


def _every(draft: Draft, what: str, default: str) -> float | str:
    """``save_strategy`` with ``save_steps``, or the same of ``eval``: steps, a share of them, "epoch" or "no"."""
    settings = draft.settings
    names = (f"{what}_strategy", *(("evaluation_strategy",) if what == "eval" else ()))
    strategy = next((settings.text(name) for name in names if settings.has(name)), default)
    settings.used.update(names)
    steps = settings.given(f"{what}_steps")
    if strategy == "steps":
        if steps is None:
            steps = 500 if what == "save" else settings.number("logging_steps", 500)
        return steps if steps > 0 else "no"
    if strategy not in ("epoch", "no", "best"):
        settings.fault(names[0], f"must be no, steps or epoch; found {short(strategy)}")
    return "epoch" if strategy == "epoch" else "no"


def tracker(draft: Draft, names: list[str], default: str) -> None:
    """A tracker that nobody asked for needs no package to be installed: none."""
    ours = next((name for name in TRACKERS if name in names), "none")
    draft.put("tracker", ours, "report_to", value=" ".join(names) or default)


def total_steps(made: Course, rows: int | None) -> int | None:
    """Updates of the whole run there, where the rows are known and not packed."""
    if made.steps is not None:
        return made.steps
    if rows is None or made.packed:
        return None
    if made.passes == "filled":
        return math.ceil(rows * made.epochs / made.per_step)
    batches = math.ceil(rows / (made.micro * made.devices))
    whole = batches // made.accumulation if made.passes == "dropped" else math.ceil(batches / made.accumulation)
    return math.ceil(made.epochs * max(1, whole))


def settle(draft: Draft, rows: int | None) -> None:
    """Shares and epochs become steps: ``rows`` of the training files, None where they cannot be counted from here."""
    made = draft.course
    assert made is not None
    kept = _hold_out(draft, made, rows)
    total = total_steps(made, kept)
    _settle_warmup(draft, made, total)
    each = None if total is None else math.ceil(total / made.epochs) if made.steps is None else None
    _settle_every(draft, made.save_keys, "train.save_every", made.save, total, each)
    if {"data.eval_path", "data.eval_fraction"} & set(draft.lines):
        _settle_every(draft, made.evaluate_keys, "evaluate.every", made.evaluate, total, each)
    _best(draft)
    joined = None if kept is None else math.ceil(kept * made.epochs / made.per_step)
    if made.steps is None and total is not None and joined != total:
        end = "left out its last rows, which filled no step" if made.passes == "dropped" else "ended with a short step"
        draft.differs("epochs", f"each pass {end} there: {total:,} steps; here steps go on over the border of a pass: "
                      f"{joined:,}")  # fmt: skip


def _best(draft: Draft) -> None:
    """The best evaluated step, and an end where nothing gets better: both need evaluations on the way."""
    settings = draft.settings
    unknown = {remark.key for remark in draft.remarks if remark.kind == "differs"}
    if not draft.lines.get("evaluate.every", (0, ""))[0]:
        return  # that they are lost was said with the other keys
    wanted = settings.truth("load_best_model_at_end", default=False)
    for key, ours in (("load_best_model_at_end", "keep"), *((stop, "early_stopping_patience") for stop in STOPS)):
        if settings.has(key) and key not in unknown and (wanted or ours != "keep"):
            draft.remarks = [remark for remark in draft.remarks if remark.key != key]
            draft.put(f"evaluate.{ours}", "best" if ours == "keep" else settings.count(key, 1), key)
    metric = settings.text("metric_for_best_model", "loss")
    if wanted and metric not in ("loss", "eval_loss"):
        draft.remarks = [remark for remark in draft.remarks if remark.key != "metric_for_best_model"]
        draft.lost("metric_for_best_model", f"{short(metric)} decided which is best there; here the loss does")


def _hold_out(draft: Draft, made: Course, rows: int | None) -> int | None:
    """The rows that are left to train on."""
    if not made.held:
        return rows
    if made.held >= 1 and rows is None:
        draft.lost(made.held_key, f"{made.held:g} rows were held out; the rows cannot be counted from here: set "
                   "data.eval_fraction to their share")  # fmt: skip
        return None
    share = made.held if made.held < 1 else round(made.held / (rows or 1), 9)
    if not share < 1:
        draft.settings.fault(made.held_key, f"holds out all {rows} rows")
        return rows
    draft.put("data.eval_fraction", share, made.held_key, value=made.held)
    return None if rows is None else rows - max(1, round(share * rows))


def _settle_warmup(draft: Draft, made: Course, total: int | None) -> None:
    if made.warmup >= 1 or not made.warmup:
        draft.put("train.warmup", int(made.warmup), *made.warmup_keys)
        _first_step(draft, made, int(made.warmup))
    elif total is None:
        draft.lost(made.warmup_keys[0], f"{made.warmup:g} of the steps, whose number is not known from here: set "
                   f"train.warmup to {made.warmup:g} × the steps that `finetune plan` prints")  # fmt: skip
    else:
        steps = made.least_warmup(made.rounding(made.warmup * total))
        note = f"{made.warmup:g} of {total:,} steps"
        draft.put("train.warmup", steps, *made.warmup_keys, value=made.warmup, note=note)
        _first_step(draft, made, steps)


def _settle_every(
    draft: Draft, keys: tuple[str, ...], ours: str, every: float | str, total: int | None, each: int | None
) -> None:
    saving = ours == "train.save_every"
    if isinstance(every, str):
        if every == "epoch" and each:
            draft.put(ours, each, *keys, value="epoch", note="steps of one pass")
        elif saving:
            why = "once a pass, whose steps are not known from here" if every == "epoch" else "never before the end"
            draft.put(ours, 50, *keys, value=every, note=f"{why}; here every 50 steps, so that a run can go on")
        return
    if every < 1 and total is None:
        if saving:
            draft.put(ours, 50, *keys, value=every, note="a share of steps that are not known from here")
        else:
            draft.lost(keys[-1], f"every {every:g} of the steps, whose number is not known from here")
        return
    steps = max(1, math.ceil(every * (total or 0)) if every < 1 else int(every))
    draft.put(ours, steps, *keys, value=every)
    if saving and total is not None and steps > total:
        draft.differs(keys[-1], f"the run has {total:,} steps: nothing was saved before its end")
