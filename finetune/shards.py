"""safetensors shards read and written in row blocks, so that memory holds neither a model nor its largest matrix.

The format is an 8-byte length, a JSON header and the tensors' bytes in the header's order.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch

from finetune import forms, headers
from finetune.base import HEADERS, ORIGIN, Base
from finetune.errors import ModelError
from finetune.families import qwen1
from finetune.headers import INDEX, SINGLE, Tensor
from finetune.runfolder import disk_fault, json_bytes, read_json, rename, write_synced

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""Of weights."""
_STORED = TORCH_DTYPES | {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_FLUSH = 1 << 28
"""Bytes after which what was written is sent on to the disk."""
_BLOCK = 1 << 19
"""Values read and written at a time: 1 MB in fp32. They stay in a cache, and memory does not follow the model."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A tensor that is read as it is needed. ``read``: its rows from and to, in the dtype that it is stored in."""

    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor]

    def bounds(self) -> list[tuple[int, int]]:
        """Row blocks from and to: always the same ones, and 64 rows or a multiple each, save the last."""
        rows = self.shape[0] if self.shape else 1
        step = max(64, _BLOCK // max(1, math.prod(self.shape[1:])) // 64 * 64)
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def blocks(self) -> Iterator[torch.Tensor]:
        return (self.read(start, stop) for start, stop in self.bounds())


Change = Callable[[str, Rows], Iterable[torch.Tensor]]
"""A tensor's name and rows → the row blocks to write in its place."""


class Reader:
    """A base's tensors by their native names, whatever they are called and fused with on the disk.

    Read, not mapped into memory: pages of a mapped shard count as the process's own, 9 GB for a shard of 9 GB.
    """

    def __init__(self, base: Base) -> None:
        self._base, self._open, self._stack = base, dict[str, tuple[BinaryIO, dict[str, Tensor]]](), ExitStack()
        self._last: tuple[str, Any] = ("", None)
        self._lock = threading.Lock()  # row blocks are asked for from several threads

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored. Raises ModelError where the file no longer holds it."""
        shape = self._base.tensors[name].shape
        return self._read(name, 0, shape[0]) if shape else self._read(name, 0, 1).reshape(())

    def packed(self, name: str) -> Any:
        """A packed matrix as ``forms`` holds it. Raises ModelError where its parts cannot be read, or cannot be.

        The last one is kept: its row blocks are asked for one after the other.
        """
        place, packing = self._base.tensors[name], self._base.shape.packing
        assert packing is not None
        with self._lock:
            if self._last[0] != name:
                try:
                    held = forms.stored(packing.kind).read(lambda part: self._part(place.parts[part]), packing)
                except ValueError as error:
                    where, what = str(self._base.folder / place.shard), f"{name.removesuffix('.weight')}: {error}"
                    raise ModelError(what, where, "fetch it again") from None
                self._last = name, held
            return self._last[1]

    def _part(self, place: Tensor) -> torch.Tensor:
        return self._stored(place, 0, place.shape[0])

    def streamed(self, name: str) -> Rows:
        """One tensor, to be read in row blocks; as ``tensor``."""
        return Rows(shape=self._base.tensors[name].shape, read=lambda start, stop: self._read(name, start, stop))

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Some rows of a matrix that is stored whole. → [len(indices), columns]"""
        return torch.cat([self._read(name, index, index + 1) for index in indices])

    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a tensor: [stop - start, …]."""
        place = self._base.tensors[name]
        if place.made:
            return torch.zeros((stop - start, *place.shape[1:]), dtype=_STORED[place.dtype])
        if place.parts:
            return self.packed(name).rows(start, stop).dense(torch.float32)  # type: ignore[no-any-return]
        return self._stored(replace(place, stored=place.stored or name), start, stop)

    def _stored(self, place: Tensor, start: int, stop: int) -> torch.Tensor:
        path, stored = self._base.folder / place.shard, place.stored
        try:
            file, tensors = self._shard(place.shard)
            found = tensors.get(stored)
            if found is None or found.dtype != place.dtype or found.shape[1:] != place.shape[1:]:
                raise ValueError("the shard is not the one that was looked into")
            value = torch.empty((stop - start, *place.shape[1:]), dtype=_STORED[place.dtype])
            row = value[:1].nbytes
            _fill(value, file, found.start + row * (start + (place.rows or (0, 0))[0]))
        except (OSError, ValueError) as error:
            raise ModelError(f"tensor {stored} cannot be read: {error}", str(path), "fetch it again") from None
        return value

    def _shard(self, shard: str) -> tuple[BinaryIO, dict[str, Tensor]]:
        if shard not in self._open:
            path = self._base.folder / shard
            self._open[shard] = self._stack.enter_context(path.open("rb", buffering=0)), headers.read(path)
        return self._open[shard]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._open.clear()
        self._stack.close()


def _fill(value: torch.Tensor, file: BinaryIO, place: int) -> None:
    """Read a tensor's bytes from a place of a file."""
    into = memoryview(value.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(into):
        count = os.preadv(file.fileno(), [into[done : done + (1 << 30)]], place + done)
        if count == 0:
            raise ValueError("the file ends before it does")
        done += count


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
    base: Base, out: Path, layout: str, change: Change | None, progress: Callable[[int, int], None],
    *, consume: bool = False,
) -> None:  # fmt: skip
    """Write the base's weights into the folder ``out`` in a layout, and the index where there are several shards.

    A shard has its name once it is whole, and one that has it is not written again. ``change`` gets each native
    tensor's name and rows, and gives the row blocks to be written. With ``consume`` each source shard is removed once
    it is written.
    """
    arranged = arrange(base, layout)
    kept = read_json(base.folder / ORIGIN / HEADERS) if layout == "original" else None
    as_stored = kept if isinstance(kept, dict) else {}
    done = 0
    for shard, tensors in arranged.items():
        parts = sum(len(written.parts) for written in tensors.values())
        if (out / shard).is_file():
            done += parts
            progress(done, len(base.tensors))
            continue
        header = as_it_was(as_stored.get(shard, ""), tensors) or headers.header_of(
            {n: w.tensor for n, w in tensors.items()}
        )
        unfinished = out / f"{shard}.part"
        with Reader(base) as source, ShardWriter(unfinished, header) as target:
            for name in target.names:
                target.add(name, _blocks(source, tensors[name], change))
                done += len(tensors[name].parts)
                progress(done, len(base.tensors))
        rename(unfinished, out / shard)
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


def _blocks(source: Reader, written: Written, change: Change | None) -> Iterator[torch.Tensor]:
    """One output tensor in row blocks, in its dtype: its parts one below the other."""
    for part in written.parts:
        rows = source.streamed(part)
        for block in change(part, rows) if change else rows.blocks():
            yield block.to(_STORED[written.tensor.dtype])


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
        self._sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items()}
        self.path, self._due = path, list(self.names)
        self._file = path.open("wb")
        self._flusher, self._since = ThreadPoolExecutor(1), 0
        self._flushing: Future[None] | None = None
        self._write(struct.pack("<Q", len(header)) + header)

    def add(self, name: str, value: torch.Tensor | Iterable[torch.Tensor]) -> None:
        """The tensor that is due, in one or in row blocks."""
        assert self._due[:1] == [name], f"{name} is not the tensor due"
        del self._due[0]
        written = 0
        for block in [value] if isinstance(value, torch.Tensor) else value:
            data = block.detach().cpu().contiguous()
            self._write(memoryview(data.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
            written += data.nbytes
        assert written == self._sizes[name], f"{name} has {written} bytes, {self._sizes[name]} were announced"

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
            self._since += len(data)
            if self._since > _FLUSH and (self._flushing is None or self._flushing.done()):
                self._settle()  # the disk works while the next tensors are made, and has little left to do at the end
                self._since, self._flushing = 0, self._flusher.submit(os.fdatasync, self._file.fileno())
        except OSError as error:
            raise disk_fault(error, self.path) from error

    def _settle(self) -> None:
        if self._flushing is not None:
            self._flushing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.flush()
            self._settle()
            os.fsync(self._file.fileno())
        except OSError as error:
            if kind is None:
                raise disk_fault(error, self.path) from error
        finally:
            self._flusher.shutdown()
            self._file.close()
        assert kind is not None or not self._due, f"{self._due} were not written"
