"""Headers of safetensors shards: each tensor's place, dtype and shape from a few KB of each file, without torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune.errors import Fault

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LIMIT = 100 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where one tensor lies. ``stored``: its name in the shard, where it is another; ``rows``: the part of that tensor
    which is this one, where it is not all of it; ``start``: the shard's byte at which what is stored begins; ``made``:
    no file holds it yet, it is all zeros. ``parts``: of a packed one, the stored tensors by their last names; ``dtype``
    is then what a merge writes."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    stored: str = ""
    rows: tuple[int, int] | None = None
    start: int = field(default=0, compare=False)
    made: bool = False
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES.get(self.dtype, 2)


def read_folder(folder: Path) -> tuple[dict[str, Tensor], list[Fault]]:
    """Every tensor of the folder's safetensors shards under its stored name, and the faults of the shards."""
    places, faults = _shards(folder)
    tensors: dict[str, Tensor] = {}
    for path in dict.fromkeys(places.values()):
        try:
            found = read(path)
        except FileNotFoundError:
            faults.append(Fault("this shard is missing", str(path), "fetch it again"))
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            faults.append(Fault(f"this shard cannot be read: {error}", str(path), "fetch it again"))
            continue
        for name in sorted(set(found) & set(tensors)):
            what = f"tensor {name} lies in {tensors[name].shard} too: which one is meant cannot be told"
            faults.append(Fault(what, str(path), "remove the shard that does not belong here"))
        tensors |= found
    for name, path in places.items():
        if name in tensors and tensors[name].shard != path.name:
            what = f"tensor {name} lies in {tensors[name].shard}, the index says {path.name}"
            faults.append(Fault(what, str(folder / INDEX), "fetch the index again"))
    return tensors, faults[:20]


def _shards(folder: Path) -> tuple[dict[str, Path], list[Fault]]:
    """Tensor name → its shard as the index has it (without an index: the single shard), and what is wrong there."""
    index = folder / INDEX
    if index.is_file():
        try:
            places = json.loads(index.read_bytes())["weight_map"]
            strangers = sorted({str(name) for name in places.values() if Path(str(name)).name != name})
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return {}, [Fault("the shard index cannot be read", str(index), "fetch the file again")]
        if strangers:
            return {}, [
                Fault(f"it names {strangers[0]!r}, which is no file of this folder", str(index), "fetch it again")
            ]
        return {str(name): folder / shard for name, shard in places.items()}, []
    if (folder / SINGLE).is_file():
        return {"": folder / SINGLE}, []
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        what = f"weights are pickled ({pickles[0]}), which can run code"
        fix = "make safetensors of them: finetune convert FOLDER OUT --to native"
        return {}, [Fault(what, str(folder), fix)]
    return {}, [Fault("no safetensors weights here", str(folder), "fetch the model again")]


def text(path: Path) -> bytes:
    """One shard's header as it is written. Raises ValueError with the reason."""
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("it is cut off before its header")
        (length,) = struct.unpack("<Q", start)
        if length > min(_LIMIT, path.stat().st_size - 8):
            raise ValueError("its header is longer than the file")
        return file.read(length)


def read(path: Path) -> dict[str, Tensor]:
    """Parse one shard's header and hold the file's size against it. Raises ValueError with the reason."""
    size, written = path.stat().st_size, text(path)
    header = json.loads(written)
    tensors, end = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        low, high = entry["data_offsets"]
        start = 8 + len(written) + low
        tensor = Tensor(shard=path.name, dtype=entry["dtype"], shape=tuple(entry["shape"]), start=start)
        if entry["dtype"] in DTYPE_BYTES and high - low != tensor.bytes:
            raise ValueError(f"tensor {name} has {high - low} bytes, which is not its shape {list(tensor.shape)}")
        end = max(end, high)
        tensors[name] = tensor
    whole = 8 + len(written) + end
    if size != whole:
        raise ValueError(f"it has {size} bytes where its header says {whole}: the download was cut off")
    return tensors


def header_of(layout: Mapping[str, Tensor]) -> bytes:
    """The header of a shard that holds these tensors in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in layout.items():
        length = math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)
