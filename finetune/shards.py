"""safetensors shards read and written one tensor at a time, so that memory holds a tensor and never a model.

The format is an 8-byte length, a JSON header and the tensors' bytes in the header's order.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from finetune.base import HEADERS, ORIGIN, Base
from finetune.errors import ModelError
from finetune.families import qwen1
from finetune.headers import DTYPE_BYTES, INDEX, SINGLE, Tensor
from finetune.runfolder import disk_fault, json_bytes, read_json, write_synced

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class Reader:
    """A base's tensors by their native names, whatever they are called and fused with on the disk."""

    def __init__(self, base: Base) -> None:
        self._base, self._open, self._stack = base, dict[str, Any](), ExitStack()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored. Raises ModelError where the file no longer holds it."""
        rows = self._base.tensors[name].rows
        return self._read(name, lambda stored: stored[slice(*rows)] if rows else stored[...])

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Some rows of a matrix that is stored whole. → [len(indices), columns]"""
        return self._read(name, lambda stored: torch.cat([stored[index : index + 1] for index in indices]))

    def _read(self, name: str, take: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        place = self._base.tensors[name]
        path, stored = self._base.folder / place.shard, place.stored or name
        try:
            if place.shard not in self._open:
                self._open[place.shard] = self._stack.enter_context(safe_open(path, framework="pt"))
            return take(self._open[place.shard].get_slice(stored))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"tensor {stored} cannot be read: {error}", str(path), "fetch it again") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        self._stack.close()


@dataclass(frozen=True, kw_only=True)
class Written:
    """One tensor of an output shard: the native tensors that it is made of, one below the other."""

    tensor: Tensor
    parts: tuple[str, ...]


def arrange(base: Base, layout: str) -> dict[str, dict[str, Written]]:
    """Output shard → stored name → what goes there. The split over shards is the base's own."""
    pieces = qwen1.pieces(base.shape.layers, base.shape.hidden) if layout == "original" else {}
    found: dict[str, dict[str, Written]] = {}
    for name, tensor in base.tensors.items():
        stored = pieces[name].stored if pieces else name
        shard = found.setdefault(tensor.shard, {})
        parts = (*shard[stored].parts, name) if stored in shard else (name,)
        rows = sum(base.tensors[part].shape[0] for part in parts)
        shard[stored] = Written(
            tensor=Tensor(shard=tensor.shard, dtype=tensor.dtype, shape=(rows, *tensor.shape[1:])), parts=parts
        )
    return found


def rewrite(
    base: Base, out: Path, layout: str, change: Callable[[str, torch.Tensor], torch.Tensor] | None,
    progress: Callable[[int, int], None], *, consume: bool = False,
) -> None:  # fmt: skip
    """Write the base's weights into the folder ``out`` in a layout, and the index where there are several shards.

    ``change`` gets each native tensor's name and value, and gives the value to be written. With ``consume``
    each source shard is removed once it is written.
    """
    arranged = arrange(base, layout)
    kept = read_json(base.folder / ORIGIN / HEADERS) if layout == "original" else None
    headers = kept if isinstance(kept, dict) else {}
    done = 0
    for shard, tensors in arranged.items():
        header = as_it_was(headers.get(shard, ""), tensors) or header_of({n: w.tensor for n, w in tensors.items()})
        with Reader(base) as source, ShardWriter(out / shard, header) as target:
            for name in target.names:
                written = tensors[name]
                values = [source.tensor(part) for part in written.parts]
                if change:
                    kind = TORCH_DTYPES[written.tensor.dtype]
                    values = [change(part, value).to(kind) for part, value in zip(written.parts, values, strict=True)]
                target.add(name, torch.cat(values) if len(values) > 1 else values[0])
                done += len(values)
                progress(done, len(base.tensors))
        if consume:
            (base.folder / shard).unlink()
    places = {name: shard for shard, tensors in arranged.items() for name in tensors}
    stored = base.folder / ORIGIN / INDEX
    index = read_json(stored) if layout == "original" else None
    if isinstance(index, dict) and index.get("weight_map") == places:
        write_synced(out / INDEX, stored.read_bytes())
    elif list(arranged) != [SINGLE]:
        total = sum(w.tensor.bytes for shard in arranged.values() for w in shard.values())
        write_synced(out / INDEX, json_bytes({"metadata": {"total_size": total}, "weight_map": places}))


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


def as_it_was(text: str, tensors: Mapping[str, Written]) -> bytes | None:
    """The header that the original shard had, so that the file comes back byte for byte; None where it does not fit."""
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        stored = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        offsets = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
    wanted = {name: (written.tensor.dtype, written.tensor.shape) for name, written in tensors.items()}
    lengths = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items()}
    ends = [0, *(end for _, end in offsets)]
    whole = all(low == before for (low, _), before in zip(offsets, ends, strict=False))
    sized = all(lengths.get(name) == written.tensor.bytes for name, written in tensors.items())
    return text.encode() if stored == wanted and whole and sized else None


class ShardWriter:
    """Write the tensors that a header announces, in the order of their places; leaving without one is an error."""

    def __init__(self, path: Path, header: bytes) -> None:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        self.names = sorted(entries, key=lambda name: (entries[name]["data_offsets"], list(entries).index(name)))
        self.path, self._due = path, list(self.names)
        self._file = path.open("wb")
        self._write(struct.pack("<Q", len(header)) + header)

    def add(self, name: str, value: torch.Tensor) -> None:
        assert self._due[:1] == [name], f"{name} is not the tensor due"
        del self._due[0]
        data = value.detach().cpu().contiguous()
        self._write(memoryview(data.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise disk_fault(error, self.path) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            if kind is None:
                raise disk_fault(error, self.path) from error
        finally:
            self._file.close()
        assert kind is not None or not self._due, f"{self._due} were not written"
