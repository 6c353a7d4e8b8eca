"""A GGUF file, read back and held against the model folder that it was made of.

What must hold: every tensor's bytes (after the reordering of rows that llama.cpp wants), the numbers of the layers, the
vocabulary and merges, and the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from finetune import endings
from finetune.errors import EnvironmentFault, Fault, ModelError
from finetune.terminal import clean

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
"""What is written, and what llama.cpp calls it."""
_NUMBERS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SPACE = chr(ord(" ") + 256)
"""How a blank inside a merge is written."""
_ROUNDING = {"Q8": 0.02, "Q6": 0.05, "Q5": 0.1, "Q4": 0.2, "IQ4": 0.2, "Q3": 0.35, "Q2": 0.6}
"""The largest relative error of a tensor in each form: two to three times that of normally distributed weights."""
_MOST, _ROWS = 20, 4096


@dataclass(frozen=True)
class GGUF:
    """One file: its keys and values, and its tensors by name (the ``gguf`` package's, mapped from the disk)."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, Any]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))

    def number(self, name: str) -> Any:
        """A number of the layers, by its name below the architecture's."""
        return self.values.get(f"{self.architecture}.{name}")


def package() -> Any:
    """The ``gguf`` package. Raises EnvironmentFault where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise EnvironmentFault("GGUF needs the package gguf", "", "pip install 'finetune-qwen[gguf]'") from None
    return gguf


def read(path: Path) -> GGUF:
    """Raises ModelError where the file is no GGUF or is cut off."""
    gguf = package()
    try:
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ModelError(f"this GGUF cannot be read: {error}", str(path), "export again") from None
    return GGUF(path, values, {tensor.name: tensor for tensor in reader.tensors})


def config_of(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises ModelError where it is none, or of a model that is not written as GGUF."""
    path = folder / "config.json"
    config = _json(path)
    found = config.get("architectures")
    if not (isinstance(found, list) and found and isinstance(found[0], str) and found[0] in ARCHITECTURES):
        fix = f"models that are written: {', '.join(ARCHITECTURES)}; an original Qwen in the native layout first"
        raise ModelError(f"{clean(str(found))} cannot be written as GGUF", str(path), fix)
    if missing := [key for key in _NUMBERS if type(config.get(key)) not in (int, float)]:
        raise ModelError(f"{missing[0]} is no number", str(path), "make the folder again")
    return config


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}", str(path), "make the folder again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is no mapping", str(path), "make the folder again")
    return value


def shards(folder: Path) -> list[Path]:
    """The folder's weight files. Raises ModelError where there are none."""
    if (folder / _INDEX).is_file():
        names = sorted(set(_json(folder / _INDEX).get("weight_map", {}).values()))
        strangers = [name for name in names if Path(str(name)).name != name]
        if strangers:
            raise ModelError(f"it names {strangers[0]!r}, which is no file of this folder", str(folder / _INDEX), "")
    else:
        names = [_SINGLE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ModelError(f"no {(missing or [_SINGLE])[0]} here", str(folder), "make the folder again")
    return [folder / name for name in names]


def weights(paths: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of these safetensors files, one at a time."""
    for path in paths:
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    yield name, opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"this shard cannot be read: {error}", str(path), "make the folder again") from None


def _names(architecture: str, layers: int) -> Any:
    gguf = package()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[architecture], layers)


def reordered(name: str, value: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Rows as llama.cpp's ``llama`` wants them: its rotary embedding turns neighbours (2i, 2i+1), transformers' turns
    the halves of a head (i, i + d/2), so the rows of q and k are interleaved. → the same shape [heads · d, …]"""
    if ARCHITECTURES[config["architectures"][0]] != "llama":
        return value
    heads = {"q_proj": config["num_attention_heads"]}
    heads["k_proj"] = config.get("num_key_value_heads") or heads["q_proj"]
    for part, count in heads.items():
        if f".{part}." in name:
            split = value.reshape(count, 2, value.shape[0] // count // 2, *value.shape[1:])
            return split.swapaxes(1, 2).reshape(value.shape)
    return value


def tensor_faults(file: GGUF, folder: Path, config: dict[str, Any]) -> list[Fault]:
    """Every tensor of the folder against the file's, byte for byte in the form that the file has it in."""
    names = _names(ARCHITECTURES[config["architectures"][0]], config["num_hidden_layers"])
    faults, seen = [], set()
    for name, value in weights(shards(folder)):
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored == "output.weight" and stored not in file.tensors and config.get("tie_word_embeddings"):
            continue
        seen.add(stored)
        if what := _differs(file.tensors.get(stored), reordered(name, value, config)):
            faults.append(Fault(f"tensor {stored} {what}", str(file.path), f"it was made of {name}"))
    extra = {"rope_freqs.weight"} if _rope(config).get("rope_type") == "llama3" else set()
    strangers = sorted(set(file.tensors) - seen - extra)
    faults += [Fault(f"tensor {name} is not of this model", str(file.path)) for name in strangers]
    return faults[:_MOST]


def _differs(tensor: Any, wanted: torch.Tensor) -> str:
    """What is not as it should be; empty where every byte is."""
    if tensor is None:
        return "is missing"
    shape = tuple(int(side) for side in reversed(tensor.shape))
    if shape != tuple(wanted.shape):
        return f"is {list(shape)} where it should be {list(wanted.shape)}"
    kind = tensor.tensor_type.name
    if kind not in _PLAIN:
        return f"is stored as {kind}"
    rounded = wanted.to(_PLAIN[kind]).contiguous()
    if not torch.isfinite(rounded).all():
        return f"does not fit {kind}: it has values that are too large or no numbers"
    stored = torch.from_numpy(tensor.data.reshape(-1).view("u1").copy())
    return "" if torch.equal(rounded.reshape(-1).view(torch.uint8), stored) else "holds other values"


def adapter_faults(file: GGUF, folder: Path, config: dict[str, Any], alpha: float) -> list[Fault]:
    """The same for a LoRA adapter's folder. ``config``: of the base; ``alpha``: what the file must say."""
    names = _names(ARCHITECTURES[config["architectures"][0]], config["num_hidden_layers"])
    faults, seen = [], set()
    for key, value in weights([folder / "adapter_model.safetensors"]):
        module, _, matrix = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        stored = f"{names.get_name(module)}.weight.lora_{matrix.lower()}"
        seen.add(stored)
        wanted = reordered(f"{module}.", value, config) if matrix == "B" else value
        if what := _differs(file.tensors.get(stored), wanted):
            faults.append(Fault(f"tensor {stored} {what}", str(file.path), f"it was made of {key}"))
    faults += [Fault(f"tensor {name} is not of this adapter", str(file.path)) for name in set(file.tensors) - seen]
    wanted_values = {
        "general.architecture": ARCHITECTURES[config["architectures"][0]], "general.type": "adapter",
        "adapter.type": "lora", "adapter.lora.alpha": alpha,
    }  # fmt: skip
    faults += [
        _other(file, key, value) for key, value in wanted_values.items() if not _same(file.values.get(key), value)
    ]
    return faults[:_MOST]


def number_faults(file: GGUF, config: dict[str, Any]) -> list[Fault]:
    """The numbers of the layers against those of config.json."""
    heads, rope = config["num_attention_heads"], _rope(config)
    head = config.get("head_dim") or config["hidden_size"] // heads
    wanted = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": rope.get("rope_theta", 10000.0),
    }
    prefix = ARCHITECTURES[config["architectures"][0]]
    faults = [
        _other(file, f"{prefix}.{name}", value) for name, value in wanted.items() if not _same(file.number(name), value)
    ]
    if (found := file.number("attention.key_length")) not in (None, head) or (
        found is None and head * heads != config["hidden_size"]
    ):
        faults.append(_other(file, f"{prefix}.attention.key_length", head))
    scaling = file.number("rope.scaling.type")
    if (rope.get("rope_type", "default") == "default") != (scaling in (None, "none")) and rope.get(
        "rope_type"
    ) != "llama3":
        faults.append(_other(file, f"{prefix}.rope.scaling.type", rope.get("rope_type")))
    return [*faults, *([] if file.architecture == prefix else [_other(file, "general.architecture", prefix)])]


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding's settings, in the words of transformers 5 or of those before it."""
    stored = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    kind = {"rope_type": stored["type"]} if "type" in stored else {}
    return theta | kind | {key: value for key, value in stored.items() if value is not None}


def _same(found: Any, wanted: Any) -> bool:
    """Numbers with a point are stored in single precision."""
    if isinstance(wanted, float) and isinstance(found, float | int):
        return abs(found - wanted) <= 1e-6 * abs(wanted)
    return bool(found == wanted)


def _other(file: GGUF, key: str, wanted: Any) -> Fault:
    return Fault(f"{key} is {clean(str(file.values.get(key)))} where it should be {clean(str(wanted))}", str(file.path))


def vocabulary_faults(file: GGUF, folder: Path, config: dict[str, Any]) -> list[Fault]:
    """Tokens, merges and chat template against tokenizer.json and the folder's template."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    known = {index: token for token, index in Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).items()}
    # Rows of the embedding that no token has are named so by llama.cpp's converter.
    wanted = [known.get(index, f"[PAD{index}]") for index in range(config["vocab_size"])]
    found = file.values.get("tokenizer.ggml.tokens") or []
    faults = []
    if len(found) != len(wanted):
        faults.append(Fault(f"it has {len(found)} tokens where the model has {len(wanted)}", str(file.path)))
    elif found != wanted:
        index = next(index for index, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
        faults.append(Fault(f"token {index} is {found[index]!r} where it should be {wanted[index]!r}", str(file.path)))
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in _json(path)["model"].get("merges", [])]
    stored = [" ".join(part.replace(" ", _SPACE) for part in pair) for pair in merges]
    if file.values.get("tokenizer.ggml.model") == "gpt2" and file.values.get("tokenizer.ggml.merges", []) != stored:
        faults.append(Fault("its merges are not those of the tokenizer", str(file.path)))
    if file.values.get("tokenizer.chat_template") != endings.template(folder):
        faults.append(Fault("its chat template is not the tokenizer's", str(file.path)))
    return faults


def quantised_faults(file: GGUF, whole: GGUF) -> list[Fault]:
    """A quantised file against the one that it was made of: the same keys and names, and values near enough."""
    changed = {"general.file_type", "general.quantization_version"}
    keys = sorted(key for key in {*file.values, *whole.values} - changed if not key.startswith("GGUF."))
    keys = [key for key in keys if not _same(file.values.get(key), whole.values.get(key))]
    faults = [Fault(f"{key} changed while quantising", str(file.path)) for key in keys]
    alone = sorted(set(file.tensors) ^ set(whole.tensors))
    faults += [Fault(f"tensor {name} is in one file alone", str(file.path)) for name in alone]
    for name in sorted(set(file.tensors) & set(whole.tensors)):
        kind = file.tensors[name].tensor_type.name
        error = _distance(file.tensors[name], whole.tensors[name])
        if not error <= next((bound for word, bound in _ROUNDING.items() if kind.startswith(word)), 1e-2):
            faults.append(Fault(f"tensor {name} as {kind} is off by {error:.2f} of its length", str(file.path)))
    return faults[:_MOST]


def _distance(one: Any, two: Any) -> float:
    """The norm of their difference relative to that of ``two``, some rows at a time; infinite where shapes differ."""
    dequantise, off, length = package().dequantize, 0.0, 0.0
    if list(one.shape) != list(two.shape):
        return float("inf")
    for start in range(0, len(two.data), _ROWS):
        rows = slice(start, start + _ROWS)
        found, wanted = (dequantise(tensor.data[rows], tensor.tensor_type) for tensor in (one, two))
        off, length = off + float(((found - wanted) ** 2).sum()), length + float((wanted**2).sum())
    return float((off / length) ** 0.5) if length else off**0.5
