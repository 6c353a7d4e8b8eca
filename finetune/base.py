"""The base model's folder, judged before anything is loaded: config, shards, tensors, tokenizer, template.

Reads JSON files and the headers of safetensors shards only (a few KB each), so that a fault of a 28 GB folder is
known in milliseconds. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune import families, forms, headers, manifest, packed, tokens
from finetune.decoder import SCORE, DecoderShape, Packing, is_scored
from finetune.errors import Fault, ModelError
from finetune.families import qwen1
from finetune.headers import Tensor
from finetune.runfolder import read_json

_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_OF_PACKED = {"quantization_config", "torch_dtype"}
"""Keys of a packed base's config that its matrices have no use for."""
ORIGIN = "original"
"""Sub-folder of a converted base that keeps the small files of the original layout."""
HEADERS = "headers.json"
"""In it: the headers that the original's shards had."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base folder whose files hold together.

    ``config`` and the names in ``tensors`` are native, whatever the layout on the disk, and packed linears (``packing``
    of the shape) stand there as the matrices that they are; ``origin`` is the original
    Qwen's own config where the folder is in its layout or was converted from it.
    """

    folder: Path
    layout: str
    config: dict[str, Any]
    shape: DecoderShape
    tensors: dict[str, Tensor]
    stop_token: str
    notes: tuple[str, ...]
    origin: dict[str, Any] | None = None

    @property
    def shards(self) -> list[str]:
        return sorted({part.shard for one in self.tensors.values() for part in (one, *one.parts.values())})

    @property
    def piecewise(self) -> bool:
        """Whether the model was trained on contents tokenised apart from their frame."""
        return self.origin is not None

    @property
    def dtype(self) -> str:
        """The torch name of the dtype that most weights are stored in."""
        return _dtype(self.tensors)

    def files(self) -> list[Path]:
        """The files that decide what the model computes and how text becomes ids."""
        names = {
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "qwen.tiktoken",
        }
        return [self.folder / name for name in sorted(names | set(self.shards)) if (self.folder / name).is_file()]

    def digests(self, progress: Callable[[int], None] | None = None) -> dict[str, str]:
        return {path.name: manifest.digest(path, progress) for path in self.files()}


def _dtype(tensors: dict[str, Tensor]) -> str:
    stored = [tensor.dtype for tensor in tensors.values()]
    return _FLOATS.get(max(set(stored), key=stored.count), "float32") if stored else "float32"


def inspect(folder: Path, rope: str | None = None, *, weights_only: bool = False) -> Base:
    """Judge a base folder.

    Args:
        rope: the recipe's choice for contexts beyond the original Qwen's ``seq_length``.
        weights_only: pass over an absent tokenizer (``stop_token`` is then empty).

    Raises:
        ModelError: with every fault found, each naming the file or the tensor.
    """
    stored = _read_config(folder)
    family = families.get(stored.get("model_type", ""), folder / "config.json")
    layout = "original" if stored["model_type"] == qwen1.MODEL_TYPE else "native"
    tensors, faults = headers.read_folder(folder)
    packing = forms.packing_of(stored, str(folder / "config.json"))
    if packing is not None:
        stored = {key: value for key, value in stored.items() if key not in _OF_PACKED} | {"dtype": "bfloat16"}
    config, shape, origin = _numbers(folder, stored, layout, rope, _dtype(tensors))
    shape = replace(shape, packing=packing)
    if packing is not None and not faults:
        tensors, faults = packed.as_matrices(folder, shape, tensors)
    if layout == "original" and not faults:
        tensors, faults = _as_native(folder, shape, tensors)
    if not faults:
        faults += _tensor_faults(folder, shape, tensors)
    stop_token = ""
    if not weights_only or tokens.is_there(folder):
        stop_token, found = tokens.judge(folder, shape.vocab, family.STOP_TOKENS, layout)
        faults += found
    if faults:
        raise ModelError.of(faults)
    return Base(
        folder=folder, layout=layout, config=config, shape=shape, tensors=tensors, stop_token=stop_token,
        notes=_notes(stored, layout, packing), origin=origin,
    )  # fmt: skip


def as_scorer(base: Base) -> Base:
    """The base with a score head in place of its head over the vocabulary; a reward model is one already.

    The head begins as zeros: every text has the same reward, and no pair is told apart before one was learned from.
    """
    if base.shape.scored:
        return base
    kept = {name: tensor for name, tensor in base.tensors.items() if name != "lm_head.weight"}
    kept[SCORE] = Tensor(
        shard=max(one.shard for one in kept.values()), dtype="F32", shape=(1, base.shape.hidden), made=True
    )
    named = [str(name).replace("ForCausalLM", "ForSequenceClassification") for name in base.config["architectures"]]
    config = base.config | {"architectures": named, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    config["problem_type"] = "regression"  # or a pipeline would show the sigmoid of a reward
    return replace(base, config=config, shape=replace(base.shape, scored=True), tensors=kept)


def refuse_scorer(folder: Path, doing: str) -> None:
    """Raise ModelError where a reward model's run, adapter or own folder is asked for what takes words."""
    told = [
        _read_json(folder / name) or {}
        for name in ("config.json", "adapter_config.json", "adapter/adapter_config.json")
    ]
    named = told[0].get("architectures")
    if "SEQ_CLS" in [one.get("task_type") for one in told] or is_scored(named):
        what = f"this is a reward model: it scores whole texts and writes none, which {doing} needs"
        raise ModelError(what, str(folder), "score rows with it (finetune predict), or judge pairs (finetune eval)")


def _notes(stored: dict[str, Any], layout: str, packing: Packing | None) -> tuple[str, ...]:
    notes = []
    if packing is not None:
        size = f"groups of {packing.group}" if packing.group else "whole rows"
        notes.append(f"the base is packed by {packing.kind} in 4 bits, {size}: read as it is, without its library")
    if "auto_map" in stored:
        notes.append("config.json names remote code (auto_map): ignored, nothing from the folder is executed")
    if layout == "original":
        notes.append("original Qwen layout: its tensors are read into native Qwen2 layers, which compute the same")
    return tuple(notes)


def _numbers(
    folder: Path, stored: dict[str, Any], layout: str, rope: str | None, dtype: str
) -> tuple[dict[str, Any], DecoderShape, dict[str, Any] | None]:
    """(native config, shape, the original's config where there is one)."""
    path, fix = folder / "config.json", "use the folder as published"
    origin = stored if layout == "original" else _read_json(folder / ORIGIN / "config.json")
    origin = origin if origin and origin.get("model_type") == qwen1.MODEL_TYPE else None
    if layout == "original" and (refused := qwen1.refusals(stored)):
        raise ModelError.of([Fault(what, str(path), mend) for what, mend in refused])
    made = stored.get(qwen1.RECORD)
    if rope and made and rope != made:
        raise ModelError(f"this model was made with rope: {made}, not {rope}", str(path), f"set rope: {made}")
    rope = rope or made
    try:
        config = stored
        if layout == "original":
            config = qwen1.native_config(stored, rope, dtype)
        elif origin:
            _refuse_strayed(folder, stored, qwen1.native_config(origin, made, dtype))
            config = stored | (qwen1.native_config(origin, rope, dtype) if rope else {})
        shape = DecoderShape.from_config(config)
        return config, replace(shape, family="qwen1") if origin else shape, origin
    except KeyError as error:
        raise ModelError(f"config.json has no {error}", str(path), fix) from None
    except (TypeError, ValueError) as error:
        raise ModelError(f"config.json holds a number that cannot be: {error}", str(path), fix) from None


_FREE = {"architectures", "dtype", "use_cache", "initializer_range"}


def _refuse_strayed(folder: Path, stored: dict[str, Any], derived: dict[str, Any]) -> None:
    """A native folder and its record of the original must tell of one model, or the way back would make another."""
    apart = [key for key, value in derived.items() if key not in _FREE and stored.get(key, value) != value]
    if apart:
        what = f"{apart[0]} is {stored.get(apart[0])!r} here and {derived[apart[0]]!r} by {ORIGIN}/config.json"
        raise ModelError(what, str(folder / "config.json"), "put the edited file back, or convert the original again")


def _read_json(path: Path) -> dict[str, Any] | None:
    value = read_json(path)
    return value if isinstance(value, dict) else None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError("no config.json: this is not a model folder", str(folder), "check `model:`") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"config.json cannot be read: {error}", str(path), "fetch the file again") from None
    if not isinstance(config, dict):
        raise ModelError("config.json is not a JSON object", str(path), "fetch the file again")
    return config


def _as_native(folder: Path, shape: DecoderShape, stored: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Fault]]:
    """The original's tensors under their native names, each with its place in the stored one."""
    found: dict[str, Tensor] = {}
    faults: dict[str, Fault] = {}
    for name, (source, rows) in qwen1.pieces(shape.layers, shape.hidden).items():
        tensor = stored.get(source)
        if tensor is None:
            faults[source] = Fault(
                f"tensor {source} is missing", str(folder), "the model would be random there; fetch it again"
            )
        elif rows and tensor.shape[0] != 3 * shape.hidden:
            what = f"tensor {source} is {list(tensor.shape)}, it must have 3 × {shape.hidden} rows"
            faults[source] = Fault(what, str(folder / tensor.shard), "config.json and weights belong to two models")
        else:
            size = (rows[1] - rows[0], *tensor.shape[1:]) if rows else tensor.shape
            found[name] = replace(tensor, shape=size, stored=source, rows=rows)
    known = {tensor.stored for tensor in found.values()} | set(faults)
    for source in sorted(set(stored) - known):
        if not qwen1.is_leftover(source):
            what = f"tensor {source} belongs to no part of this model"
            faults[source] = Fault(what, str(folder / stored[source].shard), "config.json and weights do not agree")
    return found, list(faults.values())[:20]


def _tensor_faults(folder: Path, shape: DecoderShape, tensors: dict[str, Tensor]) -> list[Fault]:
    wanted = shape.tensors()
    missing = [name for name in wanted if name not in tensors]
    faults = []
    if missing:
        what = f"{len(missing)} tensors are missing, the first is {missing[0]}"
        faults.append(Fault(what, str(folder), "the model would be random there; fetch it again"))
    for name, size in wanted.items():
        if name in tensors and tensors[name].dtype not in _FLOATS:
            what = f"tensor {_stored(name, tensors)} is stored as {tensors[name].dtype}, which is a quantised form"
            faults.append(Fault(what, str(folder / tensors[name].shard), "use the full-precision model"))
        elif name in tensors and tensors[name].shape != size:
            what = f"tensor {_stored(name, tensors)} is {list(tensors[name].shape)} where config.json says {list(size)}"
            faults.append(
                Fault(what, str(folder / tensors[name].shard), "config.json and weights belong to two models")
            )
    return faults[:20]


def _stored(name: str, tensors: dict[str, Tensor]) -> str:
    return tensors[name].stored or name


def stored_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.bytes for tensor in tensors.values())
