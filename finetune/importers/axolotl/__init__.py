"""axolotl's YAML (``axolotl train FILE``), supervised, with ``rl:`` or with ``reward_model: true``.

Facts of axolotl 0.19.0, which runs with transformers 5.16.1 and PEFT 0.20.0: `utils/schemas/` (defaults; a pydantic
model that ignores unknown keys), `core/builders/base.py` (warm-up, saves), `utils/config/__init__.py` (shares of an
epoch, number formats), `utils/trainer.py` (steps), `utils/data/utils.py` (long rows), `loaders/` (adapter and
quantisation), `prompt_strategies/` (what is in the loss), `core/builders/rl.py` and `core/trainers/dpo/` (preferences),
`core/builders/causal.py` and `prompt_strategies/bradley_terry/` (reward models).
"""

from __future__ import annotations

from typing import Any

from finetune import foreignobjective, importers
from finetune.dsfile import scheduler
from finetune.foreign import Course, Draft, Settings, short
from finetune.foreignparts import compute, number_formats, targets, whole
from finetune.hftrainer import TRACKERS, Names, course
from finetune.importers.axolotl.datasets import rows

SIGNS = frozenset({
    "base_model", "micro_batch_size", "sequence_len", "datasets", "adapter", "num_epochs", "val_set_size",
    "lora_target_linear", "sample_packing", "dataset_prepared_path", "train_on_inputs", "lr_scheduler",
    "pad_to_sequence_len", "lora_r", "evals_per_epoch", "saves_per_epoch", "optimizer", "lora_model_dir",
    "tokenizer_type", "wandb_project",
})  # fmt: skip
COMMANDS = (("axolotl", "train"), ("axolotl.cli.train",))
_LEAST_WARMUP = 2


def draft(settings: Settings) -> Draft:
    made = Draft(settings=settings, version="axolotl 0.19.0")
    key, word = "rl", settings.text("rl") or "sft"
    for scored, theirs in (("reward_model", "reward"), ("process_reward_model", "prm")):
        if settings.truth(scored, default=False):
            key, word = scored, theirs
    method = foreignobjective.method(settings, key, word)
    if method == "grpo":
        what = "grpo is not taken over: its rewards are Python functions, and its other numbers stand in trl:"
        raise settings.stop("rl", what, "write objective.method: grpo by hand; docs/objectives.md")
    kind = settings.text("adapter")
    if kind not in ("lora", "qlora"):
        what = f"{short(kind)} is no LoRA" if kind else "not set: every weight is trained, and lora_* is ignored"
        raise settings.stop("adapter", what, "write adapter: lora or qlora there: here only adapters are trained")
    if settings.has("base_model"):
        made.put("model", settings.text("base_model"), "base_model")
    else:
        settings.fault("base_model", "missing", "name the base model")
    for key in ("revision_of_model", "model_revision"):
        if settings.has(key):
            made.put("revision", settings.text(key), key)
    _formats(made, settings, kind)
    _adapter(made, settings)
    _onward(made, settings, method)
    if method == "reward":
        _reward(made, settings)
    elif method != "sft":
        _objective(made, settings, method, word)
    length = _window(made, settings, method)
    _course(made, settings, length if settings.truth("sample_packing", default=False) else None)
    rows(made, settings, method)
    made.put("output", settings.text("output_dir", "model-out"), "output_dir")
    made.leftovers(importers.known("axolotl"), "axolotl does not know this key and drops it without a word")
    return made


def _formats(made: Draft, settings: Settings, kind: str) -> None:
    four, eight = settings.truth("load_in_4bit", default=False), settings.truth("load_in_8bit", default=False)
    automatic = settings.text("bf16", "auto") in ("auto", "full")
    bf16 = automatic or settings.truth("bf16", default=True) or settings.truth("bfloat16", default=False)
    fp16 = settings.truth("fp16", default=False) or settings.truth("float16", default=False)
    if settings.has("fp16") and fp16 and automatic:
        bf16 = False
    if kind == "qlora" and not four:
        settings.fault("load_in_4bit", "must be true with adapter: qlora", "write it, or adapter: lora")
    if four and eight:
        settings.fault("load_in_8bit", "cannot be true beside load_in_4bit", "keep one")
    if four:
        extra = settings.raw("bnb_config_kwargs")
        changed: dict[str, Any] = extra if isinstance(extra, dict) else {}
        form = str(changed.get("bnb_4bit_quant_type", "nf4"))
        double = bool(changed.get("bnb_4bit_use_double_quant", True))
        number_formats(made, form, ("load_in_4bit",), f"4 bits, {form}", double=double)
    elif eight:
        number_formats(made, "int8", ("load_in_8bit",), "8 bits")
    else:
        form = "bf16" if bf16 else "fp16" if fp16 else "fp32"
        number_formats(made, form, ("bf16", "fp16"), form)
    compute(made, bf16, fp16, ("bf16", "fp16"), "auto" if automatic else "bf16" if bf16 else "fp16" if fp16 else "fp32")


def _adapter(made: Draft, settings: Settings) -> None:
    made.add("adapter.method", "lora", "PEFT method")
    for key, ours in (("lora_r", "r"), ("lora_alpha", "lora_alpha")):
        if settings.has(key):
            value = settings.count(key, 8) if ours == "r" else settings.number(key, 8)
            made.put(f"adapter.{ours}", value, key)
        else:
            settings.fault(key, "missing: axolotl has no default for it", "write it")
    made.put("adapter.lora_dropout", settings.number("lora_dropout", 0.0), "lora_dropout")
    names, linear = settings.items("lora_target_modules"), settings.truth("lora_target_linear", default=False)
    if linear:
        targets(made, "lora_target_linear", [])
    elif names:
        targets(made, "lora_target_modules", names)
    else:
        settings.fault("lora_target_modules", "missing: nothing would get a LoRA", "or write lora_target_linear: true")
    if settings.has("peft_layers_to_transform"):
        layers = settings.raw("peft_layers_to_transform")
        made.put("adapter.layers_to_transform", layers, "peft_layers_to_transform")
    for key, ours in (("peft_use_dora", "use_dora"), ("peft_use_rslora", "use_rslora")):
        if settings.truth(key, default=False):
            made.put(f"adapter.{ours}", True, key)
    ratio = settings.given("loraplus_lr_ratio")
    if ratio:
        made.put("train.lora_plus_ratio", ratio, "loraplus_lr_ratio")
    if settings.text("peft_init_lora_weights", "true") not in ("true", "gaussian"):
        made.lost("peft_init_lora_weights", "an adapter begins at zero here, so that the base is not changed")
    if settings.has("peft"):
        made.lost("peft", "LoftQ and torchao: the base is quantised as quantize.weights says")
    whole(made, "lora_modules_to_save", settings.items("lora_modules_to_save"))


def _onward(made: Draft, settings: Settings, method: str) -> None:
    if not settings.has("lora_model_dir"):
        return
    if method in ("dpo", "kto") and not settings.truth("merge_lora", default=False):
        settings.used.add("lora_model_dir")
        made.differs("lora_model_dir", f"with rl: {settings.text('rl')} it is never loaded there, without a word: "
                     "the run begins with a new adapter, here too; adapter.start_from goes on from one")  # fmt: skip
    else:
        foreignobjective.onward(made, "lora_model_dir", settings.text("lora_model_dir"), method)


def _objective(made: Draft, settings: Settings, method: str, word: str) -> None:
    nested = settings.raw("trl")
    if isinstance(nested, dict) and nested.get("beta") is not None:  # it counts before rl_beta there
        settings.values = {**settings.values, "rl_beta": nested["beta"]}
    if settings.truth("sample_packing", default=False):
        settings.fault("sample_packing", f"does not go with rl: {word} there", "remove it: rows are packed here anyway")
    loss = settings.items("dpo_loss_type") if word == "dpo" else word
    names = foreignobjective.Names(
        word="rl", beta=("rl_beta", "orpo_alpha"), loss="dpo_loss_type" if word == "dpo" else "rl",
        smoothing="dpo_label_smoothing", smooths=False, gamma_default=None, wanted="kto_desirable_weight",
        unwanted="kto_undesirable_weight",
    )  # fmt: skip
    foreignobjective.objective(made, method, names, loss=loss)


def _reward(made: Draft, settings: Settings) -> None:
    foreignobjective.reward(made, "reward_model", centre="center_rewards_coefficient")
    if settings.truth("sample_packing", default=False):
        settings.fault("sample_packing", "its reward trainer packs no pairs", "remove it: they are packed here anyway")


def _window(made: Draft, settings: Settings, method: str) -> int:
    length = settings.count("sequence_len", 512, least=8)
    made.put("train.max_length", length, "sequence_len")
    if not settings.has("sequence_len"):
        made.differs("sequence_len", "not set: 512 tokens")
    if method == "reward":
        settings.used.add("excess_length_strategy")
        made.add("data.over_length", "drop", f"pairs with a text over {length:,} tokens: left out and named")
        made.differs("sequence_len", f"a text over {length:,} tokens loses its end there, where its reward is read, "
                     "whatever excess_length_strategy says; here such a pair is left out and named, or raise "
                     "max_length")  # fmt: skip
        return length
    how = settings.text("excess_length_strategy", "drop")
    ours = {"drop": "drop", "raise": "error"}.get(how, "drop")
    made.put("data.over_length", ours, "excess_length_strategy", value=how)
    if how == "truncate":
        made.differs("excess_length_strategy", f"rows over {length:,} tokens lose their end there, the answer and "
                                               "its stop token "
                     "first; here they are left out and named, or raise max_length")  # fmt: skip
    elif how == "drop":
        made.differs("excess_length_strategy", f"rows over {length:,} tokens are left out there, which only a log "
                                               "line says; here "
                     "each is named in rows.jsonl")  # fmt: skip
    return length


def _course(made: Draft, settings: Settings, packed: int | None) -> None:
    if not settings.has("gradient_accumulation_steps") and settings.has("batch_size"):
        total, micro = settings.count("batch_size", 1), settings.count("micro_batch_size", 1)
        settings.values = {**settings.values, "gradient_accumulation_steps": max(1, total // micro)}
    settings.used.add("batch_size")
    if not settings.has("learning_rate"):
        settings.fault("learning_rate", "missing: axolotl has no default for it", "write it")
    names = Names(
        batch="micro_batch_size", epochs="num_epochs", schedule="lr_scheduler", optimizer="optimizer",
        batch_default=1, epochs_default=1.0, schedule_default="cosine",
    )  # fmt: skip
    course(made, names, packed=packed)
    scheduler(made)
    assert made.course is not None
    _steps(made, settings, made.course)
    if (settings.devices or 1) > 1:
        made.differs("micro_batch_size", "each device's mean has the same weight there, however few answer tokens "
                                         "it holds "
                     "(average_tokens_across_devices is off); here every token of a step counts the same")  # fmt: skip
    if not settings.has("save_total_limit"):
        made.put("train.keep_last", 4, "save_total_limit")
    for key in ("cosine_min_lr_ratio", "cosine_constant_lr_ratio"):
        if settings.has(key):
            made.lost(key, "a recipe's cosine ends near zero")
    used = [name for name in TRACKERS if settings.truth(f"use_{name}", default=False)]
    if settings.has("wandb_project") and not settings.has("use_wandb"):
        used.append("wandb")
    keys = [f"use_{name}" for name in used or ("wandb",)]
    made.put("tracker", used[0] if used else "none", *keys, value=used or "none")


def _steps(made: Draft, settings: Settings, planned: Course) -> None:
    """Warm-up by axolotl's own arithmetic; saves and evaluations as shares of a pass."""
    planned.passes, planned.rounding = "filled", int
    if not settings.has("warmup_steps", "warmup_ratio"):
        planned.warmup, planned.warmup_keys = 0.03, ("warmup_ratio",)
        planned.least_warmup = lambda steps: _least(min(steps, 100))
    else:
        planned.least_warmup = _least
        if planned.warmup == 1:
            planned.warmup = _LEAST_WARMUP
    if made.lines["train.schedule"][0] == "constant" and settings.text("lr_scheduler") == "constant":
        planned.warmup = 0
    planned.save = _share(settings, "save", planned.epochs, "epoch")
    planned.evaluate = _share(settings, "eval", planned.epochs, "no")
    planned.save_keys = ("saves_per_epoch", *planned.save_keys)
    planned.evaluate_keys = ("evals_per_epoch", *planned.evaluate_keys)


def _least(steps: int) -> int:
    """A warm-up of one step becomes two there."""
    return _LEAST_WARMUP if steps == 1 else steps


def _share(settings: Settings, what: str, epochs: float, default: str) -> float | str:
    each = settings.given(f"{what}s_per_epoch")
    steps = settings.given(f"{what}_steps")
    strategy = settings.text(f"{what}_strategy", default)
    if each and steps:
        settings.fault(f"{what}s_per_epoch", f"cannot be given together with {what}_steps", "keep one")
    if each and each * epochs > 1:
        return 1 / (each * epochs)
    if steps:
        return steps
    return strategy if strategy in ("epoch", "no") else "no"
