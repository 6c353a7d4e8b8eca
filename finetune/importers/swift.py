"""ms-swift's arguments: a YAML or JSON file, or the ``swift sft …`` or ``swift rlhf …`` line of a shell script.

Facts of ms-swift 4.6.0, which runs with transformers 4.33 to 5.19: `arguments/` (defaults), `trainers/arguments.py`
(accumulation, decay, beta2, schedule), `pipelines/base.py` (unknown arguments are refused),
`dataset/dataset_syntax.py`, `cli/main.py`, `arguments/rlhf_args.py` and `rlhf_trainers/` (preferences). Words of 3.x
(``train_type``, ``sft_type``) are read as well.
"""

from __future__ import annotations

import math

from finetune import foreignobjective, foreignsampled, importers
from finetune.dsfile import scheduler
from finetune.foreign import Draft, Settings, short
from finetune.foreignparts import Origin, compute, eval_rows, number_formats, targets, train_rows, whole
from finetune.hftrainer import Names, course

SIGNS = frozenset({
    "model", "dataset", "val_dataset", "split_dataset_ratio", "tuner_type", "train_type", "sft_type", "lora_rank",
    "target_modules", "truncation_strategy", "quant_bits", "quant_method", "use_hf", "loss_scale", "torch_dtype",
    "attn_impl", "dataset_num_proc", "model_author", "lorap_lr_ratio", "rlhf_type", "ref_adapters",
})  # fmt: skip
COMMANDS = (("swift", "sft"), ("swift", "pt"), ("swift", "rlhf"))
_BATCH = 16
_SAMPLED = foreignsampled.Names(
    word="rlhf_type", beta=0.04, loss="grpo", temperature=0.9, corrected=False, masked="overlong_filter"
)


def draft(settings: Settings) -> Draft:
    made = Draft(settings=settings, version="ms-swift 4.6.0")
    word = settings.text("rlhf_type", "dpo" if settings.program == "rlhf" else "sft")
    if word == "cpo" and settings.items("loss_type") == ["simpo"]:
        word = "simpo"
    method = foreignobjective.method(settings, "rlhf_type", word)
    kind = next((settings.text(key) for key in ("tuner_type", "train_type", "sft_type") if settings.has(key)), "lora")
    settings.used.update(("tuner_type", "train_type", "sft_type"))
    for key in ("train_type", "sft_type"):
        if settings.has(key):
            made.differs(key, "a word of ms-swift 3; 4.6 calls it tuner_type and refuses this one")
    if kind != "lora":
        raise settings.stop("tuner_type", f"{short(kind)} trains what is no LoRA", "only lora is taken over")
    if settings.has("model"):
        made.put("model", settings.text("model"), "model")
    else:
        settings.fault("model", "missing", "name the base model")
    if not settings.truth("use_hf", default=False):
        made.differs("use_hf", "not set: models and data sets came from ModelScope there; here ids are the Hugging "
                               "Face hub's "
                     "(folders, and ModelScope's own cache, are found)")  # fmt: skip
    if settings.has("model_revision"):
        made.put("revision", settings.text("model_revision"), "model_revision")
    _formats(made, settings)
    _adapter(made, settings)
    _objective(made, settings, method)
    length = _window(made, settings, method)
    micro = settings.count("per_device_train_batch_size", 1)
    accumulation = 1 if method == "grpo" else max(1, math.ceil(_BATCH / micro / (settings.devices or 1)))
    if not settings.has("gradient_accumulation_steps") and method != "grpo":
        made.differs("gradient_accumulation_steps", f"not set: as many as make about {_BATCH} rows a step there "
                     f"({accumulation} here), whatever the number of devices")  # fmt: skip
    names = Names(
        batch_default=1, accumulation_default=accumulation, rate_default=1e-4, schedule_default="cosine",
        decay_default=0.1, beta2_default=0.95, report_default="tensorboard",
    )  # fmt: skip
    packing = settings.truth("packing", default=False) and method != "grpo"
    course(made, names, packed=length if packing else None)
    if method == "grpo":
        foreignsampled.steps(made, "per_device_train_batch_size")
    scheduler(made)
    _rows(made, settings, method)
    _loss(made, settings, method)
    name = settings.text("model").rstrip("/").rpartition("/")[2]
    made.put("output", settings.text("output_dir", f"output/{name}"), "output_dir")
    made.leftovers(importers.known("swift"), "ms-swift refuses an argument that it does not know, unless "
                                             "ignore_args_error "
                   "is set: then it was dropped")  # fmt: skip
    return made


def _formats(made: Draft, settings: Settings) -> None:
    words = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    dtype = settings.text("torch_dtype", "bfloat16")
    if dtype not in words:
        settings.fault("torch_dtype", f"must be bfloat16, float16 or float32; found {short(dtype)}")
    method, bits = settings.text("quant_method"), settings.given("quant_bits")
    if method and bits is None:
        settings.fault("quant_bits", f"missing beside quant_method {short(method)}", "write 4 or 8")
    if method and method != "bnb":
        made.lost("quant_method", f"{short(method)} is read as bitsandbytes' format of as many bits")
    if method and bits == 4:
        kind = settings.text("bnb_4bit_quant_type", "nf4")
        double = settings.truth("bnb_4bit_use_double_quant", default=True)
        number_formats(made, kind, ("quant_method", "quant_bits"), f"{method}, 4 bits, {kind}", double=double)
    elif method and bits == 8:
        number_formats(made, "int8", ("quant_method", "quant_bits"), f"{method}, 8 bits")
    elif method:
        settings.fault("quant_bits", f"{short(bits)} bits have no format here", "4 or 8")
    else:
        number_formats(made, words.get(dtype, "bf16"), ("torch_dtype",), dtype)
        if bits is not None:
            made.differs("quant_bits", "without quant_method nothing is quantised there")
    fp16 = settings.truth("fp16", default=dtype in ("float16", "float32"))
    bf16 = settings.truth("bf16", default=dtype == "bfloat16")
    if not settings.has("torch_dtype"):
        made.differs("torch_dtype", "not set: the format of the base's own config.json; bf16 is taken, as Qwen's "
                                    "is. A base in "
                     "float32 was trained in fp16 there")  # fmt: skip
    compute(made, bf16, fp16, ("torch_dtype", "bf16", "fp16"), "bf16" if bf16 else "fp16" if fp16 else "float32")


def _adapter(made: Draft, settings: Settings) -> None:
    made.add("adapter.method", "lora", "PEFT method")
    made.put("adapter.r", settings.count("lora_rank", 8), "lora_rank")
    made.put("adapter.lora_alpha", settings.number("lora_alpha", 32), "lora_alpha")
    made.put("adapter.lora_dropout", settings.number("lora_dropout", 0.05), "lora_dropout")
    if settings.has("target_regex"):
        targets(made, "target_regex", [settings.text("target_regex")])
    else:
        targets(made, "target_modules", settings.items("target_modules"), note="every linear of the layers")
    for key in ("use_rslora", "use_dora"):
        if settings.truth(key, default=False):
            made.put(f"adapter.{key}", True, key)
    ratio = settings.given("lorap_lr_ratio")
    if ratio:
        made.put("train.lora_plus_ratio", ratio, "lorap_lr_ratio")
    if settings.text("init_weights", "true").lower() != "true":
        made.lost("init_weights", "an adapter begins at zero here, so that the base is not changed")
    if settings.text("lora_bias", "none") != "none":
        made.lost("lora_bias", "biases are not trained here: merging could not fold them")
    whole(made, "modules_to_save", settings.items("modules_to_save"))


def _objective(made: Draft, settings: Settings, method: str) -> None:
    """The adapter that it goes on from, and what it learns from preferences."""
    paths, theirs = settings.items("adapters"), settings.items("ref_adapters")
    if len(paths) > 1:
        made.lost("adapters", "several: a run goes on from one")
    elif paths:
        foreignobjective.onward(made, "adapters", paths[0], method, reference=theirs[0] if theirs else "")
    if method == "reward":
        if settings.truth("packing", default=False):
            settings.fault("packing", "does not go with rlhf_type: rm there", "remove it: rows are packed here anyway")
        foreignobjective.reward(made, "rlhf_type", centre="center_rewards_coefficient")
    if method in ("sft", "reward"):
        return
    if method == "grpo":
        foreignsampled.objective(made, _SAMPLED)
        settings.used.add("ref_adapters")
        return
    if theirs and not paths:
        made.lost("ref_adapters", "a reference with an adapter that the policy does not begin from")
    settings.used.add("ref_adapters")
    simpo = settings.text("rlhf_type") == "simpo"
    names = foreignobjective.Names(word="rlhf_type", beta_default=2.0 if simpo else 0.1)
    foreignobjective.objective(made, method, names, loss=settings.items("loss_type") if method != "simpo" else "")


def _window(made: Draft, settings: Settings, method: str) -> int:
    reach = settings.place.reach(settings.text("model"))
    if method == "grpo":
        return _prompts(made, settings, reach)
    if settings.has("max_length"):
        length = settings.count("max_length", 2048, least=8)
        made.put("train.max_length", length, "max_length")
    else:
        length = reach or 2048
        made.put("train.max_length", length, "max_length", value="what the model reaches")
        made.differs("max_length", f"not set: all that the model reaches there; {length:,} is written"
                     + ("" if reach else ", since the model is not here to ask"))  # fmt: skip
    how = settings.text("truncation_strategy", "delete")
    judged = "objective.method" in made.lines  # of a pair nothing is cut
    ours = "split" if how == "split" and not judged else "drop"
    made.put("data.over_length", ours, "truncation_strategy", value=how)
    if how in ("left", "right"):
        lost = "beginning: the system turn and the question" if how == "left" else "end: the answer and its stop token"
        made.differs("truncation_strategy", f"{how}: rows over {length:,} tokens lose their {lost}; here they are "
                                            "left out "
                     "and named, or raise max_length")  # fmt: skip
    elif not settings.has("truncation_strategy"):
        made.differs("truncation_strategy", f"not set: rows over {length:,} tokens are left out there; here they "
                                            "are too, and "
                     "each is named in rows.jsonl")  # fmt: skip
    return length


def _prompts(made: Draft, settings: Settings, reach: int | None) -> int:
    """grpo's ``max_length`` bounds prompts alone."""
    longest = settings.count("max_length", 2048, least=8) if settings.has("max_length") else None
    foreignsampled.window(made, "max_length", longest, reach)
    how = settings.text("truncation_strategy", "left")
    if longest:
        lost = "are replaced by others" if how == "delete" else "lose their beginning"
        made.differs("truncation_strategy", f"{how}: prompts over {longest:,} tokens {lost} there; here such a row is "
                     "left out and named where prompt and answer do not fit into train.max_length")  # fmt: skip
    return 0


def _rows(made: Draft, settings: Settings, method: str) -> None:
    names = _names(settings, "dataset")
    if not names:
        raise settings.stop("dataset", "missing", "name the data set")
    columns = settings.raw("columns")
    renamed = columns if isinstance(columns, dict) else {}
    if columns and not renamed:
        made.lost("columns", "write data.columns by hand: the format's column, then the one used here")
    origins = [_origin(made, settings, "dataset", name, renamed) for name in names]
    train_rows(made, foreignsampled.rows(made, "dataset", origins) if method == "grpo" else origins, "dataset")
    if method == "reward":
        foreignobjective.margins(made, "dataset", [origin.path for origin in origins])
    judged = [_origin(made, settings, "val_dataset", name, renamed) for name in _names(settings, "val_dataset")]
    eval_rows(made, judged, "val_dataset")
    ratio = settings.number("split_dataset_ratio", 0.0)
    if not 0 <= ratio < 1:
        settings.fault("split_dataset_ratio", "must be at least 0 and below 1")
    elif ratio and not judged and made.course:
        made.course.held, made.course.held_key = ratio, "split_dataset_ratio"
    if made.course and not settings.has("eval_strategy"):
        steps = settings.given("eval_steps")
        made.course.evaluate = made.course.save if steps is None or isinstance(made.course.save, str) else steps
    if settings.has("interleave_prob"):
        made.lost("interleave_prob", "it mixes rows; `share` of data.sources mixes tokens: set it there")


def _names(settings: Settings, key: str) -> list[str]:
    """Words between blanks or of a list: a comma belongs to the name."""
    value = settings.raw(key)
    if isinstance(value, str):
        return value.split()
    return settings.items(key)


def _origin(made: Draft, settings: Settings, key: str, name: str, renamed: dict[object, object]) -> Origin:
    """``hub::id_or_path:subset#rows``."""
    path = settings.find(name)
    if path == name:
        hub, mark, rest = name.partition("::")
        rest = rest if mark else hub
        rest, _, sample = rest.rpartition("#") if "#" in rest else (rest, "", "")
        path, _, subset = rest.partition(":")
        path = settings.find(path)
        if sample:
            made.lost(
                key,
                f"#{short(sample)}: so many rows of {short(path)} were drawn; here all are read: make a shorter file",
            )
        if "self-cognition" in path:
            made.lost(
                key, f"{short(path)} is filled in with model_name and model_author there: write such rows yourself"
            )
    else:
        subset = ""
    # The other way round than in a recipe: the file's column, then swift's name.
    columns = {str(theirs): str(column) for column, theirs in renamed.items() if theirs != column}
    split = "test" if key == "val_dataset" else "train"
    return Origin(path=path, subset=subset, columns=columns, split=split)


def _loss(made: Draft, settings: Settings, method: str) -> None:
    scale = settings.text("loss_scale", "default")
    base, *more = scale.split("+")
    ours = {"default": "assistant", "last_round": "last", "all": "all"}.get(base, "assistant")
    if method == "sft":
        made.put("data.train_on", ours, "loss_scale", value=scale)
    if base not in ("default", "last_round", "all") or set(more) - {"ignore_empty_think"}:
        made.lost(
            "loss_scale", f"{short(scale)} weighs parts of an answer: `weight` of a message weighs a whole one here"
        )
    if settings.has("system"):
        made.lost("system", "write the system turn into the rows")
    if settings.has("template"):
        made.differs("template", "it is ms-swift's own text, not the tokenizer's template; here the tokenizer's is "
                                 "used: "
                     "compare one row with `finetune data show`")  # fmt: skip
    if settings.has("custom_register_path", "external_plugins"):
        made.lost("external_plugins", "Python files that it loads: what they register has to be written as rows")
        settings.used.add("custom_register_path")
