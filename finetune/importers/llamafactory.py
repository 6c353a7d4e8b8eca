"""LLaMA-Factory's YAML or JSON (``llamafactory-cli train FILE``), with the ``dataset_info.json`` that it names.

Facts of LLaMA-Factory 0.9.5, which runs with transformers 4.55 to 5.6: `hparams/*_args.py` (defaults),
`hparams/parser.py` (unknown keys are refused), `data/parser.py` and `data/converter.py` (data sets),
`data/processor/supervised.py` with `processor_utils.py` (what is cut, what is in the loss, how rows are packed),
`model/adapter.py`, `train/dpo/trainer.py` and `train/kto/trainer.py` (losses, the reference), `train/rm/trainer.py`
with the value head of TRL 0.24 (`models/modeling_value_head.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune import foreignobjective, importers
from finetune.dsfile import scheduler
from finetune.errors import RecipeError
from finetune.foreign import Draft, Settings, short
from finetune.foreignparts import (
    Origin,
    base,
    compute,
    eval_rows,
    kept_back,
    number_formats,
    targets,
    train_rows,
    whole,
)
from finetune.hftrainer import Names, course

SIGNS = frozenset({
    "stage", "finetuning_type", "template", "dataset_dir", "cutoff_len", "lora_rank", "lora_target",
    "quantization_bit", "neat_packing", "val_size", "mask_history", "train_on_prompt", "preprocessing_num_workers",
    "interleave_probs", "loraplus_lr_ratio", "flash_attn", "plot_loss", "pref_loss", "pref_beta",
})  # fmt: skip
COMMANDS = (("llamafactory-cli", "train"), ("llamafactory.cli", "train"))
_INFO = "dataset_info.json"
_MOST_INFO = 10_000_000


def draft(settings: Settings) -> Draft:
    made = Draft(settings=settings, version="LLaMA-Factory 0.9.5")
    stage, kind = settings.text("stage", "sft"), settings.text("finetuning_type", "lora")
    word = settings.text("pref_loss") if stage == "dpo" and settings.text("pref_loss") in ("orpo", "simpo") else stage
    method = foreignobjective.method(settings, "stage", word)
    if kind != "lora":
        raise settings.stop("finetuning_type", f"{short(kind)} trains what is no LoRA", "only lora is taken over")
    base(made)
    _formats(made, settings)
    _adapter(made, settings)
    _objective(made, settings, method)
    packing = settings.truth("packing", default=stage == "pt") or settings.truth("neat_packing", default=False)
    length = _window(made, settings, packing)
    course(made, Names(), packed=length if packing and method == "sft" else None)
    scheduler(made)
    _rows(made, settings, method)
    _loss(made, settings, stage, method)
    made.put("output", settings.text("output_dir", "trainer_output"), "output_dir")
    made.leftovers(importers.known("llamafactory"), "LLaMA-Factory refuses a key that it does not know, unless "
                   "ALLOW_EXTRA_ARGS is set in the environment: then it was dropped")  # fmt: skip
    return made


def _formats(made: Draft, settings: Settings) -> None:
    bf16, fp16 = settings.truth("bf16", default=False), settings.truth("fp16", default=False)
    bits = settings.given("quantization_bit")
    method = settings.text("quantization_method", "bnb")
    if bits == 4:
        kind = settings.text("quantization_type", "nf4")
        double = settings.truth("double_quantization", default=True)
        keys = ("quantization_bit", "quantization_type")
        number_formats(made, kind, keys, f"4 bits, {kind}", double=double)
    elif bits == 8:
        number_formats(made, "int8", ("quantization_bit",), 8)
    elif bits is not None:
        settings.fault("quantization_bit", f"{bits:g} bits have no format here", "4 or 8")
    else:
        number_formats(made, "fp16" if fp16 else "bf16", ("bf16", "fp16"), "fp16" if fp16 else "bf16")
    if bits is not None and method not in ("bnb", "bitsandbytes"):
        made.lost("quantization_method", f"{short(method)} is read as bitsandbytes' format of as many bits")
    if not bf16 and not fp16:
        made.differs("bf16", "neither bf16 nor fp16 is set: the base's own format (bf16 where the card has it) and "
                             "no mixed "
                     "precision")  # fmt: skip
    compute(made, bf16 or not fp16, fp16, ("bf16", "fp16"), "fp16" if fp16 else "bf16")
    if settings.truth("pure_bf16", default=False):
        made.lost("pure_bf16", "the adapter is held in fp32 here whatever the products are in: small updates arrive")


def _adapter(made: Draft, settings: Settings) -> None:
    made.add("adapter.method", "lora", "PEFT method")
    rank = settings.count("lora_rank", 8)
    made.put("adapter.r", rank, "lora_rank")
    alpha = settings.given("lora_alpha")
    made.put("adapter.lora_alpha", alpha or rank * 2, "lora_alpha", note="" if alpha else "twice lora_rank")
    made.put("adapter.lora_dropout", settings.number("lora_dropout", 0.0), "lora_dropout")
    targets(made, "lora_target", settings.items("lora_target"), note="every linear of the layers")
    for key in ("use_rslora", "use_dora"):
        if settings.truth(key, default=False):
            made.put(f"adapter.{key}", True, key)
    ratio = settings.given("loraplus_lr_ratio")
    if ratio:
        made.put("train.lora_plus_ratio", ratio, "loraplus_lr_ratio")
    if settings.truth("pissa_init", default=False):
        made.lost("pissa_init", "an adapter begins at zero here, so that the base is not changed")
    whole(made, "additional_target", settings.items("additional_target"))


def _objective(made: Draft, settings: Settings, method: str) -> None:
    """The adapter that it goes on from, and what it learns from preferences."""
    paths, theirs = settings.items("adapter_name_or_path"), settings.text("ref_model_adapters")
    own = settings.text("ref_model") == settings.text("model_name_or_path") and theirs
    if settings.truth("create_new_adapter", default=False) or len(paths) > 1:
        made.lost("adapter_name_or_path", "merged into the base there before it began: `finetune merge` such a run, "
                  "and name the result as model")  # fmt: skip
    elif paths:
        foreignobjective.onward(made, "adapter_name_or_path", paths[0], method, reference=theirs if own else "")
    if method == "reward":
        foreignobjective.reward(made, "stage", dropout=True)
        made.lost("stage", "its value head drops a tenth of its inputs while it learns, and adds a bias that no pair "
                  "moves; the score head here has neither")  # fmt: skip
    if method in ("sft", "reward"):
        return
    loss = settings.text("pref_loss", "sigmoid") if method == "dpo" else ""
    if settings.has("dpo_label_smoothing") and loss != "sigmoid" and settings.text("stage") == "dpo":
        settings.fault("dpo_label_smoothing", "is only for pref_loss: sigmoid there", "remove it")
    names = foreignobjective.Names(
        word="stage", beta=("pref_beta",), loss="pref_loss", smoothing="dpo_label_smoothing", gamma_default=0.5,
        likelihood="pref_ftx", likelihood_default=0.0, wanted="kto_chosen_weight", unwanted="kto_rejected_weight",
    )  # fmt: skip
    said = ("ref_model", "ref_model_adapters") if own and [theirs] == paths else ()
    settings.used.update(said)
    foreignobjective.objective(made, method, names, loss=loss, said=said)


def _window(made: Draft, settings: Settings, packing: bool) -> int:
    length = settings.count("cutoff_len", 2048, least=9)
    if packing:
        length -= 1
        made.differs("cutoff_len", f"with packing it is one token less there: {length:,}")
    made.put("train.max_length", length, "cutoff_len", value=length + packing)
    made.add("data.over_length", "drop", "rows over the length: left out and named; there they were cut")
    made.differs("cutoff_len", f"{'' if settings.has('cutoff_len') else 'not set: '}of a turn over {length:,} "
                               "tokens question and "
                 "answer are both cut in proportion there, without a word: the answer loses its end and its stop "
                 "token; "
                 "here such a row is left out and named (data.over_length), or raise max_length")  # fmt: skip
    if packing and not settings.truth("neat_packing", default=False):
        made.differs("packing", "rows of a pack see each other there unless neat_packing is set; here never")
    return length


def _loss(made: Draft, settings: Settings, stage: str, method: str) -> None:
    on_prompt, last = settings.truth("train_on_prompt", default=False), settings.truth("mask_history", default=False)
    if on_prompt and last:
        settings.fault("mask_history", "cannot be true beside train_on_prompt", "keep one")
    ours = "all" if on_prompt or stage == "pt" else "last" if last else "assistant"
    if method == "sft":
        made.put("data.train_on", ours, "train_on_prompt", "mask_history", value=f"{on_prompt}, {last}".lower())
    template = settings.text("template")
    if template:
        made.differs("template", f"{short(template)} is LLaMA-Factory's own text, not the tokenizer's template; "
                                 "here the "
                     "tokenizer's is used: compare one row with `finetune data show`")  # fmt: skip
    if settings.has("default_system"):
        made.lost("default_system", "write the system turn into the rows")
    if settings.has("enable_thinking", "preserve_thinking"):
        made.lost("enable_thinking", "see data.thinking: keep, strip or mask")


def _rows(made: Draft, settings: Settings, method: str) -> None:
    names = settings.items("dataset")
    if not names:
        raise settings.stop("dataset", "missing", "name the data sets")
    info = _info(settings)
    probabilities = settings.items("interleave_probs")
    origins = [_origin(made, settings, "dataset", name, info, method) for name in names]
    train_rows(made, origins, "dataset", "dataset_dir")
    if probabilities:
        made.lost("interleave_probs", "they mix rows; `share` of data.sources mixes tokens: set it there")
    tests = settings.items("eval_dataset")
    judged = [_origin(made, settings, "eval_dataset", name, info, method) for name in tests]
    eval_rows(made, judged, "eval_dataset")
    kept_back(made, settings, "val_size", "eval_dataset" if judged else None)
    if settings.has("max_samples"):
        made.lost("max_samples", f"only the first {settings.count('max_samples', 1):,} rows of each set were read; "
                                 "here all "
                  "are: make a shorter file")  # fmt: skip


def _info(settings: Settings) -> dict[str, Any] | None:
    """What ``dataset_info.json`` declares; None where it is not on this disk."""
    folder = settings.text("dataset_dir", "data")
    path = Path(settings.find(str(Path(folder) / _INFO)))
    if not path.is_file():
        return None
    if path.stat().st_size > _MOST_INFO:
        raise RecipeError(f"larger than {_MOST_INFO} bytes", str(path))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise RecipeError("not valid JSON", str(path), "mend it") from None
    if not isinstance(found, dict):
        raise RecipeError("must be one object, a data set for each key", str(path))
    return {"": str(path.parent), **found}


def _origin(
    made: Draft, settings: Settings, key: str, name: str, info: dict[str, Any] | None, method: str
) -> Origin:  # fmt: skip
    if info is None:
        made.lost(key, f"{short(name)} is a name in {_INFO}, which is not here: write the file that it stands for")
        return Origin(path=name)
    declared = info.get(name) if name else None
    if not isinstance(declared, dict):
        near = importers.near(name, [word for word in info if word])
        settings.fault(key, f"{short(name)} is not declared in {info['']}/{_INFO}", near)
        return Origin(path=name)
    path, revision = str(declared.get("file_name") or ""), ""
    if declared.get("hf_hub_url"):
        path = str(declared["hf_hub_url"])
    elif path:
        path = str(Path(info[""]) / path)
    else:
        made.lost(key, f"{short(name)} comes from neither a file nor the Hugging Face hub: fetch it and name the file")
        path = name
    for word in ("script_url", "folder", "num_samples"):
        if declared.get(word):
            made.lost(key, f"{word} of {short(name)} is not read here")
    if declared.get("ranking") and method == "sft":
        made.differs(key, f"{short(name)} holds preference pairs, which only stages dpo and rm train on")
    format_name, columns = _columns(made, key, name, declared)
    written = declared.get("columns")
    narrowed = format_name == "alpaca" and isinstance(written, dict) and not written.get("query")
    if narrowed and "input" in (settings.place.columns(path) or ()):
        what = f"{short(name)} declares no `query`: its column input is not read there; here it is, as alpaca has it"
        made.differs(key, what)
    split, subset = str(declared.get("split") or "train"), str(declared.get("subset") or "")
    return Origin(path=path, format=format_name, columns=columns, split=split, subset=subset, revision=revision)


def _columns(made: Draft, key: str, name: str, declared: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The format, and its columns where they are called otherwise."""
    written = declared.get("columns")
    written = written if isinstance(written, dict) else {}
    given = {str(theirs): str(column) for theirs, column in written.items() if column}
    formatting = str(declared.get("formatting") or "alpaca")
    judging = {"chosen": "chosen", "rejected": "rejected"} if declared.get("ranking") else {}
    if given.get("kto_tag"):
        judging = {"kto_tag": "kto_tag"}
    if formatting == "alpaca":
        names = {"prompt": "instruction", "query": "input", "response": "output"}
        names |= {"system": "system", "history": "history"}
        format_name = "alpaca"
        if given and not given.get("response") and not judging:
            return "text", {"text": given["prompt"]} if given.get("prompt", "text") != "text" else {}
    else:
        names = {"messages": "messages" if formatting == "openai" else "conversations"}
        names |= {"system": "system", "tools": "tools"}
        format_name = "chat" if formatting == "openai" else "sharegpt"
        given.setdefault("messages", "conversations")
    tags = declared.get("tags")
    usual = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
    openai = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    if isinstance(tags, dict):
        odd = [tag for tag, word in usual.items() if tags.get(tag, word) not in (word, openai[tag])]
        if odd:
            made.lost(key, f"{', '.join(odd)} of {short(name)}: rename those keys in the rows (data check names them)")
        if tags.get("role_tag") == "role":
            format_name, names["messages"] = "chat", "messages"
    if judging:
        format_name, names = "kto" if "kto_tag" in judging else "preference", {**names, **judging}
    return format_name, {ours: given[theirs] for theirs, ours in names.items() if given.get(theirs, ours) != ours}
