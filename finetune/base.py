"""The base model's folder, judged before anything is loaded: config, shards, tensors, tokenizer, template.

Reads JSON files and the headers of safetensors shards only (a few KB each), so that a fault of a 28 GB folder is
known in milliseconds. No torch.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import families, manifest
from finetune.decoder import DecoderShape
from finetune.errors import Fault, ModelError

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_HEADER_LIMIT = 100 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where one tensor of the checkpoint lies."""

    shard: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base folder whose files hold together."""

    folder: Path
    config: dict[str, Any]
    shape: DecoderShape
    tensors: dict[str, Tensor]
    stop_token: str
    notes: tuple[str, ...]

    @property
    def shards(self) -> list[str]:
        return sorted({tensor.shard for tensor in self.tensors.values()})

    @property
    def dtype(self) -> str:
        """The torch name of the dtype that most weights are stored in."""
        stored = [tensor.dtype for tensor in self.tensors.values()]
        return _FLOATS.get(max(set(stored), key=stored.count), "float32")

    def files(self) -> list[Path]:
        """The files that decide what the model computes and how text becomes ids."""
        names = {
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        }
        return [self.folder / name for name in sorted(names | set(self.shards)) if (self.folder / name).is_file()]

    def digests(self, progress: Callable[[int], None] | None = None) -> dict[str, str]:
        return {path.name: manifest.digest(path, progress) for path in self.files()}


def inspect(folder: Path) -> Base:
    """Judge a base folder.

    Raises:
        ModelError: with every fault found, each naming the file or the tensor.
    """
    config = _read_config(folder)
    family = families.get(config.get("model_type", ""), folder / "config.json")
    try:
        shape = DecoderShape.from_config(config)
    except KeyError as error:
        raise ModelError(
            f"config.json has no {error}", str(folder / "config.json"), "use the folder as published"
        ) from None
    except TypeError as error:
        what = f"config.json holds a number that cannot be: {error}"
        raise ModelError(what, str(folder / "config.json"), "use the folder as published") from None
    tensors, faults = _read_headers(folder)
    if not faults:
        faults += _tensor_faults(folder, shape, tensors)
    stop_token, found = _tokenizer_faults(folder, shape, family.STOP_TOKENS)
    faults += found
    if faults:
        raise ModelError.of(faults)
    notes = []
    if "auto_map" in config:
        notes.append("config.json names remote code (auto_map): ignored, nothing from the folder is executed")
    return Base(folder=folder, config=config, shape=shape, tensors=tensors, stop_token=stop_token, notes=tuple(notes))


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
    if "quantization_config" in config:
        raise ModelError(
            "the base is already quantised", str(path), "use the full-precision model; `quantize:` makes the 4-bit form"
        )
    return config


def _read_headers(folder: Path) -> tuple[dict[str, Tensor], list[Fault]]:
    """Every tensor of the folder's safetensors shards, and the faults of the shards."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            return {}, [Fault("the shard index cannot be read", str(index), "fetch the file again")]
        paths = [folder / Path(name).name for name in names]
    elif single.is_file():
        paths = [single]
    else:
        pickles = [path.name for path in folder.iterdir() if path.suffix in _PICKLES]
        if pickles:
            what, fix = (
                f"weights are pickled ({pickles[0]}), which can run code",
                "use the safetensors form of the model",
            )
            return {}, [Fault(what, str(folder), fix)]
        return {}, [Fault("no safetensors weights here", str(folder), "fetch the model again")]
    tensors: dict[str, Tensor] = {}
    faults: list[Fault] = []
    for path in paths:
        try:
            tensors |= _header(path)
        except FileNotFoundError:
            faults.append(Fault("this shard is missing", str(path), "fetch it again"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            faults.append(Fault(f"this shard cannot be read: {error}", str(path), "fetch it again"))
    return tensors, faults


def _header(path: Path) -> dict[str, Tensor]:
    """Parse one safetensors header and hold the file's size against it. Raises ValueError with the reason."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("it is cut off before its header")
        (length,) = struct.unpack("<Q", start)
        if length > min(_HEADER_LIMIT, size - 8):
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
    tensors, end = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        low, high = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if entry["dtype"] in DTYPE_BYTES and high - low != math.prod(shape) * DTYPE_BYTES[entry["dtype"]]:
            raise ValueError(f"tensor {name} has {high - low} bytes, which is not its shape {list(shape)}")
        end = max(end, high)
        tensors[name] = Tensor(shard=path.name, dtype=entry["dtype"], shape=shape)
    if size != 8 + length + end:
        raise ValueError(f"it has {size} bytes where its header says {8 + length + end}: the download was cut off")
    return tensors


def _tensor_faults(folder: Path, shape: DecoderShape, tensors: dict[str, Tensor]) -> list[Fault]:
    wanted = shape.tensors()
    missing = [name for name in wanted if name not in tensors]
    faults = []
    if missing:
        what = f"{len(missing)} tensors are missing, the first is {missing[0]}"
        faults.append(Fault(what, str(folder), "the model would be random there; fetch it again"))
    for name, size in wanted.items():
        if name in tensors and tensors[name].dtype not in _FLOATS:
            what = f"tensor {name} is stored as {tensors[name].dtype}, which is a quantised form"
            faults.append(Fault(what, str(folder / tensors[name].shard), "use the full-precision model"))
        elif name in tensors and tensors[name].shape != size:
            what = f"tensor {name} is {list(tensors[name].shape)} where config.json says {list(size)}"
            faults.append(
                Fault(what, str(folder / tensors[name].shard), "config.json and weights belong to two models")
            )
    return faults[:20]


def _tokenizer_faults(folder: Path, shape: DecoderShape, stops: tuple[str, ...]) -> tuple[str, list[Fault]]:
    """The stop token that ends a turn here, and what is wrong with tokenizer and template."""
    path = folder / "tokenizer.json"
    try:
        tokenizer = json.loads(path.read_bytes())
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
        added = {entry["content"]: int(entry["id"]) for entry in tokenizer.get("added_tokens", [])}
        vocabulary = tokenizer["model"]["vocab"]
        ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))), *added.values()]
        highest = max(map(int, ids), default=-1)
        template = settings.get("chat_template") or (folder / "chat_template.jinja").is_file()
    except FileNotFoundError as error:
        return "", [Fault(f"no {Path(str(error.filename)).name}", str(folder), "fetch the model's tokenizer files")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return "", [Fault(f"the tokenizer cannot be read: {error}", str(path), "fetch it again")]
    faults = []
    if highest >= shape.vocab:
        what = f"the tokenizer knows id {highest} but the model has only {shape.vocab} embedding rows"
        faults.append(Fault(what, str(path), "tokenizer and weights belong to two models"))
    if not template:
        faults.append(
            Fault(
                "no chat template", str(folder / "tokenizer_config.json"), "use the chat or instruct form of the model"
            )
        )
    stop = next((token for token in stops if token in added), "")
    if not stop:
        what = f"none of the family's stop tokens ({', '.join(stops)}) is in the tokenizer"
        faults.append(Fault(what, str(path), "a model trained without a stop token never ends its answer"))
    return stop, faults


def stored_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(math.prod(tensor.shape) * DTYPE_BYTES.get(tensor.dtype, 2) for tensor in tensors.values())
