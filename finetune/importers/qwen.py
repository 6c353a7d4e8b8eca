"""The ``finetune.py`` of the original Qwen's repository (2023): its command line in a shell script.

Facts of QwenLM/Qwen, commit 00dceeb of `finetune.py` and af22d5e of `finetune/ds_config_zero2.json` (with
transformers before 4.46, whose Trainer drops a pass's last incomplete step and averages micro-batches): what is in
the loss, that rows are cut on the right, which modules are trained whole, what Q-LoRA quantises.
`dsfile.py` has those of its DeepSpeed file.
"""

from __future__ import annotations

from finetune import importers
from finetune.dsfile import scheduler
from finetune.foreign import Draft, Settings
from finetune.foreignparts import Origin, compute, eval_rows, number_formats, targets, train_rows, whole
from finetune.hftrainer import Names, course

SIGNS = frozenset({
    "q_lora", "use_lora", "data_path", "model_max_length", "lazy_preprocess", "lora_weight_path",
})  # fmt: skip
COMMANDS = (("finetune.py",),)
_TARGETS = ["c_attn", "c_proj", "w1", "w2"]


def draft(settings: Settings) -> Draft:
    made = Draft(settings=settings, version="QwenLM/Qwen, finetune.py of 00dceeb")
    if not settings.truth("use_lora", default=False):
        what = "use_lora is not set: every weight was trained, whatever lora_* says"
        raise settings.stop(
            "use_lora", what, "add --use_lora there if an adapter is meant: here only adapters are trained"
        )
    quantised = settings.truth("q_lora", default=False)
    name = settings.text("model_name_or_path", "Qwen/Qwen-7B")
    base = name.removesuffix("-Int4").removesuffix("-Int8") if quantised else name
    made.put("model", base, "model_name_or_path", value=name)
    _formats(made, settings, quantised, name != base)
    _adapter(made, settings, quantised, name)
    _window(made, settings)
    course(made, Names(optimizer_default="adamw_torch"))
    assert made.course is not None
    made.course.passes = "dropped"
    scheduler(made, usual={"ds_config_zero2.json": "WarmupLR"})  # that repository's own file
    _rows(made, settings)
    made.differs("gradient_accumulation_steps", "each micro-batch's mean had the same weight there, however few "
                                                "answer tokens "
                 "it held; here every token of a step counts the same")  # fmt: skip
    made.put("output", settings.text("output_dir", "output_qwen"), "output_dir")
    made.leftovers(importers.known("qwen"), "finetune.py refuses an argument that it does not know")
    return made


def _formats(made: Draft, settings: Settings, quantised: bool, renamed: bool) -> None:
    bf16, fp16 = settings.truth("bf16", default=False), settings.truth("fp16", default=False)
    if quantised:
        number_formats(made, "nf4", ("q_lora",), "GPTQ, 4 bits", note="the nearest that can be merged")
        made.differs("q_lora", "it trained over weights that were quantised by GPTQ beforehand"
                     + (" (the -Int4 model)" if renamed else "")
                     + ", and its adapter cannot be merged; here the published 16-bit weights are quantised to NF4 "
                       "while they "
                     "are read, so the losses differ a little, and the adapter can be merged")  # fmt: skip
    else:
        kind = "bf16" if bf16 else "fp16" if fp16 else "fp32"
        number_formats(made, kind, ("bf16", "fp16"), kind)
        if not bf16 and not fp16:
            made.differs("bf16", "neither bf16 nor fp16 is set: float32 throughout")
    compute(made, bf16, fp16, ("bf16", "fp16"), "bf16" if bf16 else "fp16" if fp16 else "fp32")


def _adapter(made: Draft, settings: Settings, quantised: bool, name: str) -> None:
    made.add("adapter.method", "lora", "PEFT method")
    made.put("adapter.r", settings.count("lora_r", 64), "lora_r")
    made.put("adapter.lora_alpha", settings.number("lora_alpha", 16), "lora_alpha")
    made.put("adapter.lora_dropout", settings.number("lora_dropout", 0.05), "lora_dropout")
    targets(made, "lora_target_modules", settings.items("lora_target_modules") or _TARGETS)
    if settings.text("lora_bias", "none") != "none":
        made.lost("lora_bias", "biases are not trained here: merging could not fold them")
    embeddings = not quantised and "chat" not in name.lower()
    whole(made, "model_name_or_path", ["wte", "lm_head"] if embeddings else [])
    if embeddings:
        made.differs("model_name_or_path", "without 'chat' in the model's name embedding and head are trained whole "
                                           "beside the "
                     "LoRA (1.56 billion parameters for 14B): instead of adapter.modules_to_save, trainable_tokens: "
                     '["<|im_start|>", "<|im_end|>"] trains the two rows that need it')  # fmt: skip
    elif quantised and "chat" not in name.lower():
        made.differs("q_lora", "on a base that is no Chat model <|im_start|> and <|im_end|> stay untrained, and it "
                               "never ends "
                     'its answers; trainable_tokens: ["<|im_start|>", "<|im_end|>"] trains their rows')  # fmt: skip


def _window(made: Draft, settings: Settings) -> None:
    length = settings.count("model_max_length", 8192, least=8)
    made.put("train.max_length", length, "model_max_length")
    made.add("data.over_length", "drop", "rows over the length: left out and named; there their end was cut off")
    made.differs("model_max_length", f"{'' if settings.has('model_max_length') else 'not set: '}rows over "
                                     f"{length:,} tokens lose "
                 "their end there without a word, the last answer and its stop token first; here such a row is left "
                 "out and "
                 "named (data.over_length), or raise max_length")  # fmt: skip
    if length > 2048:
        made.add("rope", "plain", "beyond 2048 tokens: as finetune.py trains, with the rotary base unchanged")
        made.differs("model_max_length", "beyond 2048 tokens the model stretches its rotary base when it answers, "
                                         "and not while it "
                     "is trained: `rope: plain` is what was trained, see docs/qwen14b.md")  # fmt: skip


def _rows(made: Draft, settings: Settings) -> None:
    if not settings.has("data_path"):
        raise settings.stop("data_path", "missing", "name the training data")
    train = settings.find(settings.text("data_path"))
    train_rows(made, [Origin(path=train, format="sharegpt")], "data_path")
    judged = settings.text("eval_data_path")
    if judged:
        eval_rows(made, [Origin(path=settings.find(judged))], "eval_data_path")
    made.add("data.train_on", "assistant", "answers and their stop tokens")
    made.differs("data_path", "beside the answers, <|im_start|>, <|im_end|> and the newline behind it were in the "
                              "loss of every "
                 "turn there, of system and user too; here answers and their stop tokens alone")  # fmt: skip
    made.differs("data_path", "a first turn that is not the user's is left out there, and every row gets the system "
                              "message 'You "
                 "are a helpful assistant.'; here a row's own system turn is used, and that message "
                 "where it has none")  # fmt: skip
