"""A model or an adapter as one GGUF file, through llama.cpp's own converter, read back and compared before it is kept.

The converter is shown a folder of its own: weights and tokenizer by reference, the settings without anything that names
code, the tokenizer as tokenizer.json describes it (for some model types transformers would rebuild it with that type's
split), and the token that ends an answer as the end of a text, whatever the base had there.

Where llama-cpp-python can be loaded, the file is run: the same texts must give the same tokens, and after each prompt
every greedy token must be the one that transformers chooses in fp32. An exact tie is a matter of rounding, so another
token is let pass where its logit is within ``MARGIN`` of the best one; how many were is in the report. A quantised
file is another model by design: it is compared with the whole one, which was run, tensor by tensor.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save

from finetune import endings, gguf_file, llamacpp, manifest, runfolder
from finetune.endings import End
from finetune.errors import EnvironmentFault, Fault, ModelError
from finetune.gguf_file import GGUF
from finetune.llamacpp import Say
from finetune.runfolder import disk_fault, json_bytes, read_json, write_synced

FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
QUANTISED = ("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m")
KINDS = (*FLOATS, *QUANTISED)
MARGIN = {"f32": 1e-3, "f16": 0.1, "bf16": 0.5}
"""In logits. In 16 bits llama.cpp rounds what goes into each product to the weights' form as well: over 4 prompts of a
135M model the largest difference of any logit was 1e-4 (f32), 0.05 (f16) and 0.45 (bf16)."""
PROMPTS = (
    "What is the capital of France?",
    "Écris une phrase sur l'été.",
    "Count from 1 to 12, then write 2024-05-17 in words.",
    "def area(r):\n    return 3.14 * r ** 2  # {{ what }} is r?",
)
TEXTS = (
    *PROMPTS,
    "  two  blanks\n\n\ttabs, don't WE'LL naïve",
    "日本語 한국어 русский עברית العربية ไทย हिन्दी",
    "🦙🧑\u200d💻 …–x=y[3:10]!=z",
)
TOKENS = 8
_LARGEST_BASE = 4_000_000_000
"""Bytes of weights up to which an adapter is run on its base, which has to be written as GGUF for that."""


def merged(model_folder: Path, out_file: Path, quantise: str | None, say: Say, name: str = "") -> dict[str, Any]:
    """Write a model folder in the native layout as ``out_file``, and return what was found to hold.

    ``quantise`` is one of KINDS; without it the weights keep their own form. ``name`` is what the file calls itself.
    ``say`` is told how far it is, about once a second.

    Raises:
        ModelError: the model cannot be written so, or what was written differs; nothing is left behind.
        EnvironmentFault: a package or the converters are missing, or the disk refuses.
    """
    absent = ready(out_file, quantise, say)
    config = gguf_file.config_of(model_folder)
    ends = endings.end_tokens(model_folder)
    kind = quantise if quantise in FLOATS else _own_form(model_folder)
    with _workplace(out_file) as scratch:
        stage(model_folder, scratch / "model", ends[0])
        written = scratch / "model.gguf"
        settings = ["--outtype", kind, f"--model-name={name or model_folder.name}"]
        llamacpp.convert(llamacpp.MODEL, scratch / "model", written, settings, say)
        say("reading the GGUF back")
        file = gguf_file.read(written)
        faults = gguf_file.number_faults(file, config) + gguf_file.vocabulary_faults(file, model_folder, config)
        faults += endings.end_faults(written, file.values, ends)
        _refuse(faults + gguf_file.tensor_faults(file, model_folder, config))
        ran = _ran(file, model_folder, ends, kind, say) if not absent else {"not_compared": absent}
        if quantise in QUANTISED:
            request = {"verb": "quantise", "model": str(written), "out": str(scratch / "small.gguf"), "kind": quantise}
            llamacpp.ask(request, scratch, "quantising", say)
            written = scratch / "small.gguf"
            _refuse(gguf_file.quantised_faults(gguf_file.read(written), file))
        report = {"kind": quantise or kind, "tensors": len(file.tensors), "vocabulary": config["vocab_size"]}
        report |= {"ends": [end.token for end in ends], "sha256": manifest.digest(written), "llama.cpp": ran}
        _keep(written, out_file)
    return report


def ready(out_file: Path, quantise: str | None, say: Say) -> str:
    """Everything that a GGUF needs, before a model is read; → why llama.cpp cannot run here, empty where it can.

    Raises:
        ModelError: no such form. EnvironmentFault: a package or the converters are missing.
    """
    gguf_file.package()
    if quantise not in (None, *KINDS):
        what = f"{quantise} is no form of a GGUF's weights"
        raise ModelError(what, str(out_file), f"choose one of {', '.join(KINDS)}")
    absent = llamacpp.unusable()
    if quantise in QUANTISED and absent:
        raise EnvironmentFault(f"quantising: {absent}", str(out_file), "pip install 'finetune-qwen[llamacpp]'")
    llamacpp.converters(say)
    return absent


def adapter(adapter_folder: Path, base_folder: Path, out_file: Path, say: Say) -> dict[str, Any]:
    """Write a plain LoRA adapter (``exporters.adapter.plain``) as ``out_file``; otherwise as ``merged``.

    llama.cpp scales by one alpha over each module's rank; where alphas differ their ratio goes into the matrix B.
    """
    gguf_file.package()
    config, absent = gguf_file.config_of(base_folder), llamacpp.unusable()
    settings = read_json(adapter_folder / "adapter_config.json") or {}
    values = dict(gguf_file.weights([adapter_folder / "adapter_model.safetensors"]))
    if refused := _not_plain(settings, values, config):
        raise ModelError(f"GGUF cannot hold {refused}", str(adapter_folder), "merge it instead: finetune merge")
    with _workplace(out_file) as scratch:
        stage(base_folder, scratch / "base", None)
        (scratch / "adapter").mkdir()
        alpha = float(settings["lora_alpha"])
        plain = {"lora_alpha": alpha, "peft_type": "LORA"}
        write_synced(scratch / "adapter" / "adapter_config.json", json_bytes(plain))
        write_synced(scratch / "adapter" / "adapter_model.safetensors", save(_one_alpha(values, settings)))
        written = scratch / "adapter.gguf"
        more = ["--base", str((scratch / "base").absolute()), "--outtype", "f32"]
        llamacpp.convert(llamacpp.ADAPTER, scratch / "adapter", written, more, say)
        file = gguf_file.read(written)
        _refuse(gguf_file.adapter_faults(file, scratch / "adapter", config, alpha))
        size = sum(path.stat().st_size for path in gguf_file.shards(base_folder))
        if not absent and size > _LARGEST_BASE:
            absent = f"the base has {size / 1e9:.0f} GB"
        ran = {"not_compared": absent} if absent else _ran_on_base(adapter_folder, base_folder, scratch, say)
        report = {"kind": "f32", "tensors": len(file.tensors), "alpha": alpha, "sha256": manifest.digest(written)}
        _keep(written, out_file)
    return report | {"llama.cpp": ran}


def _not_plain(settings: dict[str, Any], values: dict[str, torch.Tensor], config: dict[str, Any]) -> str:
    if type(settings.get("lora_alpha")) not in (int, float) or not settings["lora_alpha"]:
        return "an adapter without lora_alpha"
    for key in ("use_dora", "use_rslora", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens"):
        if settings.get(key):
            return key
    strange = [key for key in values if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if not strange and config.get("tie_word_embeddings"):
        strange = [key for key in values if ".lm_head." in key]
    return strange[0] if strange else ""


def _one_alpha(values: dict[str, torch.Tensor], settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that give the same ΔW = (alpha / r) · B A where every module's alpha is the config's."""
    found = {}
    for key, value in values.items():
        module = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
        pattern = settings.get("alpha_pattern") or {}
        alpha = next(
            (a for word, a in pattern.items() if re.match(rf"(.*\.)?({word})$", module)), settings["lora_alpha"]
        )
        factor = alpha / settings["lora_alpha"] if ".lora_B." in key else 1.0
        found[key] = (value.float() * factor).contiguous()
    return found


def stage(folder: Path, out: Path, end: End | None) -> None:
    """What the converter is shown of a model folder; ``end`` is what ends a text there, if not the folder's own."""
    out.mkdir()
    config = {key: value for key, value in (read_json(folder / "config.json") or {}).items() if key != "auto_map"}
    write_synced(out / "config.json", json_bytes(config))
    settings = read_json(folder / "tokenizer_config.json") or {}
    dropped = ("auto_map", "chat_template", "tokenizer_class")
    settings = {key: value for key, value in settings.items() if key not in dropped}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"eos_token": end.token} if end else {})
    write_synced(out / "tokenizer_config.json", json_bytes(settings))
    if (template := endings.template(folder)) is not None:
        write_synced(out / "chat_template.jinja", template.encode())
    index = folder / "model.safetensors.index.json"
    for path in (folder / "tokenizer.json", *gguf_file.shards(folder), *([index] if index.is_file() else [])):
        (out / path.name).symlink_to(path.absolute())


def _own_form(folder: Path) -> str:
    """The form that the first of the large tensors is in; a model's matrices are all in one."""
    for name, value in gguf_file.weights(gguf_file.shards(folder)):
        if value.dim() > 1:
            forms = {long: short for short, long in FLOATS.items()}
            found = str(value.dtype).removeprefix("torch.")
            if found in forms:
                return forms[found]
            raise ModelError(
                f"tensor {name} is {found}, which has no form in GGUF", str(folder), "choose --quantize f32"
            )
    raise ModelError("no matrix among the weights", str(folder), "make the folder again")


def _ran(file: GGUF, folder: Path, ends: Sequence[End], kind: str, say: Say) -> dict[str, Any]:
    """Tokens, ends and greedy answers of the file as llama.cpp runs it."""
    tokenizer, scratch, ids = endings.tokenizer_of(folder), file.path.parent, [end.id for end in ends]
    request = {"verb": "tokens", "model": str(file.path), "texts": [*TEXTS, *prompts(tokenizer)], "ids": ids}
    found = llamacpp.ask(request, scratch, "comparing tokens", say)
    for text, tokens in zip(request["texts"], found["tokens"], strict=True):
        if (wanted := tokenizer.encode(text, add_special_tokens=False)) != tokens:
            what = f"llama.cpp reads {text!r} as the tokens {tokens} where the model was trained on {wanted}"
            raise ModelError(what, str(folder / "tokenizer.json"), "set FINETUNE_LLAMA_CPP to a newer llama.cpp")
    if missed := [end.token for end in ends if end.id not in found["ends"]]:
        raise ModelError(
            f"llama.cpp would go on after {missed[0]}", str(folder), "train with a stop token that it knows"
        )
    return {"texts": len(request["texts"]), **greedy(file.path, None, folder, lambda model: model, MARGIN[kind], say)}


def _ran_on_base(folder: Path, base: Path, scratch: Path, say: Say) -> dict[str, Any]:
    written, kind = scratch / "base.gguf", _own_form(base)
    llamacpp.convert(llamacpp.MODEL, scratch / "base", written, ["--outtype", kind], say)
    from peft import PeftModel

    def adapted(model: Any) -> Any:
        return PeftModel.from_pretrained(model, folder)

    return greedy(written, scratch / "adapter.gguf", base, adapted, MARGIN[kind], say)


def prompts(tokenizer: Any) -> list[str]:
    if not tokenizer.chat_template:
        return list(PROMPTS)
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return [endings.rendered(tokenizer, turn, answer=True) for turn in turns]


def greedy(
    file: Path, adapter_file: Path | None, folder: Path, change: Callable[[Any], Any], margin: float, say: Say,
    texts: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """llama.cpp's greedy tokens after each prompt against what transformers would choose at the same places.

    ``change`` makes the reference of the model in ``folder``. Raises ModelError where they differ by more than
    ``margin`` in logits.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    need = 2 * sum(path.stat().st_size for path in gguf_file.shards(folder))
    if need > psutil.virtual_memory().available * 0.8:
        return {"not_compared": f"running it in fp32 takes {need / 1e9:.0f} GB of memory"}
    tokenizer = endings.tokenizer_of(folder)
    asked = [tokenizer.encode(text, add_special_tokens=False) for text in texts or prompts(tokenizer)]
    request = {"verb": "greedy", "model": str(file), "adapter": str(adapter_file) if adapter_file else None}
    answers = llamacpp.ask(request | {"prompts": asked, "count": TOKENS}, file.parent, "running the GGUF", say)
    say("running the model in transformers")
    logging.disable_progress_bar()
    model = change(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)).eval()
    near = 0
    for prompt, answer in zip(asked, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        gaps = logits.max(dim=-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        if float(gaps.max()) > margin:
            place = int(gaps.argmax())
            what = (
                f"after {tokenizer.decode(prompt)!r} llama.cpp's greedy token {place + 1} is {answer[place]} where the "
                f"model's is {int(logits[place].argmax())}, {float(gaps[place]):.3f} ahead (at most {margin})"
            )
            raise ModelError(what, str(file), "the GGUF is another model: it is not kept")
        near += int((gaps > 0).sum())
    if near > TOKENS * len(asked) // 8:
        what = f"{near} of {TOKENS * len(asked)} greedy tokens of llama.cpp are the second best, which no rounding does"
        raise ModelError(what, str(file), "the GGUF is another model: it is not kept")
    return {"prompts": len(asked), "tokens": TOKENS * len(asked), "near_ties": near, "margin": margin}


def _refuse(faults: Sequence[Fault]) -> None:
    if faults:
        raise ModelError.of(list(faults))


@contextlib.contextmanager
def _workplace(out_file: Path) -> Iterator[Path]:
    """A folder beside the file, under a temporary name that the next start clears."""
    runfolder.make_folder(out_file.parent)
    runfolder.clear_leftovers_of(out_file)
    scratch = out_file.absolute().with_name(f"{out_file.name}.tmp-{os.getpid()}")
    try:
        scratch.mkdir()
        yield scratch
    except OSError as error:
        raise disk_fault(error, out_file) from error
    finally:
        runfolder.remove(scratch)


def _keep(written: Path, out_file: Path) -> None:
    runfolder.sync_file(written)
    written.replace(out_file)
    runfolder.sync_folder(out_file.parent)
