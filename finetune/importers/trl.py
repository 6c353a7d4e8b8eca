"""TRL's ``trl sft --config FILE``, ``trl dpo``, ``kto``, ``reward``, ``grpo``, ``orpo.py``, ``cpo.py``, or their lines.

Facts of TRL 1.16.0 with transformers 5.23.0 and PEFT 0.21.2: `trl/scripts/` (which keys are read, that unknown ones are
dropped), the trainers' configs and `model_config.py` (defaults), `trainer/sft_trainer.py` (what is cut and what is in
the loss), `trainer/utils.py` (number formats). A file does not say which program reads it: its keys and its rows do.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune import foreignobjective, foreignsampled, importers
from finetune.dsfile import scheduler
from finetune.foreign import Draft, Settings, short
from finetune.foreignparts import Origin, base, compute, eval_rows, number_formats, shape, targets, train_rows, whole
from finetune.hftrainer import Names, course

SIGNS = frozenset({
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "use_peft", "load_in_4bit",
    "lora_r", "lora_target_modules", "max_seq_length", "assistant_only_loss", "completion_only_loss",
    "dataset_text_field", "packing_strategy", "use_bnb_nested_quant", "dtype", "precompute_ref_log_probs",
})  # fmt: skip
_PROGRAMS = ("sft", "dpo", "kto", "orpo", "cpo", "grpo", "rloo", "reward", "distillation")
COMMANDS = (*(("trl", name) for name in _PROGRAMS), *((f"{name}.py",) for name in _PROGRAMS))
_OLD = {
    "max_seq_length": "max_length, whose default is 1024",
    "warmup_ratio": "warmup_steps, which is a share of the steps where it is below 1, and 0 by default",
    "torch_dtype": "dtype, whose default is float32",
}
"""Names of earlier versions that 1.16 drops like any other word that it does not know."""
_TELLING = {
    "desirable_weight": "kto", "undesirable_weight": "kto", "simpo_gamma": "cpo", "cpo_alpha": "cpo",
    "reward_funcs": "grpo", "num_generations": "grpo", "center_rewards_coefficient": "reward",
    "teacher_model_name_or_path": "distillation", "label_smoothing": "dpo", "loss_weights": "dpo",
    "f_divergence_type": "dpo", "precompute_ref_log_probs": "dpo", "ref_model_name_or_path": "dpo", "ld_alpha": "dpo",
    "use_weighting": "dpo", "beta": "dpo",
}  # fmt: skip
"""Keys that only one program reads, the telling ones first."""
_SCORED = "SEQ_CLS"
_SFT_LOSSES = ("nll", "dft", "chunked_nll")
_RATES = {"sft": 2e-5, "reward": 1e-4}
_RATE = 1e-6
_SAMPLED = foreignsampled.Names(
    word="trl", beta=0.0, loss="dapo", temperature=1.0, corrected=True, masked="mask_truncated_completions"
)


def draft(settings: Settings) -> Draft:
    made = Draft(settings=settings, version="TRL 1.16.0, transformers 5.23.0")
    program, told = _program(settings)
    word = "simpo" if program == "cpo" and settings.text("loss_type") == "simpo" else program
    method = foreignobjective.method(settings, told, word)
    if not settings.truth("use_peft", default=False):
        what = "use_peft is not set: TRL trains every weight, and ignores whatever lora_* says"
        raise settings.stop(
            "use_peft", what, "write use_peft: true there if an adapter is meant: here only adapters are trained"
        )
    base(made)
    _formats(made, settings)
    _adapter(made, settings)
    if method == "reward":
        _reward(made, settings)
    elif method == "grpo":
        settings.values = {**settings.values, "trl": "grpo"}
        foreignsampled.objective(made, _SAMPLED)
        if settings.truth("disable_dropout", default=False):
            foreignobjective.no_dropout(made)
    elif method != "sft":
        _objective(made, settings, method, program, told)
    length = _window(made, settings, method)
    packing = program == "sft" and settings.truth("packing", default=False)
    rate = _RATES.get(program, _RATE)
    course(made, Names(rate_default=rate, ratio=False), packed=length if packing else None)
    if method == "grpo":
        foreignsampled.steps(made, "per_device_train_batch_size")
    scheduler(made)
    _rows(made, settings, method)
    if settings.values.get("learning_rate") is None and method != "reward":
        what = f"{rate:g} is TRL's default for whole models; adapters usually take ten times that"
        made.differs("learning_rate", what)
    made.put("output", settings.text("output_dir", "trainer_output"), "output_dir")
    _unknown(made, settings, importers.known("trl" if program == "sft" else f"trl.{program}"))
    return made


def _program(settings: Settings) -> tuple[str, str]:
    """Which of TRL's programs reads the settings, and the key that tells it, to point at."""
    if settings.program in _PROGRAMS:
        return settings.program, "trl"
    loss = settings.items("loss_type")
    if loss in (["simpo"], ["kto"], ["apo_zero_unpaired"]):
        return "cpo" if loss == ["simpo"] else "kto", "loss_type"
    for key, program in _TELLING.items():
        if settings.has(key):
            return program, key
    if settings.values.get("lora_task_type") == _SCORED:
        return "reward", "lora_task_type"
    if loss and loss[0] not in _SFT_LOSSES:
        return "dpo", "loss_type"
    name = settings.text("dataset_name")
    columns = set(settings.place.columns(settings.find(name)) or ())
    if {"chosen", "rejected"} <= columns:
        return "dpo", "dataset_name"
    return ("kto", "dataset_name") if "label" in columns and "completion" in columns else ("sft", "dataset_name")


def _objective(made: Draft, settings: Settings, method: str, program: str, told: str) -> None:
    settings.values = {**settings.values, "trl": program}
    names = foreignobjective.Names(word="trl", smooths=program != "dpo", gamma_default=0.5)
    loss = settings.items("loss_type") if program in ("dpo", "kto") else ""
    foreignobjective.objective(made, method, names, loss=loss)
    if told in ("beta", "dataset_name") and program == "dpo":
        made.differs(told, "read as `trl dpo` reads it; orpo.py has such rows and this key too: then write "
                     "objective.method: orpo, without loss. `trl reward` has such rows: lora_task_type: SEQ_CLS tells "
                     "that it is meant")  # fmt: skip
    if program == "kto":
        made.differs("train_sampling_strategy", "rows are taken in the file's order there, so that each meets its "
                     "neighbour's answer; here a step's rows are drawn, and meet those beside them in it")  # fmt: skip
    settings.used.add("train_sampling_strategy")


def _reward(made: Draft, settings: Settings) -> None:
    settings.values = {**settings.values, "trl": "reward"}
    foreignobjective.reward(made, "trl", centre="center_rewards_coefficient")
    kind = settings.text("lora_task_type", "CAUSAL_LM")
    if kind != _SCORED:
        source = "" if settings.has("lora_task_type") else ", the default"
        made.differs("lora_task_type", f"it is {short(kind)}{source}, with which PEFT neither trains nor saves the "
                     "score head, and its current version stops at once; here the head is trained and saved, as with "
                     "SEQ_CLS")  # fmt: skip


def _formats(made: Draft, settings: Settings) -> None:
    dtype = settings.text("dtype", "float32")
    fp16 = settings.truth("fp16", default=False)
    bf16 = settings.truth("bf16", default=not fp16)
    four, eight = settings.truth("load_in_4bit", default=False), settings.truth("load_in_8bit", default=False)
    if four and eight:
        settings.fault("load_in_8bit", "cannot be true beside load_in_4bit", "keep one")
    if four:
        kind = settings.text("bnb_4bit_quant_type", "nf4")
        double = settings.truth("use_bnb_nested_quant", default=False)
        number_formats(made, kind, ("load_in_4bit", "bnb_4bit_quant_type"), f"4 bits, {kind}", double=double)
    elif eight:
        number_formats(made, "int8", ("load_in_8bit",), "8 bits")
    else:
        words = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "auto": "bf16"}
        if dtype not in words:
            settings.fault("dtype", f"must be auto, bfloat16, float16 or float32; found {short(dtype)}")
        number_formats(made, words.get(dtype, "bf16"), ("dtype",), dtype)
    if not settings.has("dtype"):
        made.differs("dtype", "TRL loads the base in float32 where dtype is not set: twice the memory of bfloat16"
                     + (", and the dequantised 4-bit weights are float32 too" if four else ""))  # fmt: skip
    compute(made, bf16, fp16, ("bf16", "fp16"), "bf16" if bf16 else "fp16" if fp16 else "float32")


def _adapter(made: Draft, settings: Settings) -> None:
    made.add("adapter.method", "lora", "PEFT method")
    made.put("adapter.r", settings.count("lora_r", 16), "lora_r")
    made.put("adapter.lora_alpha", settings.number("lora_alpha", 32), "lora_alpha")
    made.put("adapter.lora_dropout", settings.number("lora_dropout", 0.05), "lora_dropout")
    names = settings.items("lora_target_modules")
    if names:
        targets(made, "lora_target_modules", names)
    else:
        made.put("adapter.target_modules", ["q_proj", "v_proj"], "lora_target_modules",
                 note="PEFT's choice for llama, qwen2 and qwen3")  # fmt: skip
        made.differs("lora_target_modules", "only q_proj and v_proj of each layer get a LoRA where it is not set; "
                     "all-linear is what is usually meant")  # fmt: skip
    for key in ("use_rslora", "use_dora"):
        if settings.truth(key, default=False):
            made.put(f"adapter.{key}", True, key)
    whole(made, "lora_modules_to_save", settings.items("lora_modules_to_save"))


def _window(made: Draft, settings: Settings, method: str) -> int:
    reach = settings.place.reach(settings.text("model_name_or_path"))
    if method == "grpo":
        foreignsampled.window(made, "max_completion_length", None, reach)
        return 0
    if "max_length" in settings.values and settings.raw("max_length") is None:
        length = reach or 2048
        made.put("train.max_length", length, "max_length", value="none", note="nothing was cut: what the model reaches")
    else:
        length = settings.count("max_length", 1024, least=8)
        made.put("train.max_length", length, "max_length")
    default = "" if settings.has("max_length") else "not set: "
    if method == "reward":
        made.add("data.over_length", "drop", f"pairs with a text over {length:,} tokens: left out, as there, and named")
        made.differs("max_length", f"{default}pairs with a text over {length:,} tokens are left out there without a "
                     "word; here they are too, and each is named in rows.jsonl")  # fmt: skip
        return length
    made.add(
        "data.over_length", "drop", f"rows over {length:,} tokens: left out and named; there their end was cut off"
    )
    made.differs("max_length", f"{default}rows over {length:,} tokens lose their end there without a word, the "
                               "answer's end "
                 "and its stop token first; here such a row is left out and named (data.over_length), or raise "
                 "max_length")  # fmt: skip
    return length


def _rows(made: Draft, settings: Settings, method: str) -> None:
    listed = settings.raw("datasets")
    test = settings.text("dataset_test_split", "test")
    judged = made.course is not None and made.course.evaluate != "no"
    if isinstance(listed, list) and listed:
        origins = _asked(made, "datasets", [_mixed(made, settings, one) for one in listed], method)
        train_rows(made, origins, "datasets")
        if settings.has("test_split_size") and made.course:
            made.course.held, made.course.held_key = settings.number("test_split_size", 0), "test_split_size"
    elif settings.has("dataset_name"):
        name = settings.find(settings.text("dataset_name"))
        split, subset = settings.text("dataset_train_split", "train"), settings.text("dataset_config")
        origins = _asked(made, "dataset_name", [Origin(path=name, split=split, subset=subset)], method)
        train_rows(made, origins, "dataset_name")
        if judged:
            eval_rows(made, [Origin(path=name, split=test)], "dataset_name")
        elif not settings.has("eval_strategy"):
            made.lost("dataset_test_split", "nothing was judged there (eval_strategy is no by default); "
                                            "data.eval_path or "
                      "data.eval_fraction judges here")  # fmt: skip
    else:
        raise settings.stop("dataset_name", "missing: dataset_name or datasets", "name the data set")
    paths = [origin.path for origin in origins]
    if method == "sft":
        _loss(made, settings, paths)
    elif method == "reward":
        foreignobjective.margins(made, "datasets" if listed else "dataset_name", paths)


def _asked(made: Draft, key: str, origins: list[Origin], method: str) -> list[Origin]:
    return foreignsampled.rows(made, key, origins) if method == "grpo" else origins


def _mixed(made: Draft, settings: Settings, declared: object) -> Origin:
    if not isinstance(declared, dict) or not isinstance(declared.get("path"), str):
        raise settings.stop("datasets", "each must be a mapping with a path", "write `- path: …`")
    path, files = declared["path"], declared.get("data_files")
    if path in ("json", "csv", "parquet") and isinstance(files, str):
        path = settings.find(files)
    elif files or declared.get("data_dir"):
        made.lost("datasets", f"data_files and data_dir of {short(path)}: name the files themselves in data.sources")
    if declared.get("fraction") is not None:
        made.lost("datasets", f"fraction of {short(path)} is a share of rows, of the first ones; `share` is of tokens")
    split, name = declared.get("split"), declared.get("name")
    return Origin(path=settings.find(path), split=str(split or "train"), subset=str(name or ""))


def _loss(made: Draft, settings: Settings, paths: list[str]) -> None:
    only = settings.truth("assistant_only_loss", default=False)
    kinds = {shape(settings.place.columns(path)) for path in paths}
    pairs = settings.truth("completion_only_loss", default=kinds == {"pairs"})
    ours = "assistant" if only or pairs else "all"
    made.put("data.train_on", ours, "assistant_only_loss", "completion_only_loss", value=f"{only}, {pairs}".lower())
    if ours == "all" and kinds != {"text"}:
        made.differs("assistant_only_loss", "not set: questions and system turns are in the loss too, unless rows have "
                     "prompt and completion; data.train_on: assistant trains answers alone")  # fmt: skip
    if kinds & {"pairs", "text"}:
        made.differs("eos_token", "TRL appends the tokenizer's end token to prompt and completion and to text; here an "
                     "answer ends with the stop token of the template")  # fmt: skip
    field = settings.text("dataset_text_field", "text")
    if field != "text":
        made.add("data.format", "text", "dataset_text_field")
        made.put("data.columns", {"text": field}, "dataset_text_field")


def _unknown(made: Draft, settings: Settings, known: Sequence[str]) -> None:
    for key, now in _OLD.items():
        if settings.has(key) and key not in settings.used | set(known):
            settings.used.add(key)
            made.differs(key, f"a name of earlier versions; 1.16 drops it without a word. It is now {now}: that is "
                              "what "
                         "is taken over")  # fmt: skip
    made.leftovers(known, "TRL does not know this key and drops it without a word")
